"""Rotary positions (RoPE) that travel with tokens: each is turned by the middle of the cells that it stands for.

A tokenizer leaves the sines and cosines of every cell in ``tokens.state``. A token that owns one cell has its; one that
owns several has the mean rotation of them (sine and cosine averaged, brought back to length 1): where the angle grows
evenly from cell to cell, that is the rotation of their centre. A prefix token is not turned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.lazy import unread
from saccade.core.provenance import Cells
from saccade.core.tokens import Tokens

ROPE = "rope"  # in ``Tokens.state``: [B, G, 2d], or for each block and head [B, L, H, G, 2d]; sines, then cosines
SHORT = 1e-6  # of a mean of opposite rotations, which has no direction


@dataclass
class Rotations:
    """Those of one forward; what blocks share is made once."""

    known: tuple[Any, Tensor] | None = field(default=None)

    def of(self, block: int, tokens: Tokens) -> Tensor | None:
        """For each token [B, P+N, H, 2d], where H may be 1; None: this ViT has none."""
        patches = self.of_patches(block, tokens)
        if patches is None or not tokens.num_prefix:
            return patches
        dim = patches.shape[-1] // 2
        still = F.pad(patches.new_zeros(dim), (0, dim), value=1.0)
        return torch.cat([still.expand(patches.shape[0], tokens.num_prefix, patches.shape[2], -1), patches], dim=1)

    def of_patches(self, block: int, tokens: Tokens) -> Tensor | None:
        """For each patch token [B, N, H, 2d]."""
        table = tokens.state.get(ROPE)
        if table is None:
            return None
        owner, shared = unread(tokens), table.ndim == 3
        if shared and self.known is not None and self.known[0] is owner:
            return self.known[1]
        cells = table[:, :, None] if shared else table[:, block].transpose(1, 2)  # [B, G, H, 2d]
        if isinstance(owner, Cells):
            found = cells
        else:
            found = _mean(cells, tokens.owner, tokens.num_patches)
            owner = unread(tokens)
        self.known = (owner, found) if shared else None
        return found


def _mean(cells: Tensor, owner: Tensor, tokens: int) -> Tensor:
    """Rotations of cells [B, G, H, 2d], owner [B, G] -> of tokens [B, N, H, 2d]."""
    place = (owner + 1)[:, :, None, None].expand(-1, -1, *cells.shape[2:])  # what was dropped goes before the first
    total = cells.new_zeros(owner.shape[0], tokens + 1, *cells.shape[2:]).scatter_add(1, place, cells)[:, 1:]
    pair = total.unflatten(-1, (2, -1))
    length = pair.square().sum(-2, keepdim=True).sqrt()
    still = pair.new_tensor([0.0, 1.0])[:, None]
    return torch.where(length > SHORT, pair / length.clamp(min=SHORT), still).flatten(-2)
