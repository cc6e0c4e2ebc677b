"""The arithmetic of the studies; their runs are minutes to hours, and are not repeated here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "studies"))

import compositions
import dense

import saccade
from oracles import make_vit
from saccade.evaluation.candidates import price
from saccade.evaluation.stats import bootstrap
from saccade.model import AdaptiveViT
from saccade.tasks.segmentation.mean_iou import Counts, interval, mean_iou
from saccade.tasks.segmentation.segmenter import segmenter


def counts(seed: int, images: int = 12, classes: int = 3) -> Counts:
    generator = torch.Generator().manual_seed(seed)
    hit, missed, wrong = (torch.randint(1, 50, (images, classes), generator=generator) for _ in range(3))
    return Counts(torch.arange(images), hit, hit + missed, hit + wrong)


def test_every_study_and_benchmark_imports():
    root = Path(__file__).resolve().parents[1]
    scripts = sorted(str(path) for folder in ("studies", "benchmarks") for path in (root / folder).glob("*.py"))
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
