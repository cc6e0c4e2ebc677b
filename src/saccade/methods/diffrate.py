"""``diffrate``: in every block some tokens are dropped and some merged, by lists of counts (DiffRate).

Chen et al., ICCV 2023, arXiv 2305.17997. The paper learns the counts, which are the same for all images; here they are
given, so nothing is trained. Its published schedules fall almost in a line from the second block on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Merge, Reduction, rows
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import one_of, schedule
from saccade.methods.common.matching import METRICS, check_score, cosines, feature_of


class Thin(Reducer):
    """Rank tokens by attention: the last are dropped, those before them merge each into its most similar kept token."""

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
        keep, src = order[:, :kept].sort(dim=1).values, order[:, kept : kept + merged]
        if merged == 0:
            return Reduction(keep)
        feature = feature_of(tokens, self.metric)
        valid = None if tokens.valid is None else (tokens.valid.gather(1, src), tokens.valid.gather(1, keep))
        dst = cosines(rows(feature, src), rows(feature, keep), valid).argmax(dim=-1)
        return Reduction(keep, Merge(src, dst, weight=_weights(tokens)))


def _weights(tokens: Tokens) -> Tensor | None:
    """What counts in a merge: sizes; nothing of padding, should there be too much of it to drop."""
    if tokens.valid is None:
        return None
    size = torch.ones_like(tokens.valid, dtype=torch.float32) if tokens.size is None else tokens.size
    return torch.where(tokens.valid, size, 1e-6)


def _menu(backbone: Backbone) -> list[str]:
    knob = "" if backbone.has_class_token else ", score='received'"
    return [f"diffrate({p}, {m}{knob})" for p, m in ((1, 3), (2, 6), (4, 8), (6, 10))]


@register("diffrate", menu=_menu)
def diffrate(
    backbone: Backbone,
    prune: int | tuple[int, ...] = 4,
    merge: int | tuple[int, ...] = 8,
    metric: str = "key",
    score: str = "class",
) -> Method:
    """Drop so many of the least attended tokens in each block, and merge so many of the next (arXiv 2305.17997).

    Args:
        prune: tokens dropped in every block, or a list for the first blocks; 0 after its end.
        merge: tokens merged away likewise, each into the most similar token that is kept.
        metric: similarity of the mean 'key' over heads, or of the features 'x'.
        score: 'class' attention, or mean attention 'received', for models without a class token.
    """
    one_of("diffrate", "metric", metric, METRICS)
    reading = check_score("diffrate", score, backbone)
    pruned, merged = (
        schedule("diffrate", tuple(r) if isinstance(r, list) else r, 0, backbone.depth) for r in (prune, merge)
    )
    width = backbone.head_dim if metric == "key" else backbone.dim
    counts = enumerate(zip(pruned, merged, strict=True))
    return Method((i, Thin(p, m, reading, metric, width)) for i, (p, m) in counts if p or m)
