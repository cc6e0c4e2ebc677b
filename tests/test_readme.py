"""What the README says can be run is run, as it stands: every ``saccade`` command and every Python block, in order.

Small versions stand in for models and data: timm's names give narrow, shallow ViTs of 64 pixels with random weights,
also where ``--pretrained`` would fetch them (no test reaches for the network); pictures are drawn; timing takes its
least number of runs, and training two steps. The slow test runs commands with real weights and photos instead.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import saccade
from data_helpers import encode, picture, write_folder
from saccade.cli import main
from saccade.evaluation import report as publish
from saccade.evaluation import speed, sweep
from saccade.training import config
from small_runs import shorten

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3}
SYNSETS = ("n01440764", "n02102040", "n03394916")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("saccade ")]


def run(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code, f"saccade {shlex.join(arguments)}"


def test_there_is_something_to_run():
    verbs = {command[0] for command in commands()}
    assert {"tune", "eval", "bench", "view", "train", "stem", "convert", "analyze", "predict"} <= verbs
    assert len(blocks("python")) >= 2


@pytest.fixture
def small(monkeypatch, tmp_path) -> Path:
    """A folder with all that the README names, and models as small as pictures."""
    whole = timm.create_model

    def create(name: str, pretrained: bool = False, **given: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        return whole(name, pretrained=False, **{**SMALL, **given})

    monkeypatch.setattr(timm, "create_model", create)
    shorten(monkeypatch)
    monkeypatch.setattr(sweep, "SECONDS", 0.0)
    monkeypatch.setattr(speed, "bench", quickly(speed.bench))
    monkeypatch.setattr(publish, "tune", quickly(publish.tune))
    read = config.read_config

    def two_steps(source: Any, changes: Any = ()) -> config.Config:
        found = read(source, changes)
        return found.model_copy(update={"run": found.run.model_copy(update={"steps": 2, "batch": 12})})

    monkeypatch.setattr(config, "read_config", two_steps)
    monkeypatch.chdir(tmp_path)
    photos = {
        f"{name}/{i}.png": encode(picture(70, 64, 20 * k + i)) for k, name in enumerate(SYNSETS) for i in range(14)
    }
    write_folder(tmp_path / "photos", photos)
    (tmp_path / "photo.jpg").write_bytes(encode(picture(90, 70), "JPEG"))
    with ZipFile("photos.zip", "w") as file:
        for name, data in photos.items():
            file.writestr(name, data)
    rng = np.random.default_rng(0)
    with ZipFile("camvid.zip", "w") as file:
        for split, i in [(split, i) for split in ("train", "val") for i in range(12)]:
            labels = Image.fromarray(rng.integers(0, 11, (64, 64), dtype=np.uint8))
            file.writestr(f"{split}/images/{i}.png", encode(picture(64, 64, i)))
            file.writestr(f"{split}/labels/{i}.png", encode(labels))
    weights = create("vit_tiny_patch16_224").state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, "w.safetensors")
    return tmp_path


def quickly(verb: Callable) -> Callable:
    """A verb with no more timing than it needs, and nothing compiled."""
    least = {"seconds": 0.0, "compiled": False}

    def call(*given: Any, **options: Any) -> Any:
        return verb(*given, **{name: least.get(name, value) for name, value in options.items()})

    return call


def test_every_command_runs_as_it_stands(small, capsys):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime, for which one of them exports, is not installed")
    for command in commands():
        run(command)
    assert capsys.readouterr().out


def test_every_python_block_runs_as_it_stands(small):
    known: dict[str, Any] = {"images": torch.randn(2, 3, 64, 64)}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), known)
    assert known["fast"](known["images"]).logits.shape == (2, 1000)
    assert isinstance(known["predictor"], saccade.Predictor)


@pytest.mark.slow
def test_commands_with_real_weights_and_photos(data_dir, tmp_path, monkeypatch):
    """Those that take minutes at most: not training, nor names whose weights are not in the data folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").symlink_to(data_dir / "vit_tiny_patch16_224.safetensors")
    with ZipFile(data_dir / "inval227_dev.zip") as file:
        file.extractall(tmp_path / "all")
    photos = sorted(p for p in (tmp_path / "all").rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    for photo in photos[::5]:
        place = tmp_path / "photos" / photo.parent.name / photo.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(photo)
    Image.open(photos[0]).convert("RGB").save("photo.jpg")
    possible = [c for c in commands() if c[0] in ("eval", "predict", "view", "stem", "tune") and "w.safetensors" in c]
    assert len(possible) >= 5
    for command in possible:
        run(command)
