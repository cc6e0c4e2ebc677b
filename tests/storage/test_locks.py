"""A folder has one writer, its own content, and nothing of anybody else's is replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import saccade
from oracles import make_vit
from saccade.cli import main
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.storage.files import check_folder, part_beside, replacing, sweep, write_picture, write_text
from saccade.storage.locks import LOCK, owning
from saccade.storage.run_folder import check_apart, taking
from saccade.storage.signs import EVAL, TRAIN, TUNE

HOLDER = """
import sys, time
from saccade.storage.locks import owning
with owning(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_owner_is_refused_and_told_who_the_first_is(holder, tmp_path):
    with pytest.raises(UserError, match=f"written by process {holder.pid}: wait"), owning(tmp_path / "out"):
        pytest.fail("both own it")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owner_blocks_nobody(how, holder, tmp_path):
    os.kill(holder.pid, how)
    holder.wait()
    with owning(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).read_text() == str(os.getpid())
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_who_waits_gets_it_when_it_is_free(tmp_path):
    code = HOLDER.replace("time.sleep(60)", "time.sleep(0.5)")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with owning(tmp_path / "out", wait=30):
        assert process.wait() == 0


def test_every_verb_with_a_folder_refuses_one_that_is_written(holder, tmp_path):
    model, out = AdaptiveViT(make_vit()), tmp_path / "out"
    pictures(tmp_path / "data")
    calls = {
        "tune": lambda: saccade.tune(model, str(tmp_path / "data"), "2x", out=out),
        "eval": lambda: saccade.eval(model, str(tmp_path / "data"), ["dense"], out=out),
        "analyze": lambda: saccade.analyze(model, str(tmp_path / "data"), out=out),
        "train": lambda: saccade.train({"data": {"path": str(tmp_path / "data")}}, out=out),
    }
    for verb, call in calls.items():
        with pytest.raises(UserError, match=f"written by process {holder.pid}"):
            call()
            pytest.fail(verb)


def pictures(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64), (90 * i, 100, 50)).save(folder / name / f"{i}.png")
    return folder


# --- what is somebody else's ----------------------------------------------------------------------------------------

FOREIGN = {
    "a model of transformers": {"config.json": '{"model_type": "vit"}', "model.safetensors": "theirs"},
    "weights alone": {"model.safetensors": "theirs"},
    "another config": {"config.json": "[1, 2]"},
    "no json": {"config.json": "model = 3"},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_model_folder_is_not_replaced(kind, tmp_path):
    model, folder = AdaptiveViT(make_vit()), tmp_path / "theirs"
    folder.mkdir()
    for name, text in FOREIGN[kind].items():
        (folder / name).write_text(text)
    for write in (lambda: model.save(folder), lambda: saccade.convert(model, 8, folder)):
        with pytest.raises(UserError, match="not a Saccade model's: remove them, or give another folder"):
            write()
    assert {file.name: file.read_text() for file in folder.iterdir()} == FOREIGN[kind]


@pytest.mark.parametrize(
    ("writes", "name", "text"),
    [
        (TRAIN, "config.json", '{"model_type": "vit"}'),
        (TRAIN, "config.json", '{"architecture": "vit", "saccade": {"trained": {"config": {"optim": 1}}}}'),
        (TRAIN, "metrics.csv", "date,price\n1,2\n"),
        (TUNE, "report.html", "<html>our quarterly report; written with saccade</html>"),
        (EVAL, "scores.json", '{"player": 3}'),
        (EVAL, "scores.csv", "name;points\n"),
    ],
)
def test_a_foreign_file_is_not_replaced(writes, name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"holds a {name} that is of something else"), taking(tmp_path, writes):
        pytest.fail("it was taken")
    assert (tmp_path / name).read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_a_picture_replaces_our_own_and_nothing_else(tmp_path):
    picture = Image.new("RGB", (8, 8))
    write_picture(tmp_path / "a.png", picture)
    write_picture(tmp_path / "a.png", picture)
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("photo.png", "notes.txt"):
        with pytest.raises(UserError, match="was not written by saccade"):
            write_picture(tmp_path / name, picture)
    assert Image.open(tmp_path / "photo.png").size == (9, 9) and (tmp_path / "notes.txt").read_text() == "mine"


def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(UserError, match="a device, a pipe or the like"):
            write_text(path, "x")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_what_is_read_is_not_written_to(tmp_path):
    data = pictures(tmp_path / "data")
    AdaptiveViT(make_vit()).save(tmp_path / "run" / "model")
    (tmp_path / "again").symlink_to(data)
    for out, read in {
        data: data,
        tmp_path / "again": data,
        data / "cat" / "out": data,
        tmp_path / "run": tmp_path / "run" / "model",
        tmp_path / "run" / "model": tmp_path / "run" / "model",
        data / "cat" / "0.png": data / "cat" / "0.png",
    }.items():
        with pytest.raises(UserError, match="read"):
            check_apart(out, [str(read)])
    check_apart(tmp_path, [str(data), "vit_tiny_patch16_224", None, 5])


def test_commands_leave_their_inputs_alone(tmp_path, capsys):
    data, model = pictures(tmp_path / "data"), tmp_path / "m"
    AdaptiveViT(make_vit(num_classes=2)).save(model)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    photo = str(data / "cat" / "0.png")
    for command in (
        ["view", str(model), photo, "-s", "tome(r=2)", "--out", photo],
        ["view", str(model), photo, "-s", "tome(r=2)", "--out", str(data / "dog" / "1.png")],
        ["convert", str(model), "--patch", "8", "--out", str(model)],
        ["train", "finetune", f"model.name={model}", f"data.path={data}", "--out", str(model)],
        ["train", "finetune", f"model.name={model}", f"data.path={data}", "--out", str(data / "run")],
        ["eval", str(model), str(data), "-s", "dense", "--out", str(data)],
        ["tune", str(model), str(data), "--target", "2x", "--out", str(model)],
        ["stem", str(model), str(data), "--out", str(model)],
        ["analyze", str(model), str(data), "--out", str(data / "cat")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and said[-1].startswith("saccade: "), (command, said)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("layout", ["{}", "cat/{}", "val/cat/{}"])
def test_no_verb_writes_into_a_folder_of_photos(layout, tmp_path, capsys):
    data, model, photos = pictures(tmp_path / "data"), tmp_path / "m", tmp_path / "photos"
    AdaptiveViT(make_vit(num_classes=2)).save(model)
    photo = photos / layout.format("mine.jpg")
    photo.parent.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(photo)
    before = {p: p.read_bytes() for p in photos.rglob("*") if p.is_file()}
    for command in (
        ["convert", str(model), "--patch", "8"],
        ["stem", str(model), str(data)],
        ["calibrate", str(model), str(data), "-s", "dynamicvit(0.7)", "--gmacs", "0.1"],
        ["train", "finetune", f"model.name={model}", f"data.path={data}"],
        ["tune", str(model), str(data), "--target", "2x"],
        ["eval", str(model), str(data), "-s", "dense"],
        ["analyze", str(model), str(data)],
        ["predict", str(model), str(data)],
        ["demo"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--out", str(photos)])
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and "is a folder of images" in said[-1], (command, said)
    with pytest.raises(UserError, match="is a folder of images"):
        saccade.load(model).save(photos)
    assert {p: p.read_bytes() for p in photos.rglob("*") if p.is_file()} == before


# --- what killed processes left -------------------------------------------------------------------------------------


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_dead_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    mine = part_beside(tmp_path / "x.json")
    theirs = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{dead()}."))
    old, fresh = tmp_path / ".x.0123abcd.part.json", tmp_path / ".0123456789ab.part"
    for path in (mine, theirs, old, tmp_path / "x.part", tmp_path / ".keep"):
        path.write_text("half")
    fresh.mkdir()
    day = time.time() - 2 * 24 * 3600
    os.utime(old, (day, day))
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine.name, fresh.name, "x.part", ".keep"])
    sweep(tmp_path, owned=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".keep", "x.part"]


def test_writing_a_file_sweeps_what_was_left_of_it(tmp_path):
    part = part_beside(tmp_path / "x.json")
    part.with_name(part.name.replace(f".{os.getpid()}.", f".{dead()}.")).write_text("half")
    write_text(tmp_path / "x.json", "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


# --- what the system refuses ----------------------------------------------------------------------------------------


def test_names_that_no_system_takes(tmp_path):
    for name in ("x" * 300, "é" * 150, "a\0b", "/".join(["deep"] * 1000)):
        for check in (check_folder, lambda path: write_text(path, "x"), AdaptiveViT(make_vit()).save):
            with pytest.raises(UserError) as refused:
                check(f"{tmp_path}/{name}")
            assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    write_text(tmp_path / ("y" * 255), "fits")
    AdaptiveViT(make_vit()).save(tmp_path / ("z" * 255))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EDQUOT", "EACCES", "EIO"])
def test_a_failure_of_the_system_is_one_line_and_leaves_what_was_there(number, tmp_path, monkeypatch):
    import errno

    model = AdaptiveViT(make_vit())
    model.save(tmp_path / "m")
    write_text(tmp_path / "a.txt", "old")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code = getattr(errno, number)

    def full(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    for work in (
        lambda: model.save(tmp_path / "m"),
        lambda: model.save(tmp_path / "new"),
        lambda: write_text(tmp_path / "a.txt", "new"),
        lambda: write_text(tmp_path / "b.txt", "new"),
        lambda: saccade.convert(model, 8, tmp_path / "c"),
    ):
        with pytest.raises(UserError, match="cannot") as refused:
            work()
        assert "\n" not in str(refused.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_error_within_is_not_taken_for_the_systems(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "x"):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_what_escapes_is_one_line_in_a_terminal(tmp_path, capsys, monkeypatch):
    import saccade.cli.list as listing

    def broken(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    assert listing
    monkeypatch.setattr("saccade.cli.app", broken)
    with pytest.raises(SystemExit) as ended:
        main(["list"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"saccade: '{tmp_path}': there is no permission: give another place\n"


def test_config_of_a_run_is_recognised(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"optim": {}, "sampling": {}}))
    (tmp_path / "metrics.csv").write_text("")
    with taking(tmp_path, TRAIN):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()
