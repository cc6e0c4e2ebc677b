"""``pitome``: merge where many tokens are alike, protect the lone ones (PiToMe, NeurIPS 2024, arXiv 2405.16148).

A token's energy is high in a large cluster of similar ones. In the first half of the depth all tokens may merge; in the
second only the 2r of the highest energy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.merging import Merge, rows
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Reduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import fraction, one_of, switch
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import METRICS, best_proposals, cosines, feature_of, floor_share, leave


class EnergyMerge(Reducer):
    """Order tokens by energy, alternate them into A and B, and merge the r = ⌊(1 - keep) · n⌋ best proposals."""

    def __init__(self, keep: float, margin: float, protect: bool, metric: str, width: int, proportional: bool) -> None:
        super().__init__()
        self.keep, self.margin, self.protect = keep, margin, protect
        self.metric, self.width, self.proportional = metric, width, proportional
        self.read = frozenset({"key"} if metric == "key" else ())

    def count(self, n: int) -> int:
        return n - min(floor_share(1 - self.keep, n), n // 2)

    def macs(self, n: int) -> int:
        return n * n * self.width

    def forward(self, tokens: Tokens) -> Reduction:
        n, feature = tokens.num_patches, feature_of(tokens, self.metric)
        r = n - self.count(n)
        similar = cosines(feature, feature, None if tokens.valid is None else (tokens.valid, tokens.valid))
        order = energy(similar, self.margin, tokens.valid).argsort(dim=1, descending=True, stable=True)
        order = order[:, : 2 * r] if self.protect else order
        a, b = order[:, 0::2], order[:, 1::2]
        between = rows(similar, a).gather(2, b.unsqueeze(1).expand(-1, a.shape[1], -1))
        merged, _, partner = best_proposals(between, r)
        src = a.gather(1, merged)
        keep, dst = leave(n, src, b.gather(1, partner))
        return Reduction(keep, Merge(src, dst, proportional=self.proportional))


@torch.no_grad()
def energy(similar: Tensor, margin: float, valid: Tensor | None = None) -> Tensor:
    """Mean of ELU(cosine - margin) over all tokens: cosines [B, N, N] -> [B, N]; padding has the least."""
    terms = F.elu(similar - margin)
    if valid is None:
        return terms.mean(2)
    mean = (terms * valid.unsqueeze(1)).sum(2) / valid.sum(1, keepdim=True).clamp(min=1)
    return mean.masked_fill(~valid, -torch.inf)


@register(
    "pitome", sources={"code": "margin proportional"}, menu=lambda backbone: [f"pitome({k})" for k in (0.95, 0.9, 0.85)]
)
def pitome(
    backbone: Backbone,
    keep: float = 0.925,
    margin: float = 0.75,
    metric: str = "key",
    proportional: bool = False,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Merge by energy: large clusters first, tokens that stand alone never (arXiv 2405.16148).

    Args:
        keep: share of patch tokens left in every block, in [0.5, 1].
        margin: cosine above which tokens attract, in the first block; it falls to 0 behind the last.
        metric: similarity of the mean 'key' over heads, or of the features 'x'.
        proportional: attention counts a merged token as often as it has patches; False, the default of its code: once.
        gmacs: find ``keep`` for this many GMACs per image (at its own size) instead.
        speed: find ``keep`` for this many times fewer MACs instead.
    """
    keep, margin = fraction("pitome", "keep", keep, 0.5), fraction("pitome", "margin", margin, -1.0)
    one_of("pitome", "metric", metric, METRICS)
    switch("pitome", "proportional", proportional)
    depth, width = backbone.depth, backbone.head_dim if metric == "key" else backbone.dim

    def build(keep: float) -> Method:
        return Method(
            (i, EnergyMerge(keep, margin * (1 - i / depth), i >= depth / 2, metric, width, proportional))
            for i in range(depth)
        )

    if gmacs is None and speed is None:
        return build(keep)
    return fit("pitome", backbone, lambda i: build(1 - i / 1000), 500, gmacs, speed)
