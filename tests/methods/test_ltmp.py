"""``ltmp``: learned thresholds of merging and dropping (LTMP, TMLR 2023), and what masked execution of a merge is.

Cost, batches, gradients, half precision and company are in `test_contract`; dropping alone is in `test_selection`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import saccade.core.packing
from oracles import (
    attention_by_hand,
    field_of,
    logits_by_hand,
    make_images,
    make_tokens,
    make_vit,
    reduce_by_hand,
    relative,
    with_fields,
)
from saccade.core.packing import Rows, padded
from saccade.core.reduction import Merge as Merged
from saccade.core.reduction import Reduction, hide, reduce
from saccade.core.softmax import masked_softmax
from saccade.core.tokens import Hidden, Tokens
from saccade.errors import UserError
from saccade.execution.attention import attend
from saccade.execution.mixing import Asked
from saccade.methods.ltmp import Merge, Prune
from saccade.model import AdaptiveViT

STRONG = ["ltmp(start=0.6, merge=0.4)", "ltmp(at=[0, 1], start=0.0, merge=0.7)", "ltmp(start=0.9, merge=None)"]


def some_tokens(present: list[int], patches: int = 13) -> Tokens:
    """Ragged: as many of each image's tokens are there; with sizes, keys and attention received."""
    g = torch.Generator().manual_seed(1)
    valid = torch.stack([torch.arange(patches) < n for n in present])
    key, received = torch.randn(len(present), patches, 3, generator=g), torch.rand(len(present), patches, generator=g)
    size = torch.randint(1, 4, (len(present), patches), generator=g).float()
    return make_tokens(len(present), patches, key=key, attn_received=received, size=size, valid=valid)


def merge_by_hand(key: Tensor, here: list[int], limit: float, prefix: int) -> list[list[int]]:
    """Members of each new token, the one that stays first, in the new order; ``here``: patch tokens in theirs."""
    whole = [*range(-prefix, 0), *here]
    side_a, side_b = ([i for i in whole[first::2] if i >= 0] for first in (0, 1))
    groups = {j: [j] for j in side_a + side_b}
    for j in side_a:
        similar = {k: float(F.cosine_similarity(key[j], key[k], dim=0)) for k in side_b}
        best = max(similar, key=similar.get) if similar else None
        if best is not None and similar[best] > limit:
            groups[best] += groups.pop(j)
    return list(groups.values())


@torch.no_grad()
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("limit", [0.0, 0.7, 1.0])
def test_similar_tokens_merge_by_hand(prefix, limit):
    tokens = some_tokens([13, 9, 2, 1])
    tokens = replace(tokens, num_prefix=prefix, x=torch.cat([tokens.x[:, :1]] * prefix + [tokens.patches], 1))
    merge = Merge(limit, 3).eval()
    found = reduce(tokens, merge(tokens))
    merged = 0
    for b in range(4):
        here = [j for j in range(13) if tokens.valid[b, j]]
        groups = merge_by_hand(tokens.stats.key[b], here, limit, prefix)
        merged += len(here) - len(groups)
        kept = found.valid[b]
        assert int(kept.sum()) == len(groups)
        for slot, members in enumerate(groups):
            total = sum(float(tokens.size[b, j]) for j in members)
            mean = sum(tokens.size[b, j] * tokens.patches[b, j] for j in members) / total
            assert relative(found.patches[b, slot], mean) <= 1e-5 and float(found.size[b, slot]) == total
            assert {j for j in here if int(found.owner[b, j]) == slot} == set(members)
        assert float(found.size[b, kept].sum()) == float(tokens.size[b, here].sum())
        most = [max(float(tokens.stats.attn_received[b, j]) for j in members) for members in groups]
        assert Prune(0.0)._received(found)[b, kept].tolist() == most
    assert (merged > 3) == (limit < 1.0)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_ltmp_is_as_published_through_a_whole_model(training):
    """Merge, then drop by the part that received most; the order of merges goes on from block to block."""
    vit = make_vit("deit", depth=4, img_size=128)
    images, counts = make_images(vit, 2), []

    def step(block, x, attention, key, size):
        if block == 3:
            return x, size
        received, patches = attention.mean(0), key[1:]
        groups = merge_by_hand(patches, list(range(len(patches))), 0.75, 1)
        groups = [[j + 1 for j in group] for group in groups]
        score = [max(float(received[j]) for j in group) * (1 + len(groups)) for group in groups]
        groups = [g for g, s in zip(groups, score, strict=True) if s > 0.3 or s == max(score)]
        counts.append(len(groups))
        sizes = [sum(size[j] for j in g) for g in groups]
        rows = [sum(size[j] * x[j] for j in g) / total for g, total in zip(groups, sizes, strict=True)]
        return torch.stack([x[0], *rows]), [size[0], *sizes]

    expected = logits_by_hand(vit, images, step)
    model = AdaptiveViT(vit, "ltmp(start=0.3, merge=0.75)").train(training)
    found = model(images).logits
    vit.eval()
    assert relative(found, expected) <= 1e-5
    assert all(64 >= a >= b > c > 4 for a, b, c in (counts[:3], counts[3:])), counts


@torch.no_grad()
@pytest.mark.parametrize("seed", range(5))
def test_what_moves_is_what_a_reduction_of_those_alone_moves(seed):
    """``gate`` leaves some sources where they are; on a mask, all stay, in their new order, and give what they have."""
    g = torch.Generator().manual_seed(seed)
    tokens = replace(some_tokens([10, 10], 10), valid=None)
    a, b = torch.arange(0, 10, 2).expand(2, -1), torch.arange(1, 10, 2)
    into, moved = b[torch.randint(5, (2, 5), generator=g)], (torch.rand(2, 5, generator=g) < 0.5).float()
    gate = torch.ones(2, 10).scatter(1, a, 1 - moved)
    keep = gate.argsort(dim=1, descending=True, stable=True)
    place = (gate.cumsum(1) - 1).long()
    static = Reduction(keep, Merged(a, place.gather(1, into), moved), valid=gate.gather(1, keep) > 0, gate=gate)
    dropped, masked = reduce(tokens, static), hide(tokens, static)
    assert torch.equal(masked.keep_mask, gate.gather(1, keep))
    for i in range(2):
        count, on = int(gate[i].sum()), moved[i] > 0
        alone = Reduction(keep[i : i + 1, :count], Merged(a[i : i + 1, on], static.merge.dst[i : i + 1, on]))
        fields = ("x", "owner", "size", "key", "attn_received")
        one = with_fields(tokens, **{name: field_of(tokens, name)[i : i + 1] for name in fields})
        expected = reduce_by_hand(one, alone)
        for name in ("patches", "size", "key", "attn_received"):
            wanted = field_of(expected, name)[0]
            assert relative(field_of(dropped, name)[i, :count], wanted) <= 1e-5, name
            assert relative(field_of(masked, name)[i, :count], wanted) <= 1e-5, name
        assert torch.equal(dropped.owner[i], expected.owner[0])
        assert torch.equal(masked.owner[i], expected.owner[0]), "cells went to the same tokens"


@pytest.mark.parametrize("text", STRONG)
@pytest.mark.parametrize("before", ["", "quadtree(threshold=7.7) | ", "tome(r=[3]) | ", "dynamicvit(0.5, at=0) | "])
def test_masked_merging_and_dropping_is_the_real_thing(text, before, monkeypatch):
    """Training without noise equals evaluation: logits, and the cost that was wanted."""
    monkeypatch.setattr(saccade.core.packing, "MAX_LIVE_SHARE", 1.0)
    vit = make_vit("deit", depth=4, img_size=128)
    model, images = AdaptiveViT(vit, before + text), make_images(vit, 3)
    if "dynamicvit" in before:  # its draws are not evaluation: mask what was drawn, or drop it
        model.train()
        torch.manual_seed(0)
        masked = model(images)
        model.eval()
        assert masked.logits.isfinite().all() and (masked.trace.target_macs() < masked.trace.macs()).all()
        return
    with torch.no_grad():
        sparse, masked = model(images), model.train()(images)
        model.eval()
        assert relative(masked.logits, sparse.logits) <= 1e-5
    grad_masked = model.train()(images)  # through attention that has a gradient
    model.eval()
    assert relative(grad_masked.logits, sparse.logits) <= 1e-5
    assert sparse.trace.macs().unique().numel() > 1, "images differ"
    for hidden, gone in zip(grad_masked.trace.blocks[:-1], sparse.trace.blocks[:-1], strict=True):
        wanted = hidden.macs() if hidden.target_macs is None else hidden.target_macs.detach()
        ran = torch.as_tensor(gone.macs() - gone.aux_macs).float().expand(3)
        assert relative(torch.as_tensor(wanted - hidden.aux_macs).float().expand(3), ran) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("way", ["masked", "padded", "packed"])
def test_who_is_not_there_does_not_ask(way, monkeypatch):
    """Attention received, of a model whose tokens are hidden, is that of a model without them."""
    attn = make_vit("vit").blocks[0].attn
    x, there = torch.randn(2, 7, 96), torch.tensor([[1, 1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).float()
    read = frozenset({"attn_received"})
    if way == "packed":
        rows = Rows.of(there > 0)
        found = rows.unpack(attend(attn, rows.pack(x), ask=Asked(read=read, rows=rows)).stats.attn_received)
    elif way == "masked":
        found = attend(attn, x, ask=Asked(read=read, keep_mask=there, query_mask=there)).stats.attn_received
    else:
        found = attend(attn, x, there.log(), ask=Asked(read=read, query_mask=there)).stats.attn_received
    for b in range(2):
        alone = attention_by_hand(attn, x[b, there[b] > 0])[1].mean((0, 1))
        assert (found[b, there[b] > 0] - alone).abs().max() <= 1e-6 and float(found[b, there[b] == 0].abs().sum()) == 0
    assert torch.allclose(found.sum(1), torch.ones(2))


@torch.no_grad()
def test_padding_does_not_ask_where_it_is_computed(monkeypatch):
    """As a rectangle and packed, a ragged batch reads the same attention."""
    vit = make_vit("deit", depth=4, img_size=128)
    model, images = AdaptiveViT(vit, "ltmp(start=0.8, merge=None)"), make_images(vit, 3)
    found = []
    for ladder in (1.0, 0.0):
        monkeypatch.setattr(saccade.core.packing, "MAX_LIVE_SHARE", ladder)
        tokens, _ = model.forward_tokens(images)
        assert padded(tokens) is tokens and tokens.valid is not None and not tokens.valid.all()
        found.append((model.forward_head(tokens), tokens.owner))
    assert relative(found[0][0], found[1][0]) <= 1e-5 and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("start", [0.5, -0.2, 1.3])
def test_the_threshold_of_merging_learns_and_finds_its_way_back(start):
    """The sigmoid's gradient, of every A token's best similarity; also outside of [0, 1], where it acts as an end."""
    tokens = replace(some_tokens([12, 12], 12), size=None, valid=None)
    merge = Merge(start, 3).train()
    found = merge(tokens)
    found.merge.gate.sum().backward()
    unit = F.normalize(tokens.stats.key, dim=-1)
    best = (unit[:, 1::2] @ unit[:, 0::2].transpose(1, 2)).amax(-1)  # the class token leads A
    limit = min(1.0, max(0.0, start))
    soft = ((best - limit) / 0.1).sigmoid()
    assert torch.equal(found.merge.gate.detach(), (best > limit).float())
    assert float(merge.threshold.grad) == pytest.approx(-float((soft * (1 - soft)).sum()) / 0.1, rel=1e-4)
    alone = with_fields(make_tokens(2, 1), key=torch.randn(2, 1, 3))
    assert merge(alone) is None, "there is nobody to merge with"


def test_a_budget_pulls_both_thresholds():
    vit = make_vit("deit", depth=4, img_size=128)
    model = AdaptiveViT(vit, "ltmp(0.3, start=0.3, merge=0.7)").train()
    out = model(make_images(vit, 3))
    model.plan.methods[0].loss(out.trace)["budget"].backward()
    model.eval()
    grads = [(type(step) is Merge, float(step.threshold.grad)) for step in model.plan.methods[0].steps]
    assert all(grad > 0 if merging else grad < 0 for merging, grad in grads), grads  # merge more, and drop more
    assert len(grads) == 6


def test_a_threshold_out_of_range_is_named():
    with pytest.raises(UserError, match=r"merge=1\.5 is not a number in \[0, 1\]"):
        AdaptiveViT(make_vit("vit"), "ltmp(merge=1.5)")


def test_hidden_keys_leave_the_gradient_of_the_others_as_it_is():
    """Of the softmax over those that are there, the best one's too."""
    scores = torch.randn(3, 4, 9, requires_grad=True)
    alive = (torch.rand(3, 1, 9) < 0.6).float().index_fill(2, torch.tensor([0]), 1.0)
    wanted = torch.randn(3, 4, 9)
    (found,) = torch.autograd.grad((masked_softmax(scores, alive) * wanted).sum(), scores)
    alone = scores.masked_fill(alive == 0, -torch.inf).softmax(-1)
    (expected,) = torch.autograd.grad((alone * wanted).sum(), scores)
    assert relative(found, expected) <= 1e-5


def test_what_is_hidden_and_then_merged_has_a_gradient():
    tokens = replace(make_tokens(1, 4), hidden=Hidden(torch.tensor([[1.0, 1.0, 0.0, 1.0]], requires_grad=True)))
    merged = reduce(tokens, Reduction(torch.tensor([[0, 1, 2]]), Merged(torch.tensor([[3]]), torch.tensor([[2]]))))
    assert merged.keep_mask.tolist() == [[1, 1, 1]], "one of two parts is there"
    merged.keep_mask.sum().backward()
    assert tokens.keep_mask.grad.tolist() == [[1, 1, 1, 1]]
