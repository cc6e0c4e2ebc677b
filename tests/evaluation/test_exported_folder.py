"""An exported folder runs without Saccade, agrees with the original, and is opened by Saccade with care."""

from __future__ import annotations

import errno
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import saccade
from saccade.data import Preprocess
from saccade.errors import UserError
from saccade.evaluation import parity
from saccade.runners import artefact
from saccade.runners.artefact import KEY, open_artefact
from saccade.storage.files import part_beside


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return saccade.create_model("vit_tiny_patch16_224", "evit(0.5)", img_size=64, depth=2, num_classes=5)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    saccade.export(model, out, runner="torch", provenance=True)
    return out


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> str:
    noise = np.random.default_rng(0).integers(0, 256, (90, 121, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photo") / "a.png"
    Image.fromarray(noise).resize((363, 270)).save(path)
    return str(path)


def changed(source: Path, target: Path, **facts) -> Path:
    """A copy of a folder with other facts in its config; ``None`` takes one away."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config[KEY] = {k: v for k, v in (config[KEY] | facts).items() if v is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_what_a_folder_says(model, exported):
    config = json.loads((exported / "config.json").read_text())[KEY]
    assert config["setting"] == "evit(0.5)" and config["tokens"] == "fixed" and config["outputs"][0] == "logits"
    with torch.no_grad():
        assert config["gmacs"] == pytest.approx(model(torch.zeros(1, 3, 64, 64)).trace.macs().item() / 1e9)
    assert config["parity"]["agreement"] == 1.0 and config["parity"]["met"] and config["parity"]["images"] == 64
    assert "| evit(0.5) | fp32 torch | 100.00% |" in (exported / "parity.md").read_text()


def test_it_answers_as_the_original(model, exported, photo):
    opened = open_artefact(exported, trusted=True)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        out, expected = opened(images), model(images)
    assert torch.allclose(out.logits, expected.logits, atol=1e-5)
    assert torch.equal(out.owner, expected.trace.blocks[-1].owner.int())
    (a,), (b,) = saccade.Predictor(opened)(photo), saccade.Predictor(model)(photo)
    assert a.labels == b.labels and a.probabilities == pytest.approx(b.probabilities, abs=1e-5)
    with pytest.raises(UserError, match="is exported and gives logits alone"):
        _ = a.embedding


def test_it_runs_without_saccade(exported, photo, model):
    code = "import sys, runpy; sys.modules['saccade'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    line = [sys.executable, "-c", code, str(exported / "predict.py"), photo]
    found = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split("\t")
    (expected,) = saccade.Predictor(model)(photo)
    assert found[0] == photo and found[1] == f"{expected.label} {expected.probability:.3f}"


def test_the_script_says_how_it_is_called_and_names_photos_that_it_cannot_read(exported, photo, tmp_path, capsys):
    main = runpy.run_path(str(exported / "predict.py"))["main"]
    assert main([]) == main(["--help"]) == 2 and "python predict.py PHOTO" in capsys.readouterr().err
    (tmp_path / "text.jpg").write_text("no photo")
    assert main([str(tmp_path / "nothing.jpg"), str(tmp_path / "text.jpg"), photo]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(photo) and printed.out.count("\n") == 1
    assert [Path(line.split(": ")[0]).name for line in printed.err.splitlines()] == ["nothing.jpg", "text.jpg"]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(64, 64), (48, 64)])
def test_the_script_prepares_photos_as_saccade_does(exported, photo, tmp_path, mode, size):
    prepare = Preprocess(size, "bicubic", 0.9, mode, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    folder = changed(exported, tmp_path / "m", preprocessing=prepare.to_dict())
    pixels = runpy.run_path(str(folder / "predict.py"))["pixels"]
    for width, height in ((363, 270), (270, 363), (64, 64), (63, 211)):
        image = Image.open(photo).resize((width, height))
        image.save(tmp_path / "b.png")
        found = pixels(str(tmp_path / "b.png"))[0]
        assert found.shape == (3, *size)
        far = torch.from_numpy(found) - prepare(image)
        assert far.abs().max() <= 1 / 255 / 0.224 + 1e-6


@pytest.mark.parametrize("engine", ["onnx", *(pytest.param(e, marks=pytest.mark.slow) for e in ("torch", "openvino"))])
def test_photos_of_any_size_go_in_as_they_are(model, tmp_path, photo, engine):
    if engine != "torch":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        pytest.importorskip({"onnx": "onnxruntime"}.get(engine, engine), reason=f"{engine} is not installed")
    saccade.export(model, tmp_path / "m", runner=engine, pixels=True, least=0.9)
    opened, prepare = open_artefact(tmp_path / "m", trusted=True), Preprocess.of(model.vit, model.input_size())
    for size in ((363, 270), (90, 121)):
        image = Image.open(photo).convert("RGB").resize(size)
        found = opened(torch.from_numpy(np.array(image)).unsqueeze(0)).logits
        with torch.no_grad():
            expected = model(prepare(image).unsqueeze(0)).logits
        assert torch.allclose(found, expected, atol=2e-2 * expected.abs().max().item())
    with pytest.raises(UserError, match=r"takes uint8 \[B, H, W, 3\]"):
        opened(torch.zeros(1, 3, 64, 64))
    answer = runpy.run_path(str(tmp_path / "m" / "predict.py"))["answer"](photo)
    assert answer[0].split(" ")[0] == saccade.Predictor(model)(photo)[0].label
    with pytest.raises(UserError, match="takes photos as they are"):
        saccade.Predictor(opened)


def test_a_fixed_batch_takes_any_number_of_photos(model, tmp_path, photo):
    saccade.export(model, tmp_path / "m", runner="torch", batch=2)
    opened = open_artefact(tmp_path / "m", trusted=True)
    with pytest.raises(UserError, match=r"takes float \[2, 3, 64, 64\]"):
        opened(torch.zeros(1, 3, 64, 64))
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(opened.logits(images), model(images).logits, atol=1e-5)
    assert len(saccade.Predictor(opened)([photo, photo, photo])) == 3


def test_too_little_agreement_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "compared", lambda a, b: {"agreement": 0.9, "cosine": 1.0, "largest": 0.1})
    with pytest.raises(UserError, match=r"agreement 90.00% with the original on 64 images is under 99.5%"):
        saccade.export(model, tmp_path / "m", runner="torch")
    assert list(tmp_path.iterdir()) == []
    saccade.export(model, tmp_path / "m", runner="torch", least=0.9)
    assert json.loads((tmp_path / "m" / "config.json").read_text())[KEY]["parity"]["least"] == 0.9


def test_several_settings_have_a_folder_each(model, tmp_path):
    made = saccade.export(model, tmp_path, runner="torch", settings=["dense", "evit(0.5)"])
    assert [row.folder.name for row in made.rows] == ["dense", "evit-0.5"]
    assert all((row.folder / "predict.py").is_file() for row in made.rows) and (tmp_path / "parity.md").is_file()


def test_files_that_hold_code_are_not_opened_unasked(exported):
    with pytest.raises(UserError, match=r"holds code \(torch\): if it is your own"):
        saccade.load(exported)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"format": 2}, "format"),
        ({"runner": {"engine": "tensorrt"}}, "engine 'tensorrt' is not one of"),
        ({"runner": {"engine": "torch", "dtype": "int4"}}, "runner.dtype"),
        ({"files": {"../model.pt2": "0" * 64}}, "files"),
        ({"files": {"model.pt2": "0" * 64}}, "is not the file that config.json was written with"),
        ({"preprocessing": {"size": [0, 64]}}, "preprocessing.size"),
        ({"outputs": ["owner"]}, "its config.json says"),
        ({"setting": None}, "setting"),
        ({"more": 1}, "more"),
    ],
)
def test_a_config_that_says_anything_else_is_refused(exported, tmp_path, facts, said):
    with pytest.raises(UserError) as caught:
        open_artefact(changed(exported, tmp_path / "m", **facts), trusted=True)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_weights_in_other_files_are_refused(exported, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder = changed(exported, tmp_path / "m", runner={"engine": "onnx", "dtype": "fp32"})
    (folder / "model.onnx").write_bytes(b"\x0a\x08location\x12\x0b/etc/passwd")
    config = json.loads((folder / "config.json").read_text())
    config[KEY]["files"] = {"model.onnx": artefact.digest(folder / "model.onnx")}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="keeps weights in another file"):
        saccade.load(folder)


def test_what_is_there_is_not_replaced_unless_it_is_an_export(model, exported, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is there and is not an exported model"):
        saccade.export(model, tmp_path, runner="torch")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    beside = changed(exported, tmp_path / "n")
    (beside / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds .notes\.txt. beside an exported model"):
        saccade.export(model, beside, runner="torch")
    assert (beside / "notes.txt").read_text() == "mine"


def test_the_old_artefact_stays_where_the_new_one_cannot_take_its_place(exported, tmp_path, monkeypatch):
    place, replace = changed(exported, tmp_path / "out"), os.replace
    before = {file.name: file.read_bytes() for file in place.iterdir()}

    def full(old, new):
        if Path(new) == place and Path(old).is_dir() and (Path(old) / "new").exists():
            raise OSError(errno.ENOSPC, "no space left")
        replace(old, new)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="the disk is full"), artefact.folder_made(place) as part:
        (part / "new").write_text("whole")
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before
    assert [found.name for found in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_goes_with_the_next(exported, tmp_path):
    place = changed(exported, tmp_path / "out")
    host, _, rest = part_beside(place).name.removeprefix(".out.").split(".", 2)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = tmp_path / f".out.{host}.{dead.stdout.strip()}.{rest}"
    left.mkdir()
    with artefact.folder_made(place) as part:
        (part / "new").write_text("whole")
    assert [found.name for found in tmp_path.iterdir()] == ["out"] and (place / "new").exists()


def test_an_encoder_is_exported_too(tmp_path, photo):
    encoder = saccade.create_model("vit_tiny_patch16_224", "evit(0.5)", img_size=64, depth=2, num_classes=0)
    (row,) = saccade.export(encoder, tmp_path / "m", runner="torch").rows
    opened = open_artefact(tmp_path / "m", trusted=True)
    assert row.agreement is None and row.cosine > 0.999 and opened.config.outputs == ["embedding"]
    assert saccade.Predictor(opened)(photo)[0].embedding.shape == (192,)


def test_a_model_of_half_precision_is_exported_as_fp32(model, exported, tmp_path):
    model.save(tmp_path / "model")
    half = saccade.load(tmp_path / "model").half()
    saccade.export(half, tmp_path / "half", runner="torch")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    folders = (tmp_path / "half", exported)
    rounded, whole = (torch.as_tensor(open_artefact(folder, trusted=True)(images).logits) for folder in folders)
    assert rounded.dtype == torch.float32 and torch.allclose(rounded, whole, atol=1e-2)  # weights were rounded once


def test_what_cannot_be_exported_is_said_first(model, tmp_path):
    with pytest.raises(UserError, match="runner bf16 is not exported"):
        saccade.export(model, tmp_path / "m", runner="bf16")
    with pytest.raises(UserError, match="has a tokenizer of its own"):
        saccade.export(model, tmp_path / "m", runner="torch", settings=["grid(16)"], size=32)
    with pytest.raises(UserError, match="is exported, and runs one setting"):
        saccade.bench(str(saccade.export(model, tmp_path / "n", runner="torch").rows[0].folder))
    assert not (tmp_path / "m").exists()
