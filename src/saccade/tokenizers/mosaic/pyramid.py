"""One image at every scale, and leaves read straight from it: no table of unused patches.

The same pyramid carries whatever lies on the finest grid: pixels, and the position table, whose levels are then the
positions of coarser blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.tokenizers.mosaic.geometry import Geometry, Mosaic, table


def box(x: Tensor, times: int) -> Tensor:
    """Means over squares of ``times × times``, [B, C, h, w] -> [B, C, h // times, w // times]; a power of two."""
    while times > 1:
        x, times = F.avg_pool2d(x, 2), times // 2
    return x


def bilinear(x: Tensor, times: int) -> Tensor:
    """Bilinear resizing without antialiasing, as published: the mean of the central 2 × 2 of each square."""
    if times == 1:
        return x
    h, w = (side // times * times for side in x.shape[-2:])
    one = times // 2 - 1
    rows = x[..., one:h:times, :w] + x[..., one + 1 : h : times, :w]
    return (rows[..., one::times] + rows[..., one + 1 :: times]) * 0.25


RESAMPLERS: dict[str, Callable[[Tensor, int], Tensor]] = {"area": box, "bilinear": bilinear}


def pyramid(x: Tensor, levels: int, resample: str) -> list[Tensor]:
    """x [B, C, H, W] at 1, 1/2, 1/4, … of its size; ``area`` makes each level of the one before."""
    found = [x]
    for level in range(1, levels):
        found.append(box(found[-1], 2) if resample == "area" else RESAMPLERS[resample](x, 1 << level))
    return found


def read_leaves(levels: list[Tensor], mosaic: Mosaic) -> Tensor:
    """Each leaf's patch at its own level: levels of [B, C, h, w] pixels -> [B, N, C · s · s].

    Pixels are copied in runs of ``s``, which is one gather of rows for all levels together. Differentiable.
    """
    g, s = mosaic.geometry, mosaic.geometry.patch
    images, channels = levels[0].shape[:2]
    runs = []
    for i, x in enumerate(levels):
        h, w = g.grid(i)
        runs.append(x[..., : h * s, : w * s].reshape(images, channels, h * s * w, s))
    whole = torch.cat(runs, dim=2)  # [B, C, R, s]
    first, below = _runs(g, whole.device), _below(g, channels, whole.device)
    index = first[mosaic.node].unsqueeze(-1) + below[mosaic.leaf_level]  # [B, N, C * s]
    if images != 1 or torch.compiler.is_compiling():
        index = index + torch.arange(images, device=whole.device)[:, None, None] * (channels * whole.shape[2])
    rows = whole.reshape(-1, s).index_select(0, index.reshape(-1))
    return rows.reshape(images, mosaic.cell.shape[1], channels * s * s)


def fitted(images: Tensor, patch: int, size: tuple[int, int] | None) -> Tensor:
    """Images at ``size`` pixels, None: their own, and then at the nearest multiple of the finest patch."""
    h, w = (patch * max(1, round(side / patch)) for side in (size or images.shape[-2:]))
    if tuple(images.shape[-2:]) == (h, w):
        return images
    x = images if images.dtype == torch.float64 else images.float()  # not made for half precision on the CPU
    return F.interpolate(x, size=(h, w), mode="bicubic", antialias=True, align_corners=False).to(images.dtype)


@table
def _runs(g: Geometry) -> np.ndarray:
    """First run of pixels of every node of all levels, the finest first, [n_0 + n_1 + …] int64."""
    found, start = [], 0
    for level in range(g.levels):
        h, w = g.grid(level)
        y, x = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
        found.append((start + y * g.patch * w + x).reshape(-1))
        start += h * g.patch * w
    return np.concatenate(found)


@table
def _below(g: Geometry, channels: int) -> np.ndarray:
    """From the first run of a node of a level to all of its runs, channel by channel, [L, C * s] int64."""
    runs = sum(h * g.patch * w for h, w in map(g.grid, range(g.levels)))
    down = np.outer([g.grid(level)[1] for level in range(g.levels)], np.arange(g.patch))  # [L, s]
    return (np.arange(channels)[:, None] * runs + down[:, None, :]).reshape(g.levels, -1)
