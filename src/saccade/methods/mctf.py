"""``mctf``: merge by similarity, attention and size at once, both ways (MCTF, CVPR 2024, arXiv 2403.10030).

The paper looks one block ahead: it computes a block's attention, merges before it, and merges the attention map too.
Here attention is already at hand, so it merges between attention and MLP, as ToMe does, which saves no attention of
the same block. Both of these, and that a chain A → B → A is one weighted mean, are our reading.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Merge, Reduction, rows
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import blocks, fraction, whole
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import best_proposals, cosines, floor_share, leave


class Attract(Reducer):
    """Half of the merges go from A to B, the others from B to what is left of A: what is alike, unattended, small.

    attraction = (cos + 1) / 2 · (1/aᵢ · 1/aⱼ)^info · (1/sᵢ · 1/sⱼ)^size. The paper divides each factor by its largest
    value in the image, which changes no choice.
    """

    read = frozenset({"attn_received"})

    def __init__(self, r: int, share: float | None, info: float, size: float, dim: int) -> None:
        super().__init__()
        self.r, self.share, self.info, self.size, self.dim = r, share, info, size, dim

    def count(self, n: int) -> int:
        return n - min(self.r if self.share is None else floor_share(self.share, n), n // 2)

    def macs(self, n: int) -> int:
        return (n // 2) * (n - n // 2) * self.dim

    def forward(self, tokens: Tokens) -> Reduction:
        n, attended = tokens.num_patches, tokens.reading("attn_received").clamp(min=1e-12)
        ones = torch.ones_like(attended)
        size = ones if tokens.size is None else tokens.size
        r = n - self.count(n)
        first = r // 2
        attraction = self._attraction(tokens, attended.detach(), size)
        merged, left, partner = best_proposals(attraction, first)  # A -> B
        back, _, onto = best_proposals(rows(attraction, left).transpose(1, 2), r - first)  # B -> what is left of A
        src_a, into_b = 2 * merged, 2 * partner + 1
        src_b, into_a = 2 * back + 1, 2 * left.gather(1, onto)
        moved = torch.arange(n, device=src_a.device).expand_as(size).scatter(1, src_b, into_a)
        src = torch.cat([src_a, src_b], dim=1)
        keep, dst = leave(n, src, torch.cat([moved.gather(1, into_b), into_a], dim=1))
        return Reduction(keep, Merge(src, dst, weight=attended * size))

    @torch.no_grad()
    def _attraction(self, tokens: Tokens, attended: Tensor, size: Tensor) -> Tensor:
        """[B, |A|, |B|]; A are the even places among the patch tokens."""
        valid = None if tokens.valid is None else (tokens.valid[:, 0::2], tokens.valid[:, 1::2])
        alike = (cosines(tokens.patches[:, 0::2], tokens.patches[:, 1::2], valid) + 1) / 2
        light = attended.pow(-self.info) * size.pow(-self.size)
        pull = light[:, 0::2].unsqueeze(2) * light[:, 1::2].unsqueeze(1)
        if valid is None:
            return alike * pull
        real = valid[0].unsqueeze(2) & valid[1].unsqueeze(1)
        return torch.where(real, alike * pull, 1e9 * (alike - 1))  # padding with padding first, with tokens last


@register("mctf", menu=lambda backbone: [f"mctf(share={s})" for s in (0.15, 0.25, 0.35)])
def mctf(
    backbone: Backbone,
    r: int = 16,
    share: float | None = None,
    at: int | Iterable[int] | None = None,
    info: float = 0.05,
    size: float = 0.025,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Merge by several criteria, in both directions: similarity, attention, size (arXiv 2403.10030).

    Args:
        r: patch tokens merged away in each of the blocks.
        share: share of patch tokens merged away in each of the blocks, instead of r.
        at: 0-based blocks that merge; None: with r all but the first, with a share a quarter, a half and three quarters
            of the depth (the paper's fast variant is ``mctf(share=0.35)``).
        info: exponent of the attention that tokens receive, in [0, 1]; 0: it does not count.
        size: exponent of the patches in them, in [0, 1].
        gmacs: find the share for so many GMACs an image (of the model's own size) instead.
        speed: find the share for so many times fewer MACs instead.
    """
    whole("mctf", "r", r, 0, 10**6)
    info, size = fraction("mctf", "info", info), fraction("mctf", "size", size)
    solved = gmacs is not None or speed is not None
    by_share = share is not None or solved
    at = blocks("mctf", at, backbone.stages() if by_share else tuple(range(1, backbone.depth)), backbone.depth)

    def build(share: float | None) -> Method:
        return Method((i, Attract(r, share, info, size, backbone.dim)) for i in at)

    if solved:
        return fit("mctf", backbone, lambda i: build(i / 1000), 500, gmacs, speed)
    return build(None if share is None else fraction("mctf", "share", share, 0.0, 0.5))
