"""Files that are there whole or not at all; progress that goes to standard error; names that load late."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import saccade
from saccade.errors import UserError, nearest
from saccade.storage.files import check_folder, replacing, write_json, write_text
from saccade.terminal.progress import Progress


def test_text_and_json_are_written_with_their_folders(tmp_path):
    write_text(tmp_path / "a" / "b" / "c.txt", "é\n")
    write_json(tmp_path / "a" / "d.json", {"x": [1, 2.5, None]})
    assert (tmp_path / "a/b/c.txt").read_bytes() == "é\n".encode()
    assert json.loads((tmp_path / "a/d.json").read_text()) == {"x": [1, 2.5, None]}
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b", "d.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    file = tmp_path / "report.html"
    write_text(file, "old")
    with pytest.raises(error), replacing(file) as part:
        part.write_text("half")
        raise error
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_old_file_is_read_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "a.png"
    write_text(file, "old")
    with replacing(file) as part:
        part.write_text("new")
        assert part.parent == tmp_path  # the same file system, or the move would not be atomic
        assert part.suffix == ".png"
        assert file.read_text() == "old"
    assert file.read_text() == "new"


def test_places_that_cannot_be_written_are_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file" / "x.txt", tmp_path / "file" / "deep" / "x.txt"):
        with pytest.raises(UserError, match="is not a folder"):
            write_text(place, "new")
    with pytest.raises(UserError, match="it is a folder"):
        write_text(tmp_path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_leave_to_write_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="read-only"):
        write_text(tmp_path / "x.txt", "new")


def test_checking_a_folder_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_folder(tmp_path / "a" / "b")
    check_folder("c")
    assert not list(tmp_path.iterdir())
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="broken"):
        check_folder(tmp_path / "broken" / "x")


def test_near_misses_are_suggested_and_others_listed():
    assert nearest("tomme", ["evit", "tome"]) == " (did you mean 'tome'?)"
    assert nearest("zzz", ["tome", "evit"]) == " (known: evit, tome)"


@pytest.mark.parametrize("shown", [False, True])
def test_progress_keeps_standard_output_clean(capsys, shown):
    with Progress(shown) as progress:
        bar = progress.start("timing [bold]evit[/nothing]", 3)  # brackets are text, whatever they hold
        bar(2, what="timing grid(4, [/x])")
        progress.say("said [/y]")
        bar.finish()
    found = capsys.readouterr()
    assert found.out == ""
    assert ("said [/y]" in found.err) is shown


def test_progress_ends_with_its_block(capsys):
    with pytest.raises(ValueError), Progress(shown=True) as progress:
        progress.start("a", 1)
        raise ValueError
    with Progress(shown=True) as again:  # two at a time would be refused
        again.start("b", 1)


def modules_after(code: str) -> set[str]:
    run = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    return set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_library_loads_nothing_heavy():
    loaded = modules_after("import saccade; saccade.UserError; saccade.__version__")
    assert "saccade.errors" in loaded
    assert not loaded & {"torch", "timm", "matplotlib", "typer", "rich", "numpy", "PIL"}


def test_every_public_name_is_there_and_its_own():
    for name in saccade.__all__:
        assert getattr(saccade, name) is not None
    verbs = [getattr(saccade, name) for name in ("eval", "bench", "tune", "view", "list", "create_model", "load")]
    assert all(callable(verb) for verb in verbs)
    assert {v.__name__ for v in verbs} >= {"evaluate", "bench", "tune", "view", "create_model", "load"}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = saccade.nonsense
