"""The quadtree tokenizer: selection, mosaics, embedding, positions, ragged batches, against slow obvious oracles.

Scorers and the numbers on photos are in
``test_scorers.py``.
"""

from __future__ import annotations

import copy
import heapq
import importlib.util
import math
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from oracles import busy_images, counted_macs, make_images, make_vit, relative
from saccade.backbones.saving import save
from saccade.checkpoint import load
from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.evaluation.candidates import candidates
from saccade.execution.loop import encode
from saccade.model import AdaptiveViT
from saccade.reports import draw_tokens
from saccade.setting import Setting
from saccade.tokenizers.mosaic.geometry import Geometry, Mosaic
from saccade.tokenizers.mosaic.mosaic_files import load_mosaic, save_mosaic
from saccade.tokenizers.mosaic.pyramid import pyramid, read_leaves
from saccade.tokenizers.mosaic.selection import split_above, split_most, split_shared

SIDE = {"img_size": 128}  # 8 x 8 cells of 16 pixels


@pytest.fixture(scope="module")
def vit():
    return make_vit("vit", **SIDE).requires_grad_(False)


@pytest.fixture
def images(vit):
    return busy_images(vit)


def random_scores(g: Geometry, images: int, seed: int, steps: int = 0) -> list[Tensor]:
    """Scores of every level, the coarsest first; ``steps``: only so many different ones."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(images, *g.grid(level), generator=generator) for level in g.splittable]
    return [(s * steps).floor() for s in scores] if steps else scores


def by_heap(g: Geometry, scores: list[Tensor], count: int) -> set[tuple[int, int, int, int]]:
    """The paper's loop over a batch: (image, level, row, column) of the blocks that ``count`` splits take."""
    lists, front = [s.tolist() for s in scores], []
    levels = g.splittable

    def push(i: int, b: int, y: int, x: int) -> None:
        heapq.heappush(front, (-lists[i][b][y][x], i, b, y, x))  # of equals: coarse, first image, upper, left

    for i, level in enumerate(levels):
        (h, w), above = g.grid(level), g.grid(levels[i - 1])
        for b in range(len(scores[0])):
            for y in range(h):
                for x in range(w):
                    if i == 0 or y // 2 >= above[0] or x // 2 >= above[1]:  # its parent would cross the border
                        push(i, b, y, x)
    taken = set()
    for _ in range(count):
        _, i, b, y, x = heapq.heappop(front)
        taken.add((b, levels[i], y, x))
        for dy in (0, 1):
            for dx in (0, 1):
                if i + 1 < len(levels):
                    push(i + 1, b, 2 * y + dy, 2 * x + dx)
    return taken


def as_set(g: Geometry, split: Tensor) -> set[tuple[int, int, int, int]]:
    nodes = [(level, y, x) for level in g.splittable for y in range(g.grid(level)[0]) for x in range(g.grid(level)[1])]
    return {(b, *nodes[n]) for b, n in split.nonzero().tolist()}


# --- selection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3], ids=["no ties", "ties"])
@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_the_sort_is_the_loop(levels, steps):
    """Every reachable count, any number of cells, one to four levels that can be split: no mismatch."""
    rng, cases = random.Random(levels), 0
    while cases < 300:
        g = Geometry.of((rng.randint(1, 17), rng.randint(1, 17)), tuple(16 << i for i in range(levels)))
        if not g.splits:
            continue
        scores, count = random_scores(g, 5, cases, steps), rng.randint(0, g.splits)
        found = as_set(g, split_most(scores, count))
        assert found == {(b, *rest) for b in range(5) for _, *rest in by_heap(g, [s[b : b + 1] for s in scores], count)}
        cases += 5


@pytest.mark.parametrize("steps", [0, 3], ids=["no ties", "ties"])
def test_one_budget_for_the_batch_is_one_loop_over_it(steps):
    rng = random.Random(0)
    for seed in range(30):
        g = Geometry.of((rng.randint(2, 12), rng.randint(2, 12)), (8, 16, 32, 64))
        images = rng.randint(1, 6)
        scores, count = random_scores(g, images, seed, steps), rng.randint(0, images * g.splits)
        assert as_set(g, split_shared(scores, count)) == by_heap(g, scores, count)


def test_more_levels_than_fit_into_one_integer():
    g = Geometry.of((64, 64), tuple(4 << i for i in range(7)))
    scores = random_scores(g, 1, 0)
    assert len(g.splittable) * g.splits.bit_length() > 62
    for count in (1, 50, 700, g.splits):
        assert as_set(g, split_most(scores, count)) == by_heap(g, scores, count)


def test_a_threshold_is_apts_rule():
    """A block stays whole where it, or a block above it, scores less than its level's floor."""
    for seed in range(20):
        g = Geometry.of((7 + seed % 3, 9), (16, 32, 64, 128))
        scores, floors = random_scores(g, 3, seed, 10), [6.0, 5.0, 3.0][-len(g.splittable) :]
        expected = set()
        for b in range(3):
            for i, level in enumerate(g.splittable):
                for y in range(g.grid(level)[0]):
                    for x in range(g.grid(level)[1]):
                        path = [(j, y >> (i - j), x >> (i - j)) for j in range(i + 1)]
                        inside = [(j, v, u) for j, v, u in path if v < scores[j].shape[1] and u < scores[j].shape[2]]
                        if all(scores[j][b, v, u] >= floors[j] for j, v, u in inside):
                            expected.add((b, level, y, x))
        assert as_set(g, split_above(scores, floors)) == expected


def test_more_tokens_refine_fewer():
    for seed in range(10):
        g = Geometry.of((16, 12), (8, 16, 32, 64))
        scores, before = random_scores(g, 4, seed), None
        for count in range(g.splits + 1):
            split = split_most(scores, count)
            assert (split.sum(1) == count).all()
            level = Mosaic.of(g, split, g.coarsest + 3 * count).level
            assert before is None or (level <= before).all()
            before = level


def test_a_constant_image_has_the_documented_mosaic(vit):
    """All scores are equal: coarse before fine, then row by row. 48 cells of 16 px and 13 - 0 of 32 px …"""
    big = make_vit("vit", img_size=256)
    for scorer in ("pixel", "pixel(blur='bilinear')", "entropy", "laplacian"):
        tokenizer = AdaptiveViT(big, f'quadtree(100, scorer="{scorer}")').tokenizer
        mosaic = tokenizer.mosaic(big, torch.full((2, 3, 256, 256), 0.3))
        assert mosaic.counts().tolist() == [[48, 52, 0]] * 2
        expected = torch.ones(16, 16, dtype=torch.int64)
        expected[:2], expected[2:4, :8] = 0, 0  # twelve blocks of 2 x 2 cells, from the upper left
        assert torch.equal(mosaic.level[0].view(16, 16)[:2], expected[:2])
        assert torch.equal(mosaic.level[0], expected.flatten())


def test_scores_that_are_no_numbers(vit):
    """NaN wants most to be split, then infinity; the same each time; nothing breaks."""
    g = Geometry.of((8, 8), (16, 32, 64))
    scores = random_scores(g, 2, 0)
    scores[0][0, 1, 1], scores[1][0, 2, 2], scores[0][1, 0, 1] = torch.nan, torch.nan, torch.inf
    split = split_most(scores, 2)
    assert as_set(g, split) == {(0, 2, 1, 1), (0, 1, 2, 2), *((b, *n) for b, *n in as_set(g, split) if b == 1)}
    assert (1, 2, 0, 1) in as_set(g, split_most(scores, 1))
    images = busy_images(vit)
    images[0, :, 5, 5], images[1, :, 100, 100] = torch.nan, torch.inf
    for setting in ("quadtree(31)", "quadtree(31, scorer='entropy')", "quadtree(threshold=3.0)"):
        tokenizer = AdaptiveViT(vit, setting).tokenizer
        first, again = tokenizer.mosaic(vit, images), tokenizer.mosaic(vit, images)
        assert torch.equal(first.level, again.level)
        assert torch.equal(tokenizer.mosaic(vit, images[2:]).level, first.level[2:]), "its neighbours do not care"


class Operations(TorchDispatchMode):
    """Operators that compute something, as they run."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view:
            self.seen.append(str(operator))
        return operator(*args, **(kwargs or {}))

    def __enter__(self):
        self.seen: list[str] = []
        return super().__enter__()


def test_a_fixed_number_of_operators_and_none_that_waits_for_the_device():
    g = Geometry.of((16, 16), (16, 32, 64))
    scores, found = random_scores(g, 4, 0), []
    split_most(scores, 1)
    for count in (1, 28, 60, 79):
        with Operations() as ran:
            split_most(scores, count)
        found.append(len(ran.seen))
        assert not any(name in operator for operator in ran.seen for name in ("item", "nonzero", "local_scalar"))
    assert found[0] <= 20 and len(set(found)) == 1, ran.seen
    vit = make_vit("vit", img_size=256)
    tokenizer, images = AdaptiveViT(vit, "quadtree(100)").tokenizer, make_images(vit, 2)
    with torch.no_grad():
        tokenizer(vit, images)
        with Operations() as ran:
            tokenizer(vit, images)
    assert not any(name in operator for operator in ran.seen for name in ("item", "nonzero", "local_scalar"))


def test_the_sort_splits_what_the_loop_splits():
    """``benchmarks/quadtree.py`` times both."""
    path = Path(__file__).parents[2] / "benchmarks" / "quadtree.py"
    spec = importlib.util.spec_from_file_location("quadtree_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    g = Geometry.of((16, 16), (16, 32, 64))
    for seed in range(5):
        scores = random_scores(g, 32, seed)
        assert torch.equal(benchmark.in_steps(scores, 28), split_most(scores, 28))


# --- mosaics --------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    st.integers(1, 13), st.integers(1, 13), st.sampled_from([4, 7, 14, 16]), st.integers(2, 5), st.integers(0, 10**6)
)
def test_leaves_are_disjoint_aligned_blocks_that_cover_the_image(gh, gw, patch, levels, seed):
    g = Geometry.of((gh, gw), tuple(patch << i for i in range(levels)))
    rng = random.Random(seed)
    count = rng.randint(0, g.splits)
    scores = random_scores(g, 2, seed)
    split = split_most(scores, count) if g.splits else torch.zeros(2, 0, dtype=torch.bool)
    leaves = g.coarsest + 3 * count
    mosaic = Mosaic.of(g, split, leaves)
    assert mosaic.cell.shape == (2, leaves) and mosaic.valid is None
    owners, cells, levels_of = mosaic.owner.numpy(), mosaic.cell.numpy(), mosaic.leaf_level.numpy()
    for b in range(2):
        owner, seen = owners[b].reshape(gh, gw), np.zeros((gh, gw), dtype=int)
        for leaf, (cell, level) in enumerate(zip(cells[b].tolist(), levels_of[b].tolist(), strict=True)):
            y, x, edge = cell // gw, cell % gw, 1 << level
            assert y % edge == 0 and x % edge == 0 and y + edge <= gh and x + edge <= gw and level < g.levels
            assert (owner[y : y + edge, x : x + edge] == leaf).all()
            seen[y : y + edge, x : x + edge] += 1
        assert (seen == 1).all()
        assert (np.diff(cells[b]) > 0).all(), "in the order of their upper left cells"
    assert torch.equal(mosaic.area.sum(1), torch.full((2,), float(gh * gw)))
    assert torch.equal(mosaic.counts().sum(1), torch.full((2,), leaves))


def test_both_ends_are_uniform_grids():
    g = Geometry.of((16, 16), (16, 32, 64))
    assert (g.coarsest, g.finest, g.splits) == (16, 256, 80)
    coarse = Mosaic.of(g, torch.zeros(1, 80, dtype=torch.bool), 16)
    fine = Mosaic.of(g, torch.ones(1, 80, dtype=torch.bool), 256)
    assert (coarse.level == 2).all() and (fine.level == 0).all()
    assert torch.equal(fine.owner[0], torch.arange(256)) and coarse.owner[0].view(16, 16)[5, 9] == 6


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("quadtree(101, size=256)", r"tokens=101 cannot be had of 256x256 pixels.*16 … 64.*from 16 to 256; .* 100$"),
        ("quadtree(102, size=256)", r"tokens=102 .* nearest is 103$"),
        ("quadtree(3, size=256)", r"tokens=3 .* nearest is 16$"),
        ("quadtree(1000, size=256)", r"tokens=1000 .* nearest is 256$"),
        ("quadtree(81, size=256)", r"tokens=81 .* nearest is 82$"),
        ("quadtree(per_batch=3200, size=256)", r"per_batch=3200 .* nearest is 256 \(the mean of the batch's images\)"),
        ("quadtree(64, threshold=5.5)", r"not tokens and threshold"),
        ("quadtree(0)", r"tokens=0 is not a whole number"),
        ("quadtree(True)", r"tokens=True"),
        ("quadtree(64.0)", r"tokens=64.0"),
        ("quadtree(threshold='x')", r"threshold='x' is not one number, or 2"),
        ("quadtree(threshold=(1.0,))", r"threshold=\(1.0,\) is not one number, or 2"),
        ("quadtree(64, sizes=16)", r"sizes=16 are not two to eight"),
        ("quadtree(64, sizes=(16, 48))", r"sizes=\(16, 48\) must .* double, like \(16, 32\)"),
        ("quadtree(64, sizes=(2, 4, 8))", r"must start at 4 to 32 pixels .* like \(4, 8, 16\)"),
        ("quadtree(64, size=2)", r"size=2 is not one or two whole numbers"),
        ("quadtree(64, resample='cubic')", r"resample='cubic' is not one of area, bilinear"),
        ("quadtree(64, positions='corner')", r"positions='corner' is not one of mean, centre, sinusoid"),
        ("quadtree(64, detail=1)", r"detail=1 is not True or False"),
        ("quadtree(64, scorer='pixels')", r"no scorer 'pixels' \(did you mean 'pixel'\?\)"),
        ("quadtree(64, scorer='pixel(size=3)')", r"scorer pixel: .*'size'.* its knobs are \(weight"),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_line(vit, setting, says):
    with pytest.raises(UserError, match=says) as error:
        AdaptiveViT(vit, setting)
    assert "\n" not in str(error.value)


def test_a_number_that_other_images_cannot_have_is_refused_when_they_come(vit):
    model = AdaptiveViT(vit, "quadtree(64)")
    assert model(make_images(vit, 1, (256, 256))).trace.first.max() == 63
    with pytest.raises(UserError, match=r"tokens=64 cannot be had of 96x128 pixels.* nearest is 48$"):
        model(make_images(vit, 1, (96, 128)))


@pytest.mark.parametrize("scorer", ["pixel", "entropy"])
@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ((256, 320), (16, 32, 64)),
        ((224, 384), (8, 16, 32)),
        ((224, 224), (16, 32)),
        ((336, 336), (14, 28, 56)),
        ((384, 384), (16, 32, 64)),
        ((64, 64), (4, 8, 16)),
        ((96, 96), (8, 16, 32)),
        ((224, 224), (16, 32, 64)),  # which 64 does not divide
        ((100, 75), (8, 16, 32, 64)),  # nor 8 this: brought to 96 x 72
        ((16, 400), (16, 32)),  # nothing can be split
    ],
)
@torch.no_grad()
def test_any_image_and_any_sizes(size, sizes, scorer):
    vit = make_vit("vit", depth=1)
    images = busy_images(vit, 2, size)
    h, w = (round(side / sizes[0]) for side in size)
    g = Geometry.of((h, w), sizes)
    for share in (0.0, 0.4, 1.0):
        tokens = g.coarsest + 3 * round(share * g.splits)
        model = AdaptiveViT(vit, f"quadtree({tokens}, sizes={sizes}, scorer='{scorer}')")
        found = model.forward_tokens(images)[0]
        assert found.grid == (h, w) and found.num_patches == tokens and found.x.isfinite().all()
        assert model.feature_map(images).shape[2:] == (h, w)


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_any_channels(channels):
    vit = make_vit("vit", in_chans=channels, **SIDE)
    for scorer in ("pixel", "entropy", "laplacian", "random", "attention(2)", "gate"):
        with torch.no_grad():
            out = AdaptiveViT(vit, f"quadtree(31, scorer='{scorer}')")(busy_images(vit, 2))
        assert out.logits.isfinite().all() and out.trace.first.max() == 30


@torch.no_grad()
def test_the_same_for_a_batch_and_its_images_after_anything(vit, images):
    tokenizer = AdaptiveViT(vit, "quadtree(31)").tokenizer
    whole = tokenizer.mosaic(vit, images)
    for b in range(3):
        assert torch.equal(tokenizer.mosaic(vit, images[b : b + 1]).level, whole.level[b : b + 1])
    order = [2, 0, 1]
    assert torch.equal(tokenizer.mosaic(vit, images[order]).level, whole.level[order])
    first = tokenizer(vit, images).x.clone()
    kept = images.clone()
    images.mul_(-1).copy_(images.flip(-1))  # in place: nothing of the old image may be remembered
    assert torch.equal(
        tokenizer.mosaic(vit, images).level, AdaptiveViT(vit, "quadtree(31)").tokenizer.mosaic(vit, images).level
    )
    assert not torch.equal(tokenizer(vit, images).x, first)
    assert torch.equal(tokenizer(vit, kept).x, first)


# --- files ----------------------------------------------------------------------------------------------------------


def test_mosaics_make_the_round_trip(vit, images, tmp_path):
    tokenizer = AdaptiveViT(vit, "quadtree(31)").tokenizer
    mosaic = tokenizer.mosaic(vit, images)
    save_mosaic(tmp_path / "m.safetensors", mosaic, ["a", "b", "ç/3.jpg"])
    found, names = load_mosaic(tmp_path / "m.safetensors")
    assert names == ["a", "b", "ç/3.jpg"] and found.geometry == mosaic.geometry
    for field in ("level", "owner"):
        assert torch.equal(getattr(found, field), getattr(mosaic, field))
    with torch.no_grad():
        again = tokenizer.embed(vit, images, found)
        assert torch.equal(again.x, tokenizer(vit, images).x)
    ragged = AdaptiveViT(vit, "quadtree(per_batch=31)").tokenizer
    save_mosaic(tmp_path / "r.safetensors", ragged.mosaic(vit, images))
    found, names = load_mosaic(tmp_path / "r.safetensors")
    with torch.no_grad():
        expected, again = ragged(vit, images), ragged.embed(vit, images, found)
    assert names == [] and torch.equal(again.valid, expected.valid)
    assert torch.equal(again.x[:, 1:][again.valid], expected.x[:, 1:][expected.valid])
    with pytest.raises(UserError, match=r"a mosaic of 3 images of 128x128 and 2 images of 128x128"):
        tokenizer.embed(vit, images[:2], mosaic)


def test_what_is_no_mosaic_is_refused(vit, images, tmp_path):
    from safetensors.torch import load_file, save_file

    file, wrong = tmp_path / "m.safetensors", tmp_path / "w.safetensors"
    save_mosaic(file, AdaptiveViT(vit, "quadtree(31)").tokenizer.mosaic(vit, images))
    good = load_file(file)
    meta = {"format": "saccade.mosaic.1", "mosaic": '{"patch": 16, "levels": 3, "names": []}'}

    def refuse(tensors: dict, metadata: dict, says: str) -> None:
        save_file(tensors, wrong, metadata=metadata)
        with pytest.raises(UserError, match=says):
            load_mosaic(wrong)

    torn = {**good, "level": good["level"].clone()}
    torn["level"][0, 0, 0] = 2
    refuse(torn, meta, "do not make whole blocks")
    refuse({**good, "level": good["level"] + 7}, meta, "a level 7|a level 8|a level 9")
    refuse({**good, "owner": good["owner"].flip(1)}, meta, "not those of the levels")
    refuse({**good, "level": good["level"].float()}, meta, "levels of shape")
    refuse(good, {**meta, "format": "x"}, "format 'x'")
    refuse(good, {**meta, "mosaic": '{"patch": 16, "levels": 9, "names": []}'}, "9 levels")
    refuse(good, {**meta, "mosaic": '{"patch": 16, "levels": 3, "names": ["a"]}'}, "1 names for 3 images")
    refuse({"level": good["level"]}, meta, "is not a mosaic file")
    wrong.write_bytes(b"no")
    with pytest.raises(UserError, match="is not a mosaic file"):
        load_mosaic(wrong)
    with pytest.raises(UserError, match="there is no mosaic file"):
        load_mosaic(tmp_path / "none")
    with pytest.raises(UserError, match="2 names for the mosaics of 3 images"):
        save_mosaic(file, load_mosaic(file)[0], ["a", "b"])


# --- leaves and positions -------------------------------------------------------------------------------------------


def some_mosaics(g: Geometry, images: int = 2) -> list[Mosaic]:
    """All coarse, all fine, a mixture, and one without any block of the middle size."""
    skip = torch.zeros(images, g.finest, dtype=torch.int64)
    corner = torch.zeros(g.cells, dtype=torch.int64)
    corner[: 1 << (g.levels - 1), : 1 << (g.levels - 1)] = g.levels - 1
    skip += corner.flatten()
    counts = [0, g.splits, g.splits // 3]
    mixed = [Mosaic.of(g, split_most(random_scores(g, images, 3), k), g.coarsest + 3 * k) for k in counts]
    return [*mixed, Mosaic.of_levels(g, skip, g.finest - 4 ** (g.levels - 1) + 1)]


@pytest.mark.parametrize("resample", ["area", "bilinear"])
@pytest.mark.parametrize("cells", [(8, 8), (7, 10)])
def test_leaves_are_cut_out_and_resized(cells, resample):
    g = Geometry.of(cells, (8, 16, 32))
    images = torch.randn(2, 3, cells[0] * 8, cells[1] * 8)
    for mosaic in some_mosaics(g):
        found = read_leaves(pyramid(images, g.levels, resample), mosaic).unflatten(2, (3, 8, 8))
        for b in range(2):
            for leaf, (cell, level) in enumerate(zip(mosaic.cell[b], mosaic.leaf_level[b], strict=True)):
                y, x, edge = int(cell) // cells[1] * 8, int(cell) % cells[1] * 8, 8 << int(level)
                patch = images[b : b + 1, :, y : y + edge, x : x + edge]
                if resample == "area":
                    expected = F.avg_pool2d(patch, 1 << int(level))
                else:
                    expected = F.interpolate(patch, size=(8, 8), mode="bilinear")
                assert relative(found[b, leaf], expected[0]) <= 1e-6


def test_gradients_go_back_to_the_pixels(vit):
    images = busy_images(vit).requires_grad_()
    AdaptiveViT(vit, "quadtree(31)")(images).logits.sum().backward()
    assert images.grad.isfinite().all() and (images.grad.abs().amax((1, 2, 3)) > 0).all()
    used = images.grad[0].abs().sum(0) > 0
    assert used.float().mean() > 0.99, "means read every pixel"


@torch.no_grad()
@pytest.mark.parametrize("positions", ["mean", "centre"])
@pytest.mark.parametrize(
    "family",
    [
        "vit",
        "deit3",
        "distilled",
        "dinov2-registers",
        "clip",
        "siglip",
        "siglip-average",
        "class-average",
        "no-positions",
    ],
)
def test_a_mosaic_of_cells_alone_is_the_source_vit(family, positions):
    """Through the whole of the tokenizer, by a threshold that every block passes; a full number of tokens is exact."""
    vit = make_vit(family)
    images = make_images(vit)
    model = AdaptiveViT(vit, f"quadtree(threshold=-1.0, positions='{positions}')")
    out = model(images)
    assert float((out.logits - vit(images)).abs().max()) < 1e-4
    assert model.forward_tokens(images)[0].valid is None, "as long as each other: the fastest kernel stays in use"
    exact = AdaptiveViT(vit, f"quadtree({out.trace.first.shape[1]}, positions='{positions}')")
    assert torch.equal(exact.forward_head(exact.forward_tokens(images)[0]), vit(images))


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit3", "dinov2-registers"])
@pytest.mark.parametrize("how", ["mean", "centre"])
def test_positions_of_coarse_leaves(family, how):
    """With a kernel of zeros a token is its bias and its position: compare with loops over the covered entries."""
    vit = make_vit(family, depth=1, img_size=112 if "dino" in family else 128)
    nn.init.zeros_(vit.patch_embed.proj.weight)
    prefix = vit.num_prefix_tokens
    table = vit.pos_embed[0, 0 if vit.no_embed_class else prefix :].view(8, 8, -1)
    tokenizer = AdaptiveViT(vit, f"quadtree(31, positions='{how}')").tokenizer
    images = busy_images(vit, 2)
    tokens, mosaic = tokenizer(vit, images), tokenizer.mosaic(vit, images)
    assert {0, 1, 2} <= set(mosaic.leaf_level.unique().tolist())
    for b in range(2):
        for leaf, (cell, level) in enumerate(zip(mosaic.cell[b], mosaic.leaf_level[b], strict=True)):
            y, x, edge = int(cell) // 8, int(cell) % 8, 1 << int(level)
            covered = table[y : y + edge, x : x + edge]
            if how == "centre" and edge == 4:
                covered = covered[1:3, 1:3]  # the four entries around the centre
            expected = covered.mean((0, 1)) + vit.patch_embed.proj.bias
            assert relative(tokens.patches[b, leaf], expected) <= 1e-5
    plain = AdaptiveViT(vit).tokenizer(vit, images)
    assert torch.equal(tokens.x[:, :prefix], plain.x[:, :prefix])


@torch.no_grad()
@pytest.mark.parametrize("width", [96, 102])
def test_sinusoids(width):
    vit = make_vit("vit", depth=1, embed_dim=width, num_heads=3, **SIDE)
    nn.init.zeros_(vit.patch_embed.proj.weight)
    nn.init.zeros_(vit.patch_embed.proj.bias)
    tokenizer = AdaptiveViT(vit, "quadtree(31, positions='sinusoid')").tokenizer
    images = busy_images(vit, 1)
    tokens, mosaic = tokenizer(vit, images), tokenizer.mosaic(vit, images)
    half = width // 2

    def waves(t: float) -> list[float]:
        count = half // 2
        omega = [math.exp(-k * math.log(10000) / (count - 1)) for k in range(count)]
        assert omega[0] == 1 and omega[-1] == pytest.approx(1e-4)
        return [*(math.sin(t * o) for o in omega), *(math.cos(t * o) for o in omega), *[0.0] * (half - 2 * count)]

    for leaf, (cell, level) in enumerate(zip(mosaic.cell[0], mosaic.leaf_level[0], strict=True)):
        y, x = (float(v) + 0.5 * 2 ** int(level) for v in divmod(int(cell), 8))
        expected = torch.tensor(waves(x) + waves(y))
        assert relative(tokens.patches[0, leaf], expected) <= 1e-5
        assert float(expected.square().sum()) == pytest.approx(2 * (half // 2), rel=1e-5)
    assert torch.equal(tokens.x[:, :1], vit.cls_token), "the class token has no position"


# --- what is learned ------------------------------------------------------------------------------------------------


def detail_by_hand(detail: nn.Module, cells: Tensor, y: int, x: int, level: int) -> Tensor:
    """The convolution two by two, one product at a time: cells [D, gh, gw] -> [D]."""
    if level == 0:
        return cells[:, y, x]
    parts = [[detail_by_hand(detail, cells, 2 * y + i, 2 * x + j, level - 1) for j in (0, 1)] for i in (0, 1)]
    return detail.merge.bias + sum(detail.merge.weight[:, :, i, j] @ parts[i][j] for i in (0, 1) for j in (0, 1))


def test_the_detail_branch_starts_at_zero_and_learns(vit, images):
    plain, model = AdaptiveViT(vit, "quadtree(31)"), AdaptiveViT(vit, "quadtree(31, detail=True)")
    detail = model.tokenizer.detail
    assert sum(p.numel() for p in detail.parameters()) == 4 * 96**2 + 96**2 + 2 * 96
    with torch.no_grad():
        assert torch.equal(model(images).logits, plain(images).logits)
    optimizer = torch.optim.SGD(detail.parameters(), 0.1)
    for _ in range(2):
        model.train()(images).logits.square().sum().backward()
        grads = {name: float(p.grad.abs().sum()) for name, p in detail.named_parameters()}
        optimizer.step()
    assert all(value > 0 for value in grads.values()), "after one step it all learns"
    model.eval()
    with torch.no_grad():
        cells = vit.patch_embed.proj(images)
        found = detail(cells, mosaic := model.tokenizer.mosaic(vit, images))
        for leaf, (cell, level) in enumerate(zip(mosaic.cell[0], mosaic.leaf_level[0], strict=True)):
            y, x, level = int(cell) // 8, int(cell) % 8, int(level)
            expected = detail.out(detail_by_hand(detail, cells[0], y >> level, x >> level, level)) * (level > 0)
            assert float((found[0, leaf] - expected).abs().max()) <= 1e-5
        assert not torch.equal(model(images).logits, plain(images).logits)


def test_the_size_embedding_starts_at_zero_and_learns(vit, images, tmp_path):
    model = AdaptiveViT(vit, "quadtree(31, size_embedding=True)")
    with torch.no_grad():
        assert torch.equal(model(images).logits, AdaptiveViT(vit, "quadtree(31)")(images).logits)
    model.train()(images).logits.square().sum().backward()
    table = model.tokenizer.size_embedding
    assert table.shape == (3, 96) and (table.grad.abs().sum(1) > 0).all()
    with torch.no_grad():
        table.copy_(torch.randn(3, 96))
        model.eval()
        before, after = AdaptiveViT(vit, "quadtree(31)").tokenizer(vit, images), model.tokenizer(vit, images)
        level = model.tokenizer.mosaic(vit, images).leaf_level
        assert relative(after.patches, before.patches + table[level]) <= 1e-6
        full = AdaptiveViT(vit, "quadtree(64, size_embedding=True)")
        full.tokenizer.size_embedding.copy_(table)
        assert (
            relative(full.tokenizer(vit, images).patches, AdaptiveViT(vit).tokenizer(vit, images).patches + table[0])
            <= 1e-5
        )
        save(model, tmp_path / "m")
        assert torch.equal(load(tmp_path / "m")(images).logits, model(images).logits)


@torch.no_grad()
def test_the_area_bias_counts_cells(vit, images):
    tokens, _ = AdaptiveViT(vit, "quadtree(31, area_bias=True)").forward_tokens(images)
    area = AdaptiveViT(vit, "quadtree(31)").forward_tokens(images)[0].area()
    assert torch.equal(tokens.size, area.float()) and torch.equal(tokens.area(), area)
    assert relative(tokens.key_bias()[:, 1:], area.log()) <= 1e-6
    assert AdaptiveViT(vit, "quadtree(31)").forward_tokens(images)[0].size is None, "the fastest kernel stays in use"


@torch.no_grad()
def test_the_order_of_tokens_does_not_matter(vit, images):
    model = AdaptiveViT(vit, "quadtree(31)")
    tokens = model.tokenizer(vit, images)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        tokens, x=torch.cat([tokens.x[:, :1], tokens.patches[:, order]], 1), owner=order.argsort()[tokens.owner]
    )
    first, second = (model.forward_head(encode(vit, t, model.plan)[0]) for t in (tokens, shuffled))
    assert float((first - second).abs().max()) < 1e-5


# --- dense maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [(8, 8), (7, 10)])
def test_spreading_tokens_over_cells_gives_the_boxes_back(vit, cells):
    g = Geometry.of(cells, (16, 32, 64))
    tokens, _ = AdaptiveViT(vit).forward_tokens(make_images(vit, 2))
    for mosaic in some_mosaics(g):
        count = mosaic.cell.shape[1]
        of = replace(tokens, x=torch.zeros(2, 1 + count, 8), owner=mosaic.owner, grid=cells)
        spread = of.scatter_to_grid(torch.eye(count).expand(2, -1, -1))
        assert torch.equal(spread.argmax(-1), mosaic.owner) and torch.equal(spread.sum(-1), torch.ones(2, g.finest))
        assert torch.equal(of.area(), mosaic.area.long())


def test_spreading_is_differentiable(vit):
    g = Geometry.of((5, 6), (16, 32, 64))
    mosaic = some_mosaics(g)[2]
    tokens, _ = AdaptiveViT(vit).forward_tokens(make_images(vit, 2))
    of = replace(tokens, x=torch.zeros(2, 1 + mosaic.cell.shape[1], 8), owner=mosaic.owner, grid=(5, 6))
    values = torch.randn(2, mosaic.cell.shape[1], 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: of.scatter_to_grid(v), (values,))
    with Operations() as ran:
        of.scatter_to_grid(values.detach())
    assert sum("gather" in name or "index" in name for name in ran.seen) == 1


# --- ragged batches -------------------------------------------------------------------------------------------------

RAGGED = ["quadtree(threshold=6.6)", "quadtree(threshold=0.02, scorer='pixel', area_bias=True)"]


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "siglip-average", "siglip", "class-average"])
@pytest.mark.parametrize("setting", RAGGED)
def test_an_image_does_not_know_its_neighbours(family, setting):
    vit = make_vit(family, **SIDE)
    images = busy_images(vit, 4, seed=2)
    model = AdaptiveViT(vit, setting)
    tokens, trace = model.forward_tokens(images)
    lengths = tokens.valid.sum(1)
    assert len(set(lengths.tolist())) > 1 and tokens.num_patches == int(lengths.max())
    logits, dense = model(images).logits, model.feature_map(images)
    for b in range(4):
        alone = model(images[b : b + 1])
        assert relative(alone.logits, logits[b : b + 1]) <= 1e-4
        assert relative(model.feature_map(images[b : b + 1]), dense[b : b + 1]) <= 1e-4
        assert int(alone.trace.first.max()) + 1 == int(lengths[b])
        assert torch.equal(alone.trace.first[0], trace.first[b])
    shortest = int(lengths.argmin())
    changed = images.clone()
    changed[shortest] = images[int(lengths.argmax())]  # the lengths change, the longest does not
    others = [b for b in range(4) if b != shortest]
    assert relative(model(changed).logits[others], logits[others]) <= 1e-5


@torch.no_grad()
def test_where_shapes_are_fixed_no_bit_of_a_neighbour_comes_through(vit):
    """The form that is exported: every image has as many places as cells."""
    images = busy_images(vit, 3)
    program = torch.export.export(Logits(vit, RAGGED[0]), (images,)).module()
    logits = program(images)
    changed = images.clone()
    changed[1] = make_images(vit, 1, seed=9)
    assert torch.equal(program(changed)[[0, 2]], logits[[0, 2]])
    assert relative(logits, AdaptiveViT(vit, RAGGED[0])(images).logits) <= 1e-5


@torch.no_grad()
def test_a_batch_has_exactly_its_budget(vit):
    for tokens in (7, 31, 40, 61):
        model = AdaptiveViT(vit, f"quadtree(per_batch={tokens})")
        for count in (1, 3, 5):
            images = busy_images(vit, count, seed=count)
            encoded = model.forward_tokens(images)[0]
            valid = torch.ones(count, encoded.num_patches) if encoded.valid is None else encoded.valid
            assert int(valid.sum()) == tokens * count
            if count == 1:
                assert torch.equal(
                    model(images).trace.first, AdaptiveViT(vit, f"quadtree({tokens})")(images).trace.first
                )
    flat, noise = torch.zeros(1, 3, 128, 128), make_images(vit, 1)
    found = AdaptiveViT(vit, "quadtree(per_batch=31)").tokenizer.mosaic(vit, torch.cat([flat, noise])).valid.sum(1)
    assert found.tolist() == [4, 58], "a flat image needs no more than its coarsest blocks"


@torch.no_grad()
def test_ragged_tokens_go_through_reducers(vit):
    images = busy_images(vit, 4, seed=2)
    for method in ("evit(0.7)", "random(0.7)", "tome(r=3)"):
        out = AdaptiveViT(vit, f"{RAGGED[0]} | {method}")(images)
        assert out.logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(
    "methods", ["imagepiece() | evit(0.8)", "tome(r=2) | topk(0.5)", "evit(0.7) | adavit()", "tokenlearner(8)"]
)
@pytest.mark.parametrize("tokens", ["40", "per_batch=40"])
def test_a_mosaic_composes_with_reducers_and_gates(vit, tokens, methods):
    """Whatever comes after it: finite, batch-independent where the number is each image's own, and a dense map."""
    images = busy_images(vit, 3, seed=2)
    model = AdaptiveViT(vit, f"quadtree({tokens}) | {methods}")
    out = model(images)
    assert out.logits.isfinite().all() and out.trace.first.shape == (3, 64)
    assert model.feature_map(images).shape[2:] == (8, 8)
    if tokens == "40":
        for b in range(3):
            assert relative(model(images[b : b + 1]).logits, out.logits[b : b + 1]) <= 1e-3


# --- graphs, settings, pictures -------------------------------------------------------------------------------------


class Logits(nn.Module):
    def __init__(self, vit, setting: str) -> None:
        super().__init__()
        self.model = AdaptiveViT(vit, setting)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


GRAPHS = [
    "quadtree(31, sizes=(16, 32, 64, 128)) | tome(r=3)",
    "quadtree(31, scorer='entropy', resample='bilinear', positions='sinusoid', detail=True, size_embedding=True)",
    "quadtree(31, scorer='attention(2)', area_bias=True)",
    "quadtree(31, scorer='laplacian', positions='centre')",
    "quadtree(31, scorer='gate')",
    "quadtree(31, scorer='random(3)')",
    "quadtree(31, scorer=\"feature(weights='random')\")",
]


@torch.no_grad()
@pytest.mark.parametrize("setting", [pytest.param(s, marks=pytest.mark.slow) for s in GRAPHS])
def test_compiles_in_one_graph(vit, images, setting):
    torch._dynamo.reset()
    module = Logits(vit, setting)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for batch in (images, images[:2]):
        assert relative(compiled(batch), module(batch)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("setting", [*GRAPHS[:2], *(pytest.param(s, marks=pytest.mark.slow) for s in GRAPHS[2:])])
def test_exports_for_any_batch(vit, images, setting):
    module = Logits(vit, setting)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("b")},)).module()
    for batch in (images, images[:1], busy_images(vit, 5, seed=4)):
        assert relative(program(batch), module(batch)) <= 1e-5


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_engines(vit, images, engine):
    pytest.importorskip({"onnx": "onnxruntime"}.get(engine, engine), reason=f"{engine} is not installed")
    model = AdaptiveViT(vit, GRAPHS[0]).eval()
    assert relative(model.runner(engine)(images), model(images).logits) <= 1e-4


def test_menu_and_ranges_hold_only_what_can_be_had():
    entry = registry()["quadtree"]
    for family, shape in (("vit", {"img_size": 224}), ("dinov2", {"img_size": 336}), ("vit", {"img_size": 64})):
        model = AdaptiveViT(make_vit(family, depth=1, **shape))
        menu = entry.menu(model.backbone)
        assert len(menu) >= 5 or shape["img_size"] == 64
        for setting in menu:
            view = model.at(setting)
            (call,) = Setting.parse(setting).calls
            with torch.no_grad():
                assert view.forward_tokens(make_images(model.vit, 1, view.input_size()))[0].num_patches == call.args[0]
    assert not entry.menu(AdaptiveViT(make_vit("oblong")).backbone)
    backbone = AdaptiveViT(make_vit("vit", depth=1, img_size=256)).backbone
    legal = [n for n in range(1, 300) if entry.accepts(backbone, (n,), {})]
    assert legal == list(range(16, 257, 3))
    squares = [k * k for k in range(4, 17) if k * k in legal]
    assert squares == [16, 25, 49, 64, 100, 121, 169, 196, 256], "spec §1.1: those of 3 ∤ k"


def test_tune_races_it_as_a_reduction_and_not_as_dense(vit):
    found = candidates(AdaptiveViT(vit)).candidates
    families = {c.family for c in found if c.setting.startswith("quadtree")}
    assert families == {"reduction"} and any(c.setting.startswith("quadtree") for c in found)


def test_input_size_is_the_size_asked_for(vit):
    assert AdaptiveViT(vit, "quadtree(100, size=256)").input_size() == (256, 256)
    assert AdaptiveViT(vit, "quadtree(39, size=(96, 160), sizes=(16, 32))").input_size() == (96, 160)
    assert AdaptiveViT(vit, "quadtree(31)").input_size() == (128, 128)
    with torch.no_grad():
        model = AdaptiveViT(vit, "quadtree(100, size=256)")
        assert model(make_images(vit, 1)).trace.grid == (16, 16)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_stay_what_they_are(vit, images, dtype):
    expected = AdaptiveViT(vit, "quadtree(31, detail=True)").tokenizer(vit, images).x
    other = copy.deepcopy(vit).to(dtype)
    for setting in ("quadtree(31, detail=True)", "quadtree(31, scorer='gate', size_embedding=True)"):
        found = AdaptiveViT(other, setting).tokenizer(other, images.to(dtype)).x
        assert found.dtype == dtype
        assert float((found.float() - expected).norm() / expected.norm()) <= (2e-2 if dtype != torch.float64 else 1e-5)


@torch.no_grad()
def test_copies_and_pickles(vit, images):
    model = AdaptiveViT(vit, "quadtree(31, scorer=\"feature(weights='random')\")")
    expected = model(images).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images).logits, expected)
    assert not any("network" in name for name in model.state_dict())
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(AdaptiveViT(vit)))


@torch.no_grad()
def test_costs_are_those_of_the_operators(vit, images):
    """With the detail branch, whose settings no gradient reaches at first, so that the contract leaves them out."""
    for setting in (
        "quadtree(31, detail=True)",
        "quadtree(64, detail=True)",
        "quadtree(4, scorer='attention(2)')",
        RAGGED[0],
    ):
        model = AdaptiveViT(vit, setting)
        assert float(model(images).trace.macs().sum()) == pytest.approx(
            counted_macs(lambda m=model: m(images)), rel=1e-3
        )


@torch.no_grad()
def test_a_mosaic_is_drawn_with_a_line_around_every_patch(vit, images):
    """On a black photo the outlines are all there is to see: the picture gives the mosaic back."""
    mosaic = AdaptiveViT(vit, "quadtree(31)").tokenizer.mosaic(vit, images)
    picture = np.asarray(draw_tokens(np.zeros((128, 128, 3), np.uint8), mosaic.owner[0], (8, 8), side=256)).sum(-1)
    owner = mosaic.owner[0].view(8, 8)
    for y in range(8):
        for x in range(7):
            line = picture[32 * y + 16, 32 * x + 28 : 32 * x + 36].max() > 100
            assert line == bool(owner[y, x] != owner[y, x + 1])
