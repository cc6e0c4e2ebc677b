"""What a wheel holds beside Python files, and the check that `make dist` runs on built archives."""

from __future__ import annotations

import tarfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

import check_dist

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_file_of_the_package_is_in_the_wheel():
    """Of package data setuptools takes what a pattern names, and says nothing of the rest."""
    source, taken = ROOT / "src", set()
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = source / package.replace(".", "/")
        for pattern in patterns:
            found = [path.relative_to(source).as_posix() for path in folder.glob(pattern) if path.is_file()]
            assert found, f"{package}: no file is named {pattern}"
            taken |= {*found}
    data = {name for name in check_dist.package() if not name.endswith(".py")}
    assert "saccade/py.typed" in data and data - taken == set()


def test_every_folder_of_the_package_is_a_package():
    folders = {(ROOT / "src" / name).parent for name in check_dist.package() if name.endswith(".py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.fixture
def archives(tmp_path) -> dict[str, Path]:
    """A wheel and a source archive that are as they should be."""
    wheel, source = tmp_path / "saccade-1-py3-none-any.whl", tmp_path / "saccade-1.tar.gz"
    with ZipFile(wheel, "w") as file:
        for name in [*check_dist.package(), "saccade-1.dist-info/RECORD"]:
            file.writestr(name, "")
    empty = tmp_path / "empty"
    empty.touch()
    names = {f"src/{name}" for name in check_dist.package()} | check_dist.BESIDE | {"src/saccade.egg-info/SOURCES.txt"}
    with tarfile.open(source, "w:gz") as file:
        for name in names:
            file.add(empty, f"saccade-1/{name}")
    return {"wheel": wheel, "source": source}


@pytest.mark.parametrize("kind", ["wheel", "source"])
def test_an_archive_that_is_complete_passes(archives, kind):
    assert check_dist.check(archives[kind]) == []


def test_what_is_missing_and_what_is_too_much_is_named():
    wanted = {"saccade/__init__.py", "saccade/py.typed"}
    held = {"saccade/__init__.py", "tests/test_setting.py", "saccade-1.dist-info/METADATA"}
    expected = ["saccade/py.typed is missing", "tests/test_setting.py has no place in it"]
    assert check_dist.compared(held, wanted, wheel=True) == expected
    assert "src/saccade/py.typed is missing" in check_dist.compared({"LICENSE"}, wanted, wheel=False)


def test_the_check_fails_on_a_bad_archive(archives, capsys):
    with ZipFile(archives["wheel"], "a") as file:
        file.writestr("runs/demo/model.safetensors", "")
    with pytest.raises(SystemExit) as end:
        check_dist.main([str(path) for path in archives.values()])
    assert end.value.code == 1 and "runs/demo/model.safetensors has no place in it" in capsys.readouterr().out


def test_an_interpreter_that_is_named_is_supported():
    """The classifiers and the lowest Python agree, and CI runs the lowest and the newest of them."""
    named = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert named[0] == PROJECT["project"]["requires-python"].removeprefix(">=")
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert all(f'"{version}"' in workflow for version in named)
