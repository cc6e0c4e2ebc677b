"""Mosaics: which block of each image is one token — the nodes of a quadtree, the level of every cell, the leaves.

``s`` is the patch size of the finest cells; a node of level ``l`` is a square of ``2^l × 2^l`` cells, ``s · 2^l``
pixels, aligned to its own size. Only nodes that lie wholly inside the image can be leaves, so any number of cells will
do: where a coarse node would cross the border, the largest nodes that fit take its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import numpy as np
import torch
from torch import Tensor

from saccade.core.constant_cache import constant
from saccade.errors import UserError


@dataclass(frozen=True)
class Geometry:
    """The quadtree of images of one size; levels that do not fit in are left out."""

    cells: tuple[int, int]  # (gh, gw) of the finest grid
    patch: int  #             s, pixels of a finest cell
    levels: int  #            L, scales: s … s · 2^(L-1)

    @classmethod
    def of(cls, cells: tuple[int, int], sizes: tuple[int, ...]) -> Geometry:
        """For images of so many cells of ``sizes[0]`` pixels."""
        return cls(cells, sizes[0], min(len(sizes), min(cells).bit_length()))

    @classmethod
    def of_pixels(cls, size: tuple[int, int], sizes: tuple[int, ...]) -> Geometry:
        """For images of (height, width) pixels, brought to the nearest multiple of ``sizes[0]``."""
        return cls.of((max(1, round(size[0] / sizes[0])), max(1, round(size[1] / sizes[0]))), sizes)

    def grid(self, level: int) -> tuple[int, int]:
        """Nodes of a level, down and across."""
        return self.cells[0] >> level, self.cells[1] >> level

    def nodes(self, level: int) -> int:
        """How many a level has."""
        h, w = self.grid(level)
        return h * w

    @property
    def splittable(self) -> tuple[int, ...]:
        """Levels whose nodes can be split, the coarsest first: the order in which nodes are numbered."""
        return tuple(range(self.levels - 1, 0, -1))

    @property
    def splits(self) -> int:
        """S, nodes that can be split; each split adds three leaves."""
        return sum(map(self.nodes, self.splittable))

    @property
    def finest(self) -> int:
        """G, the most leaves there can be: one a cell."""
        return self.nodes(0)

    @property
    def coarsest(self) -> int:
        """The fewest leaves there can be."""
        return self.finest - 3 * self.splits

    def nearest(self, tokens: float) -> int:
        """The number of leaves that can be had nearest to one."""
        return self.coarsest + 3 * max(0, min(math.floor((tokens - self.coarsest) / 3 + 0.5), self.splits))

    def splits_for(self, tokens: int, knob: str = "tokens") -> int:
        """How many splits make so many leaves. UserError, with the nearest number that can be, where none do."""
        extra = tokens - self.coarsest
        if extra % 3 == 0 and 0 <= extra <= 3 * self.splits:
            return extra // 3
        h, w = (side * self.patch for side in self.cells)
        raise UserError(
            f"quadtree: {knob}={tokens} cannot be had of {h}x{w} pixels in blocks of {self.patch} … "
            f"{self.patch << (self.levels - 1)} pixels: a split adds three, from {self.coarsest} to {self.finest}; "
            f"the nearest is {self.nearest(tokens)}"
            + (" (the mean of the batch's images)" if knob == "per_batch" else "")
        )


@dataclass(frozen=True)
class Mosaic:
    """Which block of its image each token is. Tokens stand in the raster order of their upper left cells.

    The level of every cell says it all; the rest is read off it.
    """

    geometry: Geometry
    level: Tensor  #         [B, G] int64  of the leaf that covers each cell; 0: a cell of its own
    owner: Tensor  #         [B, G] int64  the leaf that covers each cell
    cell: Tensor  #          [B, N] int64  upper left cell of each leaf (some cell, for padding)
    node: Tensor  #          [B, N] int64  number of each leaf among all nodes of all levels, the finest level first
    valid: Tensor | None  #  [B, N] bool   False: padding, where images have different numbers of leaves; None: none

    @classmethod
    def of(cls, geometry: Geometry, split: Tensor, leaves: int | None) -> Mosaic:
        """From the nodes that are split, [B, S] bool, closed under ancestors; ``leaves``: N, None: images differ."""
        images, device = split.shape[0], split.device
        over = covering(geometry, device)  # [L-1, G]
        # Nodes that would cross the border always are split: they stand for one more column.
        split = torch.cat([split, split.new_ones(images, 1)], dim=1)
        split = split.gather(1, over.reshape(1, -1).expand(images, -1)).unflatten(1, over.shape)
        return cls.of_levels(geometry, (~split).sum(1), leaves)

    @classmethod
    def of_levels(cls, geometry: Geometry, level: Tensor, leaves: int | None = None) -> Mosaic:
        """From the level of every cell, [B, G] int64."""
        corner = _corner(geometry, level.device).gather(0, level)  # [B, G]
        first = corner == _cells(geometry, level.device)
        place = first.cumsum(1)
        valid, counts = None, place[:, -1]
        if leaves is None:
            # Eager: as long as the longest. In a graph: every cell gets a place, so that shapes stay fixed.
            static = torch.compiler.is_compiling() or not len(level)
            least, leaves = (0, geometry.finest) if static else torch.stack(counts.aminmax()).tolist()
            if least < leaves:
                valid = torch.arange(leaves, device=level.device) < counts.unsqueeze(1)
        cell = first.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :leaves]
        node = _numbers(geometry, level.device).gather(0, level).gather(1, cell)
        return cls(geometry, level, (place - 1).gather(1, corner), cell, node, valid)

    @property
    def leaf_level(self) -> Tensor:
        """Level of each leaf, [B, N]."""
        return self.level.gather(1, self.cell)

    @property
    def area(self) -> Tensor:
        """Cells in each leaf, [B, N] fp32."""
        return (4.0 ** self.leaf_level.float()).round()

    def counts(self) -> Tensor:
        """Leaves of each level, [B, L] int64."""
        areas = 4 ** torch.arange(self.geometry.levels, device=self.level.device)
        kinds = self.level.unsqueeze(-1) == torch.arange(self.geometry.levels, device=self.level.device)
        return kinds.sum(1) // areas


# --- tables: cell -> node -------------------------------------------------------------------------------------------


def table(build: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    """``build(geometry, *values) -> array`` as a function ``(geometry, *values, device) -> Tensor``, built once."""

    @constant
    @wraps(build)
    def plain(cells: tuple[int, int], patch: int, levels: int, *values: object) -> np.ndarray:
        return build(Geometry(cells, patch, levels), *values)

    def shared(g: Geometry, *values: object) -> Tensor:
        return plain(g.cells, g.patch, g.levels, *values)  # a compiler knows tuples as constants, and no class of ours

    shared.__doc__ = build.__doc__
    return shared


def _grids(g: Geometry, level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column of the node of a level over each cell, [G] each, and whether it lies inside the image."""
    y, x = (a.reshape(-1) for a in np.meshgrid(*map(np.arange, g.cells), indexing="ij"))
    h, w = g.grid(level)
    return y >> level, x >> level, ((y >> level) < h) & ((x >> level) < w)


@table
def covering(g: Geometry) -> np.ndarray:
    """Number of the splittable node of each level over each cell, S where it crosses the border, [L-1, G] int64."""
    rows, start = [], 0
    for level in g.splittable:
        y, x, inside = _grids(g, level)
        rows.append(np.where(inside, start + y * g.grid(level)[1] + x, g.splits))
        start += g.nodes(level)
    return np.stack(rows) if rows else np.zeros((0, g.finest), dtype=np.int64)


@table
def _cells(g: Geometry) -> np.ndarray:
    """0, 1, … G-1."""
    return np.arange(g.finest)


@table
def _corner(g: Geometry) -> np.ndarray:
    """Upper left cell of the node of each level over each cell, [L, G] int64."""
    found = []
    for level in range(g.levels):
        y, x, _ = _grids(g, level)
        found.append((y << level) * g.cells[1] + (x << level))
    return np.stack(found)


@table
def _numbers(g: Geometry) -> np.ndarray:
    """Number of the node of each level over each cell among all nodes, the finest level first, [L, G] int64."""
    rows, start = [], 0
    for level in range(g.levels):
        y, x, inside = _grids(g, level)
        rows.append(np.where(inside, start + y * g.grid(level)[1] + x, 0))
        start += g.nodes(level)
    return np.stack(rows)
