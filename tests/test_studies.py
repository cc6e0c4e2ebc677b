"""The arithmetic of the studies; their runs are minutes to hours, and are not repeated here."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "studies"))

import compositions
import dense
import jobs
import schedules
import timm
import widened

import saccade
from data_helpers import encode, picture, write_folder
from oracles import make_vit
from saccade.backbones.vit import set_class_names
from saccade.data import open_images
from saccade.evaluation.candidates import price
from saccade.evaluation.stats import bootstrap
from saccade.model import AdaptiveViT
from saccade.tasks.segmentation.mean_iou import Counts, interval, mean_iou
from saccade.tasks.segmentation.segmenter import segmenter

ROOT = Path(__file__).resolve().parents[1]


def counts(seed: int, images: int = 12, classes: int = 3) -> Counts:
    generator = torch.Generator().manual_seed(seed)
    hit, missed, wrong = (torch.randint(1, 50, (images, classes), generator=generator) for _ in range(3))
    return Counts(torch.arange(images), hit, hit + missed, hit + wrong)


def test_every_study_and_benchmark_imports():
    scripts = sorted(str(path) for folder in ("studies", "benchmarks") for path in (ROOT / folder).glob("*.py"))
    code = (
        "import runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    sys.path[0] = path.rpartition('/')[0]\n"
        "    runpy.run_path(path, run_name='imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *scripts], capture_output=True, text=True, timeout=300)
    assert len(scripts) > 10 and done.returncode == 0, done.stderr


def test_a_line_is_read_in_time_between_its_two_neighbours():
    one, two, three = counts(0), counts(1), counts(2)
    line = [(2.0, three), (1.0, one), (4 / 3, two)]  # times 0.5, 1 and 0.75
    assert dense.at_speed(line, 1.0) == [(0.0, two), (1.0, one)]
    for goal in (1.1, 1.5, 1.9):
        found = dense.at_speed(line, goal)
        own = {id(one): 1.0, id(two): 0.75, id(three): 0.5}
        assert sum(share for share, _ in found) == pytest.approx(1)
        assert sum(share * own[id(c)] for share, c in found) == pytest.approx(1 / goal)
    assert dense.at_speed(line, 2.1) is None and dense.at_speed(line, 0.9) is None


def test_a_place_on_a_line_has_the_mean_iou_between():
    one, two = counts(0), counts(1)
    (a, b) = (float(mean_iou(*(part.sum(0).double() for part in c.sums))) for c in (one, two))
    assert dense.level([(0.25, one), (0.75, two)]).mean == pytest.approx(0.25 * a + 0.75 * b)
    assert dense.level([(1.0, one)]).three() == pytest.approx(interval(mean_iou, one.sums).three())
    gap = dense.level([(1.0, one)], [(1.0, two)])
    assert gap.three() == pytest.approx(interval(mean_iou, one.sums, two.sums).three())
    assert dense.level([(1.0, one)], [(0.5, one), (0.5, one)]).three() == pytest.approx((0, 0, 0), abs=1e-12)


def test_claims_are_made_where_both_sides_can_be_read():
    good, bad = counts(0), counts(1)
    good = Counts(good.places, good.there, good.there, good.there)  # never wrong
    there = {(name, goal): None for name in ("algm", "tome", "random") for goal in dense.SPEEDS}
    there |= {("algm", 1.4): [(1.0, good)], ("tome", 1.4): [(1.0, bad)], ("random", 1.4): [(1.0, good)]}
    found = {row["claim"]: row["verdict"] for row in dense.claims(there, [(1.0, good)])}
    assert found == {
        "at 1.4×: algm > tome": "holds",
        "at 1.4×: algm > random": "not decided",
        "at 1.4×: tome > random": "does not hold",
        "at 1.4×: algm within 1 point of dense": "holds",
        "at 1.4×: tome within 1 point of dense": "does not hold",
    }


def test_settings_of_the_dense_study_get_cheaper_and_are_comparable():
    vit = make_vit(depth=12, img_size=dense.SIZE, embed_dim=192)
    model = segmenter(AdaptiveViT(vit), ("a", "b"), "linear").eval()

    def macs(setting: str) -> float:
        view = model.at(setting)
        with torch.inference_mode():
            return view(torch.zeros(1, 3, *view.input_size())).trace.macs().item()

    whole = macs("dense")
    for name, settings in dense.METHODS.items():
        ratios = [whole / macs(setting) for setting in settings]
        assert ratios == sorted(ratios) and ratios[0] > 1.15, name
        assert name not in dense.TUNED or ratios[dense.STRENGTH] == pytest.approx(1.5, rel=0.1), name


def test_a_chain_is_compared_at_its_own_macs():
    right, wrong = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    marks = [(0.3, right), (0.1, wrong)]
    for macs, expected in ((0.05, 0.0), (0.1, 0.0), (0.15, 0.25), (0.3, 1.0), (0.4, 1.0)):
        assert compositions.at_macs(marks, macs).tolist() == pytest.approx([expected] * 8)
    assert bootstrap(compositions.at_macs(marks, 0.2)).three() == pytest.approx((0.5, 0.5, 0.5))


def test_strengths_of_parts_grow_with_their_knob():
    model = AdaptiveViT(make_vit(depth=12, img_size=160))
    for name, make in compositions.STATIC.items():
        found = [price(model, make(k)) for k in (0.1, 0.4, 0.6, 0.9)]
        assert found == sorted(found) and found[0] < found[-1], name


def test_gates_are_trained_through_a_shrinking_budget():
    model = AdaptiveViT(make_vit(depth=12, embed_dim=192, img_size=160))
    for name, (before, weight) in compositions.GATED.items():
        told = compositions.annealed(model, name, 0.5)
        settings = saccade.training.config.read_config("finetune", ["data.path=x", *told]).sampling.settings
        shares = [dict(saccade.setting.Setting.parse(text).calls[-1].kwargs)["share"] for text in settings]
        assert 1 > shares[0] > shares[1] > shares[2] > 0 and all(f"weight={weight}" in text for text in settings)
        whole = price(model, before.removesuffix(" | ") or "dense") / 1e9
        assert shares[-1] == pytest.approx(compositions.GOALS[1] / whole, abs=1e-4)


# --- the scripts themselves, at their smallest ---


@pytest.fixture(scope="module")
def small_world(tmp_path_factory) -> Path:
    """A folder with photos of three classes, of one's own and ImageNet's, and drawn weights of a ViT-Tiny."""
    folder = tmp_path_factory.mktemp("studies")
    for name, classes in (("photos", ("cat", "dog", "owl")), ("known", ("n01440764", "n02102040", "n02979186"))):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for (split, count), (i, label) in product((("train", 12), ("test", 6)), enumerate(classes)):
                for j in range(count):
                    data = encode(picture(160, 160, seed=1000 * i + 100 * (split == "test") + j))
                    archive.writestr(f"{split}/{label}/{j}.png", data)
    saccade.create_model("vit_tiny_patch16_224").save(folder / "start")
    save_file(saccade.create_model("vit_tiny_patch16_224").vit.state_dict(), folder / "w.safetensors")
    return folder


def run_study(folder: Path, name: str, *arguments: str) -> str:
    script = Path(__file__).resolve().parents[1] / "studies" / f"{name}.py"
    command = [sys.executable, str(script), *arguments, "--out", f"runs/{name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    logs = sorted((folder / "runs" / name).glob("*/run.log"))
    assert done.returncode == 0, done.stderr[-2000:] + "".join(log.read_text()[-2000:] for log in logs[-1:])
    return done.stdout


SMALLEST = {
    "adavit": "photos.zip w.safetensors --dense-epochs 0.5 --epochs 0.5 --runs adavit dynamicvit --seconds 1",
    "quadformer": "photos.zip start w.safetensors --epochs 0.5 --runs uniform-49-0 entropy-49-0",
    "rates": "vit_tiny_patch16_224 w.safetensors --learn known.zip --test known.zip --moves 1 --steps 1 --limit 4 "
    "--test-limit 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_study_runs_from_its_command_to_its_tables(small_world, name):
    """And once more: what is there is not done again."""
    first = run_study(small_world, name, *SMALLEST[name].split())
    rows = {"adavit": "dynamicvit, per image, one threshold", "quadformer": "entropy-49", "rates": "| 2.0× | ltmp"}
    assert rows[name] in first
    files = {file: file.stat().st_mtime_ns for file in (small_world / "runs" / name).rglob("model/model.safetensors")}
    again = run_study(small_world, name, *SMALLEST[name].split())
    assert files == {file: file.stat().st_mtime_ns for file in files}
    assert name == "adavit" or again == first  # a time is another


@pytest.mark.slow
def test_the_study_of_imagepiece_runs_from_its_command_to_its_tables(small_world):
    told = ["photos.zip", "w.safetensors", "--epochs", "0.5", "--source-epochs", "0.5", "--limit", "4", "--whole", "4"]
    run_study(small_world, "imagepiece", *told, "--runs")
    run_study(small_world, "imagepiece", *told, "--time", "cells", "--seconds", "1")
    assert "| evit" in run_study(small_world, "imagepiece", *told)


STUDIES = sorted(path for path in (ROOT / "studies").glob("*.py") if path.stem != "jobs")
NAMED = ("Claim|Claims|Paper", "Command", "Cost", "Measured")
SHARED = {"Loader", "save_file"}  # for jobs.py alone
APART = {"rates": {"Loader"}}  # what it reads goes on in the middle


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_a_study_says_what_it_claims_and_how_it_is_run(study):
    """Claim, command with its data, time, and the page of its results, which is there."""
    doc = ast.get_docstring(ast.parse(study.read_text(encoding="utf-8"))) or ""
    parts = dict(re.findall(r"^([A-Z][a-z]+)  +(\S.*(?:\n .*)*)", doc, re.MULTILINE))
    assert all(any(name in parts for name in names.split("|")) for names in NAMED), f"it says {[*parts]}"
    assert f"python studies/{study.name}" in parts["Command"]
    page = re.search(r"\S+\.(md|json)", parts["Measured"])
    assert (ROOT / page[0]).is_file() if page else parts["Measured"].startswith("not yet")


def test_no_study_repeats_what_another_has():
    """Functions and classes are written once, and images are loaded and tensors kept by what all of them share."""
    bodies: dict[str, dict[str, str]] = {}
    for path in [*STUDIES, ROOT / "studies" / "jobs.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        whole = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        bodies[path.stem] = {ast.dump(ast.Module(node.body, [])): node.name for node in whole if len(node.body) > 1}
        called = {getattr(node.func, "id", "") for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert path.stem == "jobs" or called & SHARED <= APART.get(path.stem, set()), path.name
    twice = [(a, b, bodies[a][body]) for a, b in combinations(bodies, 2) for body in bodies[a].keys() & bodies[b]]
    assert twice == []


def test_what_models_said_is_computed_once_and_kept(tmp_path):
    asked = []

    def make() -> dict[str, torch.Tensor]:
        asked.append(1)
        return {"hits": torch.ones(3), "macs": torch.zeros(3)}

    for _ in range(2):  # a second process reads the file
        memory = jobs.Memory(tmp_path / "runs" / "seen.safetensors")
        found = memory.all({"hits": "a", "macs": "a|macs"}, make)
        assert found["hits"].tolist() == [1, 1, 1] and memory("a|macs", lambda: torch.ones(1)).tolist() == [0, 0, 0]
    assert asked == [1]


def test_labels_are_by_the_names_that_a_trained_head_has(tmp_path):
    """Capitals come first in torchvision's order of classes, and not in timm's: no place tells which is meant."""
    names = ["Faces", "accordion", "zebra"]
    photos = write_folder(tmp_path, {f"test/{name}/{i}.png": encode(picture(16, 16)) for name in names for i in (1, 2)})
    vit = make_vit(num_classes=3)
    set_class_names(vit, ["zebra", "Faces", "accordion"])
    found = jobs.labels(AdaptiveViT(vit), open_images(photos, "test"), [0, 2, 5])
    assert found.tolist() == [1, 2, 0]


def test_a_claim_is_decided_by_its_interval_and_needs_its_runs():
    better = jobs.Claim("a > b", ("a", "b"), lambda: torch.ones(9, dtype=torch.float64))
    assert better.row(lambda run: run == "a") == ["a > b", "", "not run"]
    assert better.row(lambda run: True) == ["a > b", "+100.0 [+100.0, +100.0]", "holds"]
    assert jobs.verdict(bootstrap(-torch.ones(9, dtype=torch.float64)), slack=0.5) == "does not hold"
    assert jobs.table(["a"], [["x | y"]]).splitlines() == ["| a |", "| --- |", "| x \\| y |"]


@pytest.fixture(scope="module")
def engines():
    path = ROOT / "benchmarks" / "engines.py"
    spec = importlib.util.spec_from_file_location("engines_benchmark", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@torch.inference_mode()
def test_settings_that_engines_are_tried_with_run(engines):
    model, images = saccade.create_model("vit_tiny_patch16_224"), torch.rand(1, 3, 224, 224)
    for setting in engines.ON_PHOTOS:
        assert model.at(setting).eval()(images).logits.shape == (1, 1000), setting


def test_the_page_of_engines_is_written_anew_from_itself(engines):
    """Whatever engine a run measures, what others gave, the photos and the words below them stay."""
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    known, photos, rest = engines.recorded(text)
    assert set(engines.settings()) <= known.keys() and set(engines.ON_PHOTOS) == photos.keys() and rest
    assert text == engines.page(known, photos, rest, text.splitlines()[2].partition("; ")[2])
    known["tome()"]["AOTInductor bf16"], known["new() | b()"] = "no: a | b (1)", {"AOTInductor bf16": "1e-02"}
    assert engines.recorded(engines.page(known, photos, rest, "now.")) == (known, photos, rest)
    assert engines.recorded("") == ({}, {}, "")


@pytest.mark.parametrize(("heads", "spread"), [(3, 0.3), (6, 0.3), (6, 0.0)])
def test_a_wider_model_computes_the_same(heads, spread):
    """With as many heads, or twice as many; copies differ where they are to learn apart."""
    args = {"img_size": 32, "depth": 2, "num_classes": 5}
    torch.manual_seed(0)
    narrow = timm.create_model("vit_tiny_patch16_224", embed_dim=48, num_heads=3, **args).eval()
    wide = timm.create_model("vit_tiny_patch16_224", embed_dim=96, num_heads=heads, **args).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(widened.widen(narrow, wide, spread)(images), narrow(images), atol=1e-5, rtol=1e-4)
        left, right = wide.blocks[0].mlp.fc2.weight[:, :192], wide.blocks[0].mlp.fc2.weight[:, 192:]
        assert torch.equal(left, right) == (spread == 0)


def test_blind_photos_are_in_no_half_of_what_was_seen():
    choose, report = schedules.unseen(100, 20, 30, 40)
    seen = {i * 100 // 20 for i in range(20)}
    assert len(choose) == 30 and len(report) == 40
    assert not {*choose} & {*report} and not {*choose, *report} & seen
