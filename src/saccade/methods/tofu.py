"""``tofu``: prune the more redundant of two similar tokens early, merge them late (ToFu, WACV 2024, arXiv 2312.01026).

Features of early blocks do not average well, so there a matched token is dropped; in later ones the pair becomes one
token of their mean's direction and the longer one's length (MLERP). Matching is ToMe's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.core.merging import means
from saccade.core.plan import Backbone, Method
from saccade.core.reduction import Reduction
from saccade.core.registry import also, register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import exact_schedule, schedule, whole
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import BipartiteMerge


class Prune(BipartiteMerge):
    """Drop the matched tokens; their partners stay as they are."""

    def forward(self, tokens: Tokens) -> Reduction:
        return Reduction(super().forward(tokens).keep)


class Mlerp(BipartiteMerge):
    """Merge the matched tokens: direction of the mean, length of the longest."""

    def forward(self, tokens: Tokens) -> Reduction:
        found = super().forward(tokens)
        keep, merge = found.keep, found.merge
        assert merge is not None
        length = tokens.patches.float().norm(dim=-1)
        longest = length.gather(1, keep).scatter_reduce(1, merge.dst, length.gather(1, merge.src), "amax")
        mean, _ = means(tokens.patches, tokens.size, keep, merge)
        return replace(found, merge=replace(merge, values=stretched(mean, merge.dst, longest)))


def stretched(x: Tensor, dst: Tensor, norm: Tensor) -> Tensor:
    """Rows ``dst`` [B, R] of x [B, M, D] brought to a length each, norm [B, M]; all others times exactly 1."""
    merged = torch.zeros_like(norm).scatter(1, dst, torch.ones_like(dst, dtype=norm.dtype)) > 0
    scale = torch.where(merged, norm / x.float().norm(dim=-1).clamp(min=1e-6), 1.0)
    return x * scale.unsqueeze(-1).to(x.dtype)


def _menu(backbone: Backbone) -> list[str]:
    return [f"tofu(r={max(1, round(share * backbone.num_patches / backbone.depth))})" for share in (0.5, 0.7, 0.9)]


@also(counts=("r",))
@register("tofu", sources={"paper": "r merge_from"}, menu=_menu)
def tofu(
    backbone: Backbone,
    r: int | tuple = 13,
    merge_from: int | None = None,
    total: int | None = None,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Prune similar tokens in early blocks, merge them norm-preserving in later ones (arXiv 2312.01026).

    Args:
        r: patch tokens that leave in each block, or a list with one number per block.
        merge_from: the first 0-based block that merges; those before it prune. None: half of the depth.
        total: patch tokens that leave in all blocks together, instead of r.
        gmacs: find the total for this many GMACs per image (at its own size) instead.
        speed: find the total for this many times fewer MACs instead.
    """
    depth = backbone.depth
    first = whole("tofu", "merge_from", depth // 2 if merge_from is None else merge_from, 0, depth)

    def build(rates: list[int]) -> Method:
        kind = [Prune if block < first else Mlerp for block in range(depth)]
        return Method((i, kind[i](v, backbone.head_dim)) for i, v in enumerate(rates) if v)

    if gmacs is not None or speed is not None:
        most = depth * backbone.num_patches // 2
        return fit("tofu", backbone, lambda n: build(exact_schedule("tofu", n, 0.0, depth)), most, gmacs, speed)
    return build(schedule("tofu", r, 0.0, depth) if total is None else exact_schedule("tofu", total, 0.0, depth))
