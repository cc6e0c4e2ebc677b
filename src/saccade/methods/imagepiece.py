"""``imagepiece``: re-tokenize — merge what carries no meaning, let the next blocks judge again, then prune.

ImagePiece (AAAI 2025, arXiv 2412.16491), whose code was never released, as a training-free re-tokenizer for any ViT.
The layers and what 0.08 is a fraction of are not in the paper's text: the defaults are a fit to its published speeds
and token counts, not the authors' word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from saccade.decide import KeepAttended, best_edges, check_score
from saccade.errors import UserError
from saccade.plan import Backbone, Method, Reducer, blocks, fraction, register
from saccade.reduction import Reduction, rows
from saccade.tokens import Tokens

METRICS = ("key", "x")


class Retokenize(Reducer):
    """Merge, among the ⌊p · n⌋ least attended tokens only, the ⌊merge · n⌋ most similar pairs."""

    def __init__(self, p: float, merge: float, metric: str, weighted: bool, reading: str, width: int) -> None:
        super().__init__()
        self.p, self.merge, self.metric, self.weighted, self.width = p, merge, metric, weighted, width
        self.reading = reading
        self.read = frozenset({reading, "key"} if metric == "key" else {reading})

    def _sizes(self, n: int) -> tuple[int, int]:
        """(bottom, r): tokens judged meaningless, and pairs among them that merge."""
        bottom = math.floor(round(self.p * n, 9))
        return bottom, min(math.floor(round(self.merge * n, 9)), bottom // 2 + bottom % 2 if bottom > 1 else 0)

    def count(self, n: int) -> int:
        return n - self._sizes(n)[1]

    def macs(self, n: int) -> int:
        bottom = self._sizes(n)[0]
        return (bottom // 2) * (bottom - bottom // 2) * self.width

    def forward(self, tokens: Tokens) -> Reduction:
        score: Tensor = getattr(tokens, self.reading).detach()
        feature = tokens.patches if self.metric == "x" else tokens.key
        assert feature is not None
        bottom, r = self._sizes(tokens.num_patches)
        if tokens.valid is not None:
            score = score.masked_fill(~tokens.valid, torch.inf)
        meaningless = score.argsort(dim=1, stable=True)[:, :bottom]  # least attended first
        a, b = meaningless[:, 0::2], meaningless[:, 1::2]
        merged, _, partner = best_edges(rows(feature, a), rows(feature, b), r)
        src, into = a.gather(1, merged), b.gather(1, partner)
        gone = torch.zeros_like(score, dtype=torch.int64).scatter(1, src, 1)
        keep = gone.argsort(dim=1, stable=True)[:, : tokens.num_patches - r]  # all others, in their order
        dst = into - gone.cumsum(dim=1).gather(1, into)  # its place once the merged ones have left
        return Reduction(keep, src=src, dst=dst, weight=None if self.weighted else torch.ones_like(score))


def _menu(backbone: Backbone) -> list[str]:
    knob = "" if backbone.has_class_token else ", score='received'"
    rates = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    merges = [f"imagepiece(merge={m}{knob})" for m in (0.08, 0.12)]
    return merges + [f"imagepiece(keep={k}{knob})" for k in rates]


@register("imagepiece", menu=_menu)
def imagepiece(
    backbone: Backbone,
    p: float = 0.3,
    merge: float = 0.08,
    keep: float = 1.0,
    merge_at: int | Iterable[int] | None = None,
    prune_at: int | Iterable[int] | None = None,
    metric: str = "key",
    weighted: bool = True,
    score: str = "class",
) -> Method:
    """Merge the least attended tokens with each other, judge again, then prune (arXiv 2412.16491).

    Args:
        p: share of patch tokens, the least attended, that may merge.
        merge: share of patch tokens merged away in each merging block (at most half of p).
        keep: share kept in each pruning block; 1 never prunes, the published system is ``imagepiece(keep=0.8)``.
        merge_at: 0-based blocks that merge; None: all before the last pruning block that do not prune.
        prune_at: 0-based blocks that prune; None: at a quarter, a half and three quarters of the depth.
        metric: similarity of the mean 'key' over heads, or of the features 'x'.
        weighted: weigh merged tokens by the patches in them.
        score: 'class' attention, or mean attention 'received', for models without a class token.
    """
    p, merge = fraction("imagepiece", "p", p), fraction("imagepiece", "merge", merge)
    keep = fraction("imagepiece", "keep", keep, 0.001)
    if metric not in METRICS:
        raise UserError(f"imagepiece: metric={metric!r} is not one of {', '.join(METRICS)}")
    if not isinstance(weighted, bool):
        raise UserError(f"imagepiece: weighted={weighted!r} is not True or False")
    reading = check_score("imagepiece", score, backbone)
    prunes = blocks("imagepiece", prune_at, backbone.stages(), backbone.depth)
    between = tuple(i for i in range(max(prunes, default=0)) if i not in prunes)
    merges = blocks("imagepiece", merge_at, between, backbone.depth)
    width = backbone.head_dim if metric == "key" else backbone.dim
    pruning = [(i, KeepAttended(keep, reading)) for i in prunes]  # first, where a block does both
    return Method(pruning + [(i, Retokenize(p, merge, metric, weighted, reading, width)) for i in merges])
