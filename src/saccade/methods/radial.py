"""``radial``: keep the middle of the image — the control for all that choose by what is in it.

Fixed radial masks, as in "Which Tokens to Use?" (Haurum et al., ICCVW 2023, arXiv 2308.04657).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Reduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import blocks, fraction, one_of
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import ceil_share
from saccade.methods.common.sampling import there

NORMS = {"l1": 1.0, "l2": 2.0, "linf": torch.inf}


class KeepCentral(Reducer):
    """Keep the ⌈keep · n⌉ tokens nearest to the middle of the grid; among equals the first."""

    def __init__(self, keep: float, norm: str) -> None:
        super().__init__()
        self.keep, self.norm = keep, norm

    def count(self, n: int) -> int:
        return ceil_share(self.keep, n)

    @torch.no_grad()
    def forward(self, tokens: Tokens) -> Reduction:
        distance = torch.linalg.vector_norm(offsets(tokens), NORMS[self.norm], dim=-1)
        order = there(tokens, -distance).argsort(dim=1, descending=True, stable=True)
        return Reduction(order[:, : self.count(tokens.num_patches)].sort(dim=1).values)


def offsets(tokens: Tokens) -> Tensor:
    """From the middle of the grid to the middle of the cells that each token owns, in cells: [B, N, 2] (y, x)."""
    (height, width), device = tokens.grid, tokens.x.device
    y = torch.arange(height, device=device) - (height - 1) / 2
    x = torch.arange(width, device=device) - (width - 1) / 2
    cells = torch.cartesian_prod(y, x).expand(tokens.x.shape[0], -1, -1)
    place = (tokens.owner + 1).unsqueeze(-1).expand(-1, -1, 2)  # dropped cells go to the front
    sums = cells.new_zeros(tokens.x.shape[0], tokens.num_patches + 1, 2).scatter_add(1, place, cells)
    return sums[:, 1:] / tokens.area().clamp(min=1).unsqueeze(-1)


@register("radial", sources={"code": "at"}, baseline=True)
def radial(
    backbone: Backbone,
    keep: float = 0.7,
    at: int | Iterable[int] | None = None,
    norm: str = "l2",
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Drop the patch tokens farthest from the middle of the image: a control (arXiv 2308.04657).

    Args:
        keep: share of patch tokens kept at each of the blocks, in (0, 1].
        at: 0-based blocks that drop; None: at a quarter, a half and three quarters of the depth.
        norm: of the distance: 'l1', 'l2' or 'linf'.
        gmacs: find ``keep`` for this many GMACs per image (at its own size) instead.
        speed: find ``keep`` for this many times fewer MACs instead.
    """
    one_of("radial", "norm", norm, NORMS)
    keep = fraction("radial", "keep", keep, 0.001)
    at = blocks("radial", at, backbone.stages(), backbone.depth)

    def build(keep: float) -> Method:
        return Method((i, KeepCentral(keep, norm)) for i in at)

    if gmacs is None and speed is None:
        return build(keep)
    return fit("radial", backbone, lambda i: build(1 - i / 1000), 999, gmacs, speed)
