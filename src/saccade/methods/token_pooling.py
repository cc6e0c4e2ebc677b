"""``token_pooling``: replace tokens by the centres of their clusters (Token Pooling, WACV 2023, arXiv 2110.03860).

The authors published no code. Where the paper leaves a choice this is our reading: squared distances in the cost of a
medoid, as in its objective Σ wᵢ min ‖xᵢ − cⱼ‖²; between attention and MLP of a block, not after it, so that the weights
are this block's attention; the token that stands for a cluster never leaves it, so that none is empty.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.merging import rows
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Reduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import blocks, fraction, one_of, switch, whole
from saccade.methods.common.budget import fit
from saccade.methods.common.clustering import (
    cheapest,
    gathered,
    highest,
    nearest,
    of_centres,
    squared_distances,
    squared_distances_to,
)
from saccade.methods.common.matching import ceil_share

CENTRES = ("medoid", "mean")
STARTS = ("weight", "even")


class Pool(Reducer):
    """Keep ⌈keep · n⌉ cluster centres: weighted K-medoids or K-means on the features."""

    def __init__(
        self, keep: float, dim: int, centre: str, weighted: bool, iterations: int, start: str, proportional: bool
    ) -> None:
        super().__init__()
        self.keep, self.dim, self.centre, self.weighted = keep, dim, centre, weighted
        self.iterations, self.start, self.proportional = iterations, start, proportional
        self.read = frozenset({"attn_received"} if weighted or start == "weight" else ())

    def count(self, n: int) -> int:
        return ceil_share(self.keep, n)

    def macs(self, n: int) -> int:
        m = self.count(n)
        return n * n * self.dim if self.centre == "medoid" else (1 + 2 * self.iterations) * m * n * self.dim

    def forward(self, tokens: Tokens) -> Reduction:
        n, m = tokens.num_patches, self.count(tokens.num_patches)
        significance = tokens.patches.new_ones(tokens.x.shape[0], n, dtype=torch.float32)
        if self.read:
            significance = tokens.reading("attn_received").clamp(min=1e-12)
        weight = significance if self.weighted else torch.ones_like(significance)
        start = significance if self.start == "weight" else self._even(significance, m)
        centres = highest(start.detach(), m, tokens.valid)
        find = self._medoids if self.centre == "medoid" else self._means
        centres, cluster = find(tokens.patches.detach(), weight.detach(), centres, tokens.valid)
        weight = of_centres(centres, n) if self.centre == "medoid" else weight
        return gathered(centres, cluster, weight, self.proportional)

    def _medoids(self, x: Tensor, weight: Tensor, centres: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """(medoids [B, M], cluster of each token [B, N])."""
        between = squared_distances(x, valid)

        def members(centres: Tensor) -> Tensor:
            return nearest(between.gather(2, centres.unsqueeze(1).expand(-1, x.shape[1], -1)), centres)

        cluster = members(centres)
        for _ in range(self.iterations):
            together = cluster.unsqueeze(2) == cluster.unsqueeze(1)
            cost = (between * weight.unsqueeze(1)).masked_fill(~together, 0.0).sum(2)
            centres = cheapest(cost, cluster, centres)
            cluster = members(centres)
        return centres, cluster

    def _means(self, x: Tensor, weight: Tensor, centres: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the members nearest to the means [B, M], cluster of each token [B, N])."""
        m, x = centres.shape[1], x.float()
        if valid is not None:  # padding lies together, far from all tokens
            x = torch.where(valid.unsqueeze(2), x, 10 * x.abs().amax((1, 2), keepdim=True) + 1)
        cluster = nearest(squared_distances_to(x, rows(x, centres)), centres)
        for _ in range(self.iterations):
            share = F.one_hot(cluster, m).transpose(1, 2) * weight.unsqueeze(1)  # [B, M, N]
            means = share @ x / share.sum(2, keepdim=True)
            distance = squared_distances_to(x, means)
            centres = cheapest(distance.gather(2, cluster.unsqueeze(2)).squeeze(2), cluster, centres)
            cluster = nearest(distance, centres)
        return centres, cluster

    @staticmethod
    def _even(like: Tensor, m: int) -> Tensor:
        """A score that is 1 at m evenly spread places and 0 elsewhere."""
        n = like.shape[1]
        place = (2 * torch.arange(m, device=like.device) + 1) * n // (2 * m)
        return torch.zeros_like(like).index_fill(1, place, 1.0)


@register(
    "token_pooling",
    sources={"paper": "centre weighted proportional"},
    menu=lambda backbone: [f"token_pooling({k})" for k in (0.8, 0.65, 0.5)],
)
def token_pooling(
    backbone: Backbone,
    keep: float = 0.7,
    at: int | Iterable[int] | None = None,
    centre: str = "medoid",
    weighted: bool = True,
    iterations: int = 3,
    start: str | None = None,
    proportional: bool = False,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Cluster the patch tokens and keep the centres (arXiv 2110.03860).

    Args:
        keep: share of patch tokens left at each of the blocks, in (0, 1].
        at: 0-based blocks that pool; None: at a quarter, a half and three quarters of the depth.
        centre: a cluster becomes its 'medoid' (K-medoids), or the 'mean' of its members (K-means).
        weighted: weigh each token by the attention that it receives.
        iterations: of the clustering, 0 to 20.
        start: first centres: those of the highest 'weight', or 'even' places; None: by weight where weighted.
        proportional: attention counts a centre as often as it has patches; False, the paper: once.
        gmacs: find ``keep`` for this many GMACs per image (at its own size) instead.
        speed: find ``keep`` for this many times fewer MACs instead.
    """
    keep = fraction("token_pooling", "keep", keep, 0.001)
    at = blocks("token_pooling", at, backbone.stages(), backbone.depth)
    one_of("token_pooling", "centre", centre, CENTRES)
    start = one_of("token_pooling", "start", start or ("weight" if weighted else "even"), STARTS)
    for knob, on in (("weighted", weighted), ("proportional", proportional)):
        switch("token_pooling", knob, on)
    whole("token_pooling", "iterations", iterations, 0, 20)

    def build(keep: float) -> Method:
        return Method((i, Pool(keep, backbone.dim, centre, weighted, iterations, start, proportional)) for i in at)

    if gmacs is None and speed is None:
        return build(keep)
    return fit("token_pooling", backbone, lambda i: build(1 - i / 1000), 999, gmacs, speed)
