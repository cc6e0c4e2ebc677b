"""Encoders: their embeddings are measured by neighbours, in every verb that measures classifiers."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch.nn import functional as F

import saccade
from data_helpers import encode, picture, write_folder
from oracles import make_vit
from saccade.data import open_images
from saccade.errors import UserError
from saccade.evaluation.accuracy import evaluate
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.neighbours import TEMPERATURE, Neighbours
from saccade.model import AdaptiveViT
from small_runs import tiny

CLASSES = ("a", "b", "c")


def slow_logits(query, gallery, own, places, labels, classes):
    """One query: log of each class's share of exp(cosine / 0.07) over the other images, or the cosines themselves."""
    near = [F.cosine_similarity(query, one, dim=0).item() / TEMPERATURE for one in gallery]
    if labels is None:
        return near
    largest = max(value for value, place in zip(near, places, strict=True) if place != own)
    totals = [0.0] * classes
    for value, place, label in zip(near, places, labels, strict=True):
        if place != own:
            totals[label] += math.exp(value - largest)
    return [math.log(total) if total else None for total in totals]


def test_neighbours_as_written_out():
    torch.manual_seed(0)
    gallery, places = torch.randn(9, 6, dtype=torch.float64), torch.tensor([0, 2, 4, 5, 6, 7, 8, 10, 11])
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    queries, own = torch.randn(4, 6, dtype=torch.float64), torch.tensor([2, 3, 11, 0])
    for told in (None, labels):
        found = Neighbours(gallery, places, told, 3).logits(queries, own)
        for row, query, place in zip(found, queries, own.tolist(), strict=True):
            expected = slow_logits(query, gallery, place, places.tolist(), None if told is None else told.tolist(), 3)
            for i, value in enumerate(expected):
                if told is None and places[i] == place:
                    assert row[i] < min(expected) and row.argmax() != i  # an image is not its own neighbour
                elif value is not None:
                    assert row[i].item() == pytest.approx(value, abs=1e-9)
    with pytest.raises(UserError, match="2 images: neighbours are told from 3 or more"):
        Neighbours(gallery[:2], places[:2], None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    files = {f"{CLASSES[i % 3]}/{i:02d}.png": encode(picture(70, 64, seed=i // 6)) for i in range(48)}
    return str(write_folder(tmp_path_factory.mktemp("photos"), files))


@pytest.fixture(scope="module")
def encoder() -> AdaptiveViT:
    vit = make_vit("vit")
    vit.reset_classifier(0)
    vit.pretrained_cfg = {"architecture": "vit_tiny_patch16_224"}
    return AdaptiveViT(vit.eval())


def test_labels_and_no_labels(encoder, photos, tmp_path):
    rows, _ = evaluate(encoder, photos, ["tome(r=2)", "random(0.3)"])
    assert [row.setting for row in rows] == ["dense", "tome(r=2)", "random(0.3)"]
    assert rows[0].metric == "knn" and rows[0].agreement.mean == 1.0 and rows[0].delta is not None
    assert rows[1].kl.mean < rows[2].kl.mean
    flat = write_folder(tmp_path / "flat", {f"{i}.png": encode(picture(70, 64, seed=i)) for i in range(30)})
    rows, _ = evaluate(encoder, str(flat), ["tome(r=2)", "random(0.3)"])
    assert rows[0].metric == "recall@10" and rows[0].value.mean == 1.0
    assert 0 < rows[2].value.mean < 1.0 and rows[0].value.mean >= rows[1].value.mean


def test_the_index_of_another_model_lives_as_long_as_what_is_kept_of_it(encoder, photos):
    """One that was gone could have its address taken by a third, which would then be told by a wrong index."""
    evaluator, others = Evaluator(encoder, open_images(photos)), []
    for seed in range(2):
        other = tiny(seed, num_classes=0)
        evaluator.predict(other, range(4))
        others.append(weakref.ref(other.vit))
        del other
        gc.collect()
    first, second = (found() for found in others)
    assert first is not None and second is not None and first is not second


def test_a_batch_and_a_limit_change_no_answer(encoder, photos):
    whole, _ = evaluate(encoder, photos, ["evit(0.5)"], batch=48)
    small, _ = evaluate(encoder, photos, ["evit(0.5)"], batch=5)
    assert [row.value for row in whole] == [row.value for row in small]
    some, _ = evaluate(encoder, photos, ["evit(0.5)"], limit=10)
    assert some[0].images == 10


@pytest.mark.slow
def test_tune_gives_an_encoder(encoder, photos, tmp_path):
    found = saccade.tune(encoder, photos, "1.2x", seconds=0.0, compiled=False, schedules=0, out=tmp_path / "out")
    assert "knn" in " ".join(found.recommendation)
    opened = saccade.load(tmp_path / "out" / "model")
    assert opened.vit.num_classes == 0
    images = torch.randn(2, 3, 64, 64)
    assert opened(images).logits.shape == (2, 96)
    assert "neighbours" in (tmp_path / "out" / "report.html").read_text()
