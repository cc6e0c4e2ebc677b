"""``eval`` of any task's folder: opened once, measured by its task, and no option is dropped; other verbs on these."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import saccade
from data_helpers import encode, picture, write_folder
from oracles import make_vit
from saccade import checkpoint
from saccade.backbones import task_heads
from saccade.cli import main
from saccade.errors import UserError
from saccade.tasks.detection.average_precision import evaluate_detection
from saccade.tasks.detection.detector import DetectionHead, Heads
from saccade.tasks.evaluate import EVALUATIONS
from saccade.tasks.image_text.text_tower import TextTower
from saccade.tasks.image_text.two_tower import Space, TwoTowerHead
from saccade.tasks.image_text.zero_shot import evaluate_words
from saccade.tasks.segmentation.mean_iou import evaluate_segmentation
from saccade.tasks.segmentation.segmenter import segmenter

TASKS = ("segment", "detect", "textimage")
MEASURES = {"segment": evaluate_segmentation, "detect": evaluate_detection, "textimage": evaluate_words}
TOWER = {"width": 16, "depth": 1, "heads": 2, "length": 20}


def headless() -> torch.nn.Module:
    return make_vit("vit", embed_dim=32, depth=2, num_heads=2, img_size=32, patch_size=8, num_classes=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each task, named after it, and what it is measured on, ``<task>-data``."""
    root = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)
    vit = headless()
    vit.reset_classifier(3)
    saccade.save(segmenter(saccade.AdaptiveViT(vit), ("left", "right"), "linear").eval(), root / "segment")
    heads = Heads(TextTower(16, **TOWER), 32, ("cup", "dog"))
    for part in (heads.shift, heads.scale, heads.box[-1]):
        torch.nn.init.normal_(part.weight, std=0.2)
    saccade.save(saccade.AdaptiveViT(headless(), head=DetectionHead(heads)).eval(), root / "detect")
    space = Space(TextTower(16, **TOWER), 32, project=True)
    saccade.save(saccade.AdaptiveViT(headless(), head=TwoTowerHead(space)).eval(), root / "textimage")
    photos = {f"{i}.png": encode(picture(40, 36, seed=i)) for i in range(6)}
    halves = Image.new("L", (40, 36))
    halves.paste(1, (20, 0, 40, 36))
    labels = {f"labels/{name}": encode(halves) for name in photos}
    write_folder(root / "segment-data", {f"images/{name}": data for name, data in photos.items()} | labels)
    write_folder(root / "textimage-data", {f"{'ab'[i % 2]}/{i}.png": photos[f"{i}.png"] for i in range(6)})
    width, height = 40, 36
    boxes = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": width, "height": height} for i in range(6)],
        "annotations": [{"image_id": i, "category_id": 1 + i % 2, "bbox": [4, 4, 20, 20]} for i in range(6)],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}],
    }
    write_folder(root / "detect-data", {**photos, "boxes.json": json.dumps(boxes).encode()})
    return root


def data_of(place: Path, task: str) -> str:
    return str(place / f"{task}-data" / ("boxes.json" if task == "detect" else ""))


def command(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def needed(task: str) -> None:
    if task == "detect":
        pytest.importorskip("pycocotools", reason="average precision needs pycocotools: pip install 'saccade[tasks]'")


def test_every_task_that_a_folder_can_be_of_is_routed() -> None:
    assert EVALUATIONS.keys() == {task_heads.CLASSIFY, *task_heads.HEADS}


@pytest.mark.parametrize("task", TASKS)
def test_eval_measures_a_folder_as_its_task_does(
    task: str, place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed(task)
    expected = MEASURES[task](str(place / task), data_of(place, task), ["grid(16)"], limit=4, batch=3)
    loads, load = [], checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    options = ["-s", "grid(16)", "--limit", 4, "--batch", 3]
    code, out, err = command(capsys, "eval", place / task, data_of(place, task), *options, "--json")
    assert code == 0, err
    assert json.loads(out) == json.loads(json.dumps(expected.to_dict()))
    assert len(loads) == 1
    code, out, _ = command(capsys, "eval", place / task, data_of(place, task), *options)
    assert code == 0 and "4 images" in " ".join(out.split()) and "grid(16)" in out
    again = saccade.eval(str(place / task), data_of(place, task), "grid(16)", limit=4, batch=3)
    assert again.rows == expected.rows


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("option", "value"),
    [("seconds", 1.0), ("out", "runs/x"), ("corrupt", "jpeg:2"), ("dtype", "bf16"), ("metric", "kl")],
)
def test_an_option_that_a_task_does_not_have_is_refused_by_name(
    task: str, option: str, value: str | float, place: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, "eval", place / task, data_of(place, task), f"--{option}", value)
    assert code == 2 and not out and err.count("\n") == 1
    assert f"task {task!r} is evaluated without --{option}" in err and "leave it out" in err
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"{option}="):
        saccade.eval(str(place / task), data_of(place, task), **{option: value})


def test_several_such_options_are_all_named(place: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--seconds", 1, "--out", "runs/x", "--corrupt", "jpeg:2"]
    _, _, err = command(capsys, "eval", place / "segment", data_of(place, "segment"), *options)
    assert "--seconds, --out, --corrupt (in Python: seconds=, out=, corrupt=): leave them out" in err


# Other verbs, on such a folder


@pytest.mark.parametrize("task", TASKS)
def test_what_needs_a_classifier_names_the_task_and_the_verb(
    task: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    verb, photos = {"textimage": "zeroshot"}.get(task, task), place / "textimage-data"
    for arguments in (
        ("tune", place / task, photos, "--out", tmp_path / "t"),
        ("calibrate", place / task, photos, "-s", "dynamicvit(0.7)", "--gmacs", 0.01),
        ("predict", place / task, photos),
        ("view", place / task, photos, "--out", tmp_path / "u.png"),
    ):
        code, _, err = command(capsys, *arguments)
        assert code == 2 and err.count("\n") == 1 and repr(task) in err and f"saccade {verb}" in err, err


@pytest.mark.parametrize("task", TASKS)
def test_a_new_model_is_not_made_of_half_of_one(
    task: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for arguments in (
        ("convert", place / task, "--patch", 4, "--out", tmp_path / "c"),
        ("stem", place / task, place / "textimage-data", "--out", tmp_path / "s"),
    ):
        code, _, err = command(capsys, *arguments)
        assert code == 2 and err.count("\n") == 1 and repr(task) in err and ".vit" in err, err
    with pytest.raises(UserError, match=task):
        saccade.flexify(str(place / task))
    alone = saccade.load(place / task).vit
    assert saccade.convert(alone, 4).backbone.patch_size == (4, 4)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("task", TASKS)
def test_bench_times_any_task(task: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, err = command(capsys, "bench", place / task, "-s", "grid(16)", "--batch", 1, "--seconds", 0, "--json")
    assert code == 0 and len(json.loads(out)["rows"]) == 2, err


@pytest.mark.parametrize("verb", ["eval", "tune", "analyze"])
def test_nothing_is_written_into_the_model_that_is_read(verb: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    model = place / "textimage"
    before = sorted(model.iterdir())
    for out in (model, model / "runs"):
        code, _, err = command(capsys, verb, model, place / "textimage-data", "--out", out)
        assert code == 2 and ("which is read" in err or "is what is read" in err), err
    assert sorted(model.iterdir()) == before
