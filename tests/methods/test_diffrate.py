"""``diffrate`` against a loop over tokens, written from the published form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from oracles import logits_by_hand, make_images, make_tokens, make_vit, relative
from saccade.backbones.vit import backbone_of
from saccade.core.plan import Plan
from saccade.core.reduction import reduce
from saccade.methods.common.budget import macs
from saccade.methods.diffrate import LearnedRates, LearnedThin, Thin
from saccade.model import AdaptiveViT


def thin_by_hand(
    x: Tensor, score: Tensor, metric: Tensor, size: list[float], prune: int, merge: int, prefix: int = 1
) -> tuple[Tensor, list[float], list[list[int]]]:
    """DiffRate (spec, published §1) on one image's whole sequence; also who is in each new token."""
    ranked = sorted(range(prefix, len(x)), key=lambda i: -float(score[i]))
    prune = min(prune, len(ranked) - 1)
    merge = min(merge, len(ranked) - prune - 1)
    ranked = ranked[: len(ranked) - prune]
    stay, sources = ranked[: len(ranked) - merge], ranked[len(ranked) - merge :]
    groups, grown = {i: [i] for i in stay}, {i: size[i] for i in stay}
    for i in sources:
        similar = {j: float(F.cosine_similarity(metric[i], metric[j], dim=0)) for j in stay}
        near = max(similar, key=similar.get)
        groups[near].append(i)
        grown[near] += size[i] * max(similar[near], 0.0)
    every = [[i] for i in range(prefix)] + list(groups.values())
    rows = [sum(x[i] for i in group) / len(group) for group in every]
    return torch.stack(rows), [*size[:prefix], *grown.values()], every


@torch.no_grad()
@pytest.mark.parametrize("metric", ["x", "key"])
@pytest.mark.parametrize(("prune", "merge"), [(3, 4), (0, 9), (5, 0), (99, 99)])
def test_diffrate_by_hand(metric, prune, merge):
    """Of sixteen: some dropped, some merged into their nearest kept token; sizes grow by what is similar."""
    reducer = Thin(prune, merge, "cls_attn", metric, 8)
    key, score = torch.randn(3, 16, 8) + 0.5, torch.rand(3, 16)
    size = torch.randint(1, 4, (3, 16)).float()
    tokens = make_tokens(3, 16, key=key, cls_attn=score, size=size)
    found = reduce(tokens, reducer(tokens))
    for b in range(3):
        feature = torch.cat([key[b, :1], key[b]]) if metric == "key" else tokens.x[b]
        judged = torch.cat([torch.ones(1), score[b]])
        rows, sizes, groups = thin_by_hand(tokens.x[b], judged, feature, [1.0, *size[b].tolist()], prune, merge)
        assert relative(found.x[b], rows) <= 1e-5
        assert relative(found.size[b], torch.tensor(sizes[1:])) <= 1e-5
        for slot, group in enumerate(groups[1:]):
            assert {int(i) + 1 for i in (found.owner[b] == slot).nonzero()} == set(group)
    assert found.num_patches == reducer.count(16)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit3", "dinov2-registers"])
def test_diffrate_is_as_published_through_a_whole_model(family):
    """Class attention with the bias of sizes, features behind attention: logits of a loop over images and tokens."""
    vit = make_vit(family, depth=4)
    images, rates = make_images(vit, 2), [(2, 3), (0, 4), (3, 0), (0, 0)]
    prefix = vit.num_prefix_tokens

    def step(block, x, attention, key, size):
        x, size, _ = thin_by_hand(x, attention[0], x, size, *rates[block], prefix)
        return x, size

    prune, merge = zip(*rates, strict=True)
    model = AdaptiveViT(vit, f"diffrate({prune}, {merge})")
    assert relative(model(images).logits, logits_by_hand(vit, images, step)) <= 1e-5
    assert relative(model.at("tome(r=[3, 4])")(images).logits, model(images).logits) > 1e-3


# --- counts that are learned ----------------------------------------------------------------------------------------


def learner_of(vit, prune, merge, gmacs):
    """A learner and the model with it, in masked form, the ViT in evaluation."""
    learner = LearnedRates(backbone_of(vit), gmacs, prune, merge, "x", "class").train()
    model = AdaptiveViT(vit).eval()
    model.plan, model.training = Plan([learner]), True
    return learner, model


def test_a_rank_stays_by_the_expected_count_with_the_gradient_of_its_share():
    step = LearnedThin((10.3, 7.0), 16, Thin(0, 0, "cls_attn", "x", 8))
    assert (step.ranks()[1].detach() - torch.tensor([10.3, 7.0])).abs().max() < 0.1, "it starts where it is told to"
    torch.nn.init.normal_(step.stays, generator=torch.Generator().manual_seed(0))
    shares = step.stays.detach().softmax(-1)
    for row, (stays, expected) in enumerate(zip(*step.ranks(), strict=True)):
        expected = expected.detach()
        assert float(expected) == pytest.approx(sum((k + 1) * float(shares[row, k]) for k in range(16)), rel=1e-5)
        assert stays.tolist() == [float(rank < math.ceil(float(expected))) for rank in range(16)]
        (grad,) = torch.autograd.grad(stays[4], step.stays, retain_graph=True)
        tail = float(shares[row, 4:].sum())  # counts of five and more include the rank of index four
        by_hand = [float(shares[row, k]) * ((k >= 4) - tail) for k in range(16)]
        assert relative(grad[row], torch.tensor(by_hand)) <= 1e-5


def test_learning_runs_what_its_counts_would():
    """Masked, with a gradient for every count, it is the setting that says the same numbers, and costs the same."""
    vit = make_vit("deit", depth=4, img_size=128)
    images = make_images(vit, 2)
    dense = float(AdaptiveViT(vit)(images[:1]).trace.macs())
    learner, model = learner_of(vit, 2, 5, dense / 1.4e9)
    out = model(images)
    left, lists = 64, ([], [])
    for step in learner.steps:
        kept = [min(left, int(row.sum())) for row in step.ranks()[0]]
        lists[0].append(left - kept[0])
        lists[1].append(kept[0] - min(kept))
        left = min(kept)
    same = AdaptiveViT(vit, f"diffrate({tuple(lists[0])}, {tuple(lists[1])})")(images)
    assert min(map(min, lists)) > 0 and relative(out.logits, same.logits) <= 1e-5
    assert relative(out.trace.target_macs().float(), same.trace.macs().float()) <= 1e-2, "but for deciding, as it began"
    (out.logits.square().sum() + out.trace.target_macs().sum()).backward()
    assert all(step.stays.grad.isfinite().all() and step.stays.grad.abs().sum() > 0 for step in learner.steps)


def test_what_is_found_is_just_within_the_budget():
    vit = make_vit("deit", depth=4, img_size=128)
    budget = macs(backbone_of(vit)) / 1.3e9
    learner, _ = learner_of(vit, 4, 8, budget)
    with torch.no_grad():
        learner.steps[1].stays[0] = torch.linspace(9, 0, 64)  # nearly all of them dropped in block 1
    found = learner.found()
    method = AdaptiveViT(vit, f"diffrate(prune={found['prune']}, merge={found['merge']})").plan.methods[0]
    assert 0.97 * budget <= macs(backbone_of(vit), method) / 1e9 <= budget
    assert found["prune"][1] > 4 * max(found["prune"][0], found["prune"][2]) and len(found["prune"]) == 4
