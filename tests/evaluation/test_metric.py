"""The metrics, image by image, against loops over images, neighbours and cells; and which fit what."""

from __future__ import annotations

import csv
import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import saccade
from data_helpers import encode, picture, write_folder
from oracles import make_vit
from saccade.data import open_images
from saccade.errors import UserError
from saccade.evaluation import accuracy
from saccade.evaluation.allowance import Allowance
from saccade.evaluation.candidates import Target
from saccade.evaluation.distance import Distance
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.metric import Metric, choose
from saccade.evaluation.schedule_candidates import schedules
from saccade.evaluation.schedule_price import macs
from saccade.evaluation.stats import Interval
from saccade.evaluation.tune import search
from saccade.model import AdaptiveViT
from saccade.tasks.embedding.embedding_head import EmbeddingHead
from small_runs import files, tiny

SETTING, COUNT = "random(0.4)", 26
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> str:
    files = {f"{i:02d}.png": encode(picture(70, 64, seed=i)) for i in range(COUNT)}
    return str(write_folder(tmp_path_factory.mktemp("flat"), files))


@pytest.fixture(scope="module")
def sorted_in_classes(tmp_path_factory) -> str:
    files = {f"{CLASSES[i % 3]}/{i:02d}.png": encode(picture(70, 64, seed=i // 4)) for i in range(COUNT)}
    return str(write_folder(tmp_path_factory.mktemp("classes"), files))


@pytest.fixture(scope="module")
def encoder() -> AdaptiveViT:
    vit = make_vit("vit")
    vit.reset_classifier(0)
    return AdaptiveViT(vit.eval())


def inputs(model: AdaptiveViT, data: str) -> list[Tensor]:
    images = open_images(data)
    prepare = Evaluator(model, images).preprocess(model.input_size())
    return [prepare(images.read(i)).unsqueeze(0) for i in range(len(images))]


@torch.inference_mode()
def embedded(model: AdaptiveViT, data: str) -> list[Tensor]:
    """An embedding for each image, one image at a time."""
    return [model(image).logits[0].double() for image in inputs(model, data)]


def cosine(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) / math.sqrt(
        sum(x * x for x in a.tolist()) * sum(y * y for y in b.tolist())
    )


def nearest_by_loops(query: Tensor, index: list[Tensor], own: int, k: int) -> set[int]:
    near = {i: cosine(query, one) for i, one in enumerate(index) if i != own}
    return set(sorted(near, key=lambda i: -near[i])[:k])


def measured(model: AdaptiveViT, data: str, metric: str, setting: str = SETTING) -> list[float]:
    evaluator = Evaluator(model, open_images(data), metric=metric, batch=7)
    found = evaluator.predict(model.at(setting).eval(), range(COUNT))
    assert evaluator.values(evaluator.predict(evaluator.dense, range(COUNT))).min() >= (metric != "kl")
    assert found.evidence.isfinite().all()
    return evaluator.values(found).tolist()


@pytest.mark.parametrize("k", [1, 4])
def test_recall_asks_the_dense_index(encoder, flat, k):
    dense, other = embedded(encoder, flat), embedded(encoder.at(SETTING).eval(), flat)
    expected = []
    for i in range(COUNT):
        theirs, ours = nearest_by_loops(dense[i], dense, i, k), nearest_by_loops(other[i], dense, i, k)
        expected.append(len(theirs & ours) / k)
    assert measured(encoder, flat, f"recall@{k}") == pytest.approx(expected)
    assert 0 < sum(expected) < COUNT


def test_a_reindexed_recall_embeds_the_index_anew(encoder, flat):
    dense, other = embedded(encoder, flat), embedded(encoder.at(SETTING).eval(), flat)
    expected = []
    for i in range(COUNT):
        theirs, ours = nearest_by_loops(dense[i], dense, i, 4), nearest_by_loops(other[i], other, i, 4)
        expected.append(len(theirs & ours) / 4)
    assert measured(encoder, flat, "reindexed@4") == pytest.approx(expected)
    assert measured(encoder, flat, "reindexed@4") != measured(encoder, flat, "recall@4")


def test_an_index_embedded_anew_needs_more_images_than_neighbours(encoder, flat):
    """Of ten images an image's nine neighbours are the same nine under any setting."""
    evaluator = Evaluator(encoder, open_images(flat), metric="reindexed@10")
    found = evaluator.predict(encoder.at(SETTING).eval(), range(10))
    with pytest.raises(UserError, match=r"asks for 10 of the 9 neighbours .* 10 images measured together.*reindexed@4"):
        evaluator.values(found)
    with pytest.raises(UserError, match="6 images measured together"):
        saccade.eval(encoder, flat, [SETTING], metric="reindexed@10", limit=6)
    with pytest.raises(UserError, match="11 images measured together"):
        search(encoder, flat, Target.of("2x"), metric="reindexed@10", limit=22)
    assert evaluator.values(evaluator.predict(encoder.at(SETTING).eval(), range(12))).min() < 1.0


@pytest.mark.parametrize("images, remedy", [(1, "give more images"), (2, "give more images"), (3, "or recall@1")])
def test_a_remedy_is_one_that_helps(images, remedy):
    with pytest.raises(UserError, match=f"{remedy}$"):
        choose("recall@5", encodes=True, labelled=False, images=images)


@pytest.mark.parametrize("head", [None, EmbeddingHead("mean", normalise=True)])
def test_cosine_is_that_of_the_embeddings(flat, head):
    vit = make_vit("vit")
    vit.reset_classifier(0)
    model = AdaptiveViT(vit.eval(), head=head)
    pairs = zip(embedded(model, flat), embedded(model.at(SETTING).eval(), flat), strict=True)
    assert measured(model, flat, "cosine") == pytest.approx([cosine(a, b) for a, b in pairs], abs=1e-5)


def test_knn_votes_by_the_dense_index(encoder, sorted_in_classes):
    dense, other = embedded(encoder, sorted_in_classes), embedded(encoder.at(SETTING).eval(), sorted_in_classes)
    labels, expected = open_images(sorted_in_classes).labels, []
    for i in range(COUNT):
        votes = [0.0] * 3
        for j in range(COUNT):
            votes[labels[j]] += math.exp(cosine(other[i], dense[j]) / 0.07) if j != i else 0.0
        expected.append(float(votes.index(max(votes)) == labels[i]))
    evaluator = Evaluator(encoder, open_images(sorted_in_classes), metric="knn")
    assert evaluator.values(evaluator.predict(encoder.at(SETTING).eval(), range(COUNT))).tolist() == expected


@pytest.mark.parametrize("setting", [SETTING, "tome(r=2)", "grid(32)"])
@pytest.mark.parametrize("classifies", [True, False])
@torch.inference_mode()
def test_cells_are_compared_one_by_one(encoder, flat, setting, classifies):
    model = tiny() if classifies else encoder
    theirs, ours = model.at("dense").eval(), model.at(setting).eval()
    expected = []
    for image in inputs(model, flat):
        dense, other = theirs.feature_map(image)[0], ours.feature_map(image)[0]
        height, width = dense.shape[-2:]
        total = 0.0
        for y in range(height):
            for x in range(width):  # the cell of the other grid that this one's centre lies in
                row, column = int((y + 0.5) * other.shape[1] / height), int((x + 0.5) * other.shape[2] / width)
                total += cosine(dense[:, y, x], other[:, row, column])
        expected.append(total / (height * width))
    assert measured(model, flat, "cells", setting) == pytest.approx(expected, abs=2e-4)


@torch.inference_mode()
def test_kl_and_agreement_need_no_labels(flat, sorted_in_classes):
    model = tiny()
    for data in (flat, sorted_in_classes):
        dense, other = embedded(model, data), embedded(model.at(SETTING).eval(), data)
        pairs = [(a.softmax(0).tolist(), b.softmax(0).tolist()) for a, b in zip(dense, other, strict=True)]
        expected = [sum(p * math.log(p / q) for p, q in zip(a, b, strict=True)) for a, b in pairs]
        assert measured(model, data, "kl") == pytest.approx(expected, abs=1e-5)
        same = [float(a.index(max(a)) == b.index(max(b))) for a, b in pairs]
        assert measured(model, data, "agreement") == same


def test_the_usual_metric_and_why():
    usual = [
        (choose(None, encodes=encodes, labelled=labelled, images=n).name, encodes, labelled, n)
        for encodes in (False, True)
        for labelled in (False, True)
        for n in (10, 100)
    ]
    assert [name for name, *_ in usual] == [
        "agreement", "agreement", "top-1", "top-1", "recall@1", "recall@10", "knn", "knn"
    ]  # fmt: skip
    found = choose(None, encodes=True, labelled=False, images=100)
    assert found.why and found.why in found.described() and "nearest" in found.described()
    assert not choose("kl", encodes=False, labelled=False, images=9).why


def test_neighbours_are_not_asked_for_classes_of_one_image():
    """Of fifty photos of fifty things each is wrong under knn, whatever the encoder."""
    few, most = (choose(None, encodes=True, labelled=True, images=50, alone=a) for a in (0.5, 0.98))
    assert few.name == "knn" and most.name == "recall@10" and "98% of the images are the only one" in most.why
    assert choose(None, encodes=False, labelled=True, images=50, alone=1.0).name == "top-1"
    assert choose("knn", encodes=True, labelled=True, images=50, alone=0.98).name == "knn"
    with pytest.raises(UserError, match="needs two images of a class, and every class in photos has one: recall@10"):
        choose("knn", encodes=True, labelled=True, images=50, alone=1.0, where="photos")


def test_an_evaluator_counts_the_images_that_are_alone(tmp_path):
    photos = write_folder(tmp_path / "photos", files("abcdefghijklmnopqrstuvwx", 1))
    assert Evaluator(tiny(num_classes=0), open_images(photos)).metric.name == "recall@10"
    assert Evaluator(tiny(num_classes=0), open_images(write_folder(tmp_path / "more", files()))).metric.name == "knn"


@pytest.mark.parametrize(
    "name, encodes, labelled, said",
    [
        ("cosine", False, True, "for encoders.*this model classifies: top-1, agreement, kl or cells fits"),
        ("kl", True, False, "for classifiers.*no classifier: recall@10, reindexed@10, cosine or cells fits"),
        ("top-1", False, False, "needs a folder for each class.*agreement, kl or cells fits"),
        ("knn", True, False, "needs a folder for each class"),
        ("recall", True, False, "'recall' is not one of .*recall@k"),
        ("recall@0", True, False, "is not one of"),
        ("recall@k", True, False, "k: a number"),
        ("map", True, True, "not one of.*knn or cells fits"),
        ("recall@29", True, False, "29 of the 29 neighbours.*or recall@14"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_with_those_that_do(name, encodes, labelled, said):
    with pytest.raises(UserError, match=said) as caught:
        choose(name, encodes=encodes, labelled=labelled, images=30)
    assert "\n" not in str(caught.value)


def test_a_loss_is_in_the_unit_of_the_metric():
    assert Metric("recall@10").aim(Target.of(max_drop="1%")) == "at most 1% lost"
    assert Metric("kl").aim(Target.of(max_drop=0.05)) == "kl up by at most 0.05 nats"
    assert Metric("cosine").aim(Target.of(max_drop="0.02")) == "cosine down by at most 0.02"
    assert Metric("cosine").aim(Target.of("2x")) == "2× faster"
    with pytest.raises(UserError, match=r"per cent is a share, and kl is none.*--max-drop 0.01 \(nats\)"):
        Metric("kl").aim(Target.of(max_drop="1%"))


def test_less_is_better_where_it_is():
    kl, values = Metric("kl"), torch.tensor([0.1, 0.3]).double()
    assert kl.better(Interval(-0.2, -0.3, -0.1)) == Interval(0.2, 0.1, 0.3)
    assert (
        kl.interval(values).low >= 0 and kl.worded(Interval(0.2, 0.1, 0.3), False) == "0.200 nats (95 %: 0.100 … 0.300)"
    )
    assert Metric("recall@10").interval(torch.ones(40)).low < 1.0  # forty images are no certainty


def test_eval_says_the_metric_and_ranks_by_it(encoder, flat, tmp_path):
    found = saccade.eval(encoder, flat, ["tome(r=1..2)", SETTING], metric="cosine", seconds=0, out=tmp_path / "out")
    dense, *_, worst = found.rows
    assert dense.metric == "cosine" and dense.value.three() == (1.0, 1.0, 1.0)
    assert worst.value.mean < min(row.value.mean for row in found.rows[1:-1])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "cosine of an image" in page and "cosine %" not in page and f"{worst.value.mean:.4f}" in page
    assert f"{worst.value.mean:.4f}" in str(found)
    table = csv.DictReader((tmp_path / "out" / "scores.csv").read_text(encoding="utf-8").splitlines())
    listed = [(row["metric"], float(row["value"]), row["family"], "top1" in row) for row in table]
    families = ["dense", "reduction", "reduction", "random"]  # also of what the page draws as a curve
    assert listed == [("cosine", r.value.mean, f, False) for r, f in zip(found.rows, families, strict=True)]
    assert all(row["metric"] == "cosine" and "top1" not in row for row in found.to_dict()["rows"])
    with pytest.raises(UserError, match="metric 'top-1' is for classifiers"):
        saccade.eval(encoder, flat, metric="top-1")


def test_labels_of_other_classes_can_be_left_unread(sorted_in_classes):
    model = tiny(num_classes=7)
    with pytest.raises(UserError, match="--metric agreement"):
        accuracy.evaluate(model, sorted_in_classes)
    assert accuracy.evaluate(model, sorted_in_classes, metric="agreement").rows[0].value.mean == 1.0


@torch.inference_mode()
def test_a_search_for_schedules_can_go_by_cells(encoder, flat):
    evaluator = Evaluator(encoder, open_images(flat), metric="cells")
    distance, view = Distance(evaluator, range(COUNT), images=6), encoder.at("tome(r=2)").eval()
    places = [i * COUNT // 6 for i in range(6)]
    own = evaluator.values(evaluator.predict(view, places))
    assert sum(distance.of("tome(r=2)")) == pytest.approx((1 - own).sum().item(), abs=1e-3)
    assert sum(distance.of("dense")) == pytest.approx(0.0, abs=1e-5)
    found = schedules(evaluator, list(range(COUNT)), partial(macs, ratio=1.2), Allowance(), tries=3)
    assert found.candidates


@torch.inference_mode()
def test_real_photos_find_their_neighbours(data_dir):
    """Photos of a few classes, which a trained encoder tells apart: what leaves few tokens keeps most neighbours."""
    weights = data_dir / "vit_tiny_patch16_224.safetensors"
    model = saccade.create_model("vit_tiny_patch16_224", weights=weights, num_classes=0)
    photos = open_images(data_dir / "photos50.zip")
    views = {name: model.at(name).eval() for name in ("dense", "tome(r=8)")}
    evaluator = Evaluator(model, photos, metric="recall@3")
    prepare = evaluator.preprocess()
    vectors = {n: [v(prepare(photos.read(i)).unsqueeze(0)).logits[0] for i in range(24)] for n, v in views.items()}
    index = [model(prepare(photos.read(i)).unsqueeze(0)).logits[0] for i in range(len(photos))]
    found = evaluator.values(evaluator.predict(views["tome(r=8)"], range(24))).tolist()
    for i, value in enumerate(found):
        near = [
            torch.stack([F.cosine_similarity(vectors[name][i], other, dim=0) for other in index]).index_fill(
                0, torch.tensor([i]), -2.0
            )
            for name in views
        ]
        theirs, ours = ({*row.topk(3).indices.tolist()} for row in near)
        assert value == pytest.approx(len(theirs & ours) / 3)
    assert sum(found) / len(found) > 0.7
