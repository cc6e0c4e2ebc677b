"""``mctf``: merge by similarity, attention and size at once, both ways (MCTF, CVPR 2024, arXiv 2403.10030).

The paper looks one block ahead: it computes a block's attention, merges before it, and merges the attention map too.
Here attention is already at hand, so it merges between attention and MLP, as ToMe does, which saves no attention of
the same block. Both of these, and that a chain A → B → A is one weighted mean, are our reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from saccade.core.merging import Merge, rows
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Reduction
from saccade.core.registry import also, register
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import blocks, fraction, schedule
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import alternating, best_proposals, cosines, floor_share

LEAST = 10  # tokens that stay


class Attract(Reducer):
    """Half of the merges go from A to B, the others from B to what is left of A: what is alike, unattended, small.

    At most half of the tokens go, and ten stay at least, the prefix counted.

    attraction = (cos + 1) / 2 · (1/aᵢ · 1/aⱼ)^info · (1/sᵢ · 1/sⱼ)^size. The paper divides each factor by its largest
    value in the image, which changes no choice.
    """

    read = frozenset({"attn_received"})

    def __init__(self, r: int, share: float | None, info: float, size: float, dim: int, prefix: int) -> None:
        super().__init__()
        self.r, self.share, self.info, self.size, self.dim, self.prefix = r, share, info, size, dim, prefix

    def count(self, n: int) -> int:
        wanted = self.r if self.share is None else floor_share(self.share, n)
        return n - min(wanted, n // 2, max(0, n + self.prefix - LEAST))

    def macs(self, n: int) -> int:
        return (n // 2) * (n - n // 2) * self.dim

    def forward(self, tokens: Tokens) -> Reduction:
        n, attended = tokens.num_patches, tokens.reading("attn_received").clamp(min=1e-12)
        ones = torch.ones_like(attended)
        size = ones if tokens.size is None else tokens.size
        r = n - self.count(n)
        first_a, first_b = alternating(tokens.num_prefix)
        attraction = self._attraction(tokens, attended.detach(), size)
        merged, left, partner = best_proposals(attraction, r // 2)  # A -> B
        left = left.sort(dim=1).values
        back, stay, onto = best_proposals(rows(attraction, left).transpose(1, 2), r - r // 2)  # B -> what is left of A
        stay = stay.sort(dim=1).values
        slots = left.shape[1] + torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
        slot_of_b = torch.cat([slots, onto], dim=1).gather(1, torch.cat([stay, back], dim=1).argsort(dim=1))
        keep = torch.cat([2 * left + first_a, 2 * stay + first_b], dim=1)
        src = torch.cat([2 * merged + first_a, 2 * back + first_b], dim=1)
        dst = torch.cat([slot_of_b.gather(1, partner), onto], dim=1)
        return Reduction(keep, Merge(src, dst, weight=attended * size))

    @torch.no_grad()
    def _attraction(self, tokens: Tokens, attended: Tensor, size: Tensor) -> Tensor:
        """[B, |A|, |B|]."""
        a, b = (slice(first, None, 2) for first in alternating(tokens.num_prefix))
        valid = None if tokens.valid is None else (tokens.valid[:, a], tokens.valid[:, b])
        alike = (cosines(tokens.patches[:, a], tokens.patches[:, b], valid) + 1) / 2
        light = attended.pow(-self.info) * size.pow(-self.size)
        pull = light[:, a].unsqueeze(2) * light[:, b].unsqueeze(1)
        if valid is None:
            return alike * pull
        real = valid[0].unsqueeze(2) & valid[1].unsqueeze(1)
        return torch.where(real, alike * pull, 1e9 * (alike - 1))  # padding with padding first, with tokens last


@also(counts=("r",))
@register(
    "mctf",
    sources={"paper": "r at", "code": "info size"},
    menu=lambda backbone: [f"mctf(share={s})" for s in (0.15, 0.25, 0.35)],
)
def mctf(
    backbone: Backbone,
    r: int | tuple[int, ...] = 16,
    share: float | None = None,
    at: int | Iterable[int] | None = None,
    info: float = 0.05,
    size: float = 0.025,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Merge by several criteria, in both directions: similarity, attention, size (arXiv 2403.10030).

    Args:
        r: patch tokens merged away in each of the blocks, or a list for the first blocks of all; 0 after its end.
        share: share of patch tokens merged away in each of the blocks, instead of r.
        at: 0-based blocks that merge; None: with r all but the first, with a share a quarter, a half and three quarters
            of the depth (the paper's fast variant is ``mctf(share=0.35)``).
        info: exponent of the attention that tokens receive, in [0, 1]; 0: it does not count.
        size: exponent of the patches in them, in [0, 1].
        gmacs: find the share for this many GMACs per image (at its own size) instead; where a half at the default
            blocks is not enough, the other blocks but the first merge a share too.
        speed: the same for this many times fewer MACs.
    """
    if isinstance(r, tuple) and not all(knob is None for knob in (share, at, gmacs, speed)):
        raise UserError(
            f"mctf: r={list(r)} says how many in which block: share, at, gmacs and speed leave it to others"
        )
    rates = schedule("mctf", r, 0, backbone.depth)
    info, size = fraction("mctf", "info", info), fraction("mctf", "size", size)
    solved = gmacs is not None or speed is not None
    by_share = share is not None or solved
    every = tuple(range(1, backbone.depth))
    others = () if at is not None else tuple(i for i in every if i not in backbone.stages())
    at = blocks("mctf", at, backbone.stages() if by_share else every, backbone.depth)

    def build(shares: Mapping[int, float | None]) -> Method:
        steps = ((i, Attract(rates[i], s, info, size, backbone.dim, backbone.num_prefix)) for i, s in shares.items())
        return Method(sorted(steps, key=lambda step: step[0]))

    def at_strength(i: int) -> Method:
        """A share of up to a half at the blocks in 500 steps; then one in the others."""
        more = (i - 500) / 1000
        return build(dict.fromkeys(at, min(i, 500) / 1000) | (dict.fromkeys(others, more) if more > 0 else {}))

    if isinstance(r, tuple):
        return build({i: None for i, count in enumerate(rates) if count})
    if solved:
        return fit("mctf", backbone, at_strength, 1000 if others else 500, gmacs, speed)
    return build(dict.fromkeys(at, None if share is None else fraction("mctf", "share", share, 0.0, 0.5)))
