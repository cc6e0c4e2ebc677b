"""Which cell went where: owner maps that are composed when they are read, and not in every block.

A reduction leaves its index tensors here; ``tokens.owner`` and ``trace.blocks[i].owner`` read the map [B, G] they make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from saccade.core.lazy import Recipe


class Merges(Protocol):
    """What a reduction says of merging; see ``saccade.core.merging.Merge``."""

    @property
    def src(self) -> Tensor:
        """Tokens that merge, [B, R]."""

    @property
    def dst(self) -> Tensor:
        """Into which of those that stay, [B, R]."""

    @property
    def gate(self) -> Tensor | None:
        """Whether each does, 0/1 [B, R]; None: all."""


class Fuses(Protocol):
    """What a reduction says of fusing; see ``saccade.core.reduction.Fuse``."""

    @property
    def index(self) -> Tensor:
        """Tokens that become one more, [B, Q]."""

    @property
    def weight(self) -> Tensor:
        """How much each gives to it, [B, Q]."""


class Moves(Protocol):
    """What a reduction says of where tokens go; see ``saccade.core.reduction.Reduction``."""

    @property
    def keep(self) -> Tensor:
        """Tokens that stay, [B, M]."""

    @property
    def merge(self) -> Merges | None:
        """Tokens that become part of others."""

    @property
    def fuse(self) -> Fuses | None:
        """Tokens that become one new token."""

    @property
    def valid(self) -> Tensor | None:
        """Which of those that stay are no padding, [B, M]."""


@dataclass(frozen=True)
class Cells:
    """Every cell is a token of its own."""

    images: int
    cells: int
    device: torch.device

    def made(self) -> Tensor:
        """The map [B, G]."""
        return torch.arange(self.cells, device=self.device).expand(self.images, -1)


@dataclass(frozen=True)
class Moved:
    """The map before a reduction of n tokens, and the reduction."""

    before: Tensor | Recipe
    moves: Moves
    n: int

    def made(self) -> Tensor:
        """The map after the reduction, [B, G]."""
        known: Tensor | None = self.__dict__.get("known")
        if known is None:
            before = self.before if isinstance(self.before, Tensor) else self.before.made()
            known = self.__dict__["known"] = follow(before, self.slot())  # a later block's map is read through this one
        return known

    def slot(self) -> Tensor:
        """Where each of the n tokens went, [B, N] int64; -1: dropped, or into padding."""
        r, new = self.moves, self.moves.keep.shape[1]
        slot = torch.full((r.keep.shape[0], self.n), -1, dtype=torch.int64, device=r.keep.device)
        places = torch.arange(new, device=r.keep.device).expand_as(r.keep)
        slot = slot.scatter(1, r.keep, places if r.valid is None else places.masked_fill(~r.valid, -1))
        if (m := r.merge) is not None:
            into = m.dst if m.gate is None else torch.where(m.gate > 0, m.dst, slot.gather(1, m.src))
            slot = slot.scatter(1, m.src, into)
        return slot if r.fuse is None else slot.scatter(1, r.fuse.index, new)


def anchors(anchor: Tensor | None, r: Moves) -> Tensor | None:
    """Cells that tokens keep the rotations of, [B, N] -> [B, M]; of a fused one, that of its heaviest part."""
    if anchor is None:
        return None
    kept = anchor.gather(1, r.keep)
    if r.fuse is None:
        return kept
    heaviest = r.fuse.index.gather(1, r.fuse.weight.argmax(1, keepdim=True))
    return torch.cat([kept, anchor.gather(1, heaviest)], dim=1)


def is_map(at: Tensor | Recipe, of: object) -> bool:
    """Whether an owner map, or the recipe of one, is that of a recipe, or the recipe itself."""
    return at is of or (isinstance(of, Moved) and of.__dict__.get("known") is at)


def follow(owner: Tensor, slot: Tensor) -> Tensor:
    """Send every cell's owner [B, G] where its token went: slot [B, N] -> owner [B, G]."""
    return torch.where(owner >= 0, slot.gather(1, owner.clamp(min=0)), -1)
