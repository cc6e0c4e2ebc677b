"""The command as people type it: what it prints, what it writes, and what it answers to mistakes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import saccade
from command_line import Run, place, run  # noqa: F401  (fixtures)
from data_helpers import encode, picture, write_folder
from saccade.checkpoint import open_device
from saccade.cli import spread_values
from saccade.errors import UserError
from saccade.evaluation import report as publish
from saccade.evaluation.evaluator import Evaluator
from saccade.terminal.text_table import Table, print_table
from small_runs import files, shorten

QUICK = ["--no-compiled", "--seconds", "0", "--batch", "2", "--schedules", "0"]


def everything(folder: Path) -> set[tuple[Path, int]]:
    return {(p, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def outside(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


# Starting


def test_help_loads_nothing_heavy():
    found = outside("-m", "saccade", "--help")
    assert found.returncode == 0
    assert all(verb in found.stdout for verb in ("eval", "bench", "tune", "view", "list", "demo"))
    for arguments in (["--help"], ["tune", "-h"], []):
        code = f"import sys, saccade.cli\ntry: saccade.cli.main({arguments})\nfinally: print('|', *sys.modules)"
        found = outside("-c", code)
        assert found.returncode == 0
        assert "Usage: saccade" in found.stdout
        loaded = set(found.stdout.split("|")[-1].split())
        assert "saccade.cli.tune" in loaded
        assert not loaded & {"torch", "timm", "matplotlib", "numpy", "PIL"}


def test_list_as_json_from_outside():
    found = outside("-m", "saccade", "list", "--json")
    assert (found.returncode, found.stderr) == (0, "")
    entries = json.loads(found.stdout)
    assert [e["name"] for e in entries] == saccade.list()
    evit = next(e for e in entries if e["name"] == "evit")
    assert evit["kind"] == "method" and "keep=0.7" in evit["knobs"] and evit["summary"]


def test_a_mistake_from_outside(place):
    found = outside("-m", "saccade", "view", "model", "nothing.png", cwd=place)
    assert (found.returncode, found.stdout) == (2, "")
    assert len(found.stderr.splitlines()) == 1
    assert found.stderr.startswith("saccade: nothing.png: ")


def test_list_as_a_table(run):
    code, out, _ = run("list")
    assert code == 0
    assert all(name in out for name in saccade.list())


# Values


@pytest.mark.parametrize(
    "given, expected",
    [
        ("bench m --batch 1 2", "bench m --batch 1 --batch 2"),
        ("bench --batch 1 8 32 m", "bench --batch 1 --batch 8 --batch 32 m"),
        ("bench m --batch 4 --seconds 2 3", "bench m --batch 4 --seconds 2 3"),
        ("bench m --batch 1 --batch 2 3", "bench m --batch 1 --batch 2 --batch 3"),
        ("bench m --batch=1 8", "bench m --batch=1 --batch 8"),
        ("bench m --batch -1", "bench m --batch -1"),
        ("bench m 7 --batch", "bench m 7 --batch"),
        ("", ""),
    ],
)
def test_values_are_spread(given, expected):
    assert spread_values(given.split()) == expected.split()


@given(st.lists(st.sampled_from(["--batch", "--seconds", "m", "-s", "1", "8", "tome(r=8)"])))
def test_spreading_adds_options_and_nothing_else(arguments):
    once = spread_values(arguments)
    assert spread_values(once) == once
    rest = iter(once)
    assert all(any(a == b for b in rest) for a in arguments)  # still there, in order
    assert len(once) - len(arguments) == once.count("--batch") - arguments.count("--batch")


# The verbs


def test_eval(run):
    arguments = ["eval", "model", "photos", "-s", "evit(0.4, at=0)", "-s", "grid(16, size=32)", "--limit", 21]
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    found = json.loads(out)
    assert [row["setting"] for row in found["rows"]] == ["dense", "evit(0.4, at=0)", "grid(16, size=32)"]
    assert all(row["images"] == 21 for row in found["rows"])
    assert found["not_read"] == {}
    code, table, _ = run(*arguments)
    assert code == 0
    assert "model, 21 images of photos" in table
    for row in found["rows"]:
        assert row["setting"] in table
        assert f"{row['value']['mean']:.2%}" in table


def test_eval_says_which_images_it_could_not_read(run, tmp_path):
    write_folder(tmp_path / "in[/b]", {**files(each=4), "b/bad.png": b"no image"})
    code, out, err = run("eval", "model", tmp_path / "in[/b]", "-s", "evit(0.5)")
    assert code == 0
    assert "12 images of" in out and "in[/b]" in out.replace("\n", "")
    assert "1 image could not be read" in err and "b/bad.png: not a readable image" in err
    code, out, _ = run("eval", "model", tmp_path / "in[/b]", "-s", "evit(0.5)", "--json")
    assert list(json.loads(out)["not_read"]) == ["b/bad.png"]


def test_bench(run):
    code, out, _ = run("bench", "model", "-s", "evit(0.5)", "--batch", 1, 2, "--seconds", 0, "--json")
    assert code == 0
    found = json.loads(out)
    assert [(r["setting"], r["batch"]) for r in found["rows"]] == [
        ("dense", 1), ("evit(0.5)", 1), ("dense", 2), ("evit(0.5)", 2),
    ]  # fmt: skip
    assert found["threads"] == torch.get_num_threads()
    code, out, _ = run("bench", "model", "-s", "evit(0.4..0.8..0.2)", "--batch", 1, "--seconds", 0, "--json")
    assert [r["setting"] for r in json.loads(out)["rows"]] == ["dense", "evit(0.4)", "evit(0.6)", "evit(0.8)"]
    code, out, _ = run("bench", "model", "--batch", 2, "--seconds", 0, "--dtype", "bf16")
    assert code == 0
    assert "dense" in out and "1.00×" in out and "bf16" in out


def test_bench_in_several_runners_beside_the_ideal(run):
    arguments = [
        "bench",
        "model",
        "-s",
        "evit(0.5)",
        "--batch",
        2,
        "--seconds",
        0,
        "--runner",
        "eager",
        "--runner",
        "bf16",
    ]
    code, out, _ = run(*arguments, "--ideal", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [(r["setting"], r["runner"]) for r in rows] == [
        ("dense", "fp32"), ("evit(0.5)", "fp32"), ("dense", "bf16"), ("evit(0.5)", "bf16"),
    ]  # fmt: skip
    assert [r["kept"] is not None for r in rows] == [False, True, False, True]
    assert rows[1]["ideal"].startswith("cut(")


def test_bench_needs_no_weights(run):
    code, out, _ = run("bench", "vit_tiny_patch16_224", "--batch", 1, "--seconds", 0, "--json")
    assert (code, len(json.loads(out)["rows"])) == (0, 1)


def test_tune(run, tmp_path, monkeypatch):
    shorten(monkeypatch)
    arguments = ["tune", "model", "photos", "--gmacs", "0.0015", "--out", tmp_path / "out", *QUICK]
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    found = json.loads(out)
    chosen = next(row for row in found["rows"] if row["chosen"])
    assert found["rows"][0]["setting"] == "dense"
    assert found["met"] is True and chosen["gmacs"] <= 0.0015
    assert found["verdict"] and found["folder"] == str(tmp_path / "out")
    code, table, err = run(*arguments)
    assert code == 0
    assert "→ " in table and "report.html" in table and "To run it: saccade.load(" in table
    assert "settings; 21 images to choose by, 21 to report on" in err
    code, out, _ = run("eval", tmp_path / "out" / "model", "photos", "--json")
    assert code == 0
    assert json.loads(out)["rows"][0]["setting"] == "dense"


def test_demo(run, tmp_path, monkeypatch):
    shorten(monkeypatch)
    monkeypatch.setattr(publish, "tune", partial(without_waiting, publish.tune))
    code, out, err = run("demo", "--model", "model", "--data", "photos", "--out", tmp_path / "out", "--json")
    assert code == 0
    found = json.loads(out)
    assert all(row["value"] is not None for row in found["rows"])
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "out" / "model").is_dir()
    assert "built-in" not in err


def without_waiting(tune, *args, **options):
    return tune(*args, **{**options, "seconds": 0.0, "minutes": None, "schedules": 0})


# Pictures


def look(run: Run, image: Path, *more: str) -> np.ndarray:
    out = image.with_suffix(".out.png")
    code, text, err = run("view", "model", image, "--out", out, "--json", "-s", "evit(0.5)", *more)
    assert (code, err) == (0, "")
    found = json.loads(text)
    with Image.open(out) as drawn:
        assert list(drawn.size) == found["size"]
        assert (drawn.format, drawn.mode) == ("PNG", "RGB")
        pixels = np.asarray(drawn)
    assert found["tokens"][0] <= 16 and found["tokens"] == sorted(found["tokens"], reverse=True)
    return pixels


RGB = picture(70, 50)
GREY, PALETTE, CMYK = RGB.convert("L"), RGB.convert("P", palette=Image.Palette.ADAPTIVE, colors=32), RGB.convert("CMYK")
INDEXED, CLEAR = PALETTE.convert("RGB"), RGB.copy()
CLEAR.putalpha(GREY)
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize(
    "name, data, same",
    [
        ("cmyk.tif", encode(CMYK, "TIFF"), CMYK.convert("RGB")),
        ("deep.png", encode(DEEP), GREY.convert("RGB")),
        ("palette.png", encode(PALETTE), INDEXED),
        ("alpha.png", encode(CLEAR), RGB),
        ("grey.png", encode(GREY), GREY.convert("RGB")),
        ("exif.png", encode(RGB.transpose(Image.Transpose.ROTATE_90), exif=TURNED), RGB),
        ("moving.gif", encode(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(90)]), INDEXED),
        ("dot.png", encode(picture(1, 1)), picture(1, 1)),
        ("wrong_name.jpg", encode(RGB), RGB),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_view_draws_every_kind_of_image_as_its_rgb_twin(run, tmp_path, name, data, same):
    write_folder(tmp_path, {name: data, "twin.png": encode(same)})
    assert np.array_equal(look(run, tmp_path / name), look(run, tmp_path / "twin.png"))


def test_view_takes_pictures_in_memory_too(place):
    model = saccade.load(place / "model")
    expected, counts = saccade.view(model, RGB, "tome(r=2)")
    assert counts == [14, 12, 10]
    for other in (CLEAR, place / "photo.png"):
        drawn, _ = saccade.view(model, other, "tome(r=2)")
        assert np.array_equal(drawn, expected) is (other is CLEAR)
    assert saccade.view(model, GREY)[1] == [16, 16, 16]


def test_view_says_what_it_drew_and_makes_the_folder(run, tmp_path):
    out = tmp_path / "new" / "deep" / "a.png"
    code, text, _ = run("view", "model", "photo.png", "-s", "tome(r=2)", "--out", out)
    assert code == 0
    assert text == f"{out}: 3 blocks, 14 to 10 tokens\n"
    assert [p.name for p in out.parent.iterdir()] == ["a.png"]
    assert Image.open(io.BytesIO(out.read_bytes())).size[0] > 64


# Mistakes

VIT = "vit_tiny_patch16_224"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # which pytest turns on again
@pytest.mark.parametrize(
    "arguments, said",
    [
        # files that are not there, or not what they should be
        ("view model nothing.png", "nothing.png: "),
        ("view model text.png", "text.png: not a readable image"),
        ("view model cut.png", "cut.png: "),
        ("view model photos -s tome(r=1) -s tome(r=2)", "one setting and 2 were given"),
        ("view model bomb.png", "bomb.png: is 10000×10000 = 100,000,000 pixels, limit"),
        ("view model huge.png", "huge.png: over "),
        ("view model narrow.png", "narrow.png: too narrow"),
        ("view model photo.png --out photos", "'photos': it is a folder"),
        ("view model photo.png --out photo.png/x.png", "photo.png' is not a folder"),
        ("eval model nothing", "nothing does not exist"),
        ("eval model empty", "no images in empty"),
        ("eval model one", "1 classes in one, 3 in the model's head"),
        ("eval model two", "2 classes in two, 3 in the model's head"),
        ("eval model photos --split val", "no splits in photos"),
        ("tune model nothing --target 2x", "nothing does not exist"),
        ("tune model few --target 2x", "9 images in few: tune needs 20"),
        ("tune model two --target 2x", "2 classes in two"),
        ("tune model photos --target 2x --out photo.png", "photo.png' is not a folder"),
        ("tune model photos --target 2x --out photo.png/out", "photo.png' is not a folder"),
        ("eval empty photos", "'empty' is not a model folder"),
        ("eval no/model photos", "there is no model folder 'no/model'"),
        # weights
        (f"eval {VIT} photos", "--weights FILE or --pretrained"),
        (f"tune {VIT} photos --target 2x", "--weights FILE or --pretrained"),
        (f"eval {VIT} photos --weights w --pretrained", "one of --weights and --pretrained"),
        ("eval model photos --pretrained", "leave out --weights and --pretrained"),
        (f"eval {VIT} photos --weights nothing.safetensors", "no weights file 'nothing.safetensors'"),
        (f"eval {VIT} photos --weights keys.safetensors", "1 missing (norm.weight); 1 unexpected (surplus)"),
        (f"eval {VIT} photos --weights nan.safetensors", "NaN or infinity in 1 of"),
        (f"eval {VIT} photos --weights weights.pth", "other formats may run code and are refused"),
        # names and numbers
        ("bench vit_tinny_patch16_224", "did you mean 'vit_tiny_patch16_224'"),
        ("bench model -s tomme(r=8)", "did you mean 'tome'"),
        ("bench model -s evit(kep=0.5)", "did you mean 'keep'"),
        ("bench model -s evit(1.5)", "1.5 is not a number in"),
        ("bench model -s evit(0.5", "cannot read the setting 'evit(0.5'"),
        ("bench model -s evit(at=7)", "block 7 is not one of 0 … 2"),
        ("bench model --batch 1 0", "batch sizes [1, 0]"),
        ("bench model --dtype int4", "dtype 'int4' is not one of"),
        ("bench model --runner int4", "'int4' is neither a number type"),
        ("bench model --runner int8", "dtype 'int8' is not one of fp32"),
        ("bench model --runner eager --dtype bf16", "--dtype bf16 beside --runner 'eager'"),
        ("bench model --runner eager --compile", "--compile beside --runner 'eager'"),
        ("bench model --seconds -1", "--seconds"),
        ("bench model --device gpu0", "device 'gpu0' is not usable here"),
        ("bench model --device meta", "device 'meta' is not usable here"),
        ("bench model --threads 0", "--threads"),
        ("eval model photos --batch 0", "--batch"),
        ("eval model photos --limit 0", "--limit"),
        ("tune model photos --quick --minutes 3", "give one of --quick and --minutes"),
        ("tune model photos --minutes 0", "minutes=0"),
        ("tune model photos --minutes nan", "minutes=nan"),
        ("tune model photos --target 2x --ms 3", "2 were given"),
        ("tune model photos --target fast", "target='fast' is not a number"),
        ("tune model photos --max-drop 120%", "max_drop='120%' is not in [0, 1]"),
        ("tune model photos --gmacs nan", "gmacs=nan"),
        ("tune model photos --target 2x --limit 5", "--limit"),
        ("view model photo.png -s tome(r=1) -s tome(r=2)", "one setting and 2 were given"),
        ("demo --model vit_tinny_patch16_224", "did you mean"),
        # the parser's
        ("eval model", "DATA"),
        ("frobnicate", "frobnicate"),
        ("list --jsn", "--jsn"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(run, place, arguments, said):
    before = everything(place)
    verb, *rest = arguments.split()
    code, out, err = run(verb, *rest, *(["--json"] if verb not in ("list", "frobnicate") else []))
    assert code == 2
    assert out == ""
    *notes, line = err.splitlines()  # what was assumed of the images may be said before
    assert line.startswith("saccade: ") and all(note.startswith("the head's classes") for note in notes)
    assert said in line
    assert everything(place) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="'cuda' is not usable here"):
        open_device("cuda")
    assert open_device("auto") == torch.device("cpu")


def test_weights_that_cannot_be_fetched(run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", "/nowhere")

    def refuse(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    code, out, err = run("eval", VIT, "photos", "--pretrained")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "cannot fetch timm's weights" in err and "no network" in err


def test_brackets_are_printed_as_they_are(capsys):
    print_table(Table("photos[/x]", ["a"], [["[bold]b"]], "c[/y]"))
    out = capsys.readouterr().out
    assert "photos[/x]" in out and "[bold]b" in out and "c[/y]" in out


# Interruptions


def test_an_interruption_is_said_in_one_line(run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "predict", stop)
    code, out, err = run("eval", "model", "photos")
    assert (code, out) == (130, "")
    *_, said = err.strip().splitlines()  # after what was assumed of the images
    assert said == "saccade: interrupted; nothing was kept to take up" and "Traceback" not in err


def whole_files(root: Path) -> list[Path]:
    return [p for p in root.rglob("*.safetensors") if ".part" not in p.name]


def test_ctrl_c_leaves_whole_files_and_nothing_else(place, tmp_path):
    slow = [*QUICK, "--seconds", "60"]  # would time for a minute after its first file
    arguments = ["tune", "model", "photos", "--target", "1.2x", "--out", str(tmp_path / "out"), *slow, "--json"]
    command = [sys.executable, "-m", "saccade", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        patience = time.monotonic() + 300
        while not whole_files(tmp_path) and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("saccade: interrupted")
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert left and all(p.suffix == ".safetensors" and ".part" not in p.name for p in left)
