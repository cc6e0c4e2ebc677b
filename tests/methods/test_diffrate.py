"""``diffrate`` against a loop over tokens, written from the published form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from oracles import logits_by_hand, make_images, make_tokens, make_vit, relative
from saccade.core.reduction import reduce
from saccade.methods.diffrate import Thin
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
