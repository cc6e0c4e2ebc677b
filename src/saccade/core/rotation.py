"""Rotary positions (RoPE) that travel with tokens: each is turned by what stands for the middle of its cells.

A tokenizer leaves the sines and cosines of every cell in ``tokens.state``. A token that owns one cell has its; one that
owns several has, by what the tokenizer left,

* the mean rotation of them (sine and cosine averaged, brought back to length 1): where the angle grows evenly from cell
  to cell, that is the rotation of their centre, however often a sine has gone round between them;
* the rotation of the cell that ``tokens.anchor`` says: a merged token keeps that of the one that stayed;
* the rotation of their mean position, computed anew: the angles of cells are left instead, whose mean it is.

A prefix token is not turned. Sums travel from reduction to reduction; only where owners come from elsewhere (a mosaic,
ragged groups, mixtures) or every block has a table of its own are they found anew, over all cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.core.constant_cache import constant
from saccade.core.lazy import unread
from saccade.core.merging import rows
from saccade.core.provenance import Cells, Moved, Moves, is_map
from saccade.core.slicing import Owned
from saccade.core.tokens import Tokens

ROPE = "rope"  # in ``Tokens.state``: [B, G, 2d], or for each block and head [B, L, H, G, 2d]; sines, then cosines
ANGLES = "rope angles"  # or in its place [B, G, d+1], [B, L, H, G, d+1]: angles, then a 1 to count cells by
FORMS = CENTROID, KEPT, RECOMPUTED = "centroid", "kept", "recomputed"  # of a merged token's rotation
SHORT = 1e-6  # of a mean of opposite rotations, which has no direction


@dataclass(frozen=True)
class Shared:
    """Rotations that all blocks share, of one set of tokens."""

    key: Any  #       the owner map, or what it will be made of, or the anchors
    sums: Tensor  #   [B, N, C] over the cells of each
    single: bool  #   no token has more than one
    turn: Tensor  #   [B, N, 1, 2d]


@dataclass
class Rotations:
    """Those of one forward; what blocks share is made once."""

    known: Shared | None = field(default=None)
    whole: tuple[Tensor, Tensor] | None = field(default=None)  # of patches, and the same behind the prefix's

    def of(self, block: int, tokens: Tokens) -> Tensor | None:
        """For each token [B, P+N, H, 2d], where H may be 1; None: this ViT has none."""
        patches = self.of_patches(block, tokens)
        if patches is None or not tokens.num_prefix:
            return patches
        if self.whole is None or self.whole[0] is not patches:
            still = _still(patches.shape[-1] // 2, patches.device).to(patches.dtype)
            still = still.expand(patches.shape[0], tokens.num_prefix, patches.shape[2], -1)
            self.whole = patches, torch.cat([still, patches], dim=1)
        return self.whole[1]

    def of_patches(self, block: int, tokens: Tokens) -> Tensor | None:
        """For each patch token [B, N, H, 2d]."""
        table, finish = tokens.state.get(ROPE), _unit
        if table is None:
            table, finish = tokens.state.get(ANGLES), _sines
        if table is None:
            return None
        if table.ndim == 3:
            self.known = self._shared(table, finish, tokens)
            return self.known.turn
        cells = table[:, block].transpose(1, 2)  # [B, G, H, C]
        if tokens.anchor is not None:
            return rows(cells.flatten(2), tokens.anchor).unflatten(2, cells.shape[2:])
        if isinstance(unread(tokens), Cells):
            return cells if finish is _unit else finish(cells)
        return finish(_sums(cells.flatten(2), tokens).unflatten(2, cells.shape[2:]))

    def _shared(self, table: Tensor, finish: Any, tokens: Tokens) -> Shared:
        """Of tokens whose cells have the values of ``table`` [B, G, C]."""
        key, known = unread(tokens) if tokens.anchor is None else tokens.anchor, self.known
        if known is not None and known.key is key:
            return known
        sums, single = self._carried(table, tokens) if tokens.anchor is None else (rows(table, tokens.anchor), True)
        turn = sums if single and finish is _unit else finish(sums)
        return Shared(key, sums, single, turn.unsqueeze(2))

    def _carried(self, table: Tensor, tokens: Tokens) -> tuple[Tensor, bool]:
        """Sums over the cells of each token, by the reductions since they were known last; none has two cells."""
        moves, at, known = [], unread(tokens), self.known
        while isinstance(at, (Moved, Owned)) and (known is None or not is_map(at, known.key)):
            moves.append(at)
            at = at.before
        if isinstance(at, Cells):
            sums, single = table, True
        elif known is not None and is_map(at, known.key):
            sums, single = known.sums, known.single
        else:
            return _sums(table, tokens), False
        for move in reversed(moves):
            if isinstance(move, Owned):
                sums = sums[:, : move.count]
                continue
            sums = _moved(sums, move.moves)
            single = single and move.moves.merge is None and move.moves.fuse is None
        return sums, single


def _moved(sums: Tensor, r: Moves) -> Tensor:
    """Sums [B, N, C] after a reduction, [B, M, C]; a token that merges takes its own along."""
    if r.merge is None:
        new = rows(sums, r.keep)
    else:
        given = rows(sums, r.merge.src)
        if r.merge.gate is not None:
            given = given * (r.merge.gate > 0).unsqueeze(2)
        index, into = (i.unsqueeze(2).expand_as(given) for i in (r.merge.src, r.merge.dst))
        if r.merge.gate is not None or r.keep.shape[1] + r.merge.src.shape[1] > sums.shape[1]:
            sums = sums.scatter_add(1, index, -given)  # what merges may stay as well, hidden, and then has none
        new = rows(sums, r.keep).scatter_add(1, into, given)
    return new if r.fuse is None else torch.cat([new, rows(sums, r.fuse.index).sum(1, keepdim=True)], dim=1)


def _sums(cells: Tensor, tokens: Tokens) -> Tensor:
    """Values of cells [B, G, C] -> sums over those of each token, [B, N, C]."""
    place = (tokens.owner + 1).unsqueeze(2).expand_as(cells)  # what was dropped goes before the first
    total = cells.new_zeros(cells.shape[0], tokens.num_patches + 1, cells.shape[2])
    return total.scatter_add(1, place, cells)[:, 1:]


def _unit(sums: Tensor) -> Tensor:
    """Sums of sines and cosines [..., 2d], brought to length 1."""
    pair = sums.unflatten(-1, (2, -1))
    sine, cosine = pair.square().unbind(-2)  # a norm over two values costs more than all the merging
    length = (sine + cosine).sqrt().unsqueeze(-2)
    still = _still(pair.shape[-1], pair.device).to(pair.dtype).view(2, -1)
    return torch.where(length > SHORT, pair / length.clamp(min=SHORT), still).flatten(-2)


def _sines(sums: Tensor) -> Tensor:
    """Sums of angles and their number [..., d+1] -> sines and cosines of the mean, [..., 2d]."""
    mean = sums[..., :-1] / sums[..., -1:].clamp(min=1.0)
    return torch.cat([mean.sin(), mean.cos()], dim=-1)


@constant
def _still(dim: int) -> np.ndarray:
    """No rotation: sines, then cosines, [2d]."""
    return np.repeat(np.array([0.0, 1.0], dtype=np.float32), dim)
