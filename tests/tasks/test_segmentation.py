"""Segmentation: heads, windows, pairs of images and labels, mIoU and panoptic quality, training, the command."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

import saccade
from data_helpers import bare_png, encode, write_folder, write_zip
from oracles import counted_macs, make_images, make_vit, randomise
from saccade.data import ImageError, Preprocess
from saccade.errors import UserError
from saccade.tasks.segmentation.class_picture import paint
from saccade.tasks.segmentation.coco_panoptic import open_panoptic
from saccade.tasks.segmentation.mean_iou import (
    Counts,
    accuracy,
    count,
    evaluate_segmentation,
    interval,
    iou,
    mean_iou,
)
from saccade.tasks.segmentation.panoptic_data import PanopticSet
from saccade.tasks.segmentation.panoptic_quality import compare, evaluate_panoptic, mean_quality, parts
from saccade.tasks.segmentation.segmentation_data import decode_ids, lookup, open_pixels
from saccade.tasks.segmentation.segmentation_heads import HEADS, MaskTransformer, build_head
from saccade.tasks.segmentation.segmentation_task import PixelExamples
from saccade.tasks.segmentation.segmenter import OVERLAP, VOID, SegmentationHead, fitted, look, segmenter, windows
from saccade.training.augmentation import Augment, isolated
from saccade.training.batch_stream import BatchStream
from saccade.training.checkpoints import newest, read_state
from saccade.training.config import read_config
from saccade.training.logging import read_table

NAMES = ("left", "right", "spot")
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": [32, 48]}


def small(kind: str = "mask", setting: str = "", classes: tuple[str, ...] = NAMES, **shape) -> saccade.AdaptiveViT:
    """A segmenter with random weights in which every error shows."""
    vit = make_vit("vit", **{"embed_dim": 96, "img_size": (32, 48), "patch_size": 8, **shape})
    made = segmenter(saccade.AdaptiveViT(vit, setting), classes, kind)
    randomise(made.task_head.decoder)
    return made.eval()


def pair(seed: int, size: tuple[int, int] = (40, 60), void: int = 9) -> tuple[Image.Image, np.ndarray]:
    """A green and a red side with a blue spot, noisy, and a rim of void."""
    h, w = size
    random = np.random.default_rng(seed)
    labels = np.zeros(size, dtype=np.uint8)
    labels[:, int(w * random.uniform(0.35, 0.65)) :] = 1
    top, left = random.integers(4, h - 19), random.integers(4, w - 19)
    labels[top : top + 16, left : left + 16] = 2
    colours = np.array([[40, 200, 40], [200, 40, 40], [40, 40, 220]])[labels]
    pixels = np.clip(colours + random.normal(0, 15, colours.shape), 0, 255).astype(np.uint8)
    labels[:2] = void
    return Image.fromarray(pixels), labels


def files(count: int, split: str = "", first: int = 0, **of) -> dict[str, bytes]:
    made = {}
    for i in range(first, first + count):
        image, labels = pair(i, **of)
        made[f"{split}images/{i:02d}.png"] = encode(image)
        made[f"{split}labels/{i:02d}.png"] = encode(Image.fromarray(labels))
    return made


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("pairs")
    return str(write_folder(root, {**files(24, "train/"), **files(8, "val/", first=50)}))


# Heads


@torch.no_grad()
def test_the_linear_head_is_one_product_a_cell():
    head, features = randomise(build_head(12, "linear", classes=5)), torch.randn(2, 12, 3, 4)
    logits = head(features)
    for b, y, x in np.ndindex(2, 3, 4):
        oracle = head.proj.weight @ features[b, :, y, x] + head.proj.bias
        assert torch.allclose(logits[b, :, y, x], oracle, atol=1e-5)


@torch.no_grad()
def test_the_mask_transformer_is_segmenters_formula():
    head = randomise(MaskTransformer(64, 5, layers=2)).eval()
    features = torch.randn(2, 64, 3, 4)
    logits = head(features)
    for b in range(2):
        cells = [head.embed(features[b, :, y, x]) for y in range(3) for x in range(4)]
        tokens = torch.stack([*cells, *head.class_tokens[0]]).unsqueeze(0)
        for block in head.blocks:
            tokens = block(tokens)
        tokens = head.norm(tokens)[0]
        for cell in range(12):
            patch = head.cell_proj.weight @ tokens[cell]
            said = []
            for k in range(5):
                klass = head.class_proj.weight @ tokens[12 + k]
                said.append(float(patch @ klass / (patch.norm() * klass.norm())))
            row = torch.tensor(said)
            row = (row - row.mean()) / torch.sqrt(row.var(unbiased=False) + 1e-5)
            oracle = row * head.mask_norm.weight + head.mask_norm.bias
            assert torch.allclose(logits[b, :, cell // 4, cell % 4], oracle, atol=1e-4)


@pytest.mark.parametrize("kind", HEADS)
def test_macs_of_heads_are_counted_ones(kind):
    head = build_head(96, kind, classes=7).eval()
    features = torch.randn(1, 96, 5, 6)
    assert head.macs(30) == pytest.approx(counted_macs(lambda: head(features)), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "knobs", "words"),
    [
        ("maks", {"classes": 3}, "did you mean 'mask'"),
        (None, {"classes": 3}, "None"),
        ("linear", {"classes": 3, "layers": 2}, "layers"),
        ("mask", {"classes": 0}, "classes=0"),
        ("mask", {"classes": 3, "layers": 1000}, "layers=1000"),
        ("mask", {"classes": 3, "dim": 7}, "dim"),
        ("mask", {}, "how many classes"),
        ("mask", {"classes": True}, "classes=True"),
    ],
)
def test_bad_heads_are_one_line(kind, knobs, words):
    with pytest.raises(UserError, match=words) as error:
        build_head(32, kind, **knobs)
    assert "\n" not in str(error.value)


# The segmenter

SETTINGS = ["dense", "grid(4)", "grid(12)", "grid(16)", "tome(r=5)", "evit(0.5)", "grid(6) | evit(0.6)"]


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", HEADS)
def test_logits_are_the_heads_on_the_dense_map_enlarged(kind, setting):
    model = small(kind, setting)
    for size in ((32, 48), (30, 50)):  # patches do not divide the second
        images = make_images(model.vit, 2, size)
        out = model(images)
        plain = saccade.AdaptiveViT(model.vit, setting).eval().feature_map(images)
        oracle = F.interpolate(model.task_head.decoder(plain), size=size, mode="bilinear", align_corners=False)
        assert out.logits.shape == (2, 3, *size) and torch.allclose(out.logits, oracle, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS)
def test_macs_are_counted_ones(setting):
    model = small("mask", setting)
    images = make_images(model.vit, 1)
    trace = model(images).trace
    assert trace.macs().item() == pytest.approx(counted_macs(lambda: model(images)), rel=1e-3)
    cells = trace.grid[0] * trace.grid[1]
    assert trace.head == model.task_head.decoder.macs(cells) > 0


@torch.no_grad()
@pytest.mark.parametrize("setting", ["dense", "tome(r=5)", "evit(0.5)"])
def test_a_batch_equals_its_images_one_by_one(setting):
    model = small("mask", setting)
    images = make_images(model.vit, 3)
    each = torch.cat([model(image.unsqueeze(0)).logits for image in images])
    assert torch.allclose(model(images).logits, each, atol=1e-4)


def test_a_view_shares_all_parameters():
    model = small()
    view = model.at("grid(16) | evit(0.5)")
    assert view.task_head is model.task_head and view.vit is model.vit and not view.training


@torch.no_grad()
@pytest.mark.parametrize("kind", HEADS)
def test_a_saved_segmenter_opens_as_it_was(kind, tmp_path):
    model = small(kind, "grid(16)")
    model.task_head.void = 9
    model.save(str(tmp_path / "model"))
    opened, images = saccade.load(tmp_path / "model"), make_images(model.vit, 2)
    assert type(opened.task_head) is SegmentationHead and not opened.training and not opened.task_head.decoder.training
    assert (opened.task_head.classes, opened.task_head.void, str(opened.setting)) == (NAMES, 9, "grid(16)")
    assert torch.equal(opened(images).logits, model(images).logits)
    from safetensors.torch import load_file

    held = load_file(tmp_path / "model" / "model.safetensors")
    assert {key.split(".")[0] for key in held} == {"vit", "decoder"}
    model.vit.load_state_dict({k.removeprefix("vit."): v for k, v in held.items() if k.startswith("vit.")})


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 3},
        {"classes": ["a", "b"]},
        {"decoder": None},
        {"decoder": {"kind": "mask", "classes": 3, "layers": 10**9}},
        {"decoder": {"kind": "os.system", "classes": 3}},
        {"void": "x"},
        {"void": -1},
        {"task": "other"},
        {"task": ["segment"]},
    ],
    ids=str,
)
def test_a_malformed_folder_is_one_line(change, tmp_path):
    small().save(str(tmp_path))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["saccade"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        saccade.load(tmp_path)
    assert "\n" not in str(error.value)


def test_what_cannot_be_is_refused():
    vit = make_vit("vit", img_size=(32, 48), patch_size=8)
    with pytest.raises(UserError, match="reset_classifier"):
        saccade.AdaptiveViT(vit, head=SegmentationHead(build_head(96, "linear", classes=3), NAMES))
    with pytest.raises(UserError, match="covers them"):
        small().at("grid(20, fit='pad')")
    with pytest.raises(UserError, match="2 names"):
        SegmentationHead(build_head(96, "linear", classes=3), ("a", "b"))
    with pytest.raises(UserError, match="slice"):
        look(small(), torch.zeros(1, 3, 32, 48), "slice")


# Looking at images of any size


@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_windows_cover_everything_and_overlap(h, w, wh, ww):
    seen = np.zeros((h, w), dtype=int)
    found = list(windows((h, w), (wh, ww)))
    for top, left, a, b in found:
        assert top >= 0 and left >= 0 and top + a <= h and left + b <= w and (a, b) == (min(h, wh), min(w, ww))
        seen[top : top + a, left : left + b] += 1
    assert seen.min() >= 1 and len(set(found)) == len(found)
    tops = sorted({f[0] for f in found})
    for one, two in pairwise(tops):
        assert one + wh - two >= int(wh * OVERLAP) - 1


@torch.no_grad()
def test_sliding_is_the_mean_of_windows():
    model = small()
    images = make_images(model.vit, 2, (50, 70))
    seen = look(model, images, "slide")
    total, times = torch.zeros(2, 3, 50, 70), torch.zeros(50, 70)
    macs = 0.0
    for top, left, h, w in windows((50, 70), (32, 48)):
        out = model(images[:, :, top : top + h, left : left + w])
        for y in range(h):
            for x in range(w):
                total[:, :, top + y, left + x] += out.logits[:, :, y, x]
                times[top + y, left + x] += 1
        macs += out.trace.macs()[0].item()
    assert torch.allclose(seen.logits, total / times, atol=1e-5) and seen.macs == macs and times.max() > 1


@torch.no_grad()
def test_all_ways_agree_at_the_models_own_size():
    model = small()
    images = make_images(model.vit, 2)
    found = [look(model, images, how) for how in ("fit", "whole", "slide")]
    assert all(torch.equal(f.logits, found[0].logits) and f.macs == found[0].macs for f in found)


@torch.no_grad()
def test_fitting_keeps_area_and_proportions():
    assert fitted((360, 480), (240, 320)) == (240, 320) and fitted((480, 360), (240, 320)) == (320, 240)
    model = small()
    images = make_images(model.vit, 1, (64, 96))
    seen = look(model, images, "fit")
    half = F.interpolate(images, size=(32, 48), mode="bicubic", antialias=True)
    oracle = F.interpolate(model(half).logits, size=(64, 96), mode="bilinear")
    assert torch.allclose(seen.logits, oracle, atol=1e-5)
    assert seen.macs == look(model, half, "whole").macs < look(model, images, "whole").macs


# Pairs of images and labels


def test_folders_and_zips_with_and_without_splits(tmp_path):
    given = {**files(3, "train/"), **files(2, "val/", first=7)}
    folder, packed = write_folder(tmp_path / "a", given), write_zip(tmp_path / "a.zip", given)
    for path in (folder, packed):
        train, held = open_pixels(path, "train", NAMES, 9), open_pixels(path, None, NAMES, 9)
        assert (len(train), len(held), held.images.split) == (3, 2, "val") and not train.failures
        image, labels = train.read(1)
        oracle_image, oracle = pair(1)
        assert np.array_equal(np.asarray(image), np.asarray(oracle_image))
        assert np.array_equal(labels, np.where(oracle == 9, VOID, oracle))
    plain = write_folder(tmp_path / "b", files(4))
    assert len(open_pixels(plain, None, NAMES, 9)) == 4
    again = pickle.loads(pickle.dumps(open_pixels(packed, "train", NAMES, 9)))
    assert np.array_equal(again.read(2)[1], open_pixels(packed, "train", NAMES, 9).read(2)[1])
    with pytest.raises(UserError, match="name one of train, val"):
        open_pixels(folder, "test", NAMES, 9)
    with pytest.raises(UserError, match="it has none"):
        open_pixels(plain, "val", NAMES, 9)
    with pytest.raises(UserError, match="lay them out as"):
        open_pixels(write_folder(tmp_path / "c", {"images/a.png": b"", "labels/b.png": b""}), None, NAMES)
    with pytest.raises(UserError, match="does not exist"):
        open_pixels(tmp_path / "none", None, NAMES)


@pytest.mark.parametrize("void", [0, 2, 5, 255, 4000])
def test_classes_are_the_values_that_are_not_void_in_order(void):
    table, k = lookup(5, void), 0
    for value in range(6):
        if value == void:
            assert table[value] == VOID
        elif k < 5:
            assert table[value] == k
            k += 1
    assert k == 5 and table[void] == VOID and (table[table >= 0] != VOID).sum() == 5


def test_label_files_of_all_kinds(tmp_path):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(labels).convert("P")
    palette.putdata(list(range(12)))
    wide = Image.fromarray(labels.astype(np.uint16) * 300)
    for image, oracle in ((Image.fromarray(labels), labels), (palette, labels), (wide, labels.astype(int) * 300)):
        assert np.array_equal(decode_ids(encode(image), "x"), oracle)
    for data, words in (
        (encode(Image.fromarray(labels).convert("RGB")), "mode RGB"),
        (b"no image", "not a readable image"),
        (encode(pair(0)[0].convert("L"))[:300], "x: "),
        (bare_png(12_000, 12_000, b""), "144,000,000 pixels, limit"),
        (bare_png(60_000, 60_000, b""), "pixels, the most Pillow opens"),
    ):
        with pytest.raises(ImageError, match=words) as error:
            decode_ids(data, "x")
        assert "\n" not in str(error.value)


def spoiled(split: str = "") -> dict[str, bytes]:
    """Pairs that cannot be used, each for a reason of its own."""
    image, labels = pair(0)
    good, half = encode(image), Image.fromarray(labels[:20])
    return {
        f"{split}images/size.png": good,
        f"{split}labels/size.png": encode(half),
        f"{split}images/value.png": good,
        f"{split}labels/value.png": encode(Image.fromarray(np.where(labels == 2, 7, labels).astype(np.uint8))),
        f"{split}images/torn.png": good[:90],
        f"{split}labels/torn.png": encode(Image.fromarray(labels)),
        f"{split}images/alone.png": good,
        f"{split}labels/lost.png": encode(Image.fromarray(labels)),
    }


REASONS = {
    "labels/size.png": "60×20 labels for 60×40 pixels",
    "labels/value.png": "holds 7",
    "images/torn.png": "",
    "images/alone.png": "has no labels",
    "labels/lost.png": "has no image",
}


def test_pairs_that_cannot_be_used_are_named(tmp_path):
    found = open_pixels(write_folder(tmp_path, {**files(4), **spoiled()}), None, NAMES, 9)
    counted = count(small(), found, range(len(found)), "fit", 3, lambda done: None)
    assert len(counted.places) == 4 and found.failures.keys() == REASONS.keys()
    assert all(REASONS[name] in reason for name, reason in found.failures.items())
    with pytest.raises(UserError, match="5 of 5 images"):
        bad = open_pixels(write_folder(tmp_path / "bad", spoiled()), None, NAMES, 9)
        count(small(), bad, range(len(bad)), "fit", 3, lambda done: None)


def _examples(path: str, **of) -> PixelExamples:
    preprocess = Preprocess.of(saccade.create_model("vit_tiny_patch16_224", **TINY).vit)
    return PixelExamples(open_pixels(path, "train", NAMES, 9), Augment(**{"vflip": 0.5, **of}), preprocess)


def test_labels_follow_their_image(pairs):
    """The image is its labels painted, so what a view shows tells where its labels should be."""
    examples, views = _examples(pairs, scale=(0.2, 1.0)), 0
    paints = torch.tensor([[40, 200, 40], [200, 40, 40], [40, 40, 220]])
    for seed in range(30):
        with isolated(seed):
            image, labels = examples.view(examples.read(seed % 24), seed % 24)
        assert image.shape == (3, 32, 48) and labels.shape == (32, 48)
        assert image.dtype == labels.dtype == torch.uint8
        near = (image.permute(1, 2, 0).unsqueeze(2).int() - paints).square().sum(-1).argmin(-1)
        known = labels != VOID
        assert (near == labels)[known].float().mean() > 0.9, seed
        views += int((~known).any())
    assert views > 3  # void is kept as void


def test_views_differ_and_repeat_and_workers_change_nothing(pairs):
    runs = [
        list(BatchStream(_examples(pairs, color_jitter=0.3), batch=6, seed=2, workers=workers).run(0, 6))
        for workers in (0, 0, 2)
    ]
    for views in zip(*runs, strict=True):
        assert all(torch.equal(v.images, views[0].images) and torch.equal(v.labels, views[0].labels) for v in views)
    assert len({v.images.numpy().tobytes() for v in runs[0]}) == 6
    other = next(BatchStream(_examples(pairs, color_jitter=0.3), batch=6, seed=3, workers=0).run(0, 1))
    assert not torch.equal(other.images, runs[0][0].images)


# Measures


def _random_counts(n: int = 7, k: int = 4, seed: int = 0) -> tuple[Counts, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    said = torch.randint(k, (n, 10, 12), generator=generator)
    there = torch.where(torch.rand(n, 10, 12, generator=generator) < 0.5, said, (said + 1) % k)
    there[torch.rand(n, 10, 12, generator=generator) < 0.1] = VOID
    logits = F.one_hot(said, k).movedim(-1, 1).float()
    rows = [Counts.of(a, b.to(torch.uint8)) for a, b in zip(logits, there, strict=True)]
    return Counts(torch.arange(n), *(torch.stack(part) for part in zip(*rows, strict=True))), said, there


def test_miou_is_torchmetrics_and_the_definition():
    from torchmetrics.classification import MulticlassJaccardIndex

    counts, said, there = _random_counts()
    sums = [part.sum(0).double() for part in counts.sums]
    metric = MulticlassJaccardIndex(4, ignore_index=VOID)
    assert mean_iou(*sums).item() == pytest.approx(metric(said, there).item(), abs=1e-6)
    known = there != VOID
    for k in range(4):
        a, b = (said == k) & known, (there == k)
        assert iou(*sums)[k].item() == pytest.approx(((a & b).sum() / (a | b).sum()).item(), abs=1e-6)
    assert accuracy(*sums).item() == pytest.approx((said == there)[known].double().mean().item())
    absent = [torch.tensor([3.0, 0.0]), torch.tensor([3.0, 0.0]), torch.tensor([4.0, 0.0])]
    assert mean_iou(*absent).item() == 0.75  # a class that is neither there nor said does not count


def test_intervals_are_of_the_whole_set_and_paired():
    counts, _, _ = _random_counts(30)
    found = interval(mean_iou, counts.sums)
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(mean_iou(*(part.sum(0).double() for part in counts.sums)).item())
    generator = torch.Generator().manual_seed(5)  # an oracle that draws image by image, others than the code's
    oracle = []
    for _ in range(2000):
        rows = torch.randint(30, (30,), generator=generator)
        oracle.append(mean_iou(*(part[rows].sum(0).double() for part in counts.sums)).item())
    assert found.low == pytest.approx(np.quantile(oracle, 0.025), abs=0.003)
    assert found.high == pytest.approx(np.quantile(oracle, 0.975), abs=0.003)
    same = interval(mean_iou, counts.sums, counts.sums)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    other, _, _ = _random_counts(30, seed=1)
    delta = interval(mean_iou, counts.sums, other.sums)
    assert delta.mean == pytest.approx(found.mean - interval(mean_iou, other.sums).mean)
    one = interval(mean_iou, [part[:1] for part in counts.sums])
    assert (one.low, one.high) == (0, 1) and 0 < one.mean < 1  # one image has no spread


def test_an_evaluation_says_what_ran(pairs):
    model = small()
    rows, failures = evaluate_segmentation(model, pairs, ["grid(16)", "evit(0.5)"], void=9, batch=3)
    assert [r.setting for r in rows] == ["dense", "grid(16)", "evit(0.5)"] and not failures
    assert rows[0].images == 8 and rows[0].delta is None and rows[1].delta is not None
    assert rows[0].gmacs > rows[2].gmacs > rows[2].decoder_gmacs > 0 and rows[1].mac_ratio > 2
    assert json.loads(json.dumps(rows[1].to_dict()))["classes"].keys() == set(NAMES)
    pixels = open_pixels(pairs, "val", NAMES, 9)
    hits = total = 0
    for i in range(8):
        image, labels = pixels.read(i)
        x = Preprocess.of(model.vit).normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1)).unsqueeze(0)
        with torch.no_grad():
            best = look(model, x).logits[0].argmax(0).numpy()
        hits, total = hits + (best == labels).sum(), total + (labels != VOID).sum()
    assert rows[0].pixel_accuracy.mean == pytest.approx(hits / total)
    again, _ = evaluate_segmentation(model, pairs, void=9, batch=1)
    assert again[0].miou == rows[0].miou
    with pytest.raises(UserError, match="no method"):
        evaluate_segmentation(model, pairs, ["tomme(r=3)"], void=9)


def test_images_of_other_sizes_are_compared_at_their_own(tmp_path):
    given = {**files(2), **files(2, first=5, size=(60, 40)), **files(1, first=9, size=(26, 90))}
    rows, _ = evaluate_segmentation(small(), str(write_folder(tmp_path, given)), void=9, batch=4)
    assert rows[0].images == 5


# Panoptic quality


def test_parts_are_what_hangs_together():
    random = np.random.default_rng(0)
    classes = random.integers(0, 3, (24, 30)).repeat(2, 0).repeat(2, 1)
    found = parts(classes, {1, 2}, least=9)

    def flood(start: tuple[int, int]) -> set[tuple[int, int]]:
        todo, seen = [start], {start}
        while todo:
            y, x = todo.pop()
            for a, b in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= a < classes.shape[0] and 0 <= b < classes.shape[1]
                if inside and (a, b) not in seen and classes[a, b] == classes[start]:
                    seen.add((a, b))
                    todo.append((a, b))
        return seen

    for y, x in random.integers(0, 40, (40, 2)):
        part = flood((y, x))
        mine = {(int(a), int(b)) for a, b in np.argwhere((found == found[y, x]).all(-1))}
        if classes[y, x] == 0:
            assert found[y, x].tolist() == [0, 0]
        elif len(part) < 9:
            assert found[y, x].tolist() == [VOID, 0]
        else:
            assert mine == part and found[y, x, 0] == classes[y, x]


def test_panoptic_quality_is_torchmetrics():
    from torchmetrics.detection import PanopticQuality

    random = np.random.default_rng(1)
    blocks = random.integers(0, 3, (6, 4, 5)).repeat(4, 1).repeat(4, 2)
    shifted = np.where(random.random(blocks.shape) < 0.1, (blocks + 1) % 3, blocks)
    truths = [torch.from_numpy(parts(b, {1}, 1)) for b in blocks]
    for truth in truths:
        truth[:2] = torch.tensor([VOID, 0])
    said = [torch.from_numpy(parts(s, {1}, 3)) for s in shifted]
    metric = PanopticQuality({1}, {0, 2}, allow_unknown_preds_category=True)
    metric.update(torch.stack(said), torch.stack(truths))
    each = [compare(a, b, {1}, 3) for a, b in zip(said, truths, strict=True)]
    sums = [torch.stack(part).sum(0) for part in zip(*each, strict=True)]
    assert (
        mean_quality(*sums).item() == pytest.approx(metric.compute().item(), abs=1e-6) and 0 < mean_quality(*sums) < 1
    )
    perfect = [torch.stack(p).sum(0) for p in zip(*(compare(t, t, {1}, 3) for t in truths), strict=True)]
    assert mean_quality(*perfect).item() == 1


def test_panoptic_sets_are_read_and_measured(tmp_path):
    given = {}
    for i in range(3):
        image, labels = pair(i)
        number = np.where(labels == 2, 300, 0)
        ids = np.stack([labels, number // 256, number % 256], -1).astype(np.uint8)
        given[f"val/images/{i}.png"], given[f"val/panoptic/{i}.png"] = encode(image), encode(Image.fromarray(ids))
    path = write_folder(tmp_path, given)
    image, ids = open_pixels(path, None, NAMES, 9, PanopticSet).read(0)
    labels = pair(0)[1]
    assert np.array_equal(ids[..., 0], np.where(labels == 9, VOID, labels))
    assert np.array_equal(ids[..., 1], np.where(labels == 2, 300, 0))
    rows, failures = evaluate_panoptic(small(), str(path), ["spot"], ["grid(16)"], void=9)
    assert [r.setting for r in rows] == ["dense", "grid(16)"] and rows[0].images == 3 and not failures
    assert all(0 <= r.pq.low <= r.pq.mean <= r.pq.high <= 1 for r in rows) and json.dumps(rows[0].to_dict())
    with pytest.raises(UserError, match="did you mean 'spot'"):
        evaluate_panoptic(small(), str(path), ["spott"])


def coco(labels: np.ndarray) -> tuple[np.ndarray, list[dict]]:
    """Labels -> COCO's colours and segments: the two halves of a class are two segments, the void has none."""
    half = np.arange(labels.shape[1]) >= labels.shape[1] // 2
    ids = np.where(labels == 9, 0, 1000 + 70_000 * labels.astype(np.int64) + half)
    info = [
        {"id": int(one), "category_id": 10 + (int(one) - 1000) // 70_000, "iscrowd": 0} for one in np.unique(ids) if one
    ]
    return ids, info


def test_panoptic_sets_of_coco_are_read(tmp_path):
    given, told = {}, {"annotations": [], "categories": [{"id": 10 + k, "name": n} for k, n in enumerate(NAMES[:-1])]}
    told["categories"].append({"id": 10 + len(NAMES) - 1, "name": "unicorn"})  # that the model does not know
    for i in range(2):
        image, labels = pair(i)
        ids, info = coco(labels)
        info[0]["iscrowd"] = int(i == 1)
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        given[f"images/{i}.png"], given[f"panoptic/{i}.png"] = encode(image), encode(Image.fromarray(colours))
        told["annotations"].append({"file_name": f"{i}.png", "segments_info": info})
    del told["annotations"][1]["segments_info"][-1]
    path = write_folder(tmp_path, {**given, "panoptic.json": json.dumps(told).encode()})
    pixels = open_panoptic(path, None, NAMES, 9)
    labels = pair(0)[1]
    ids = coco(labels)[0]
    found = pixels.read(0)[1]
    assert np.array_equal(found[..., 0], np.where((labels == 9) | (labels == len(NAMES) - 1), VOID, labels))
    for one in np.unique(ids):
        numbers = found[..., 1][ids == one]
        assert (numbers == numbers[0]).all() and not (found[..., 1][ids != one] == numbers[0]).any()
    with pytest.raises(ImageError, match=r"of which panoptic\.json knows nothing"):
        pixels.read(1)
    rows, failures = evaluate_panoptic(small(), str(path), [NAMES[0]])
    assert rows[0].images == 1 and list(failures) == ["panoptic/1.png"]
    (path / "panoptic.json").write_text('{"annotations": [{}], "categories": []}')
    with pytest.raises(UserError, match=r"panoptic.json in .* is not in COCO's panoptic format \(KeyError: "):
        open_panoptic(path, None, NAMES, 9)
    (path / "panoptic.json").write_text('{"annotations": [], "categories": [{"id": 1, "name": "unicorn"}]}')
    with pytest.raises(UserError, match="has categories unicorn, the model"):
        open_panoptic(path, None, NAMES, 9)


# Training


def config(pairs: str, **sections) -> dict:
    base = {
        "model": {"args": TINY},
        "data": {"path": pairs, "workers": 0},
        "segment": {"classes": NAMES, "void": 9, "layers": 1},
        "sampling": {"settings": ["dense", "grid(12)", "grid(16)"]},
        "augment": {"color_jitter": 0.2},
        "optim": {"lr": 1e-3, "head": 2.0, "ema": 0.5},
        "run": {"steps": 8, "batch": 6, "save_every": 4, "log_every": 2, "device": "cpu", "check_every": 1.0},
    }
    return {"task": "segment", **{name: {**values, **sections.get(name, {})} for name, values in base.items()}}


@pytest.fixture(scope="session")
def whole(pairs, tmp_path_factory) -> tuple[saccade.training.train.Trained, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return saccade.train(config(pairs), out=folder), folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    return read_state(newest(folder / "checkpoints", "last"))[0]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_what_it_promises(whole, pairs):
    trained, folder = whole
    assert (trained.metric, trained.column) == ("mIoU", "miou") and type(trained.model.task_head) is SegmentationHead
    rows = read_table(folder / "checks.csv")
    assert rows[0].keys() == {"step", "setting", "miou", "low", "high", "gmacs"}
    assert {r["setting"] for r in rows} == {"dense", "grid(12)", "grid(16)"}
    assert "mIoU" in (folder / "report.html").read_text()
    card = json.loads((folder / "model" / "config.json").read_text())["saccade"]
    assert card["task"] == "segment" and card["classes"] == list(NAMES) and card["void"] == 9
    assert {"miou", "gmacs"} <= card["trained"]["checked"][0].keys()
    opened = saccade.load(folder / "model")
    scores, _ = evaluate_segmentation(opened, pairs, ["grid(12)"])  # void is the model's own
    of = {c.setting: c.top1 for c in trained.checks}
    assert scores[1].miou.mean == pytest.approx(of["grid(12)"]) and scores[0].gmacs > scores[1].gmacs
    assert any(k.startswith("student.task_head.decoder.") for k in state(folder))


def test_it_learns_at_every_patch_size(pairs, tmp_path):
    settled = config(
        pairs,
        optim={"lr": 3e-3, "ema": 0.0},
        sampling={"settings": ["dense", "grid(12)"]},
        augment={"scale": (0.5, 1.0)},
        run={"steps": 90, "batch": 8, "check_every": 100.0, "save_every": 1000},
    )
    trained = saccade.train(settled, out=tmp_path / "run")
    assert all(c.top1 > 0.6 for c in trained.checks), trained.checks  # to say one class everywhere gives about 0.15
    rows, _ = evaluate_segmentation(trained.model, pairs, ["grid(10)", "evit(0.8)"])
    assert all(r.miou.mean > 0.5 for r in rows), rows  # nor were these trained


def test_resumed_equals_uninterrupted_bit_for_bit(whole, pairs, tmp_path):
    import saccade.training.train as script

    class Stop(Exception):
        pass

    real = script.TrainStep.step

    def step(self, number, *args):
        if number == 6:
            raise Stop
        return real(self, number, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(script.TrainStep, "step", step)
        saccade.train(config(pairs), out=tmp_path / "run")
    saccade.train(config(pairs), out=tmp_path / "run", resume=True)
    assert equal(state(tmp_path / "run"), state(whole[1]))
    assert read_table(tmp_path / "run" / "checks.csv") == read_table(whole[1] / "checks.csv")


def test_the_largest_setting_teaches(pairs, tmp_path):
    settled = config(pairs, sampling={"every": ["largest"]}, run={"steps": 2})
    settled["distill"] = {"teacher": "self", "weight": 0.5}
    saccade.train(settled, out=tmp_path / "run")
    assert read_table(tmp_path / "run" / "metrics.csv")[-1]["loss/teacher"] > 0


def test_parts_of_a_batch_add_up(pairs, tmp_path):
    for name, parts_of in (("a", 1), ("b", 3)):
        saccade.train(config(pairs, run={"steps": 2, "accumulate": parts_of}), out=tmp_path / name)
    losses = [[row["loss"] for row in read_table(tmp_path / n / "metrics.csv")] for n in "ab"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_void_is_not_learned_from(whole, pairs):
    """The loss of a batch is that of its labelled pixels, over all of them."""
    from saccade.tasks.segmentation.segmentation_task import Segment

    task = Segment(read_config(config(pairs)))
    model = whole[0].model
    logits, labels = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randint(3, (2, 4, 5)).to(torch.uint8)
    labels[0, :2] = VOID
    out = saccade.Output(logits, None, None)
    loss = task.terms(model, out, labels, None, 2)["label"]
    logp = logits.log_softmax(1)
    oracle = -sum(
        logp[b, labels[b, y, x].long(), y, x] for b, y, x in np.ndindex(2, 4, 5) if labels[b, y, x] != VOID
    ) / (2 * 20)
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5)
    loss.backward()
    assert (logits.grad[0, :, :2] == 0).all() and (logits.grad[0, :, 2:] != 0).all()


def test_corrupt_pairs_are_left_out_counted_and_named(tmp_path):
    folder = write_folder(tmp_path / "set", {**files(9), **spoiled()})
    settled = config(str(folder), data={"holdout": 0.0}, run={"steps": 4})
    trained = saccade.train(settled, out=tmp_path / "run")
    assert trained.failures.keys() == REASONS.keys() and trained.checks == []


def test_where_there_is_no_split_a_share_is_held_out(tmp_path):
    from saccade.tasks.segmentation.segmentation_task import Segment

    folder = write_folder(tmp_path / "set", files(40))
    task = Segment(read_config(config(str(folder), data={"holdout": 0.3})))
    assert not {*task.images.names} & {*task.held.names} and len(task.images) + len(task.held) == 40
    image, labels = task.checked.read(0)
    assert labels.shape == (image.height, image.width)


def test_a_segmentation_model_goes_on_with_its_decoder(whole, pairs, tmp_path):
    earlier = str(whole[1] / "model")
    settled = config(pairs, optim={"lr": 1e-12, "ema": 0.0, "weight_decay": 0.0}, run={"steps": 1})
    settled["model"] = {"name": earlier}
    trained = saccade.train(settled, out=tmp_path / "run")
    assert torch.allclose(trained.model.task_head.decoder.class_tokens, whole[0].model.task_head.decoder.class_tokens)
    other = config(pairs, run={"steps": 1}, segment={"classes": ("a", "b", "c")})
    other["model"] = {"name": earlier}
    fresh = saccade.train(other, out=tmp_path / "other")
    assert not torch.allclose(
        fresh.model.task_head.decoder.class_tokens, whole[0].model.task_head.decoder.class_tokens, atol=1e-3
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("segment.classes=[]", "name the classes"),
        ("augment.mixup=0.2", "augment.mixup"),
        ("augment.erase=0.2", "augment.erase"),
        ("distill.teacher=vit_tiny_patch16_224", "no teacher but 'self'"),
        ("segment.head=conv", "segment.head"),
        ("segment.how=crop", "segment.how"),
        ("data.split=val", "never trained on"),
        ("data.path=nowhere", "nowhere"),
        ("model.size=[30, 48]", "model.size"),
        ("model.size=[32, 48, 3]", "model.size"),
        ("task=segmentt", "did you mean 'segment'"),
    ],
)
def test_wrong_configs_are_one_line(change, words, pairs, tmp_path):
    with pytest.raises(UserError) as error:
        saccade.train(config(pairs), [change], out=tmp_path / "run")
    assert "\n" not in str(error.value) and words in str(error.value), str(error.value)


# The command


def run_command(capsys, *arguments: str) -> tuple[int, str, str]:
    from saccade.cli import main

    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_command_measures_and_draws(whole, pairs, tmp_path, capsys):
    model = str(whole[1] / "model")
    code, out, _ = run_command(capsys, "segment", model, pairs, "-s", "grid(16)", "--json", "--limit", "4")
    found = json.loads(out)["rows"]
    assert code == 0 and [r["setting"] for r in found] == ["dense", "grid(16)"] and found[0]["images"] == 4
    code, out, _ = run_command(capsys, "eval", model, pairs, "-s", "grid(16)", "--json", "--limit", "4")
    assert code == 0 and json.loads(out)["rows"] == found
    code, out, _ = run_command(capsys, "segment", model, pairs, "--how", "slide")
    assert code == 0 and "mIoU" in out and "spot" in out
    photo, drawn = Path(pairs) / "val" / "images" / "50.png", tmp_path / "drawn.png"
    code, _, _ = run_command(capsys, "segment", model, str(photo), "-s", "grid(12)", "--out", str(drawn))
    assert code == 0 and Image.open(drawn).size == Image.open(photo).size
    oracle = paint(saccade.load(model, "grid(12)").eval(), Image.open(photo).convert("RGB"))
    assert np.array_equal(np.asarray(Image.open(drawn)), np.asarray(oracle))


def test_the_command_refuses_in_one_line(whole, pairs, tmp_path, capsys):
    model = str(whole[1] / "model")
    saccade.create_model("vit_tiny_patch16_224", **TINY).save(str(tmp_path / "plain"))
    for arguments, words in (
        (["segment", str(tmp_path / "plain"), pairs], "no segmentation model"),
        (["segment", model, str(tmp_path)], "no pairs"),
        (["segment", model, pairs, "--how", "crop"], "fit, whole, slide"),
        (["segment", model, pairs, "-s", "tomme()"], "tomme"),
        (["segment", model, str(tmp_path / "no.png")], "no photo"),
        (["segment", model, pairs, "--things", "spot"], "panoptic"),
    ):
        code, _, err = run_command(capsys, *arguments)
        assert code == 2 and err.count("\n") == 1 and words in err, err


def test_shipped_config_names_camvids_classes():
    rule = read_config("segment").segment
    assert len(rule.classes) == 11 and rule.void == 11


@pytest.mark.slow
def test_camvid_opens(data_dir):
    pixels = open_pixels(data_dir / "camvid_dev.zip", "train", read_config("segment").segment.classes, 11)
    assert len(pixels) == 367 and not pixels.failures
    seen = np.zeros(11)
    for i in range(0, 367, 8):
        image, labels = pixels.read(i)
        assert image.size == (480, 360)
        seen += np.bincount(labels[labels != VOID], minlength=11)
    assert (seen > 0).all() and seen[:4].argmax() == 3  # of sky, building, pole and road, road is the most
