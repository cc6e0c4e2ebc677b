"""``diffrate``: in every block some tokens are dropped and some merged, by lists of counts (DiffRate).

Chen et al., ICCV 2023, arXiv 2305.17997. Merged features are plain means; a merged token is as much larger as what
joined it was similar. The counts are the same for all images, and ``saccade calibrate`` learns them for a budget. Where
the best similarity is negative nothing is added to a size; the paper would take something away.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.merging import Merge, rows
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Reduction
from saccade.core.registry import KnobLearner, also, register
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import one_of, schedule, whole_parts
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import METRICS, check_score, cosines, feature_of
from saccade.methods.common.sampling import present, there

MOVED = (1, 2, 4, 8, 16)  # tokens of a move
SPREAD = 32  # a count's distribution starts as wide as this part of all tokens


class Thin(Reducer):
    """Rank tokens by attention: the last are dropped, those before them merge each into its most similar kept token.

    Those that stay are in the order of their rank.
    """

    def __init__(self, prune: int, merge: int, reading: str, metric: str, width: int) -> None:
        super().__init__()
        self.prune, self.merge, self.reading, self.metric, self.width = prune, merge, reading, metric, width
        self.read = frozenset({reading, "key"} if metric == "key" and merge else {reading})

    def _counts(self, n: int) -> tuple[int, int]:
        """(kept, merged away) of n; one stays at least."""
        pruned = min(self.prune, n - 1)
        merged = min(self.merge, n - pruned - 1)
        return n - pruned - merged, merged

    def count(self, n: int) -> int:
        return self._counts(n)[0]

    def macs(self, n: int) -> int:
        kept, merged = self._counts(n)
        return kept * merged * self.width

    def forward(self, tokens: Tokens) -> Reduction:
        kept, merged = self._counts(tokens.num_patches)
        score = tokens.reading(self.reading).detach()
        score = score if tokens.valid is None else score.masked_fill(~tokens.valid, -1.0)
        order = score.argsort(dim=1, descending=True, stable=True)
        keep, src = order[:, :kept], order[:, kept : kept + merged]
        return Reduction(keep, merge_similar(tokens, self.metric, keep, src) if merged else None)


def merge_similar(tokens: Tokens, metric: str, keep: Tensor, src: Tensor) -> Merge:
    """Each of ``src`` [B, R] into its most similar of ``keep`` [B, M]: a plain mean, and their similarity in size."""
    feature, valid = feature_of(tokens, metric), tokens.valid
    sides = None if valid is None else (valid.gather(1, src), valid.gather(1, keep))
    similar, dst = cosines(rows(feature, src), rows(feature, keep), sides).max(dim=-1)
    # nothing of padding, should there be too much of it to drop
    weight = torch.ones_like(tokens.x[:, tokens.num_prefix :, 0], dtype=torch.float32)
    weight = weight if valid is None else torch.where(valid, weight, 1e-6)
    return Merge(src, dst, weight=weight, size_share=similar.clamp(0, 1))


class LearnedThin(Reducer):
    """``Thin`` by counts that are learned: how many stay after dropping, and after merging, is a distribution each.

    The probability that the token of a rank stays is that of all counts that include it; where the expected count,
    rounded up, includes it, it does: a straight-through mask, which attention goes by (the paper's form).
    """

    ragged = True

    def __init__(self, after: tuple[float, float], n: int, like: Thin) -> None:
        super().__init__()
        self.like, self.read = like, like.read
        away = (torch.arange(1, n + 1) - torch.tensor(after).unsqueeze(1)) / (1 + n / SPREAD)
        self.stays = nn.Parameter(-away.square() / 2)  # logits of the counts 1 … n, after dropping and after merging

    def ranks(self) -> tuple[Tensor, Tensor]:
        """Whether each rank stays, 0/1, straight-through, and the expected counts: [2, n], [2]."""
        shares = self.stays.float().softmax(-1).flip(-1).cumsum(-1).flip(-1)
        expected = shares.sum(-1)
        hard = torch.arange(shares.shape[1], device=shares.device) < (expected.detach() - 1e-3).ceil().unsqueeze(1)
        return hard.float() + (shares - shares.detach()), expected

    def count(self, n: int) -> int | None:
        return None

    def macs(self, n: int) -> int:
        return self.like.macs(n)

    def forward(self, tokens: Tokens) -> Reduction:
        score, (stays, _) = there(tokens, tokens.reading(self.like.reading).detach().float()), self.ranks()
        stays = stays[:, : tokens.num_patches]
        order, live = score.argsort(dim=1, descending=True, stable=True), present(tokens).sum(1, keepdim=True)
        pruned, kept = int((stays[0] > 0).sum()), int((stays.amin(0) > 0).sum())
        mask = torch.zeros_like(score).scatter(1, order, (stays[0] * stays[1]).expand_as(score))
        keep, src = order[:, :kept], order[:, kept:pruned]
        merge = None
        if src.shape[1]:  # what is dropped already merges into nothing
            merge = merge_similar(tokens, self.like.metric, keep, src)
            merge = replace(merge, gate=(torch.arange(kept, pruned, device=live.device) < live).float())
        return Reduction(order, merge, gate=mask, freeze=False) if self.training else Reduction(keep, merge)


class LearnedRates(KnobLearner):
    """Both lists, learned from where multiples of those given meet the budget."""

    def __init__(self, backbone: Backbone, gmacs: float, prune: Any, merge: Any, metric: str, score: str) -> None:
        plain: dict[str, Any] = {"metric": metric, "score": score}
        diffrate(backbone, prune, merge, **plain)  # refuses what does not fit
        pruned, merged = _within(backbone, gmacs, _schedule(backbone, prune), _schedule(backbone, merge), plain)
        width, reading = _width(backbone, metric), check_score("diffrate", score, backbone)
        steps: list[tuple[int, Reducer]] = []
        left = backbone.num_patches
        for block in range(backbone.depth - (backbone.pool == "token")):  # what the last would leave is not read then
            like = Thin(pruned[block], merged[block], reading, metric, width)
            after = left - pruned[block], left - pruned[block] - merged[block]
            steps.append((block, LearnedThin(after, backbone.num_patches, like)))
            left = after[1]
        super().__init__(steps)
        self.backbone, self.gmacs, self.plain = backbone, gmacs, plain

    def found(self) -> dict[str, Any]:
        lists: tuple[list[float], list[float]] = ([], [])
        left = float(self.backbone.num_patches)
        for step in self.steps:
            kept = [min(float(count), left) for count in step.ranks()[1].detach()]
            lists[0].append(left - kept[0])
            lists[1].append(kept[0] - min(kept))
            left = min(kept)
        for numbers in lists:
            numbers.extend([0.0] * (self.backbone.depth - len(numbers)))
        prune, merge = _within(self.backbone, self.gmacs, *lists, self.plain)
        return {"prune": tuple(prune), "merge": tuple(merge)}

    def moved(self, knobs: Mapping[str, Any], draw: random.Random) -> dict[str, Any]:
        """Some tokens leave at another block, or in the other way; then multiples of that meet the budget."""
        depth = self.backbone.depth
        counts = [*knobs["prune"], *knobs["merge"]]
        some = [i for i, count in enumerate(counts) if count]
        if not some:
            return dict(knobs)
        here, there = draw.choice(some), draw.randrange(2 * depth)
        many = min(counts[here], draw.choice(MOVED))
        counts[here] -= many
        counts[there] += many
        try:
            prune, merge = _within(self.backbone, self.gmacs, counts[:depth], counts[depth:], self.plain)
        except UserError:  # no multiple of these meets it
            return dict(knobs)
        return {"prune": tuple(prune), "merge": tuple(merge)}


def _within(
    backbone: Backbone, gmacs: float, pruned: Sequence[float], merged: Sequence[float], plain: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Multiples of two schedules that just meet a budget."""

    def make(total: int) -> Method:
        return diffrate(backbone, *map(tuple, scaled(pruned, merged, total)), **plain)

    method = fit("diffrate", backbone, make, backbone.depth * backbone.num_patches // 2, gmacs=gmacs)
    prune, merge = [0] * backbone.depth, [0] * backbone.depth
    for block, step in zip(method.at, method.steps, strict=True):
        prune[block], merge[block] = step.prune, step.merge
    return prune, merge


def _menu(backbone: Backbone) -> list[str]:
    knob = "" if backbone.has_class_token else ", score='received'"
    return [f"diffrate({p}, {m}{knob})" for p, m in ((1, 3), (2, 6), (4, 8), (6, 10))]


@also(learner=LearnedRates, counts=("prune", "merge"))
@register("diffrate", sources={"paper": "metric score"}, menu=_menu)
def diffrate(
    backbone: Backbone,
    prune: int | tuple[int, ...] = 4,
    merge: int | tuple[int, ...] = 8,
    metric: str = "x",
    score: str = "class",
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Drop so many of the least attended tokens in each block, and merge so many of the next (arXiv 2305.17997).

    Args:
        prune: tokens dropped in every block, or a list for the first blocks; 0 after its end.
        merge: tokens merged away likewise, each into the most similar token that is kept.
        metric: similarity of the features 'x' behind attention, as published, or of the mean 'key' over heads.
        score: 'class' attention, or mean attention 'received', for models without a class token.
        gmacs: find multiples of these numbers for this many GMACs per image (at its own size) instead.
        speed: find multiples for this many times fewer MACs instead.
    """
    one_of("diffrate", "metric", metric, METRICS)
    reading = check_score("diffrate", score, backbone)
    pruned, merged = (_schedule(backbone, r) for r in (prune, merge))
    width = _width(backbone, metric)

    def build(pruned: Sequence[int], merged: Sequence[int]) -> Method:
        counts = enumerate(zip(pruned, merged, strict=True))
        return Method((i, Thin(p, m, reading, metric, width)) for i, (p, m) in counts if p or m)

    if gmacs is None and speed is None:
        return build(pruned, merged)
    most = backbone.depth * backbone.num_patches // 2
    return fit("diffrate", backbone, lambda n: build(*scaled(pruned, merged, n)), most, gmacs, speed)


def _width(backbone: Backbone, metric: str) -> int:
    return backbone.head_dim if metric == "key" else backbone.dim


def _schedule(backbone: Backbone, r: Any) -> list[int]:
    return schedule("diffrate", tuple(r) if isinstance(r, list) else r, 0, backbone.depth)


def scaled(pruned: Sequence[float], merged: Sequence[float], total: int) -> tuple[list[int], list[int]]:
    """Multiples of two schedules, in whole numbers that are ``total`` together."""
    both = [p + m for p, m in zip(pruned, merged, strict=True)]
    if not (sum_of_both := sum(both)):
        raise UserError("diffrate: all of prune and merge are 0, and no multiple of that saves anything")
    gone = whole_parts([b * total / sum_of_both for b in both], total)
    dropped = [round(g * p / b) if b else 0 for g, p, b in zip(gone, pruned, both, strict=True)]
    return dropped, [g - d for g, d in zip(gone, dropped, strict=True)]
