"""Methods from elsewhere: a file by ``--plugin`` or in Python, an installed package, and what folders say of them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import saccade
from oracles import make_images, make_vit
from saccade.cli import main
from saccade.core import plugins, registry
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.testing import check_method

PAGE = Path(__file__).parents[1] / "docs" / "add-a-method.md"
METHOD = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """The method of the page, in a folder of its own; what it registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry.registry()))
    monkeypatch.setattr(plugins, "_LOADED", {})
    file = tmp_path / "far" / "my_methods.py"
    file.parent.mkdir()
    file.write_text(METHOD, encoding="utf-8")
    yield file
    sys.modules.pop("saccade_plugin_my_methods", None)


def told(arguments: list[str], capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out + captured.err


def test_every_verb_takes_a_plugin(elsewhere, tmp_path, capsys):
    code, said = told(["list", "from_mean", "--plugin", str(elsewhere)], capsys)
    assert code == 0 and "nearest to the mean" in said
    model = AdaptiveViT(make_vit("vit"), "from_mean(0.5)").eval()
    model.vit.pretrained_cfg = {"architecture": "vit_tiny_patch16_224"}
    code, said = told([f"--plugin={elsewhere}", "list"], capsys)
    assert code == 0 and "from_mean" in said
    code, said = told(["bench", "vit_tiny_patch16_224", "-s", "from_mean(0.5)", "--plugin", str(elsewhere),
                       "--batch", "1", "--seconds", "0"], capsys)  # fmt: skip
    assert code == 0 and "from_mean(0.5)" in said
    code, said = told(["bench", "vit_tiny_patch16_224", "--plugin"], capsys)
    assert code == 2 and "is no Python file that is there" in said


def test_a_folder_names_its_plugin_and_never_loads_it(elsewhere, tmp_path, monkeypatch):
    saccade.load_plugin(elsewhere)
    saccade.load_plugin(str(elsewhere))  # once
    assert registry.registry()["from_mean"].origin == "my_methods.py" and registry.registry()["tome"].origin == ""
    model = saccade.create_model("vit_tiny_patch16_224", "tome(r=1) | from_mean(0.5)", depth=2, img_size=64)
    model.save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["saccade"]["plugins"] == {"from_mean": "my_methods.py"}
    images = make_images(model.vit, 2)
    with torch.no_grad():
        assert torch.equal(saccade.load(tmp_path / "model")(images).logits, model(images).logits)
    monkeypatch.delitem(registry._REGISTRY, "from_mean")
    with pytest.raises(UserError, match=r"names 'from_mean', which 'my_methods.py' brings: load that before"):
        saccade.load(tmp_path / "model")
    assert saccade.load(tmp_path / "model", "tome(r=1)").setting == saccade.Setting.parse("tome(r=1)")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (METHOD.replace('"from_mean"', '"tome"'), "my_methods.py registers 'tome', which saccade has: rename it"),
        ("def broken(:\n", "my_methods.py does not run .SyntaxError"),
        ("import nothing_of_this_name", "my_methods.py does not run .ModuleNotFoundError"),
        ("raise SystemError('first\\nsecond')", "SystemError: first"),
    ],
)
def test_a_plugin_that_does_not_work(elsewhere, text, match):
    elsewhere.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=match) as refused:
        saccade.load_plugin(elsewhere)
    assert "\n" not in str(refused.value) and registry.registry()["tome"].origin == ""


def test_installed_packages_bring_theirs(elsewhere, monkeypatch):
    def point(name: str, load) -> SimpleNamespace:
        return SimpleNamespace(value=name, dist=SimpleNamespace(name=name), load=load)

    def broken() -> None:
        raise ImportError("needs something else")

    given = [point("their-methods", lambda: exec(METHOD, {"__name__": "theirs"})), point("broken-methods", broken)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: given if group == "saccade.methods" else [])
    with pytest.warns(UserWarning, match=r"broken-methods is left out \(ImportError: needs something else\)"):
        plugins.load_installed()
    assert registry.registry()["from_mean"].origin == "their-methods"


@pytest.mark.parametrize("setting", ["tome(r=4)", "evit(0.5, fuse=True)", "ats(0.5)", "adavit()", "quadtree(31)"])
def test_methods_of_the_package_pass_the_checks(setting):
    check_method(setting)


def test_the_page_s_method_passes_the_checks(elsewhere):
    saccade.load_plugin(elsewhere)
    check_method("from_mean(0.5)")


@pytest.mark.parametrize(
    ("right", "wrong", "match"),
    [
        ("self.count(tokens.num_patches)]", "self.count(tokens.num_patches) - 1]", "counts are as announced"),
        ("return n * self.width", "return 100 * n * self.width", "macs are those of the operators"),
        ("mean = x.mean(1, keepdim=True)", "mean = x.mean((0, 1), keepdim=True)", "a batch equals its images"),
        ("distance: Tensor = (x - mean)", "distance: Tensor = (x - mean + torch.rand(()))", "a batch|a run repeats"),
        ("share of patch tokens kept", "", "not in its docstring"),
    ],
)
def test_the_checks_find_what_is_wrong(elsewhere, right, wrong, match):
    assert right in METHOD
    text = METHOD.replace(right, wrong) if wrong else METHOD.replace("        keep: share", "        hold: share")
    elsewhere.write_text("import torch\n" + text.split('"""\n', 1)[1], encoding="utf-8")
    saccade.load_plugin(elsewhere)
    with pytest.raises(AssertionError, match=match):
        check_method("from_mean(0.5)")
