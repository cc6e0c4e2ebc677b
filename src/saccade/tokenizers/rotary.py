"""What a ViT with rotary positions says of the cells of a grid, as timm makes it: rotations, or their angles."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, build_fourier_pos_embed
from timm.layers.pos_embed_sincos import get_mixed_grid
from torch import Tensor
from torch.nn import functional as F

from saccade.core.rotation import ANGLES, CENTROID, RECOMPUTED, ROPE
from saccade.core.timm_types import ViT
from saccade.errors import UserError


def rotary(vit: ViT, images: int, grid: tuple[int, int], form: str = CENTROID) -> dict[str, Tensor]:
    """What is to be known of the cells of so many images, for ``Tokens.state``; {} where nothing is rotated.

    form: of a merged token's rotation, one of ``saccade.core.rotation.FORMS``.
    """
    rope: Any = getattr(vit, "rope", None)
    if rope is None:
        return {}
    name, table = (ANGLES, _angles(rope, grid)) if form == RECOMPUTED else (ROPE, _rotations(vit, rope, grid))
    return {name: table.expand(images, *table.shape)}


def _rotations(vit: ViT, rope: Any, grid: tuple[int, int]) -> Tensor:
    """Sines, then cosines of each cell, [G, 2d] or [L, H, G, 2d]."""
    if grid == tuple(vit.patch_embed.grid_size) and getattr(rope, "feat_shape", None) is not None:
        return rope.get_embed()
    if isinstance(rope, RotaryEmbeddingCat):  # which gives its own grid whatever it is asked for
        return rope._build_embed_cat(list(grid), cast(Tensor, rope.bands))
    return rope.get_embed(shape=list(grid))


def _angles(rope: Any, grid: tuple[int, int]) -> Tensor:
    """The angle of each cell, by position and frequencies, and a 1: [G, d+1] or [L, H, G, d+1], fp32.

    Random shifts and scales of positions, which timm has for training, are left out. Raises UserError for rotations
    that are made otherwise.
    """
    half = getattr(rope, "rotate_half", False)
    if isinstance(rope, RotaryEmbeddingMixed):
        x, y = get_mixed_grid(list(grid), grid_indexing=rope.grid_indexing, device=rope.freqs.device)
        across, down = cast(Tensor, rope.freqs).float().unsqueeze(-2).unbind(0)  # [L, H, 1, d/2]
        found = x.unsqueeze(-1) * across + y.unsqueeze(-1) * down
    elif isinstance(rope, RotaryEmbeddingDinoV3):
        place = _places(grid, rope.periods, "centered", rope)
        found = (2 * math.pi * place / cast(Tensor, rope.periods)).flatten(-2).flatten(0, -2)
    elif isinstance(rope, RotaryEmbeddingCat):
        found = (_places(grid, rope.bands, rope.grid_type, rope) * cast(Tensor, rope.bands)).flatten(-2).flatten(0, -2)
    else:
        raise UserError(
            f"the rotations of a {type(rope).__name__} are not known to come from positions, and cannot be computed "
            "anew: take rotation='centroid' or 'kept'"
        )
    found = torch.cat([found, found], dim=-1) if half else found.repeat_interleave(2, -1)
    return F.pad(found, (0, 1), value=1.0)


def _places(grid: tuple[int, int], bands: Any, kind: str, rope: Any) -> Tensor:
    """Positions of the cells as timm counts them, [gh, gw, 2, 1]."""
    told = {"grid_offset": rope.grid_offset, "grid_indexing": rope.grid_indexing}
    scaled = getattr(rope, "ref_feat_shape", None)
    more = {"grid_type": kind, "normalize_coords": rope.normalize_coords, "ref_feat_shape": scaled}
    return build_fourier_pos_embed(list(grid), bands=bands, include_grid=True, **told, **more)[0]
