"""``algm``: merge windows of alike neighbours early, alike tokens anywhere later (ALGM, CVPR 2024, arXiv 2406.09936).

For dense tasks: ``model.dense`` gives every cell the features of its token. The paper merges what is above a threshold
and takes the least count of a batch; here the counts are shares, so that shapes are static and an image's result does
not depend on its batch. The paper's "layers 1 and 5" are read as blocks 0 and 4 of twelve.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.merging import Merge
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Reduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import fraction, switch, whole
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import BipartiteMerge, floor_share


class MergeWindows(Reducer):
    """Make one token of each of the ⌊share · W⌋ most uniform of the grid's W whole windows of 2 × 2 tokens.

    It works on a whole grid, and does nothing once other tokens have left it. The order is then that of all merges:
    what might have merged and has not, by place, before the windows' first tokens.
    """

    def __init__(self, share: float, proportional: bool) -> None:
        super().__init__()
        self.share, self.proportional = share, proportional

    def count(self, n: int) -> int | None:
        return None  # it depends on the shape of the grid; never on the image

    def forward(self, tokens: Tokens) -> Reduction | None:
        height, width = tokens.grid
        merged = floor_share(self.share, (height // 2) * (width // 2))
        if tokens.num_patches != height * width or merged == 0:
            return None
        cells = torch.arange(height * width, device=tokens.x.device).view(height, width)
        corners = [cells[i : height // 2 * 2 : 2, j : width // 2 * 2 : 2].flatten() for i in (0, 1) for j in (0, 1)]
        windows = torch.stack(corners, dim=1)  # [W, 4]
        best = uniformity(tokens.patches[:, windows]).argsort(dim=1, descending=True, stable=True)[:, :merged]
        first, src = windows[:, 0], windows[best][:, :, 1:].flatten(1)
        gone = torch.zeros_like(cells).flatten().scatter(0, first, 1).expand(best.shape[0], -1).scatter(1, src, 1)
        unmerged = gone.argsort(dim=1, stable=True)[:, : cells.numel() - len(first) - src.shape[1]]
        keep = torch.cat([unmerged, first.expand(best.shape[0], -1)], dim=1)
        dst = unmerged.shape[1] + best.repeat_interleave(3, dim=1)
        return Reduction(keep, Merge(src, dst, proportional=self.proportional))


class OwnWindows(MergeWindows):
    """On the model's own grid, whose windows can be counted before there is an image: for a price."""

    def __init__(self, share: float, grid: tuple[int, ...]) -> None:
        super().__init__(share, False)
        self.merged = 3 * floor_share(share, math.prod(side // 2 for side in grid))

    def count(self, n: int) -> int:
        return n - self.merged


@torch.no_grad()
def uniformity(windows: Tensor) -> Tensor:
    """Mean cosine between the different members of each window: [B, W, 4, D] -> [B, W]."""
    unit = F.normalize(windows.float(), dim=-1, eps=1e-6)
    together, alone = unit.sum(2).square().sum(-1), unit.square().sum((2, 3))
    return (together - alone) / 12


class MergeAnywhere(BipartiteMerge):
    """Merge the ⌊share · n⌋ most similar pairs of tokens."""

    def __init__(self, share: float, dim: int, proportional: bool, weighted: bool = True) -> None:
        super().__init__(0, dim, "x", proportional)
        self.share, self.weighted = share, weighted

    def count(self, n: int) -> int:
        return n - min(floor_share(self.share, n), n // 2)

    def forward(self, tokens: Tokens) -> Reduction:
        found = super().forward(tokens)
        if self.weighted or found.merge is None:
            return found
        ones = torch.ones_like(tokens.x[:, tokens.num_prefix :, 0], dtype=torch.float32)
        weight = ones if tokens.valid is None else torch.where(tokens.valid, ones, 1e-6)  # nothing of padding
        return replace(found, merge=replace(found.merge, weight=weight))


@register(
    "algm",
    sources={"code": "local_at merge_at proportional"},
    menu=lambda backbone: [f"algm({a}, {b})" for a, b in ((0.25, 0.2), (0.5, 0.3), (0.75, 0.4))],
)
def algm(
    backbone: Backbone,
    local: float = 0.5,
    merge: float = 0.25,
    local_at: int = 0,
    merge_at: int | None = None,
    proportional: bool = False,
    gmacs: float | None = None,
    speed: float | None = None,
    weighted: bool = True,
) -> Method:
    """Merge uniform 2 × 2 windows, and later similar tokens wherever they are (arXiv 2406.09936).

    Args:
        local: share of the grid's windows that become one token each.
        merge: share of patch tokens merged away later, at most a half.
        local_at: 0-based block that merges windows; tokens must still be a whole grid there.
        merge_at: 0-based block that merges anywhere; None: at a third of the depth.
        proportional: attention counts a merged token as often as it has patches; False, as its code: once.
        gmacs: find multiples of ``local`` and ``merge`` for this many GMACs per image (at its own size) instead.
        speed: find multiples of them for this many times fewer MACs instead.
        weighted: the later mean weighs tokens by the patches in them; False: all alike.
    """
    local, merge = fraction("algm", "local", local), fraction("algm", "merge", merge, 0.0, 0.5)
    whole("algm", "local_at", local_at, 0, backbone.depth - 1)
    later = whole("algm", "merge_at", backbone.depth // 3 if merge_at is None else merge_at, 0, backbone.depth - 1)
    switch("algm", "proportional", proportional)
    switch("algm", "weighted", weighted)

    def build(local: float, merge: float) -> Method:
        steps: list[tuple[int, Reducer]] = [(local_at, MergeWindows(local, proportional))] if local else []
        return Method([*steps, (later, MergeAnywhere(merge, backbone.dim, proportional, weighted))])

    if gmacs is None and speed is None:
        return build(local, merge)
    most = max(1 / local if local else 0.0, 0.5 / merge if merge else 0.0)

    def shares(i: int) -> tuple[float, float]:
        return min(1.0, local * most * i / 1000), min(0.5, merge * most * i / 1000)

    def priced(i: int) -> Method:
        """With a count of windows: that of the model's own grid."""
        local, merge = shares(i)
        return Method([(local_at, OwnWindows(local, own)), (later, MergeAnywhere(merge, backbone.dim, proportional))])

    own = tuple(side // patch for side, patch in zip(backbone.input_size, backbone.patch_size, strict=True))
    return fit("algm", backbone, lambda i: build(*shares(i)), 1000, gmacs, speed, priced)
