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
        h, w = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
        rows = x[..., 0:h:2, :w] + x[..., 1:h:2, :w]
        x, times = (rows[..., ::2] + rows[..., 1::2]) * 0.25, times // 2
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
    first, stride = _runs(g, whole.device), _strides(g, whole.device)
    level = mosaic.leaf_level
    start = first.reshape(-1)[level * g.finest + mosaic.cell]  # [B, N]
    down = torch.arange(s, device=whole.device)
    across = torch.arange(channels, device=whole.device).unsqueeze(1) * whole.shape[2]  # [C, 1]
    index = (start.unsqueeze(-1) + stride[level].unsqueeze(-1) * down).unsqueeze(2) + across  # [B, N, C, s]
    index = index + torch.arange(images, device=whole.device)[:, None, None, None] * (channels * whole.shape[2])
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
    """First run of pixels of the node of each level over each cell, [L, G] int64."""
    found, start = [], 0
    y, x = (a.reshape(-1) for a in np.meshgrid(*map(np.arange, g.cells), indexing="ij"))
    for level in range(g.levels):
        h, w = g.grid(level)
        run = start + (y >> level) * g.patch * w + (x >> level)
        found.append(np.where(((y >> level) < h) & ((x >> level) < w), run, 0))
        start += h * g.patch * w
    return np.stack(found)


@table
def _strides(g: Geometry) -> np.ndarray:
    """From a run of pixels to the one below it, [L] int64."""
    return np.array([g.grid(level)[1] for level in range(g.levels)])
