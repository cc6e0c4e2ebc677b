"""Where speed, masks, boxes, retrieval and analyses have no figure: refused or said, never 0, 100 % or NaN."""

from __future__ import annotations

import json

import numpy as np
import pytest
import test_detection
import test_image_text
import torch
from PIL import Image
from test_segmentation import files as labelled
from test_segmentation import pair, small

import saccade
from data_helpers import encode, picture, write_folder
from saccade.analysis import cka, correspondence
from saccade.analysis.merging import ratio
from saccade.analysis.usage import usage
from saccade.errors import UserError
from saccade.evaluation.defined import require_choice, require_finite
from saccade.evaluation.speed import bench
from saccade.reports import token_map
from saccade.tasks.detection.average_precision import evaluate_detection
from saccade.tasks.detection.detector import look
from saccade.tasks.image_text.zero_shot import evaluate_words
from saccade.tasks.segmentation.class_picture import paint
from saccade.tasks.segmentation.mean_iou import evaluate_segmentation, interval, mean_iou
from saccade.tasks.segmentation.panoptic_quality import evaluate_panoptic
from small_runs import files, tiny


def broken(model: torch.nn.Module, value: float = float("nan")) -> torch.nn.Module:
    with torch.no_grad():
        model.vit.blocks[0].attn.qkv.weight.fill_(value)
    return model


def silent(model: torch.nn.Module, *layers: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for layer in layers:
            for weight in layer.parameters():
                weight.zero_()
    return model


# Speed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_model_without_finite_logits_is_timed_and_named(value):
    rows = bench(broken(tiny(), value), ["evit(0.5)"], batch=[2], seconds=0)
    assert [row.finite for row in rows] == [False, False] and all(row.p50_ms > 0 for row in rows)
    shown = repr(rows)
    assert "NaN or infinity" in shown and "evit(0.5)" in shown
    assert all(row["finite"] is False for row in rows.to_dicts())


def test_what_overflows_in_a_number_type_alone_is_named_there():
    model = tiny()
    with torch.no_grad():
        model.vit.head.weight.mul_(1e7)
    for dtype, finite in (("fp32", True), ("fp16", False)):
        rows = bench(model, batch=[1], seconds=0, runner=saccade.runners.runner.Runner(dtype))
        assert [row.finite for row in rows] == [finite]
    assert not bench(tiny(), batch=[1], seconds=0)[0].verdict.startswith("NaN")


def test_tune_by_speed_alone_names_what_is_of_no_use(tmp_path, monkeypatch):
    from small_runs import shorten

    shorten(monkeypatch)
    found = saccade.tune(broken(tiny()), None, "2x", out=tmp_path, seconds=0)
    assert "0 of" in found.recommendation[0] and "Of no use" in found.recommendation[0]


# Pictures


def test_nothing_is_drawn_of_what_is_not_finite(tmp_path):
    photo, images = (
        picture(64, 64),
        write_folder(tmp_path / "images", {f"{i}.png": encode(picture()) for i in range(2)}),
    )
    out = tmp_path / "out.png"
    for draw in (
        lambda: saccade.view(broken(tiny()), photo, out=out),
        lambda: saccade.view(broken(tiny()), photo, "evit(0.5)", out=out),
        lambda: token_map(broken(tiny()), photo),
        lambda: usage(broken(tiny()), images, out=out),
        lambda: paint(broken(small()), photo),
        lambda: look(broken(test_detection.tiny()), photo),
    ):
        with pytest.raises(UserError, match="hold NaN or infinity") as error:
            draw()
        assert "\n" not in str(error.value) and not out.exists()


# Segmentation


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("pairs"), labelled(2)))


def test_a_segmenter_without_answers_is_refused(pairs):
    zeroed = small("linear")
    for model, said in (
        (broken(small()), "hold NaN or infinity"),
        (silent(zeroed, zeroed.decoder), "scores all classes alike"),
        (small(classes=("all",)), "mIoU is not defined for 1 classes"),
    ):
        with pytest.raises(UserError, match=said) as error:
            evaluate_segmentation(model, pairs, void=9)
        assert "\n" not in str(error.value)


def test_labels_that_are_all_void_have_no_iou(tmp_path):
    nothing = Image.fromarray(np.full((40, 60), 9, dtype=np.uint8))
    write_folder(tmp_path, {"images/0.png": encode(pair(0)[0]), "labels/0.png": encode(nothing)})
    with pytest.raises(UserError, match="all are void"):
        evaluate_segmentation(small(), str(tmp_path), void=9)


def test_labels_that_are_all_void_have_no_panoptic_quality(tmp_path):
    nothing = Image.new("RGB", (60, 40), (9, 0, 0))
    write_folder(tmp_path, {"images/0.png": encode(pair(0)[0]), "panoptic/0.png": encode(nothing)})
    with pytest.raises(UserError, match="all is void"):
        evaluate_panoptic(small(), str(tmp_path), ["spot"], void=9)


def test_one_image_has_no_spread():
    counts = [torch.tensor([[3, 4]]), torch.tensor([[5, 5]]), torch.tensor([[4, 6]])]
    assert interval(mean_iou, counts).three()[1:] == (0.0, 1.0)
    assert interval(mean_iou, counts, counts).three() == (0.0, -1.0, 1.0)
    assert ratio(torch.tensor([1.0]), torch.tensor([2.0])).three() == (0.5, 0.0, 1.0)


# Detection


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes")
    write_folder(folder, {f"{i}.png": encode(picture(64, 64, seed=i)) for i in range(2)})

    def written(count: int) -> str:
        found = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(2)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1, "bbox": [8, 8, 30, 30], "area": 900, "iscrowd": 0}
                for i in range(count)
            ],
            "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}],
        }
        (folder / f"{count}.json").write_text(json.dumps(found))
        return str(folder / f"{count}.json")

    return written


def test_a_detector_without_answers_is_refused(boxes):
    model = test_detection.tiny()
    assert evaluate_detection(model, boxes(2)).rows[0].ap.mean >= 0
    with pytest.raises(UserError, match="no objects in these images"):
        evaluate_detection(model, boxes(0))
    with pytest.raises(UserError, match="scores all cells and queries alike"):
        evaluate_detection(silent(model, model.task_head.heads.seen, model.task_head.heads.shift), boxes(2))
    with pytest.raises(UserError, match="hold NaN or infinity"):
        evaluate_detection(broken(test_detection.tiny()), boxes(2))


# Images and texts


def test_towers_without_answers_are_refused(tmp_path):
    named = {f"{name}/{i}.png": encode(picture(seed=i)) for i, name in enumerate(("cat", "dog", "cat"))}
    classes = str(write_folder(tmp_path / "classes", named))
    one = str(write_folder(tmp_path / "one", {k: v for k, v in named.items() if "cat" in k}))
    texts = {f"{i}.txt": f"number {i}".encode() for i in range(3)}
    pictures = {f"{i}.png": encode(picture(seed=i)) for i in range(3)}
    told = str(write_folder(tmp_path / "told", {**pictures, **texts}))
    alike = str(write_folder(tmp_path / "alike", {**pictures, **dict.fromkeys(texts, b"a photo")}))
    good = test_image_text.tiny()
    assert evaluate_words(good, classes).rows and evaluate_words(good, told).rows
    for data, said in (
        (one, "accuracy is not defined for 1 classes"),
        (alike, "recall is not defined for 1 different"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate_words(good, data)
    for data in (classes, told):
        with pytest.raises(UserError, match="hold NaN or infinity"):
            evaluate_words(broken(test_image_text.tiny()), data)
    lost = test_image_text.tiny()
    with torch.no_grad():
        next(iter(lost.task_head.space.texts.parameters())).fill_(float("nan"))
    with pytest.raises(UserError, match="embeddings of texts"):
        evaluate_words(lost, told)


# Analyses


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("photos"), files(each=8)))


@pytest.mark.parametrize("what", ["cka", "correspondence", "relevance(images=2)", "merging", "ensemble(sizes=2)"])
def test_an_analysis_of_nan_is_refused_by_name(photos, what):
    settings = ["dense", "tome(r=2)"]
    assert saccade.analyze(tiny(), photos, settings, what)
    with pytest.raises(UserError, match=r"of `(dense|tome\(r=2\))` hold NaN or infinity") as error:
        saccade.analyze(broken(tiny()), photos, settings, what)
    assert "\n" not in str(error.value)


def test_shape_or_texture_needs_an_answer(tmp_path):
    names = [f"{s}/{s}{k}-{t}{k}.png" for s in "abc" for t in "abc" for k in range(2)]
    pictures = write_folder(tmp_path, {n: encode(picture(64, 64, seed=i)) for i, n in enumerate(names)})
    for model, said in ((silent(m := tiny(), m.vit.head), "scores all classes alike"), (broken(tiny()), "NaN")):
        with pytest.raises(UserError, match=said):
            saccade.analyze(model, str(pictures), ["dense"], "bias")


def test_a_head_of_zeros_rests_on_no_place(photos):
    for what in ("relevance(images=1)", "ensemble(sizes=2)"):
        with pytest.raises(UserError, match="scores all classes alike"):
            saccade.analyze(silent(m := tiny(), m.vit.head), photos, ["dense", "evit(0.5)"], what)
    with pytest.raises(UserError, match="depends on no attention"):
        saccade.analyze(silent(m := tiny(), *(b.attn.proj for b in m.vit.blocks)), photos, ["dense"], "relevance")
    with pytest.raises(UserError, match="no classifier"):
        saccade.analyze(tiny(num_classes=0), photos, ["dense"], "relevance")


def test_the_relevance_of_one_image_is_no_certainty(photos):
    found = saccade.analyze(tiny(), photos, ["dense"], "relevance(images=1, photos=0)")["relevance"].data["half"]
    assert (found["dense"]["low"], found["dense"]["high"]) == (0.0, 1.0)


def test_images_that_are_all_alike_have_no_cka(tmp_path):
    blank = {f"{i}.png": encode(Image.new("RGB", (64, 64), (90, 90, 90))) for i in range(6)}
    with pytest.raises(UserError, match="there is no CKA"):
        saccade.analyze(tiny(), str(write_folder(tmp_path, blank)), ["dense"], "cka")
    assert cka.similarity(torch.zeros(2, 2)).isnan().all()


def test_tokens_that_are_all_alike_are_no_hit():
    owner, close = torch.arange(4).repeat(2, 1), torch.tensor([True, True, False, False])
    alike = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.1, 0.1]])
    assert correspondence.hits(alike, owner, close)[0].tolist() == [False, True]
    assert correspondence.hits(alike[:1], torch.zeros(1, 4, dtype=torch.int64), close)[0].tolist() == [True]


# The rules themselves


def test_rules_let_through_what_is_defined():
    x = torch.randn(3, 2, 4)
    assert require_finite(x, "dense") is x and require_choice(x, "dense") is x
    assert require_choice(torch.zeros(3, 1), "dense").shape == (3, 1)  # one choice is refused elsewhere, by name
    x[1, 0, 2] = float("inf")
    with pytest.raises(UserError, match=r"1 of 3 images"):
        require_finite(x, "dense")
    x[2] = 1.0
    with pytest.raises(UserError, match=r"1 of 3 images"):
        require_choice(x, "dense")
