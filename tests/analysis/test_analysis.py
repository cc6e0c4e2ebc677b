"""Analyses against slow restatements and closed cases; the page, the numbers, and what an interruption leaves."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import saccade
from command_line import Run, place, run  # noqa: F401  (fixtures)
from data_helpers import encode, picture, write_folder
from html_page import Page
from oracles import make_images, make_tokens, make_vit, relative
from saccade import analysis
from saccade.analysis import analyze, bias, cka, correspondence, ensemble, registry, relevance
from saccade.analysis.layers import cell_map, levels, watch
from saccade.analysis.study import Answers, Finding, Study, readable, usual
from saccade.core.tokens import DROPPED
from saccade.data import open_images
from saccade.errors import UserError
from saccade.evaluation.stats import paired_difference
from saccade.execution.policy import Execution
from saccade.model import AdaptiveViT
from saccade.reports.heat_map import colours, heat_figure, path_figure
from saccade.reports.overlay import draw_overlay
from saccade.reports.report_blocks import Heat, Paths, Pictures, Table, render_parts
from saccade.terminal.progress import Progress
from small_runs import files, tiny

SETTINGS = ("dense", "grid(8)", "grid(32)", "tome(r=2)", "evit(0.5, at=1)")


@pytest.fixture(scope="module")
def model() -> AdaptiveViT:
    return tiny()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"), files(each=8))


def study(
    model: AdaptiveViT, folder: Path, names: tuple[str, ...] = SETTINGS, count: int = 24, batch: int = 8
) -> Study:
    images = open_images(folder)
    return Study(model.at("dense").eval(), images, names, tuple(range(min(count, len(images)))), batch, Progress())


# Layers


def test_levels_of_the_dense_model_are_timms_blocks(model):
    images, seen = make_images(model.vit), []
    hooks = [b.register_forward_hook(lambda *args: seen.append(args[2])) for b in model.vit.blocks]
    hooks.append(model.vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    with torch.inference_mode():
        model.vit(images)
    for hook in hooks:
        hook.remove()
    with torch.inference_mode():
        found = levels(model, images)
    assert len(found) == len(seen) == 4
    assert all(relative(a.x, b) < 1e-5 for a, b in zip(found, seen, strict=True))


@pytest.mark.parametrize("setting", ["tome(r=2)", "evit(0.5)", "imagepiece()", "grid(8) | tome(r=3)", "grid(32)"])
def test_levels_are_what_the_blocks_hand_on(model, setting):
    view, images = model.at(setting).eval(), make_images(model.vit)
    with torch.inference_mode():
        tokens, trace = view.forward_tokens(images)
        found = levels(view, images)
        events, last = watch(view, images)
    assert torch.equal(last.x, tokens.x) and torch.equal(found[-1].x, tokens.x)
    assert torch.equal(found[0].owner, trace.first)
    for level, block in zip(found[1:], trace.blocks, strict=True):
        assert torch.equal(level.owner, block.owner)
    assert [(e.block, e.site) for e in events] == [(i, site) for i in range(3) for site in ("block", "attn")]


@settings(max_examples=25)
@given(st.lists(st.integers(-1, 3), min_size=6, max_size=6))
def test_a_cell_map_gives_each_cell_its_token(owner):
    tokens = make_tokens(1, 4, width=3)
    tokens = type(tokens)(tokens.x, torch.tensor([owner]), (2, 3), 1, state={DROPPED: torch.full((1, 6, 3), 7.0)})
    found = cell_map(tokens, (2, 3))
    pooled = cell_map(tokens, (1, 1))
    for cell, own in enumerate(owner):
        expected = torch.full((3,), 7.0) if own < 0 else tokens.patches[0, own]
        assert torch.equal(found[0, :, cell // 3, cell % 3], expected)
    assert torch.allclose(pooled.flatten(), found[0].flatten(1).mean(1), atol=1e-6)


# CKA


def slow_hsic(k: Tensor, l: Tensor) -> float:
    """Mean over all ordered quadruples of different examples: the U-statistic that HSIC₁ is."""
    quadruples = [*permutations(range(len(k)), 4)]
    total = sum(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in quadruples)
    return float(total / len(quadruples))


def features(seed: int, n: int, width: int = 5) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka_of(*xs: Tensor) -> Tensor:
    return cka.similarity(cka.hsic(torch.stack([cka.gram(x) for x in xs])))


def biased_cka(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


@pytest.mark.parametrize("n", [4, 5, 6])
def test_hsic_is_the_mean_over_all_quadruples(n):
    xs = [features(0, n), features(1, n), features(0, n) @ features(2, 5, 3)]
    found = cka.hsic(torch.stack([cka.gram(x) for x in xs]))
    for i, x in enumerate(xs):
        for j, y in enumerate(xs):
            assert found[i, j].item() == pytest.approx(slow_hsic(x @ x.T, y @ y.T), rel=1e-9, abs=1e-12)


def test_the_mean_of_all_minibatches_is_the_whole():
    """Unbiasedness, exactly: every minibatch of 5 of the 8 examples, averaged, gives HSIC₁ of the 8."""
    x, y = features(0, 8), features(1, 8) + features(0, 8)
    whole = cka.hsic(torch.stack([cka.gram(x), cka.gram(y)]))
    parts = [cka.hsic(torch.stack([cka.gram(x[list(c)]), cka.gram(y[list(c)])])) for c in combinations(range(8), 5)]
    assert torch.allclose(torch.stack(parts).mean(0), whole, rtol=1e-10, atol=1e-12)


def test_minibatches_come_near_the_whole_set():
    shared = features(0, 384, 12)
    x, y = shared @ features(1, 12, 20), shared @ features(2, 12, 9) + 2 * features(3, 384, 9)
    whole = cka_of(x, y)[0, 1]
    pairs = zip(x.split(32), y.split(32), strict=True)
    parts = torch.stack([cka.hsic(torch.stack([cka.gram(a), cka.gram(b)])) for a, b in pairs]).mean(0)
    assert 0.2 < whole < 0.9
    assert cka.similarity(parts)[0, 1].item() == pytest.approx(whole.item(), abs=0.03)


@given(st.integers(0, 99), st.integers(4, 12), st.floats(0.01, 100))
@settings(max_examples=20)
def test_cka_sees_neither_rotation_nor_scale_nor_place(seed, n, scale):
    x, y = features(seed, n), features(seed + 100, n, 7)
    turn, _ = torch.linalg.qr(features(seed + 200, 5))
    found = cka_of(x, y, scale * x @ turn + 3)
    assert found.diagonal().tolist() == pytest.approx([1.0] * 3)
    assert found[0, 2].item() == pytest.approx(1.0)
    assert found[2, 1].item() == pytest.approx(found[0, 1].item(), rel=1e-6, abs=1e-9)
    assert torch.allclose(found, found.T)


def test_independent_features_are_unlike_and_the_biased_estimator_does_not_see_it():
    found, biased = [], []
    for seed in range(40):
        x, y = features(2 * seed, 16, 200), features(2 * seed + 1, 16, 200)
        found.append(cka.hsic(torch.stack([cka.gram(x), cka.gram(y)])))
        biased.append(biased_cka(x, y))
    assert abs(cka.similarity(torch.stack(found).mean(0))[0, 1].item()) < 0.05
    assert min(biased) > 0.8


def test_a_constant_feature_has_no_cka():
    x = features(0, 6)
    found = cka_of(x, torch.full((6, 3), 0.1, dtype=torch.float64))
    assert found[0, 0].item() == pytest.approx(1) and found[0, 1].isnan() and found[1, 1].isnan()


def test_the_map_keeps_distances_that_fit_in_a_plane():
    points = features(0, 9, 2) * 0.3
    found = cka.embedding(torch.cdist(points, points).cos())
    assert torch.allclose(torch.cdist(found, found), torch.cdist(points, points), atol=1e-9)
    assert cka.embedding(torch.full((3, 3), torch.nan, dtype=torch.float64)).isfinite().all()


def test_cka_of_a_model_is_that_of_its_features(model, photos):
    """One batch of eight: every entry against the slow definition on hand-made features."""
    some = study(model, photos, ("grid(8)", "tome(r=2)"), count=8)
    found = cka.cka(some)
    (_, images), = some.batches(some.views(), lambda done: None)  # fmt: skip
    maps, firsts = [], []
    with torch.inference_mode():
        for name, view in some.views().items():
            for k, tokens in enumerate(levels(view, images[name])):
                cells = tokens.scatter_to_grid(tokens.patches).transpose(1, 2).unflatten(2, tokens.grid)
                maps.append(F.adaptive_avg_pool2d(cells, (4, 4)).flatten(1).double())
                firsts += [tokens.x[:, 0].double()] * (k > 0)
    for key, xs in (("patches", maps), ("class token", firsts)):
        values = found.data[key]
        assert len(values) == len(xs)
        grams = [x @ x.T for x in ((x - x.mean(0)) / x.std() for x in xs)]
        for i, j in [(0, len(xs) - 1), (1, 2), (len(xs) // 2, 1)]:
            own = slow_hsic(grams[i], grams[i]) * slow_hsic(grams[j], grams[j])
            assert values[i][j] == pytest.approx(slow_hsic(grams[i], grams[j]) / own**0.5, abs=2e-4)
    json.dumps(found.data, allow_nan=False)


def test_settings_that_compute_the_same_see_the_same(model, photos):
    found = cka.cka(study(model, photos, ("dense", "grid(16)")))
    patches = np.array(found.data["patches"])
    assert np.allclose(np.diag(patches), 1) and np.allclose(patches, patches.T)
    assert np.allclose(patches[:4, :4], patches[:4, 4:])
    assert found.data["median class token, last layer"] == pytest.approx(1)
    assert [type(p) for p in found.parts] == [Heat, Heat, Paths]


def test_unit_tokens_leave_lengths_out(model, photos, monkeypatch):
    raw, unit = (cka.cka(study(model, photos, ("dense", "grid(8)")), tokens=kind) for kind in ("raw", "unit"))
    assert raw.data["patches"] != unit.data["patches"]
    assert raw.data["class token"] != unit.data["class token"]
    scaled = cka.levels

    def longer(view, images):
        return [replace_x(t, t.x * (1 + torch.arange(t.x.shape[1]) % 3)[:, None]) for t in scaled(view, images)]

    def replace_x(tokens, x):
        return replace(tokens, x=x)

    monkeypatch.setattr(cka, "levels", longer)
    again_raw, again = (cka.cka(study(model, photos, ("dense", "grid(8)")), tokens=kind) for kind in ("raw", "unit"))
    assert np.allclose(np.array(again.data["patches"]), np.array(unit.data["patches"]), atol=2e-4)
    assert not np.allclose(np.array(again_raw.data["patches"]), np.array(raw.data["patches"]), atol=2e-4)


def test_one_long_token_is_said(model, photos, monkeypatch):
    long = cka.levels

    def longer(view, images):
        found = long(view, images)
        found[2].x[:, 3] *= 100
        return found

    assert not any("tokens='unit'" in line for line in cka.cka(study(model, photos)).lines)
    monkeypatch.setattr(cka, "levels", longer)
    assert any("tokens='unit'" in line for line in cka.cka(study(model, photos)).lines)


def test_a_model_without_class_token_has_the_patches_alone(photos):
    vit = make_vit("siglip-average", num_classes=3)
    found = cka.cka(study(AdaptiveViT(vit), photos, ("dense", "grid(32)")))
    assert "class token" not in found.data and "patch tokens of different settings" in found.lines[0]


# Correspondence


@settings(max_examples=25)
@given(st.lists(st.integers(-1, 4), min_size=12, max_size=12), st.lists(st.floats(-1, 1), min_size=5, max_size=5))
def test_hits_are_those_of_a_slow_loop(owner, scores):
    grid, point = (3, 4), (0.4, 0.9)
    if max(owner) < 0:
        return
    tokens = make_tokens(1, 5, width=2)
    tokens = type(tokens)(tokens.x, torch.tensor([owner]), grid, 1)
    similar = tokens.scatter_to_grid(torch.tensor(scores)[None, :, None], torch.nan).squeeze(-1)
    close = {r * 4 + c for r in range(3) for c in range(4)
             if abs((r + 0.5) - point[0] * 3) <= 1.5 and abs((c + 0.5) - point[1] * 4) <= 1.5}  # fmt: skip
    assert set(correspondence.near(grid, point).nonzero().flatten().tolist()) == close
    hit, chance = correspondence.hits(similar, tokens.owner, correspondence.near(grid, point))
    kept = sorted({o for o in owner if o >= 0})
    best = max(kept, key=lambda o: (np.float32(scores[o]), -owner.index(o)))
    cells = {o: {c for c, own in enumerate(owner) if own == o} for o in kept}
    assert hit.item() == bool(cells[best] & close)
    assert chance.item() == pytest.approx(sum(bool(cells[o] & close) for o in kept) / len(kept))


def test_similarity_is_the_cosine():
    tokens = make_tokens(2, 6, width=4)
    anchor = features(0, 2, 4).float()
    found = correspondence.alike(anchor, tokens)
    for b in range(2):
        for k in range(6):
            a, t = anchor[b], tokens.patches[b, k]
            assert found[b, k].item() == pytest.approx((a @ t / (a.norm() * t.norm())).item(), abs=1e-6)


def test_the_same_setting_written_twice_always_corresponds(model, photos):
    found = correspondence.correspondence(study(model, photos, ("dense", "grid(16)", "grid(32)")), photos=1)
    rows = found.data["settings"]
    assert list(rows) == ["grid(16)", "grid(32)"]
    assert rows["grid(16)"]["share"]["mean"] == 1.0 and rows["grid(16)"]["chance"] == pytest.approx(9 / 16)
    assert rows["grid(32)"]["chance"] == 1.0 == rows["grid(32)"]["share"]["mean"]  # of four, all are neighbours
    table, pictures = found.parts
    assert isinstance(table, Table) and isinstance(pictures, Pictures)
    (_, panels), = pictures.rows  # fmt: skip
    assert [caption for caption, _ in panels] == ["photo", "dense", "grid(16)", "grid(32)"]


def test_any_token_and_any_layer_can_be_asked_about(model, photos):
    some = study(model, photos, ("dense", "grid(8)"))
    corner = correspondence.correspondence(some, token=(0, 1), layer=0, photos=0)
    assert corner.data["settings"]["grid(8)"]["chance"] == pytest.approx(
        9 / 64
    )  # the four in the corner, and the ring around
    assert "token at 0, 1" in corner.lines[0] and corner.data["layer"] == 0
    last = correspondence.correspondence(some, token=(0, 1), photos=0)
    assert last.data["layer"] == 3


def test_dropped_places_are_told(model, photos):
    found = correspondence.correspondence(study(model, photos, ("dense", "evit(0.1, at=0)")), photos=0)
    row = found.data["settings"]["evit(0.1, at=0)"]
    assert row["kept"] < 1 and row["share"]["mean"] <= row["kept"]


# Relevance


def slow_relevance(vit, image: Tensor, target: int) -> Tensor:
    """Chefer et al.'s rollout on plain timm, block by block and head by head: [P+N]."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image)))
    shares = []
    for block in vit.blocks:
        attn, y = block.attn, block.norm1(x)
        q, k, v = attn.qkv(y).reshape(1, y.shape[1], 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        share = (attn.q_norm(q) @ attn.k_norm(k).mT * attn.scale).softmax(-1)
        shares.append(share)
        x = x + block.ls1(attn.proj(attn.norm((share @ v).transpose(1, 2).flatten(2))))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    logit = vit.forward_head(vit.norm(x))[0, target]
    gradients = torch.autograd.grad(logit, shares)
    result = torch.eye(x.shape[1])
    for share, gradient in zip(shares, gradients, strict=True):
        heads = [(gradient[0, h] * share[0, h]).clamp(min=0) for h in range(share.shape[1])]
        result = result + sum(heads) / len(heads) @ result
    return result[0] if vit.global_pool == "token" else result[vit.num_prefix_tokens :].mean(0)


@pytest.mark.parametrize("family", ["vit", "deit3", "dinov2-registers", "qk-norm", "siglip-average", "class-average"])
def test_relevance_is_the_papers_rollout(family):
    vit = make_vit(family)
    image = make_images(vit, 1)
    found, tokens = relevance.rollout(AdaptiveViT(vit), image, 3)
    expected = slow_relevance(vit, image, 3)
    assert relative(found, expected.detach()) < 1e-4
    assert tokens.num_patches == 16


@pytest.mark.parametrize("kernel", ["fused", "unfused"])
def test_relevance_does_not_depend_on_the_kernel_and_touches_nothing(model, kernel):
    image = make_images(model.vit, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    view = model.at("evit(0.5, score='received')").eval()  # which reads all scores: never fused
    expected, _ = relevance.rollout(model, image, 0)
    with torch.inference_mode():
        logits = view(image).logits
    model, view = model.at(""), view.at(view.setting)
    view.execution = model.execution = Execution(kernel)
    found, _ = relevance.rollout(model, image, 0)
    assert relative(found, expected) < 1e-4
    relevance.rollout(view, image, 0)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.inference_mode():
        assert relative(view(image).logits, logits) < 1e-5


@pytest.mark.parametrize("setting", ["grid(8)", "tome(r=3)", "evit(0.4, fuse=True)", "imagepiece()", "random(0.5)"])
def test_relevance_of_a_reduced_model_is_a_share_of_each_cell(model, setting):
    view = model.at(setting).eval()
    found, tokens = relevance.rollout(view, make_images(model.vit, 1), 1)
    cells = relevance.over_cells(found, tokens)
    assert cells.shape == (tokens.grid[0] * tokens.grid[1],)
    assert cells.sum().item() == pytest.approx(1, abs=1e-5) and cells.min() >= 0
    assert cells.std() > 0


def test_a_knob_at_off_has_the_dense_relevance(model):
    image = make_images(model.vit, 1)
    dense, _ = relevance.rollout(model, image, 2)
    for setting in ("tome(r=0)", "evit(1.0)"):
        assert torch.equal(relevance.rollout(model.at(setting).eval(), image, 2)[0], dense)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 2)), min_size=8, max_size=8))
def test_what_a_token_is_made_of_is_counted_in_cells(pairs):
    owners = [list(side) for side in zip(*pairs, strict=True)]
    before, after = make_tokens(1, 5), make_tokens(1, 3)
    before, after = (type(t)(t.x, torch.tensor([o]), (2, 4), 1) for t, o in zip((before, after), owners, strict=True))
    made = relevance.carry(analysis.layers.Seen(0, "attn", before, after))
    assert made.shape == (4, 6) and torch.equal(made[:1], torch.eye(6)[:1])
    for new in range(3):
        sources = [old for old, now in pairs if now == new and old >= 0]
        for old in range(5):
            share = sources.count(old) / len(sources) if sources else 0.0
            assert made[1 + new, 1 + old].item() == pytest.approx(share)


def test_half_of_the_relevance():
    assert relevance.half(torch.tensor([0.1, 0.7, 0.1, 0.1])) == 0.25
    assert relevance.half(torch.full((10,), 0.1, dtype=torch.float64)) in (0.5, 0.6)
    assert relevance.half(torch.tensor([0.3, 0.3, 0.2, 0.2])) == 0.5


def test_relevance_of_photos(model, photos):
    found = relevance.relevance(study(model, photos, ("dense", "grid(32)", "tome(r=2)")), images=3, photos=2)
    assert found.data["images"] == 3 and list(found.data["half"]) == ["dense", "grid(32)", "tome(r=2)"]
    assert all(0 < v["mean"] <= 1 for v in found.data["half"].values())
    pictures = found.parts[1]
    assert isinstance(pictures, Pictures) and len(pictures.rows) == 2 and len(pictures.rows[0][1]) == 4


# Ensembles


N = 400
COST = {"small": 1.0, "middle": 2.0, "large": 4.0}


def outcome(together: float, **single: float) -> ensemble.Comparison:
    """The verdict on small + middle, given shares of hits, with images of all kinds in both halves."""
    spots = torch.linspace(0, 1, N, dtype=torch.float64)[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    hits = {name: spots < share for name, share in single.items()}
    choose, report = torch.arange(N // 2), torch.arange(N // 2, N)
    return ensemble.compare(("small", "middle"), hits, spots < together, COST, choose, report)


@pytest.mark.parametrize(
    ("together", "single", "rival", "dearer", "word"),
    [
        (0.5, {"small": 0.3, "middle": 0.8, "large": 0.9}, "middle", "large", "loses"),
        (0.9, {"small": 0.3, "middle": 0.5, "large": 0.6}, "middle", "large", "wins"),
        (0.9, {"small": 0.7, "middle": 0.5, "large": 0.6}, "small", "large", "wins"),
        (0.9, {"small": 0.3, "middle": 0.5}, "middle", None, "not decided"),  # nothing of its compute to compare with
        (0.7, {"small": 0.3, "middle": 0.5, "large": 0.7}, "middle", "large", "not decided"),
        (0.5, {"small": 0.5, "middle": 0.5, "large": 0.5}, "small", "large", "not decided"),
        (0.7, {"small": 0.1, "middle": 0.7, "large": 0.9}, "middle", "large", "not decided"),
    ],
)
def test_an_ensemble_is_judged_against_runs_of_no_more_and_no_less_compute(together, single, rival, dearer, word):
    verdict = outcome(together, **single)
    assert (verdict.rival, verdict.dearer, verdict.word) == (rival, dearer, word)
    assert verdict.gmacs == 3.0 and verdict.top1.mean == pytest.approx(together, abs=0.05)


def test_the_rival_is_chosen_on_other_images_than_it_is_compared_on():
    choose, report = torch.arange(10), torch.arange(10, 20)
    lucky = torch.arange(20) < 10  # all right where rivals are chosen, all wrong where they are compared
    hits = {"small": lucky, "middle": ~lucky}
    verdict = ensemble.compare(("small", "middle"), hits, ~lucky, COST, choose, report)
    assert verdict.rival == "small"
    assert verdict.delta == paired_difference(torch.ones(10), torch.zeros(10)) and verdict.top1.mean == 1.0
    assert verdict.delta.low < verdict.delta.high  # ten images that agree are no certainty


def test_an_ensemble_is_the_mean_of_its_members_probabilities(model, photos):
    some = study(model, photos, ("grid(8)", "grid(32)", "tome(r=2)"))
    found = ensemble.ensemble(some, rivals="grid(8..32)", seed=3)
    rows = {tuple(e["members"]): e for e in found.data["ensembles"]}
    assert len(rows) == 3 + 1 and set(found.data["single"]) == {"dense", "grid(16)", *some.settings}
    assert sum(found.data["counts"].values()) == 4
    truth = torch.tensor(some.images.labels)
    said, gmacs = {}, {}
    (_, images), = Study(**{**vars(some), "batch": 24}).batches(some.views(), lambda done: None)  # fmt: skip
    for name, view in some.views().items():
        with torch.inference_mode():
            out = view(images[name])
        said[name], gmacs[name] = out.logits.softmax(-1), out.trace.macs().mean().item() / 1e9
    report = torch.tensor(ensemble.shuffled_halves(24, 3, truth)[1])
    for members, row in rows.items():
        mean = sum(said[name] for name in members) / len(members)
        assert row["top1"]["mean"] == pytest.approx((mean.argmax(1) == truth)[report].double().mean().item())
        assert row["gmacs"] == pytest.approx(sum(gmacs[name] for name in members))
    assert "`ensemble(rivals=" not in " ".join(found.lines)  # grid(8) costs more than grid(32) with tome


# Shape or texture


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat/cat1-elephant2.png", ("cat", "elephant")),
        ("val/cat/cat10-cat3.png", ("cat", "cat")),
        ("cat/cat-dog.png", ("cat", "dog")),
        ("polar bear/polar bear1-dog.png", ("polar bear", "dog")),
        ("dog/cat1-elephant2.png", None),
        ("cat/cat1.png", None),
        ("cat1-elephant2.png", None),
        ("cat/cat1-2.png", None),
    ],
)
def test_cues_of_a_name(name, expected):
    assert bias.cues(name) == expected


def test_a_table_names_classes_by_index_or_synset(tmp_path):
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"cat": [281, "n02123159"], "dog": ["n02085620"], "unused": [1]}))
    assert bias.read_table(str(file), ["cat", "dog"], 1000) == [[281, 282], [151]]
    assert bias.read_table(None, ["cat", "dog"], 2) == [[0], [1]]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (None, "the head has 1000 classes and the pictures 2"),
        ({"cat": [1]}, "no members for 'dog'"),
        ({"cat": [1], "dogs": [2]}, "did you mean 'dogs'"),
        ({"cat": [], "dog": [2]}, "no members for 'cat'"),
        ({"cat": [1000], "dog": [2]}, "1000 of 'cat' is no class of the head"),
        ({"cat": [True], "dog": [2]}, "True of 'cat' is no class"),
        ({"cat": ["n0"], "dog": [2]}, "'n0' of 'cat' is no class"),
        ([1, 2], "cannot read"),
        ({"cat": 3, "dog": [2]}, "cannot read"),
    ],
)
def test_tables_that_do_not_fit_are_refused(table, says, tmp_path):
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table))
    with pytest.raises(UserError, match=re.escape(says)):
        bias.read_table(None if table is None else str(file), ["cat", "dog"], 1000)
    with pytest.raises(UserError, match="cannot read"):
        bias.read_table(str(tmp_path / "nothing.json"), ["cat", "dog"], 1000)


def test_a_class_is_as_likely_as_its_members_are_on_average():
    probabilities = torch.tensor([[0.4, 0.0, 0.0, 0.3, 0.3], [0.5, 0.2, 0.2, 0.1, 0.0]])
    assert bias.decide(probabilities, [[0, 1, 2], [3, 4]]).tolist() == [1, 0]
    assert bias.decide(probabilities, [[0], [3]]).tolist() == [0, 0]


def conflicts(folder: Path, each: int = 3) -> Path:
    """Pictures whose names, and nothing else, say that shape and texture disagree; some agree."""
    names = [f"{s}/{s}{k}-{t}{k}.png" for s in "abc" for t in "abc" for k in range(each)]
    return write_folder(folder, {n: encode(picture(64, 64, seed=i)) for i, n in enumerate(names)})


def test_shape_bias_is_counted_among_conflicts_alone(model, tmp_path, monkeypatch):
    some = study(model, conflicts(tmp_path), ("dense", "grid(32)"), count=99)
    pairs = [bias.cues(name) for name in some.images.names]
    third = ["abc".index(({*"abc"} - {*pair}).pop()) for pair in pairs]
    shape, texture = (torch.tensor(["abc".index(p[i]) for p in pairs]) for i in (0, 1))
    order = torch.arange(len(pairs))
    mixed = torch.where(order % 3 == 0, shape, torch.where(order % 3 == 1, texture, torch.tensor(third)))
    answers = {"dense": shape, "grid(32)": mixed}
    given = Answers(order, {n: F.one_hot(a, 3).float() for n, a in answers.items()}, dict.fromkeys(answers, 1.0))
    monkeypatch.setattr(Study, "answers", lambda *_: given)
    found = bias.bias(some)
    dense, other = found.data["dense"], found.data["grid(32)"]
    assert (dense["conflicts"], dense["shape"], dense["texture"], dense["bias"]["mean"]) == (18, 18, 0, 1.0)
    conflict = shape != texture
    expected = [int(((mixed == cue) & conflict).sum()) for cue in (shape, texture)]
    assert [other["shape"], other["texture"]] == expected and 0 < other["bias"]["mean"] < 1
    assert other["bias"]["mean"] == pytest.approx(expected[0] / sum(expected))
    assert other["bias"]["low"] < other["bias"]["mean"] < other["bias"]["high"]


def test_shape_bias_of_a_model(model, tmp_path):
    some = study(model, conflicts(tmp_path), ("dense", "evit(0.3, at=0)"), count=99)
    found = bias.bias(some)
    said = some.answers(("dense",), "").probabilities["dense"].argmax(1)
    pairs = [bias.cues(name) for name in some.images.names]
    by_shape = sum("abc"[a] == s != t for a, (s, t) in zip(said.tolist(), pairs, strict=True))
    by_texture = sum("abc"[a] == t != s for a, (s, t) in zip(said.tolist(), pairs, strict=True))
    assert (found.data["dense"]["shape"], found.data["dense"]["texture"]) == (by_shape, by_texture)
    assert found.parts[0].rows["dense"][1][0] == by_shape


# The verb


def test_every_analysis_is_registered_and_says_what_it_asks():
    assert [*registry()] == ["bias", "cka", "correspondence", "ensemble", "merging", "relevance"]
    assert all(entry.summary.endswith(".") and "arXiv" in entry.summary for entry in registry().values())


@pytest.fixture(scope="module")
def analyzed(model, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    what = "cka | correspondence(photos=1) | ensemble | relevance(images=2, photos=1)"
    found = analyze(model, photos, ["grid(8..32)", "tome(r=2)"], what, batch=8, out=out, command="saccade analyze it")
    return found, out


def test_the_folder_holds_the_findings(analyzed):
    found, out = analyzed
    assert {p.name for p in out.iterdir()} == {"analysis.json", "report.html", "cache"}

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    numbers = json.loads((out / "analysis.json").read_text(), parse_constant=refuse)
    assert numbers["settings"] == ["grid(8)", "grid(16)", "grid(32)", "tome(r=2)"]
    assert list(numbers["findings"]) == list(found) == ["cka", "correspondence", "ensemble", "relevance"]
    assert all(numbers["findings"][name]["lines"] == f.lines for name, f in found.items())


def test_the_page_shows_every_finding_and_refers_to_nothing(analyzed):
    found, out = analyzed
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "saccade analyze it" in page.text
    for finding in found.values():
        assert all(line.replace("`", "") in page.text for line in finding.lines)
    assert page.count("dialog") == 1 and page.count("section") == 5
    assert page.count("button", "zoom") == 5 + 5  # a photo under four settings, twice
    assert not re.search(r"https?://|url\(|@import", text)
    for _, attributes in page.tags:
        assert all((attributes.get(n) or "data:").startswith("data:") for n in ("src", "href"))
    assert len(text) < 3_000_000


def test_an_interrupted_analysis_goes_on_after_what_it_found(model, photos, tmp_path, monkeypatch):
    what, out = "cka | correspondence(photos=0)", tmp_path / "out"
    own = registry()["correspondence"]
    ran: list[str] = []

    def stop(study, **knobs):
        raise KeyboardInterrupt

    monkeypatch.setitem(analysis._REGISTRY, "correspondence", analysis.Analysis("correspondence", stop, own.misfit))
    with monkeypatch.context() as unchecked, pytest.raises(KeyboardInterrupt):
        unchecked.setattr(analysis.Analysis, "check", lambda *_: None)
        analyze(model, photos, ["grid(8..32)"], what, batch=8, out=out)
    assert list(json.loads((out / "analysis.json").read_text())["findings"]) == ["cka"]
    assert "cka" in (out / "report.html").read_text().lower()
    monkeypatch.setitem(analysis._REGISTRY, "correspondence", own)
    run_cka = registry()["cka"].run
    counted = analysis.Analysis("cka", lambda study: ran.append("cka") or run_cka(study), lambda *_: None)
    monkeypatch.setitem(analysis._REGISTRY, "cka", counted)
    found = analyze(model, photos, ["grid(8..32)"], what, batch=8, out=out)
    assert list(found) == ["cka", "correspondence"] and ran == []
    for changed in ({"batch": 12}, {"limit": 20}):
        analyze(model, photos, ["grid(8..32)"], "cka", **{"batch": 8, "out": out, **changed})
    analyze(tiny(seed=1), photos, ["grid(8..32)"], "cka", batch=8, out=out)
    analyze(model, photos, ["grid(8)"], "cka", batch=8, out=out)
    assert ran == ["cka"] * 4  # other images, batches, weights or settings are not taken from there
    (*_, damaged) = (out / "cache").rglob("cka-*.json")
    damaged.write_text("{")
    for _ in range(2):
        for names in (["grid(8..32)"], ["grid(8)"]):
            analyze(model, photos, names, "cka", batch=8, out=out)
    assert len(ran) <= 5 + 1


def test_without_names_all_that_fit_are_run_and_the_others_are_told(model, photos, tmp_path, monkeypatch):
    ran: list[str] = []

    def quick(name):
        return lambda study: ran.append(name) or Finding([f"{name} says"], {}, [])

    for name, entry in registry().items():
        monkeypatch.setitem(analysis._REGISTRY, name, analysis.Analysis(name, quick(name), entry.misfit))
    fitting = ["cka", "correspondence", "ensemble", "merging", "relevance"]
    assert list(analyze(model, photos, out=tmp_path / "a")) == fitting == ran
    left_out = json.loads((tmp_path / "a" / "analysis.json").read_text())["left_out"]
    assert list(left_out) == ["bias"] and "is not laid out as cue-conflict pictures" in left_out["bias"]
    analyze(model, conflicts(tmp_path / "cues"))
    assert ran[5:] == ["bias", *fitting]
    few = write_folder(tmp_path / "few", files(each=2))
    assert list(analyze(model, few)) == ["cka", "correspondence", "merging", "relevance"]


def test_adding_an_analysis_is_adding_a_function(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "_REGISTRY", {})

    @analysis.register("counts")
    def counts(study: Study, *, block: int = 1) -> Finding:
        """Tokens after a block."""
        return Finding(
            [f"`{block}` <b>"], {"block": block}, [Table("", "", {"n": "tokens"}, {"dense": [(1.0, "<i>")]})]
        )

    found = analyze(model, photos, "dense", "counts(block=2)", out=tmp_path)
    assert found["counts"].data == {"block": 2}
    text = (tmp_path / "report.html").read_text()
    assert "<code>2</code> &lt;b&gt;" in text and "&lt;i&gt;" in text and "Tokens after a block." in text


def test_settings_to_compare_where_none_are_named(model):
    assert usual(model)[0] == "dense" and 2 <= len(usual(model)) <= 4
    trained = tiny()
    trained.trained = ("grid(32)", "dense", "tome(r=1)")
    assert usual(trained) == ["dense", "grid(32)", "tome(r=1)"]


def test_images_that_cannot_be_read_are_left_out_and_named(model, tmp_path):
    write_folder(tmp_path / "in", {**files(each=4), "a/00.png": b"no image", "c/zz.png": b""})
    some = study(model, tmp_path / "in", ("dense", "grid(16, size=32)"), batch=5)
    seen = [(p, {n: len(x) for n, x in images.items()}) for p, images in some.batches(some.views(), lambda done: None)]
    assert sorted(p for places, _ in seen for p in places) == list(range(1, 12))
    assert all(set(counts.values()) == {len(places)} for places, counts in seen)
    assert set(some.failures) == {"a/00.png", "c/zz.png"}
    assert readable(some, 3) and 0 not in readable(some, 3) and len(readable(some, 99)) == 11
    analyze(model, tmp_path / "in", ["dense", "grid(32)"], "cka", out=tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / "analysis.json").read_text())["not_read"]) == {"a/00.png", "c/zz.png"}
    write_folder(tmp_path / "bad", {f"{c}/{k}.png": b"no image" for c in "abc" for k in range(3)})
    with pytest.raises(UserError, match="nothing to work on"):
        analyze(model, tmp_path / "bad", ["dense", "grid(32)"], "cka")


@pytest.mark.parametrize(
    ("what", "more", "says"),
    [
        ("ckaa", {}, "there is no analysis 'ckaa' .did you mean 'cka'"),
        ("cka | cka", {}, "an analysis is named twice"),
        ("cka(token='unit')", {}, "cka has no knob 'token' .did you mean 'tokens'"),
        ("cka('unit')", {}, "cka: name its knobs"),
        ("cka(tokens='long')", {}, "tokens='long' is not 'raw' or 'unit'"),
        ("cka", {"batch": 3}, "it needs 4 or more"),
        ("cka", {"limit": 2}, "it needs 4 or more"),
        ("bias", {}, "bias: a/00.png is not laid out as cue-conflict pictures are"),
        ("correspondence(layer=4)", {}, "layer=4 is not one of 0 … 3"),
        ("correspondence(token=(0.5, 2))", {}, "not a place"),
        ("correspondence(token=1)", {}, "not a place"),
        ("ensemble(sizes=1)", {}, "not whole numbers of settings, 2 or more"),
        ("ensemble(sizes=9)", {}, "0 combinations of 2 settings"),
        ("relevance(images=0)", {}, "images=0"),
        ("relevance(photos='a')", {}, "photos='a'"),
        ("cka", {"settings": ["grid(8)", "tomme(r=1)"]}, "did you mean 'tome'"),
        ("cka", {"out": "photo.png"}, "is not a folder"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_any_work(model, photos, tmp_path, monkeypatch, what, more, says):
    if "out" in more:
        (tmp_path / "photo.png").write_bytes(b"")
        more = {"out": tmp_path / "photo.png"}
    monkeypatch.setattr(Study, "batches", lambda *_: pytest.fail("an image was run"))
    with pytest.raises(UserError, match=says) as refused:
        analyze(model, photos, **{"settings": ["dense", "grid(32)"], "what": what, **more})
    assert "\n" not in str(refused.value)


def test_the_command_analyzes(run: Run, tmp_path):
    arguments = ["analyze", "model", "photos", "-s", "dense", "-s", "grid(8..32)", "--limit", 12, "--out", tmp_path]
    code, out, err = run(*arguments, "--what", "cka | correspondence(photos=1)", "--json")
    assert code == 0 and "saccade:" not in err  # a slow machine shows progress there
    assert list(json.loads(out)) == ["cka", "correspondence"]
    code, out, _ = run(*arguments, "--what", "cka")
    assert code == 0 and out.startswith("cka:\n  At the end the class token") and "report.html" in out
    code, out, err = run(*arguments, "--what", "cka(")
    assert (code, out, len(err.splitlines())) == (2, "", 1)


# Pictures


def test_an_overlay_is_bright_where_values_are_high():
    photo = Image.fromarray(np.full((40, 60, 3), 128, dtype=np.uint8))
    drawn = np.asarray(draw_overlay(photo, torch.tensor([0.0, 1.0, 2.0, np.nan, 4.0, 3.0]), (2, 3), side=60)).astype(
        int
    )
    assert drawn.shape == (40, 60, 3)
    cells = drawn.reshape(2, 20, 3, 20, 3).transpose(0, 2, 1, 3, 4).reshape(6, 400, 3)
    assert all((cell == cell[0]).all() for cell in cells)
    light = [cell[0].sum() for cell in cells]
    assert light[0] < light[1] < light[2] < light[5] < light[4]
    marked = np.asarray(draw_overlay(photo, [0.0] * 6, (2, 3), [(0.5, 0.5, "ring"), (0.2, 0.2, "cross")], side=60))
    assert (marked == 255).all(2).any()
    with pytest.raises(ValueError, match="2x3 grid has 6 cells, got 4"):
        draw_overlay(photo, [1, 2, 3, 4], (2, 3))


def test_a_heat_map_holds_its_values():
    values = [[1.0, 0.25, None], [0.25, 1.0, 0.0], [None, 0.0, 1.0]]
    svg = heat_figure("t", "h", [("a", 2), ("b<", 1)], values).svgs["any"]
    Page(svg)
    data = re.search(r'href="data:image/png;base64,([^"]+)"', svg)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))))
    assert pixels.shape == (3, 3, 3) and (pixels[0, 2] == 128).all()
    assert np.array_equal(pixels[0, 1], colours(np.array([0.25]))[0]) and not np.array_equal(pixels[0, 0], pixels[0, 1])
    assert "b&lt;" in svg and "b<" not in svg


@settings(max_examples=15)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=6), st.text(max_size=6))
def test_any_parts_make_markup_that_parses(points, name):
    square = [[0.5] * len(points)] * len(points)
    parts = [
        Heat(name, name, [(name, len(points))], square),
        Paths(name, name, {name: points, name + "2": points[::-1]}),
        Table(name, name, {name: name}, {name: [(None, "")], name + "2": [(1.0, name)]}),
        Pictures(name, name, [(name, [(name, Image.new("RGB", (8, 8)))])]),
    ]
    assert Page(render_parts(parts)).count("img") == 1
    assert path_figure(name, name, {name: points}).svgs


# Real weights


@pytest.fixture(scope="module")
def real(data_dir) -> Study:
    weights, images = data_dir / "vit_tiny_patch16_224.safetensors", data_dir / "inval227_dev.zip"
    if not (weights.is_file() and images.is_file()):
        pytest.skip("no weights or photos in the data folder")
    model = saccade.create_model("vit_tiny_patch16_224", weights=weights)
    return Study(
        model, open_images(images), ("grid(16)", "grid(14)", "grid(28)"), tuple(range(0, 300, 5)), 20, Progress()
    )


@pytest.mark.slow
def test_real_tokens_correspond_between_near_patch_sizes(real):
    """Acceptance: the peak lies within one token for four images of five (arXiv 2212.08013, §6.2)."""
    found = correspondence.correspondence(real, photos=0).data["settings"]
    assert found["grid(14)"]["share"]["mean"] >= 0.8 > found["grid(14)"]["chance"]


@pytest.mark.slow
def test_real_layers_are_alike_between_patch_sizes_at_first_and_less_later(real):
    found = np.array(cka.cka(real, tokens="unit").data["patches"], dtype=float)
    same = [found[k, 13 + k] for k in range(13)]
    assert min(same) > 0.9
    assert found[0, 13 + 12] < 0.6 < found[6, 13 + 6]


@pytest.mark.slow
def test_real_relevance_lies_on_less_than_half_of_the_image(real):
    found = relevance.relevance(real, images=8, photos=0).data["half"]
    assert all(0 < row["mean"] < 0.35 for row in found.values())
