"""``dpc_knn``: merge tokens around density peaks (DPC-KNN, as in TCFormer, CVPR 2022, arXiv 2204.08680).

TCFormer breaks ties of the density by noise; here the first of equals wins. Its clustering stands between stages: here
before a block. A token counts among its own neighbours, which is our reading of its distance matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from saccade.core.init import draw
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Reduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import blocks, fraction, switch, whole
from saccade.methods.common.budget import fit
from saccade.methods.common.clustering import gathered, highest, nearest, squared_distances
from saccade.methods.common.matching import ceil_share


class DensityPeaks(Reducer):
    """Keep ⌈keep · n⌉ tokens that are dense and far from what is denser; each other joins the nearest of them."""

    site = "block"

    def __init__(
        self, keep: float, dim: int, neighbours: int, proportional: bool, score: Tensor | None, weighted: bool = False
    ) -> None:
        super().__init__()
        self.weighted = weighted
        self.keep, self.dim, self.neighbours, self.proportional = keep, dim, neighbours, proportional
        self.score = None if score is None else nn.Parameter(score)

    def count(self, n: int) -> int:
        return ceil_share(self.keep, n)

    def macs(self, n: int) -> int:
        return n * n * self.dim

    def forward(self, tokens: Tokens) -> Reduction:
        n = tokens.num_patches
        between = squared_distances(tokens.patches.detach(), tokens.valid) / self.dim
        centres = highest(self._peaks(between), self.count(n), tokens.valid)
        cluster = nearest(between.gather(2, centres.unsqueeze(1).expand(-1, n, -1)), centres)
        weight = None if self.weighted else torch.ones_like(between[:, 0])
        if self.score is not None:
            weight = (tokens.patches * self.score).sum(2).float().exp()
        return gathered(centres, cluster, weight, self.proportional)

    @torch.no_grad()
    def _peaks(self, between: Tensor) -> Tensor:
        """log(density · distance to the nearest denser token) [B, N]: the paper's score, which would underflow."""
        sparsity = between.topk(min(self.neighbours, between.shape[1]), dim=2, largest=False).values.mean(2)
        denser = sparsity.unsqueeze(1) < sparsity.unsqueeze(2)  # [B, N, N]: j is denser than i
        to_denser = between.masked_fill(~denser, torch.inf).amin(2)
        distance = torch.where(to_denser.isinf(), between.amax(2), to_denser)
        return distance.log() / 2 - sparsity


@register("dpc_knn", sources={"code": "neighbours"}, menu=lambda backbone: [f"dpc_knn({k})" for k in (0.8, 0.65, 0.5)])
def dpc_knn(
    backbone: Backbone,
    keep: float = 0.7,
    at: int | Iterable[int] | None = None,
    neighbours: int = 5,
    learned: bool = False,
    proportional: bool = False,
    weighted: bool = False,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Merge patch tokens around the peaks of their density (arXiv 2204.08680).

    Args:
        keep: share of patch tokens left before each of the blocks, in (0, 1].
        at: 0-based blocks before which it merges; None: a quarter, a half and three quarters of the depth.
        neighbours: of which the mean distance tells a token's density, 1 to 1000.
        learned: weigh tokens by exp of a learned linear score (TCFormer; to be trained); False: all alike.
        proportional: attention counts a merged token as often as it has patches; False: once.
        weighted: weigh tokens by the patches in them, where nothing is learned; False: all alike.
        gmacs: find ``keep`` for this many GMACs per image (at its own size) instead.
        speed: find ``keep`` for this many times fewer MACs instead.
    """
    keep = fraction("dpc_knn", "keep", keep, 0.001)
    at = blocks("dpc_knn", at, backbone.stages(), backbone.depth)
    whole("dpc_knn", "neighbours", neighbours, 1, 1000)
    switch("dpc_knn", "learned", learned)
    switch("dpc_knn", "proportional", proportional)
    switch("dpc_knn", "weighted", weighted)

    def build(keep: float) -> Method:
        scores = [draw((backbone.dim,), backbone.dim**-0.5, seed=i) if learned else None for i in at]
        steps = (DensityPeaks(keep, backbone.dim, neighbours, proportional, score, weighted) for score in scores)
        return Method(zip(at, steps, strict=True))

    if gmacs is None and speed is None:
        return build(keep)
    return fit("dpc_knn", backbone, lambda i: build(1 - i / 1000), 999, gmacs, speed)
