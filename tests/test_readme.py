"""What the README and the pages of reference say can be run is run, as it stands, in their order.

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
from saccade.evaluation import device_curve, speed, sweep
from saccade.evaluation import report as publish
from saccade.training import config
from small_runs import shorten

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/settings.md", "docs/commands.md", "docs/python.md", "docs/deploy.md")
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
SCREEN = 72  # lines of the README: more is for the site
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3}
SYNSETS = ("n01440764", "n02102040", "n03394916")


def blocks(language: str) -> list[str]:
    block = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [found for text in TEXTS.values() for found in block.findall(text)]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("saccade ")]
    return [command for command in found if command != ["demo"]]  # two minutes, and a test of its own


def run(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code, f"saccade {shlex.join(arguments)}"


def test_there_is_something_to_run():
    verbs = {command[0] for command in commands()}
    assert {"tune", "eval", "bench", "view", "train", "stem", "convert", "analyze", "predict"} <= verbs
    assert len(blocks("python")) >= 3


def test_the_readme_is_one_screen_and_its_links_lead_somewhere():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= SCREEN
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links and [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


def test_the_numbers_of_the_readme_are_those_of_the_results():
    """A row of the table says the same accuracies as the results, and the same speed-ups in the engine."""
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = [row for row in table_rows(TEXTS["README.md"]) if row[0].startswith("`")]
    assert len(rows) >= 5
    for setting, macs, photos, nette, *speeds in rows:
        name = setting[: setting.index("`", 1) + 1]
        measured = next(row for row in table_rows(results) if row[0] == name)
        dense = name == "`dense`"
        assert [macs, photos, nette] == [measured[1], measured[2 if dense else 3], measured[4 if dense else 5]]
        for batch, said in zip("18", speeds, strict=True):
            timed = [row[3] for row in table_rows(results) if row[:3] == ["ViT-Ti", batch, name]]
            assert said == ("1.00×" if dense else f"{timed[0]}×" if timed else "not timed")


def table_rows(text: str) -> list[list[str]]:
    """The cells of every line of every table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


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
    monkeypatch.setattr(publish, "tune", quickly(publish.tune, schedules=0))
    monkeypatch.setattr(device_curve, "device_curve", quickly(device_curve.device_curve, seconds=0.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
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


def quickly(verb: Callable, **always: Any) -> Callable:
    """A verb with no more timing than it needs, and nothing compiled; and with these options."""
    least = {"seconds": 0.0, "compiled": False}

    def call(*given: Any, **options: Any) -> Any:
        return verb(*given, **{name: least.get(name, value) for name, value in options.items()} | always)

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
