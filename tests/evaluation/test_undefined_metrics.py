"""Where accuracy means nothing: one class, no head, logits that are NaN, infinite or all alike."""

from __future__ import annotations

import json
import math

import pytest
import torch

import saccade
from data_helpers import write_folder
from saccade.data import open_images
from saccade.errors import UserError
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.prediction_cache import Cache
from saccade.evaluation.untrained import untrained
from saccade.execution.policy import Execution
from small_runs import files, tiny


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photos"), files(each=4))


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    named = {name.replace("/", ""): data for name, data in files(each=8).items()}
    return write_folder(tmp_path_factory.mktemp("unlabelled"), named)


def test_without_a_choice_of_classes_nothing_is_scored(unlabelled, tmp_path):
    """One class is always right; without any, an encoder has neighbours: ``test_neighbours.py``."""
    model = tiny(num_classes=1)
    for verb in (
        saccade.eval,
        lambda m, d: saccade.tune(m, d, "2x", out=tmp_path),
        lambda m, d: Evaluator(m, open_images(d)),
    ):
        with pytest.raises(UserError, match=r"a head of 1 class.*need 2 classes or more"):
            verb(model, str(unlabelled))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_dense_model_without_finite_logits_is_no_reference(unlabelled, tmp_path, value):
    model = tiny()
    with torch.no_grad():
        model.vit.blocks[0].attn.qkv.weight.fill_(value)
    for verb in (saccade.eval, lambda m, d: saccade.tune(m, d, "2x", out=tmp_path)):
        with pytest.raises(UserError, match="hold NaN or infinity"):  # logits, or the weights that no folder holds
            verb(model, str(unlabelled))


def test_a_setting_that_overflows_after_a_cast_is_disqualified_by_name(photos):
    model = tiny()
    with torch.no_grad():
        model.vit.head.weight.mul_(1e6)  # beyond fp16, within fp32
    dense, row = saccade.eval(model, str(photos), ["evit(0.5)"]).rows
    assert dense.images == row.images == 12
    with pytest.raises(UserError, match="NaN or infinity"):
        saccade.eval(model, str(photos), dtype="fp16")


def test_one_setting_of_several_is_left_out(photos, tmp_path, monkeypatch):
    real = saccade.AdaptiveViT.forward_head

    def head(self, tokens):
        return real(self, tokens) * (float("inf") if "tome" in str(self.setting) else 1.0)

    monkeypatch.setattr(saccade.AdaptiveViT, "forward_head", head)
    found = saccade.eval(tiny(), str(photos), ["tome(r=2)", "evit(0.5)"], out=tmp_path / "out")
    assert [row.setting for row in found.rows] == ["dense", "evit(0.5)"]
    assert list(found.left_out) == ["tome(r=2)"] and "NaN or infinity" in found.left_out["tome(r=2)"]
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["left_out"] == found.left_out
    with pytest.raises(UserError, match=r"tome\(r=2\) cannot be scored"):
        saccade.eval(tiny(), str(photos), ["tome(r=2)"])


def test_a_head_of_zeros_answers_nothing(photos):
    model = tiny()
    with torch.no_grad():
        model.vit.head.weight.zero_()
        model.vit.head.bias.zero_()
    with pytest.raises(UserError, match=r"all 3 classes the same logit .* untrained"):
        saccade.eval(model, str(photos))


def test_logits_that_are_all_alike_are_no_hit_for_class_zero(photos, monkeypatch):
    real = saccade.AdaptiveViT.forward_head

    def head(self, tokens):
        return real(self, tokens) * (0.0 if "evit" in str(self.setting) else 1.0)

    monkeypatch.setattr(saccade.AdaptiveViT, "forward_head", head)
    _, row = saccade.eval(tiny(), str(photos), ["evit(0.5)"]).rows
    assert row.value.mean == row.top5.mean == row.agreement.mean == 0.0


def test_one_image_is_no_certainty(photos):
    _, row = saccade.eval(tiny(), str(photos), ["evit(0.9)"], limit=1).rows
    assert row.images == 1 and row.delta.high - row.delta.low > 0.5
    assert row.nll.three()[1:] == row.kl.three()[1:] == (0.0, math.inf)
    assert row.to_dict()["nll"]["high"] is None
    assert json.loads(json.dumps(row.to_dict(), allow_nan=False))


def test_huge_logits_have_finite_losses(photos):
    model = tiny()
    with torch.no_grad():
        model.vit.head.weight.mul_(1e30)
    for row in saccade.eval(model, str(photos), ["evit(0.5)"]).rows:
        assert json.loads(json.dumps(row.to_dict(), allow_nan=False))


def test_methods_that_have_learned_nothing_are_named(photos):
    model = tiny()
    found = saccade.eval(model, str(photos), ["dynamicvit(0.5)", "evit(0.5)"])
    assert [row.untrained for row in found.rows] == [(), ("dynamicvit",), ()]
    with torch.no_grad():
        for name, weight in model.learned.items():
            if name.startswith("dynamicvit"):
                weight.add_(0.01)
    assert untrained(model, "dynamicvit(0.5)") == ()


# What the cache knows


def test_all_that_changes_a_number_is_another_cache(photos, tmp_path, monkeypatch):
    images = open_images(photos)
    model = tiny()
    seen = {Cache.of(tmp_path, Evaluator(model, images)).folder}
    seen.add(Cache.of(tmp_path, Evaluator(model, images, batch=5)).folder)
    seen.add(Cache.of(tmp_path, Evaluator(model.deploy(None).to(torch.float64), images)).folder)
    model = tiny()
    seen.add(Cache.of(tmp_path, Evaluator(model, open_images(photos / "a"))).folder)
    model.vit.blocks[0].norm1.eps = 1e-3
    seen.add(Cache.of(tmp_path, Evaluator(model, images)).folder)
    model = tiny().at("dynamicvit(0.5)")
    seen.add(Cache.of(tmp_path, Evaluator(model, images)).folder)
    model = tiny()
    model.execution = Execution("unfused")
    seen.add(Cache.of(tmp_path, Evaluator(model, images)).folder)
    model = tiny()
    monkeypatch.setattr("timm.__version__", "0")
    seen.add(Cache.of(tmp_path, Evaluator(model, images)).folder)
    assert len(seen) == 8


def test_rows_that_the_dense_model_contradicts_are_forgotten(photos, tmp_path):
    model, images = tiny(), open_images(photos)
    judge = Evaluator(model, images)
    store = Cache.of(tmp_path, judge)
    dense = judge.predict(judge.dense, range(12))
    store.check("dense", dense)
    store.get("evit(0.5)", [1, 2], lambda: judge.predict(model.at("evit(0.5)").eval(), [1, 2]))
    store.check("dense", dense)
    assert len([*store.folder.iterdir()]) == 2
    store.check("dense", type(dense)(*(v + 1 if k == "nll" else v for k, v in vars(dense).items())))
    assert not store.folder.exists()
