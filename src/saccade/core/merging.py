"""Merging: which token goes into which, and the means that merged tokens are; and rows of images by their places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saccade.core.constant_cache import constant

LARGE = 2**23  # numbers from which on copies take a GPU longer than the launches of more operators


@dataclass(frozen=True)
class Merge:
    """Tokens that are merged away, each into one that stays."""

    src: Tensor  #                     [B, R]  tokens merged away
    dst: Tensor  #                     [B, R]  the slot of ``keep`` (0 to M-1) that each merges into
    gate: Tensor | None = None  #      [B, R]  0/1, straight-through: which of ``src`` merge after all; None: all
    weight: Tensor | None = None  #    [B, N]  how much a token counts in the mean of its group; None: its size
    values: Tensor | None = None  #    [B, M, D]  what those that stay become instead of the means
    size_share: Tensor | None = None  # [B, R]  the part of its size that each of ``src`` hands over; None: all of it
    proportional: bool = True  #       False: from here on attention counts a merged token once (Tokens.proportional)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: x [B, L, C], index [B, K] -> [B, K, C]."""
    images, length, width = x.shape
    if torch.compiler.is_compiling():
        index = index + length * torch.arange(images, device=index.device).unsqueeze(1)
    elif images != 1:
        index = index + length * _counting(images, 1, index.device)
    # copies whole rows; a gather by element takes five times as long
    return torch.embedding(x.reshape(-1, width), index)


@constant
def _counting(rows: int, columns: int) -> np.ndarray:
    """0, 1, … [rows, columns]."""
    return np.arange(rows * columns).reshape(rows, columns)


def behind(prefix: int, keep: Tensor) -> Tensor:
    """Places of prefix tokens and of the patch tokens ``keep`` [B, M] in the whole sequence, [B, P+M]."""
    if prefix == 0:
        return keep
    return torch.cat([_counting(1, prefix, keep.device).expand(keep.shape[0], -1), keep + prefix], dim=1)


def means(x: Tensor, size: Tensor | None, keep: Tensor, merge: Merge) -> tuple[Tensor, Tensor]:
    """Merged tokens are the means of their parts by size: x [B, N, C] -> [B, M, C], and the new sizes [B, M] fp32.

    Features times size and size itself travel as one tensor, in fp32: one gather, one sum, one division.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if size is None:
        carried = torch.cat([wide, wide.new_ones(*wide.shape[:2], 1)], dim=2)
    else:
        weight = (size if size.dtype == wide.dtype else size.to(wide.dtype)).unsqueeze(2)
        carried = torch.cat([wide * weight, weight], dim=2)
    together, counts = rows(carried, torch.cat([keep, merge.src], dim=1)), [keep.shape[1], merge.src.shape[1]]
    kept, merged = together.split_with_sizes(counts, dim=1)
    sums = kept.scatter_add(1, merge.dst.unsqueeze(2).expand_as(merged), merged)
    features, total = sums.split_with_sizes([x.shape[2], 1], dim=2)
    mean = features / total
    return mean if wide is x else mean.to(x.dtype), total.squeeze(2)


def few_means(x: Tensor, size: Tensor | None, keep: Tensor, merge: Merge, prefix: int) -> tuple[Tensor, Tensor]:
    """As ``means``, without a gradient, of tokens behind so many others that stay: x [B, P+N, C] -> [B, P+M, C].

    Rows are copied once, and only those that others merge into are computed: each is pulled towards its sources. Rows
    of several sources are written several times, with the same numbers, so the order does not matter.
    """
    new = rows(x, behind(prefix, keep))
    if size is None:
        size = x.new_ones(x.shape[0], x.shape[1] - prefix, dtype=torch.float32)
    given = size.gather(1, merge.src)
    total = size.gather(1, keep).scatter_add(1, merge.dst, given)
    share = given / total.gather(1, merge.dst)
    together = merge.dst.unsqueeze(2) == merge.dst.unsqueeze(1)  # [B, R, R]
    images, length, width = new.shape
    flat, into = new.view(-1, width), merge.dst + prefix if prefix else merge.dst
    into = into if images == 1 else into + length * _counting(images, 1, into.device)
    there, source = torch.embedding(flat, into), rows(x, merge.src + prefix if prefix else merge.src)
    if x.dtype not in (torch.float32, torch.float64):
        there, source = there.float(), source.float()
    pulled = torch.baddbmm(there, (share.unsqueeze(1) * together).to(there.dtype), source - there)
    flat.index_copy_(0, into.flatten(), pulled.flatten(0, 1).to(x.dtype))
    return new, total


def copies_cost_more(x: Tensor) -> bool:
    """Whether ``few_means`` is the faster way, measured: for large batches on a GPU, and for narrow numbers on a CPU,
    which would be widened first. It has no gradient, and a compiler fuses the other."""
    if x.requires_grad or torch.compiler.is_compiling():
        return False
    if x.device.type == "cpu":
        return x.dtype not in (torch.float32, torch.float64)
    return x.numel() >= LARGE
