"""The merging family against slow loops: one oracle for each method, written from its formulas, one image at a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from oracles import logits_by_hand, make_images, make_tokens, make_vit, merge_by_hand, relative, with_fields
from saccade.backbones.vit import backbone_of
from saccade.core.plan import Method, Reducer
from saccade.core.reduction import Reduction, SoftReduction, reduce
from saccade.core.registry import registry
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.evaluation.candidates import price
from saccade.methods.algm import MergeAnywhere, MergeWindows
from saccade.methods.common.arguments import exact_schedule, schedule
from saccade.methods.common.budget import fit, macs, static
from saccade.methods.common.clustering import (
    cheapest,
    gathered,
    highest,
    nearest,
    squared_distances,
    squared_distances_to,
)
from saccade.methods.dpc_knn import DensityPeaks
from saccade.methods.imagepiece import Interpretation, Retokenize
from saccade.methods.kth import KeepEvery
from saccade.methods.mctf import Attract
from saccade.methods.patchmerger import Merge
from saccade.methods.pitome import EnergyMerge
from saccade.methods.tofu import Mlerp, Prune
from saccade.methods.token_pooling import Pool
from saccade.methods.tokenlearner import UNMIXED, Learn, LearnByConvolution
from saccade.methods.tome import BipartiteMerge
from saccade.model import AdaptiveViT

seeds = st.integers(0, 10_000)


def judged(patches: int, seed: int = 0, images: int = 2, prefix: int = 1, width: int = 8, **state) -> Tokens:
    """Random tokens with every reading of attention, and sizes."""
    generator = torch.Generator().manual_seed(seed + 1)
    state = {
        "size": torch.randint(1, 5, (images, patches), generator=generator).float(),
        "key": torch.randn(images, patches, width, generator=generator),
        "cls_attn": torch.rand(images, patches, generator=generator) + 0.01,
        "attn_received": torch.rand(images, patches, generator=generator) + 0.01,
        **state,
    }
    return make_tokens(images, patches, prefix, width, seed, **state)


def groups_of(reduction: Reduction, b: int) -> list[list[int]]:
    """Members of each new token of one image, the one that stays first."""
    groups = [[int(i)] for i in reduction.keep[b]]
    if reduction.merge is not None:
        for source, slot in zip(reduction.merge.src[b].tolist(), reduction.merge.dst[b].tolist(), strict=True):
            groups[slot].append(source)
    return [[group[0], *sorted(group[1:])] for group in groups]


def dissimilarity(x: Tensor, i: int, j: int) -> float:
    return float((x[i].double() - x[j].double()).square().sum())


def cosine(x: Tensor, i: int, j: int) -> float:
    a, b = x[i].double(), x[j].double()
    return float(a @ b / max(float(a.norm() * b.norm()), 1e-12))


# --- token_pooling ---------------------------------------------------------------------------------------------------


def pool_by_hand(x: Tensor, weight: list[float], m: int, centre: str, iterations: int, start: list[int]) -> dict:
    """Members of each cluster by the token that stands for it: K-medoids or K-means as in a textbook."""
    n = len(x)
    stands = list(start)
    points = [x[i].double() for i in stands]

    def assign() -> list[list[int]]:
        clusters: list[list[int]] = [[] for _ in range(m)]
        for i in range(n):
            away = [float((x[i].double() - p).square().sum()) for p in points]
            clusters[stands.index(i) if i in stands else away.index(min(away))].append(i)
        return clusters

    clusters = assign()
    for _ in range(iterations):
        for c, members in enumerate(clusters):
            if centre == "medoid":
                cost = {i: sum(weight[j] * dissimilarity(x, i, j) for j in members) for i in members}
            else:
                total = sum(weight[j] for j in members)
                points[c] = sum(weight[j] * x[j].double() for j in members) / total
                cost = {i: float((x[i].double() - points[c]).square().sum()) for i in members}
            cost[stands[c]] *= 1 - 1e-4  # it stays unless another is better
            stands[c] = min(members, key=lambda i: (cost[i], i))
            if centre == "medoid":
                points[c] = x[stands[c]].double()
        clusters = assign()
    return dict(zip(stands, clusters, strict=True))


@pytest.mark.parametrize("centre", ["medoid", "mean"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("patches", "keep", "iterations"), [(30, 0.4, 3), (17, 0.5, 1), (12, 0.25, 0), (9, 1 / 9, 2)])
def test_token_pooling_is_a_textbook_clustering(patches, keep, iterations, weighted, centre):
    tokens = judged(patches, seed=patches)
    method = Pool(keep, 8, centre, weighted, iterations, "weight", False)
    reduction = method(tokens)
    found = reduce(tokens, reduction)
    m = method.count(patches)
    for b in range(2):
        weight = tokens.stats.attn_received[b].tolist()
        start = sorted(range(patches), key=lambda i: -weight[i])[:m]
        used = weight if weighted else [1.0] * patches
        expected = pool_by_hand(tokens.patches[b], used, m, centre, iterations, start)
        assert {g[0]: sorted(g) for g in groups_of(reduction, b)} == expected
        for slot, stands in enumerate(sorted(expected)):
            members = expected[stands]
            row = tokens.patches[b, stands]
            if centre == "mean":
                row = sum(used[i] * tokens.patches[b, i] for i in members) / sum(used[i] for i in members)
            torch.testing.assert_close(found.patches[b, slot], row, rtol=0, atol=1e-5)
            assert found.size[b, slot] == sum(float(tokens.size[b, i]) for i in members)


def test_token_pooling_from_even_places_needs_no_attention():
    tokens = judged(12)
    method = Pool(0.25, 8, "medoid", False, 0, "even", False)
    assert method.read == frozenset()
    assert method(tokens.without(frozenset({"attn_received"}))).keep[0].tolist() == [2, 6, 10]


@given(seeds, st.integers(2, 20), st.sampled_from(["medoid", "mean"]))
@settings(max_examples=30)
def test_pooling_never_gets_worse_with_iterations(seed, patches, centre):
    """The cost of K-medoids falls with every step, up to the centres that stay at home."""
    tokens = judged(patches, seed=seed)
    cost = []
    for iterations in (0, 1, 5):
        reduction = Pool(0.4, 8, centre, True, iterations, "weight", False)(tokens)
        groups, x, weight = groups_of(reduction, 0), tokens.patches[0], tokens.stats.attn_received[0].tolist()
        point = {}
        for group in groups:
            share = [weight[i] for i in group]
            mean = sum(s * x[i] for s, i in zip(share, group, strict=True)) / sum(share)
            point[group[0]] = x[group[0]] if centre == "medoid" else mean
        cost.append(sum(weight[i] * float((x[i] - point[g[0]]).square().sum()) for g in groups for i in g))
    assert cost[1] <= cost[0] + 1e-4 and (centre == "mean" or cost[2] <= cost[1] + 1e-4)


@given(seeds, st.integers(2, 16))
def test_clusters_do_not_depend_on_the_order_of_tokens(seed, patches):
    tokens = judged(patches, seed=seed, images=1)
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    for method in (Pool(0.5, 8, "medoid", True, 3, "weight", False), DensityPeaks(0.5, 8, 3, False, None)):
        mixed = replace(tokens, x=torch.cat([tokens.x[:, :1], tokens.patches[:, order]], 1))
        mixed = with_fields(mixed, attn_received=tokens.stats.attn_received[:, order])
        plain = {frozenset(g) for g in groups_of(method(tokens), 0)}
        assert {frozenset(int(order[i]) for i in g) for g in groups_of(method(mixed), 0)} == plain


# --- dpc_knn ---------------------------------------------------------------------------------------------------------


def peaks_by_hand(x: Tensor, m: int, k: int) -> dict[int, list[int]]:
    n, width = x.shape
    apart = [[dissimilarity(x, i, j) / width for j in range(n)] for i in range(n)]
    density = [math.exp(-sum(sorted(row)[:k]) / min(k, n)) for row in apart]
    score = []
    for i in range(n):
        denser = [math.sqrt(apart[i][j]) for j in range(n) if density[j] > density[i]]
        score.append(density[i] * (min(denser) if denser else math.sqrt(max(apart[i]))))
    centres = sorted(range(n), key=lambda i: -score[i])[:m]
    clusters: dict[int, list[int]] = {c: [c] for c in centres}
    for i in range(n):
        if i not in centres:
            clusters[min(centres, key=lambda c: apart[i][c])].append(i)
    return {c: sorted(members) for c, members in clusters.items()}


@pytest.mark.parametrize(("patches", "keep", "k"), [(30, 0.4, 5), (17, 0.2, 1), (9, 0.5, 20), (5, 0.9, 2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_dpc_knn_merges_around_density_peaks(patches, keep, k, weighted):
    tokens = judged(patches, seed=patches)
    method = DensityPeaks(keep, 8, k, True, None, weighted)
    reduction = method(tokens)
    found = reduce(tokens, reduction)
    for b in range(2):
        expected = peaks_by_hand(tokens.patches[b], method.count(patches), k)
        assert {g[0]: sorted(g) for g in groups_of(reduction, b)} == expected
        for slot, c in enumerate(sorted(expected)):
            share = {i: float(tokens.size[b, i]) if weighted else 1.0 for i in expected[c]}
            mean = sum(share[i] * tokens.patches[b, i] for i in share) / sum(share.values())
            torch.testing.assert_close(found.patches[b, slot], mean, rtol=0, atol=1e-5)
            assert float(found.size[b, slot]) == sum(float(tokens.size[b, i]) for i in share)


def test_dpc_knn_finds_the_peaks_of_well_parted_heaps():
    torch.manual_seed(0)
    heaps = 10 * torch.eye(8)[:4]
    x = heaps.repeat_interleave(6, 0) + 0.1 * torch.randn(24, 8)
    tokens = make_tokens(1, 24, prefix=0)
    reduction = DensityPeaks(4 / 24, 8, 5, False, None)(replace(tokens, x=x[None]))
    assert sorted(map(sorted, groups_of(reduction, 0))) == [list(range(i, i + 6)) for i in range(0, 24, 6)]


def test_dpc_knn_learned_scores_weigh_the_members():
    tokens = judged(12, images=1)
    score = torch.randn(8)
    reduction = DensityPeaks(0.25, 8, 5, False, score)(tokens)
    found = reduce(tokens, reduction)
    for slot, group in enumerate(groups_of(reduction, 0)):
        weight = [math.exp(float(score @ tokens.patches[0, i])) for i in group]
        mean = sum(w * tokens.patches[0, i] for w, i in zip(weight, group, strict=True)) / sum(weight)
        torch.testing.assert_close(found.patches[0, slot], mean, rtol=0, atol=1e-5)


# --- clustering in general -------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 12), st.floats(-50, 50))
def test_distances_are_symmetric_and_do_not_care_where_the_origin_is(seed, patches, shift):
    x = make_tokens(2, patches, prefix=0, seed=seed).x
    found = squared_distances(x)
    assert torch.equal(found, found.transpose(1, 2)) and (found.diagonal(dim1=1, dim2=2) == 0).all()
    torch.testing.assert_close(found, torch.cdist(x, x) ** 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squared_distances(x + shift), found, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(squared_distances_to(x, x[:, :1]), found[:, :, :1], rtol=1e-4, atol=1e-4)


@given(seeds, st.integers(1, 12), st.integers(1, 12))
def test_pieces_of_clustering_are_what_loops_give(seed, n, m):
    m = min(n, m)
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 4, (2, n), generator=generator).float()  # with ties
    cluster = torch.randint(0, m, (2, n), generator=generator)
    cluster[:, :m] = torch.arange(m)  # none empty
    centres = highest(score, m)
    least = cheapest(score, cluster, torch.arange(m).expand(2, -1))
    apart = torch.randint(0, 4, (2, n, m), generator=generator).float()
    near = nearest(apart, centres)
    reduction = gathered(centres, near)
    for b in range(2):
        assert centres[b].tolist() == sorted(range(n), key=lambda i: (-float(score[b, i]), i))[:m]
        for c in range(m):
            members = [i for i in range(n) if int(cluster[b, i]) == c]
            assert int(least[b, c]) == min(members, key=lambda i: (float(score[b, i]), i != c, i))
        for i in range(n):
            own = [c for c in range(m) if int(centres[b, c]) == i]
            row = apart[b, i].tolist()
            assert int(near[b, i]) == (own[0] if own else row.index(min(row)))
        groups = groups_of(reduction, b)
        assert [g[0] for g in groups] == sorted(centres[b].tolist())
        assert sorted(i for g in groups for i in g) == list(range(n))
        assert all(int(near[b, i]) == int(near[b, g[0]]) for g in groups for i in g)


# --- tofu ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patches", "r"), [(24, 5), (13, 6), (5, 9)])
def test_tofu_prunes_the_sources_and_mlerp_keeps_the_longest(patches, r):
    tokens = judged(patches, seed=r)
    pruned, merged = (reduce(tokens, kind(r, 8)(tokens)) for kind in (Prune, Mlerp))
    for b in range(2):
        key, sizes = torch.cat([tokens.stats.key[b, :1], tokens.stats.key[b]]), [1.0, *tokens.size[b].tolist()]
        means, _, groups = merge_by_hand(tokens.x[b], key, sizes, r)
        for slot, group in enumerate(groups):
            longest = max(float(tokens.x[b, i].norm()) for i in group)
            row = means[slot] / means[slot].norm() * longest if len(group) > 1 else tokens.x[b, group[0]]
            torch.testing.assert_close(merged.x[b, slot], row, rtol=0, atol=1e-5)
            if len(group) == 1:  # times its size and divided by it
                torch.testing.assert_close(merged.x[b, slot], tokens.x[b, group[0]], rtol=1e-6, atol=0)
            assert torch.equal(pruned.x[b, slot], tokens.x[b, group[0]]), "a partner stays as it is"
        gone = {i - 1 for group in groups for i in group[1:]}
        assert {i for i in range(patches) if int(pruned.owner[b, i]) < 0} == gone
        assert (merged.owner[b] >= 0).all()


def test_mlerp_of_opposite_features_is_no_nan():
    tokens = make_tokens(1, 2, prefix=1)
    x = torch.cat([tokens.x[:, :1], torch.tensor([[[1.0] + [0.0] * 7, [-1.0] + [0.0] * 7]])], 1)
    tokens = with_fields(tokens, x=x.requires_grad_(), key=torch.ones(1, 2, 4))
    found = reduce(tokens, Mlerp(1, 4)(tokens))
    found.x.sum().backward()
    assert found.x.isfinite().all() and x.grad.isfinite().all()


def test_tofu_changes_from_pruning_to_merging_at_its_block():
    backbone = backbone_of(make_vit(depth=6))
    kinds = [type(step) for step in registry()["tofu"](backbone, (), {"r": 1}).steps]
    assert kinds == [Prune] * 3 + [Mlerp] * 3
    kinds = [type(step) for step in registry()["tofu"](backbone, (), {"r": 1, "merge_from": 1}).steps]
    assert kinds == [Prune] + [Mlerp] * 5


# --- pitome ----------------------------------------------------------------------------------------------------------


def energy_merge_by_hand(key: Tensor, keep: float, margin: float, protect: bool) -> tuple[set, set[int]]:
    """(source, into) pairs, and the tokens that were protected."""
    n = len(key)
    r = min(math.floor(round(n - n * keep, 9)), n // 2)

    def pull(i: int, j: int) -> float:
        gap = cosine(key, i, j) - margin
        return gap if gap > 0 else math.exp(gap) - 1

    energy = [sum(pull(i, j) for j in range(n)) / n for i in range(n)]
    order = sorted(range(n), key=lambda i: -energy[i])
    able = order[: 2 * r] if protect else order
    side_a, side_b = able[0::2], able[1::2]
    proposals = []
    for i in side_a:
        partner = max(side_b, key=lambda j: cosine(key, i, j))
        proposals.append((cosine(key, i, partner), i, partner))
    best = sorted(proposals, key=lambda p: -p[0])[:r]
    return {(i, j) for _, i, j in best}, set(order) - set(able)


@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize(("patches", "keep", "margin"), [(30, 0.8, 0.7), (21, 0.5, 0.3), (9, 0.7, 0.0), (3, 0.5, 0.5)])
def test_pitome_merges_by_energy(patches, keep, margin, protect):
    tokens = judged(patches, seed=patches)
    method = EnergyMerge(keep, margin, protect, "key", 8, False)
    reduction = method(tokens)
    for b in range(2):
        pairs, protected = energy_merge_by_hand(tokens.stats.key[b], keep, margin, protect)
        into = reduction.keep[b][reduction.merge.dst[b]].tolist()
        assert set(zip(reduction.merge.src[b].tolist(), into, strict=True)) == pairs
        assert not protected & {*reduction.merge.src[b].tolist(), *into}
    assert reduction.keep.shape[1] == method.count(patches) == patches - len(pairs)


def test_pitome_protects_in_the_second_half_and_lowers_its_margin():
    method = registry()["pitome"](backbone_of(make_vit(depth=6)), (), {})
    assert [step.protect for step in method.steps] == [False] * 3 + [True] * 3
    assert [step.margin for step in method.steps] == pytest.approx([0.75 * (1 - i / 6) for i in range(6)])


# --- mctf ------------------------------------------------------------------------------------------------------------


def attract_by_hand(
    x: Tensor, a: list[float], s: list[float], r: int, info: float, size: float, prefix: int = 1
) -> tuple[Tensor, list[float], list[list[int]]]:
    """MCTF (spec, published §4) on the whole sequence of one image; also who is in each new token."""
    n = len(x)
    r = min(r, (n - prefix) // 2, max(0, n - 10))

    def attraction(i: int, j: int) -> float:
        return (cosine(x, i, j) + 1) / 2 * (1 / a[i] / a[j]) ** info * (1 / s[i] / s[j]) ** size

    every_a, every_b = list(range(0, n, 2)), list(range(1, n, 2))
    side_a, side_b = ([i for i in side if i >= prefix] for side in (every_a, every_b))
    proposals = [max((attraction(i, j), i, j) for j in side_b) for i in side_a]
    first = sorted(proposals, reverse=True)[: r // 2]
    left = [i for i in side_a if i not in [p[1] for p in first]]
    second = sorted([max((attraction(i, j), j, i) for i in left) for j in side_b], reverse=True)[: r - r // 2]
    target = {i: j for _, i, j in [*first, *second]}
    members: dict[int, list[int]] = {}
    for i in range(n):
        end = i
        while end in target:
            end = target[end]
        members.setdefault(end, []).append(i)
    order = [*range(prefix), *(i for i in every_a + every_b if i in members and i >= prefix)]
    groups = [members[i] for i in order]
    rows = [sum(a[i] * s[i] * x[i] for i in g) / sum(a[i] * s[i] for i in g) for g in groups]
    return torch.stack(rows), [sum(s[i] for i in g) for g in groups], groups


@pytest.mark.parametrize(("patches", "r"), [(24, 7), (13, 6), (30, 99), (11, 99), (10, 1)])
@pytest.mark.parametrize(("info", "size"), [(1 / 20, 1 / 40), (1.0, 1.0), (0.0, 0.0)])
def test_mctf_merges_both_ways_by_attraction(patches, r, info, size):
    tokens = judged(patches, seed=patches + r)
    method = Attract(r, None, info, size, 8, 1)
    reduction = method(tokens)
    found = reduce(tokens, reduction)
    assert found.num_patches == method.count(patches)
    for b in range(2):
        received, sizes = [1.0, *tokens.stats.attn_received[b].tolist()], [1.0, *tokens.size[b].tolist()]
        expected, grown, groups = attract_by_hand(tokens.x[b], received, sizes, r, info, size)
        assert [[i + 1 for i in sorted(g)] for g in groups_of(reduction, b)] == groups[1:]
        torch.testing.assert_close(found.x[b], expected, rtol=0, atol=1e-5)
        assert found.size[b].tolist() == grown[1:]


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "dinov2-registers"])
def test_mctf_keeps_the_published_order_from_block_to_block(family):
    vit = make_vit(family, depth=4, img_size=96 if family == "vit" else 84)
    images, prefix = make_images(vit, 2), vit.num_prefix_tokens

    def step(block, x, attention, key, size):
        if block == 0:
            return x, size
        x, size, _ = attract_by_hand(x, attention.mean(0).tolist(), size, 6, 1 / 20, 1 / 40, prefix)
        return x, size

    assert relative(AdaptiveViT(vit, "mctf(r=6)")(images).logits, logits_by_hand(vit, images, step)) <= 1e-5


def test_mctf_goes_far_beyond_half_at_three_blocks():
    vit = make_vit(depth=12, embed_dim=96, img_size=224)
    backbone, dense = backbone_of(vit), macs(backbone_of(vit))
    for speed in (1.5, 2.0, 3.0, 3.5):
        cost = macs(backbone, *AdaptiveViT(vit, f"mctf(speed={speed})").plan.methods)
        assert 0.98 * dense / speed <= cost <= dense / speed
    assert len(AdaptiveViT(vit, "mctf(speed=1.5)").plan.at) == 3 < len(AdaptiveViT(vit, "mctf(speed=3)").plan.at)
    with pytest.raises(UserError, match="out of reach"):
        AdaptiveViT(vit, "mctf(speed=3, at=(3, 6, 9))")


@given(seeds, st.floats(0.1, 10), st.floats(0.1, 10))
@settings(max_examples=30)
def test_mctf_does_not_care_for_the_scale_of_its_criteria(seed, a, b):
    """Which is why the paper's division by the largest value is left out."""
    tokens, method = judged(15, seed=seed), Attract(5, None, 0.05, 0.025, 8, 1)
    scaled = with_fields(tokens, x=3 * tokens.x, attn_received=a * tokens.stats.attn_received, size=b * tokens.size)
    plain, other = method(tokens), method(scaled)
    assert torch.equal(plain.merge.src, other.merge.src) and torch.equal(plain.merge.dst, other.merge.dst)


# --- algm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "share"), [((4, 6), 0.5), ((5, 7), 0.34), ((3, 3), 1.0), ((2, 2), 1.0)])
def test_algm_merges_the_most_uniform_windows(grid, share):
    height, width = grid
    tokens = replace(judged(height * width, seed=width), grid=grid)
    reduction = MergeWindows(share, False)(tokens)
    windows = []
    for i, j in itertools.product(range(0, height - 1, 2), range(0, width - 1, 2)):
        windows.append([i * width + j, i * width + j + 1, (i + 1) * width + j, (i + 1) * width + j + 1])
    for b in range(2):

        def alike(window: list[int], b: int = b) -> float:
            return sum(cosine(tokens.patches[b], i, j) for i, j in itertools.permutations(window, 2)) / 12

        best = sorted(windows, key=lambda w: -alike(w))[: math.floor(round(share * len(windows), 9))]
        groups, firsts = groups_of(reduction, b), [window[0] for window in windows]
        assert sorted(sorted(g) for g in groups if len(g) > 1) == sorted(best)
        gone = {i for window in best for i in window[1:]}
        unmerged = [i for i in range(height * width) if i not in firsts and i not in gone]
        assert [g[0] for g in groups] == [*unmerged, *firsts], "what might have merged, then the windows"


def test_algm_needs_a_whole_grid_and_leaves_other_tokens_alone():
    tokens = judged(12)
    assert MergeWindows(0.5, False)(replace(tokens, grid=(4, 4))) is None
    assert MergeWindows(0.5, False)(tokens) is None, "one row has no window"
    assert MergeWindows(0.1, False)(replace(tokens, grid=(3, 4))) is None, "a tenth of two windows is none"


def test_algm_later_merges_by_features_as_tome_does_by_keys():
    tokens = judged(20)
    by_x = MergeAnywhere(0.3, 8, False)(tokens)
    as_tome = BipartiteMerge(6, 8)(with_fields(tokens, key=tokens.patches))
    assert torch.equal(by_x.merge.src, as_tome.merge.src) and torch.equal(by_x.merge.dst, as_tome.merge.dst)


# --- kth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patches", "k"), [(12, 2), (13, 4), (5, 9), (7, 3)])
def test_kth_keeps_every_kth(patches, k):
    tokens = judged(patches)
    kept = list(range(0, patches, k))
    dropped, merged = KeepEvery(k, False, 8)(tokens), KeepEvery(k, True, 8)(tokens)
    assert dropped.keep.tolist() == merged.keep.tolist() == [kept] * 2 and dropped.merge is None
    assert KeepEvery(k, False, 8).count(patches) == len(kept)
    for b in range(2):
        for group in groups_of(merged, b):
            for i in group[1:]:
                assert group[0] == max(kept, key=lambda j: cosine(tokens.stats.key[b], i, j))
        assert sorted(i for g in groups_of(merged, b) for i in g) == list(range(patches))


# --- learned mixtures ------------------------------------------------------------------------------------------------


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """With random numbers in every parameter, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5 + 0.2)
    return module


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def perceived(x: Tensor, maps: nn.Sequential) -> Tensor:
    """Norm, linear, GELU, linear, of one token."""
    norm, first, _, second = maps
    hidden = F.gelu(first.weight @ normed(x, norm) + first.bias)
    return second.weight @ hidden + (0 if second.bias is None else second.bias)


@torch.no_grad()
def test_patchmerger_weighs_normed_tokens_by_queries():
    tokens = replace(judged(7), size=None)
    method = shaken(Merge(3, 0.7, 8, seed=0))
    found = reduce(tokens, method(tokens))
    for b in range(2):
        rows = [normed(x, method.norm) for x in tokens.patches[b]]
        for m in range(3):
            scores = [math.exp(0.7 * float(method.queries[m] @ row)) for row in rows]
            expected = sum(s / sum(scores) * row for s, row in zip(scores, rows, strict=True))
            torch.testing.assert_close(found.patches[b, m], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tokenlearner_mixes_features_that_are_not_normed():
    tokens = replace(judged(7), size=None)
    method = shaken(Learn(3, 8, False, seed=0))
    found = reduce(tokens, method(tokens))
    for b in range(2):
        scores = torch.stack([perceived(x, method.maps) for x in tokens.patches[b]])  # [N, S]
        share = scores.exp() / scores.exp().sum(0)
        for s in range(3):
            expected = sum(share[i, s] * tokens.patches[b, i] for i in range(7))
            torch.testing.assert_close(found.patches[b, s], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_tokenlearner_of_version_1_0_convolves_the_grid(pool):
    tokens = replace(judged(12), grid=(3, 4))
    method = shaken(LearnByConvolution(2, 8, False, 0, pool))
    found = reduce(tokens, method(tokens))
    kernels = [layer.weight for layer in method.maps if isinstance(layer, nn.Conv2d)]
    assert len(kernels) == 4
    for b in range(2):
        values = {(i // 4, i % 4): normed(tokens.patches[b, i], method.norm) for i in range(12)}
        for depth, kernel in enumerate(kernels):
            new = {}
            for i, j in values:
                near = [(u, v) for u in (-1, 0, 1) for v in (-1, 0, 1) if (i + u, j + v) in values]
                total = sum(kernel[:, :, u + 1, v + 1] @ values[i + u, j + v] for u, v in near)
                new[i, j] = F.gelu(total) if depth < 3 else total.sigmoid()
            values = new
        for s in range(2):
            expected = sum(values[i // 4, i % 4][s] * tokens.patches[b, i] for i in range(12))
            expected = expected / 12 if pool == "mean" else expected
            torch.testing.assert_close(found.patches[b, s], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokenlearner_of_version_1_0_says_that_it_needs_a_grid():
    with pytest.raises(UserError, match=r"version='1.0' .* 5 tokens of 3x4"):
        LearnByConvolution(2, 8, False, 0, "sum")(replace(judged(5), grid=(3, 4)))


@torch.no_grad()
def test_mixtures_count_a_merged_token_as_often_as_it_has_patches():
    """And padding not at all: equal to mixing the patches themselves."""
    tokens = judged(6, images=1)
    repeats = tokens.size[0].long()
    every = replace(replace(tokens, size=None), x=torch.cat([tokens.x[:, :1]], 1))
    every = replace(every, x=torch.cat([tokens.x[:, :1], tokens.patches.repeat_interleave(repeats, 1)], 1))
    for method in (shaken(Merge(3, 0.5, 8, 0)), shaken(Learn(3, 8, False, 0))):
        torch.testing.assert_close(reduce(tokens, method(tokens)).x, reduce(every, method(every)).x)
        padded = replace(tokens, valid=torch.tensor([[True] * 5 + [False]]))
        alone = replace(tokens, x=tokens.x[:, :-1], size=tokens.size[:, :-1], owner=tokens.owner[:, :-1])
        torch.testing.assert_close(reduce(padded, method(padded)).x, reduce(alone, method(alone)).x)


@torch.no_grad()
def test_token_fuser_puts_the_tokens_back():
    model = AdaptiveViT(make_vit(depth=4), "tokenlearner(5, at=1, fuse_at=3)")
    images = make_images(model.vit)
    assert model.forward_tokens(images)[1].tokens() == [17, 6, 6, 17]
    model = AdaptiveViT(make_vit(depth=4), "tokenlearner(5, at=1, fuse_at=2)")
    dense = AdaptiveViT(model.vit)
    at_first, _ = model.forward_tokens(images)
    learn, fuse = shaken(model.plan.methods[0].steps, seed=3)
    assert learn.fused
    before = replace(at_first, x=torch.randn(1, 9, 96), owner=torch.arange(8).expand(1, -1), grid=(2, 4))
    mixed = reduce(before, learn(before))
    mixed = replace(mixed, x=mixed.x + 1)  # what a block might do
    after = reduce(mixed, fuse(mixed))
    rows = torch.stack([normed(x, fuse.norm) for x in mixed.patches[0]])
    rows = torch.stack([normed(x, fuse.norm_mixed) for x in fuse.mix.weight @ rows + fuse.mix.bias[:, None]])
    for i in range(8):
        share = perceived(before.patches[0, i], fuse.maps).sigmoid()
        expected = before.patches[0, i] + share @ rows
        torch.testing.assert_close(after.patches[0, i], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(after.x[:, :1], mixed.x[:, :1]) and torch.equal(after.owner, before.owner)
    assert after.state[UNMIXED] is None
    assert relative(at_first.x[:, 1:], dense.forward_tokens(images)[0].x[:, 1:]) > 1e-3


def test_token_fuser_starts_by_adding_nothing_and_learns():
    model = AdaptiveViT(make_vit(depth=4), "tokenlearner(5, at=1, fuse_at=2)").train()
    fuse = model.plan.methods[0].steps[1]
    images = make_images(model.vit)
    optimizer = torch.optim.SGD(fuse.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        (model.feature_map(images) * torch.linspace(-1, 1, 96)[:, None, None]).sum().backward()
        optimizer.step()
        if step == 0:
            assert (fuse.mix.bias == 0).logical_not().any()
    assert all((p.grad.abs().sum() > 0) and p.grad.isfinite().all() for p in fuse.parameters())
    features = model.eval().feature_map(images)
    assert features.shape == (2, 96, 4, 4) and features.isfinite().all()


@torch.no_grad()
def test_token_fuser_beside_other_methods():
    vit = make_vit(depth=4)
    images = make_images(vit)
    first = AdaptiveViT(vit, "tome(r=[3]) | tokenlearner(5, at=1, fuse_at=3)")
    assert first.forward_tokens(images)[1].tokens() == [14, 6, 6, 14]
    assert first.feature_map(images).isfinite().all()
    with pytest.raises(UserError, match=r"fuse_at puts back 5 tokens and 3 are left"):
        AdaptiveViT(vit, "tokenlearner(5, at=1, fuse_at=3) | evit(0.5, at=1)")(images)


@torch.no_grad()
@pytest.mark.parametrize("setting", ["tokenlearner(4, at=1)", "patchmerger(4, at=1)", "dpc_knn(0.5, learned=True)"])
def test_what_is_learned_starts_the_same_everywhere_and_takes_no_random_number(setting):
    vit = make_vit()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one = AdaptiveViT(vit, setting)
    assert torch.equal(torch.rand(1), expected)
    for a, b in zip(one.plan.parameters(), AdaptiveViT(vit, setting).plan.parameters(), strict=True):
        assert torch.equal(a, b)
    half = AdaptiveViT(make_vit().double(), setting)
    assert {p.dtype for p in half.parameters()} == {torch.float64}


# --- proportional attention ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_proportional_attention_sizes_still_weigh_means():
    vit = make_vit(depth=4)
    images = make_images(vit)
    counted: dict[int, list[float]] = {}

    def step(block, x, attention, key, size):
        size = counted.get(block, [1.0] * len(x))
        x, size, _ = merge_by_hand(x, key, size, 4) if block in (0, 1) else (x, size, None)
        counted[block + 1] = size
        return x, [1.0] * len(x)  # what attention is told

    expected = logits_by_hand(vit, images[:1], step)
    found = AdaptiveViT(vit, "tome(r=[4, 4], proportional=False)")(images[:1])
    assert relative(found.logits, expected) <= 1e-5
    assert set(found.trace.kernels) == {"fused"}, "no bias, so the fastest kernel stays"
    assert not found.tokens.proportional and float(found.tokens.size.max()) > 1
    assert relative(AdaptiveViT(vit, "tome(r=[4, 4])")(images[:1]).logits, expected) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["class-average", "siglip", "siglip-average"])
def test_an_average_counts_patches_even_where_attention_does_not(family):
    vit = make_vit(family)
    model = AdaptiveViT(vit, "pitome(0.6, proportional=False)")
    images = make_images(vit)
    tokens, _ = model.forward_tokens(images)
    assert not tokens.proportional
    patches = tokens.patches.repeat_interleave(tokens.size[0].long(), 1)[:1]
    spread = torch.cat([tokens.x[:1, : tokens.num_prefix], patches], 1)
    torch.testing.assert_close(model.forward_head(tokens)[:1], vit.forward_head(vit.norm(spread)), rtol=1e-4, atol=1e-4)


# --- padding, degenerate input, counts -------------------------------------------------------------------------------

HARD: list[Reducer] = [
    Pool(0.5, 8, "medoid", True, 3, "weight", False),
    Pool(0.4, 8, "mean", True, 2, "weight", False),
    Pool(0.5, 8, "medoid", False, 3, "even", True),
    DensityPeaks(0.5, 8, 3, False, None),
    Mlerp(6, 8),
    Prune(6, 8),
    EnergyMerge(0.7, 0.5, False, "key", 8, False),
    EnergyMerge(0.7, 0.5, True, "x", 8, False),
    Attract(7, None, 0.05, 0.025, 8, 1),
    MergeAnywhere(0.3, 8, False),
    Retokenize(0.6, 0.2, Interpretation(per="patch", of="bottom"), 8, 20),
]


@pytest.mark.parametrize("method", HARD, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("live", [20, 17, 12])
def test_padding_is_not_merged_with_tokens(method, live):
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[0, live:] = False
    tokens = judged(20, seed=live, valid=valid)
    reduction = method(tokens)
    assert reduction.keep.shape == (2, method.count(20))
    if reduction.merge is not None:
        into = reduction.keep.gather(1, reduction.merge.dst)
        assert torch.equal(valid.gather(1, reduction.merge.src), valid.gather(1, into))
    assert reduce(tokens, reduction).x.isfinite().all()
    if live == 20:
        plain = method(replace(tokens, valid=None))
        assert torch.equal(plain.keep, reduction.keep)


@pytest.mark.parametrize("method", HARD, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", ["zeros", "equal", "duplicates", "huge", "unattended"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_degenerate_tokens_make_no_nan(method, kind, dtype):
    tokens = judged(12)
    x, key = tokens.x.clone(), tokens.stats.key.clone()
    for feature in (x, key):
        if kind == "zeros":
            feature.zero_()
        if kind == "equal":
            feature[:] = 1
        if kind == "duplicates":
            feature[:, 1::2] = feature[:, 0:-1:2]
        if kind == "huge":
            feature *= 1e3
    received = tokens.stats.attn_received * (kind != "unattended")
    tokens = with_fields(tokens, x=x.to(dtype), key=key.to(dtype), attn_received=received, cls_attn=received)
    found = reduce(tokens, method(tokens))
    again = reduce(tokens, method(tokens))
    assert found.x.isfinite().all() and found.num_patches == method.count(12)
    assert torch.equal(found.x, again.x)
    assert ((found.area() > 0).all()) and int(found.size.min()) >= 1


@pytest.mark.parametrize("patches", range(1, 24))
def test_counts_are_what_comes_out(patches):
    vit = make_vit()
    backbone = backbone_of(vit)
    for text in ("token_pooling(0.3)", "dpc_knn(0.6)", "pitome(0.5)", "mctf(r=3)", "mctf(share=0.4)", "tofu(r=4)"):
        name, knob = text.removesuffix(")").split("(")
        knobs = {k: float(v) if "." in v else int(v) for k, _, v in [knob.rpartition("=")] if k}
        args = () if knobs else (float(knob),)
        for step in registry()[name](backbone, args, knobs).steps:
            tokens = judged(patches, width=96, key=torch.randn(2, patches, 32))
            if step.count(patches) < patches:
                found = reduce(tokens, step(tokens))
                assert found.num_patches == step.count(patches) >= 1, text


# --- imagepiece, as it may be read -----------------------------------------------------------------------------------


def retokenizer(p=0.5, merge=0.2, first=40, **reading) -> Retokenize:
    return Retokenize(p, merge, Interpretation(**reading), 8, first)


@pytest.mark.parametrize(("of", "merged"), [("tokens", 8), ("bottom", 4), ("first", 10)])
def test_imagepiece_merges_a_share_of_what_it_is_told(of, merged):
    method = retokenizer(of=of, first=50)
    assert method.count(40) == 40 - merged == reduce(judged(40), method(judged(40))).num_patches


@pytest.mark.parametrize("patches", [1, 2, 3, 9, 20, 41])
def test_imagepiece_splits_the_bottom_in_two(patches):
    tokens = judged(patches, images=1)
    bottom = math.floor(0.5 * patches)
    order = tokens.stats.cls_attn[0].argsort().tolist()[:bottom]
    ranks = torch.tensor(order).unsqueeze(0)
    for split in ("alternate", "halves", "random"):
        reducer = retokenizer(split=split)
        a, b = (side[0].tolist() for side in reducer._sides(reducer._ranked(ranks)))
        assert sorted(a + b) == sorted(order) and len(a) - len(b) in (0, 1)
        if split == "alternate":
            assert a == order[0::2]
        if split == "halves":
            assert a == order[: len(a)]
        if split == "random" and bottom > 8:
            assert a not in (order[0::2], order[: len(a)])


def test_imagepiece_judges_a_token_or_the_patches_in_it():
    tokens = judged(40)
    tokens = with_fields(tokens, cls_attn=tokens.stats.cls_attn * tokens.size)  # what its patches get together
    by_patch = retokenizer(per="patch")(tokens)
    same = retokenizer()(with_fields(tokens, cls_attn=tokens.stats.cls_attn / tokens.size))
    assert torch.equal(by_patch.merge.src, same.merge.src) and torch.equal(by_patch.merge.dst, same.merge.dst)
    assert not torch.equal(by_patch.merge.src, retokenizer()(tokens).merge.src)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("imagepiece(of='all')", "of='all' is not one of tokens, bottom, first"),
        ("imagepiece(split='odd')", "split='odd'"),
        ("imagepiece(per=3)", "per=3"),
        ("imagepiece(proportional=1)", "proportional=1"),
        ("imagepiece(gmacs=3, speed=2)", "one of gmacs and speed"),
        ("imagepiece(speed=0.9)", "speed=0.9"),
        ("imagepiece(speed=99)", "out of reach, the most is"),
        ("tome(gmacs=0.0001)", "out of reach, the least is"),
        ("tome(total=-1)", "total=-1"),
        ("tome(metric='q')", "metric='q' is not one of key, x"),
        ("tome(proportional=0)", "proportional=0"),
        ("tofu(merge_from=4)", r"merge_from=4 is not a whole number in \[0, 3\]"),
        ("token_pooling(centre='mode')", "centre='mode'"),
        ("token_pooling(iterations=99)", r"iterations=99 .*\[0, 20\]"),
        ("token_pooling(start='x')", "start='x'"),
        ("dpc_knn(neighbours=0)", "neighbours=0"),
        ("pitome(0.4)", r"keep=0.4 .*\[0.5, 1\]"),
        ("mctf(share=0.6)", r"share=0.6 .*\[0, 0.5\]"),
        ("algm(2)", "local=2"),
        ("algm(merge_at=3)", "merge_at=3"),
        ("kth(0)", "k=0"),
        ("tokenlearner(0)", "tokens=0"),
        ("tokenlearner(version='2')", "version='2'"),
        ("tokenlearner(at=2, fuse_at=2)", "fuse_at=2 is not behind at=2"),
        ("patchmerger(scale=0)", "scale=0"),
    ],
)
def test_knobs_out_of_range(setting, says):
    with pytest.raises(UserError, match=f"^{setting.split('(')[0]}: .*{says}|^{setting.split('(')[0]}: {says}"):
        AdaptiveViT(make_vit(), setting)


# --- budgets and schedules -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "distilled", "siglip", "registers-map", "class-average", "dinov2-swiglu"])
def test_arithmetic_gives_what_a_trace_gives(family):
    vit = make_vit(family, depth=4)
    backbone, images = backbone_of(vit), make_images(vit, 1)
    knob = "" if backbone.has_class_token else ", score='received'"
    settings = ["dense", "tome(r=3)", f"evit(0.5, fuse=True{knob})", f"imagepiece(p=1, merge=0.2, keep=0.7{knob})"]
    settings += ["tofu(r=2)", "pitome(0.8)", "mctf(r=4)", "mctf(share=0.3)", "token_pooling(0.5)", "dpc_knn(0.5)"]
    settings += ["token_pooling(0.5, centre='mean')", "random(0.5)", "kth(2, merge=True)", "patchmerger(3)"]
    settings += ["tokenlearner(3)", "tokenlearner(3, version='1.0')", "tome(r=2) | evit(0.8, score='received')"]
    for text in settings:
        model = AdaptiveViT(vit, text)
        assert macs(backbone, *model.plan.methods) == int(model(images).trace.macs()), text


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, entry in registry().items() if entry.kind == "method"])
def test_a_price_by_arithmetic_is_that_of_a_run(name):
    """For every method that is registered; those that do not know their cost beforehand are run."""
    model = AdaptiveViT(make_vit("deit", depth=4, img_size=128))
    images = make_images(model.vit, 1)
    for text in registry()[name].menu(model.backbone):
        view = model.at(text)
        if static(model.backbone, *view.plan.methods):
            assert price(model, text) == float(view(images).trace.macs()), text


@pytest.mark.parametrize(
    "text",
    [
        "tome({})",
        "tome(inflection=-1, {})",
        "imagepiece({})",
        "imagepiece(keep=0.9, p=0.6, merge=0.3, {})",
        "tofu({})",
        "pitome({})",
        "mctf({})",
        "token_pooling({})",
        "dpc_knn({})",
        "diffrate({})",
        "diffrate((0, 10, 0, 8), (20, 0, 5, 3), {})",
        "evit({})",
        "random({})",
    ],
)
@pytest.mark.parametrize("speed", [1.0, 1.05, 1.2, 1.5])
def test_a_budget_is_met_and_used(text, speed):
    vit = make_vit(depth=12, embed_dim=96, img_size=224)
    backbone = backbone_of(vit)
    dense = macs(backbone)
    by_speed = AdaptiveViT(vit, text.format(f"speed={speed}")).plan.methods
    by_gmacs = AdaptiveViT(vit, text.format(f"gmacs={dense / speed / 1e9!r}")).plan.methods
    found = macs(backbone, *by_speed)
    assert found <= dense / speed and macs(backbone, *by_gmacs) == pytest.approx(found, rel=2e-3)
    assert found >= dense / speed * 0.98, "and no more is saved than was asked for"
    if speed == 1:
        assert found == dense


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.floats(0.01, 1))
def test_fit_takes_the_weakest_that_is_within_the_budget(steps, share):
    class Keep(Reducer):
        def __init__(self, left: int) -> None:
            super().__init__()
            self.left = left

        def count(self, n: int) -> int:
            return min(n, self.left)

    backbone = backbone_of(VIT)
    lefts = [49, *sorted(steps, reverse=True)]
    costs = [macs(backbone, Method([(0, Keep(left))])) for left in lefts]
    budget = costs[-1] + share * (costs[0] - costs[-1]) + 1
    found = fit("x", backbone, lambda i: Method([(0, Keep(lefts[i]))]), len(steps), gmacs=budget / 1e9)
    assert macs(backbone, found) == max(cost for cost in costs if cost <= budget)


VIT = make_vit(depth=3, img_size=112)


@given(st.integers(0, 2000), st.floats(-1, 1), st.integers(1, 40))
def test_exact_schedules_add_up(total, inflection, depth):
    found = exact_schedule("x", total, inflection, depth)
    assert sum(found) == total and len(found) == depth and min(found) >= 0
    last = max(depth - 1, 1)
    line = [total / depth * (1 + inflection * (2 * i / last - 1)) if depth > 1 else total for i in range(depth)]
    assert all(abs(a - b) <= 1 + 1e-6 for a, b in zip(found, line, strict=True))


@given(st.integers(0, 50), st.floats(-1, 1), st.integers(2, 40))
def test_the_published_schedules_are_those_but_for_rounding(r, inflection, depth):
    rounded, exact = schedule("x", r, inflection, depth), exact_schedule("x", r * depth, inflection, depth)
    assert sum(rounded) <= sum(exact) and all(abs(a - b) <= 3 for a, b in zip(rounded, exact, strict=True))
    if inflection == 0:
        assert rounded == exact


def test_exact_mode():
    assert sum(exact_schedule("tome", 192, -1.0, 24)) == 192 > sum(schedule("tome", 8, -1.0, 24)) == 181
    vit = make_vit(depth=12, img_size=224, embed_dim=24, num_heads=3)
    model = AdaptiveViT(vit, "tome(total=187, inflection=-1)")
    with torch.no_grad():
        assert model(make_images(vit, 1)).trace.tokens()[-1] == 1 + 196 - 187


@torch.no_grad()
def test_soft_reductions_may_bring_values_of_their_own():
    tokens, values = judged(5), torch.randn(2, 5, 8)
    weights = torch.rand(2, 3, 5)
    assert torch.equal(reduce(tokens, SoftReduction(weights, values)).patches, weights @ values)
