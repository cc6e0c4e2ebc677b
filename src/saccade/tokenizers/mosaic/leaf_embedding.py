"""What makes a token of a leaf: a position for every block, and what a coarse leaf hides."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.init import init_module
from saccade.core.merging import rows
from saccade.core.timm_types import ViT
from saccade.tokenizers.mosaic.geometry import Geometry, Mosaic, table
from saccade.tokenizers.mosaic.pyramid import pyramid
from saccade.tokenizers.resize.weight_cache import cached_weight

# The table is an image with a channel for each feature, so a block's position is a pixel of its pyramid: the mean of
# the table over all cells that it covers, or the table sampled at its centre.
TABLES = {"mean": "area", "centre": "bilinear"}
POSITIONS = (*TABLES, "sinusoid")


def leaf_positions(vit: ViT, own: Tensor | None, mosaic: Mosaic, how: str) -> Tensor | None:
    """Positions as ``grid.place`` takes them, [B, (P+)N, D]; None for a ViT without a position table.

    Of a mosaic whose leaves all are cells, ``mean`` and ``centre`` are the positions of the cells themselves.

    Args:
        own: positions of the finest grid, [1, (P+)G, D].
    """
    g, prefix, images = mosaic.geometry, 0 if vit.no_embed_class else vit.num_prefix_tokens, mosaic.cell.shape[0]
    if how == "sinusoid":
        every = _sinusoids(g, vit.embed_dim, mosaic.cell.device).to(vit.patch_embed.proj.weight.dtype)
        first = every.new_zeros(images, prefix, vit.embed_dim)  # the paper's class token has none
    elif own is None:
        return None
    else:
        make = partial(_of_all_nodes, g=g, prefix=prefix, how=how)
        every = cached_weight(vit, "leaf positions", (g, prefix, how), own, make)
        first = own[:, :prefix].expand(images, -1, -1)
    return torch.cat([first, F.embedding(mosaic.node, every)], dim=1)


def _of_all_nodes(own: Tensor, g: Geometry, prefix: int, how: str) -> Tensor:
    """The positions of all nodes of all levels, the finest first, [n_0 + n_1 + …, D]."""
    levels = pyramid(own[:, prefix:].mT.unflatten(-1, g.cells), g.levels, TABLES[how])
    return torch.cat([level.flatten(2) for level in levels], dim=2)[0].mT.contiguous()


@table
def _sinusoids(g: Geometry, width: int) -> np.ndarray:
    """The paper's fixed positions of all nodes, [n_0 + n_1 + …, D] fp32 (Quadformer, arXiv 2304.00287, §3).

    The centre in units of the finest patch; half of the features for x, half for y; of each half, sines and then
    cosines of frequencies from 1 down to 1/10000.
    """
    found = []
    for level in range(g.levels):
        y, x = np.meshgrid(*((np.arange(n) + 0.5) * 2**level for n in g.grid(level)), indexing="ij")
        found.append(np.concatenate([_waves(x.reshape(-1), width // 2), _waves(y.reshape(-1), width - width // 2)], 1))
    return np.concatenate(found).astype(np.float32)


def _waves(t: np.ndarray, width: int) -> np.ndarray:
    half = width // 2
    angles = np.outer(t, np.exp(-np.log(10000.0) * np.arange(half) / max(1, half - 1)))
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)], 1), ((0, 0), (0, width - 2 * half)))


class Detail(nn.Module):
    """What the finest cells under a coarse leaf would have said (APT, arXiv 2510.18091, §3.2).

    Embeddings of the cells, convolved two by two once for each level up to the leaf's, and a linear layer of zeros: at
    first it changes nothing. One convolution serves all levels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.merge: Any = init_module(lambda: nn.Conv2d(dim, dim, 2, stride=2))
        self.out = init_module(lambda: nn.Linear(dim, dim))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def macs(self, geometry: Geometry, channels: int, leaves: int) -> int:
        """For every block of every level, used or not, which keeps shapes fixed; per image."""
        dim = self.out.in_features
        return dim * (geometry.finest * channels * geometry.patch**2 + (4 * geometry.splits + leaves) * dim)

    def forward(self, cells: Tensor, mosaic: Mosaic) -> Tensor:
        """Embeddings of all finest cells [B, D, gh, gw] -> what to add to the leaves, [B, N, D]; 0 for single cells."""
        g, x, found = mosaic.geometry, cells, [torch.zeros_like(cells).flatten(2)]
        for level in range(1, g.levels):
            h, w = g.grid(level)
            x = F.conv2d(x[..., : 2 * h, : 2 * w], self.merge.weight.to(x.dtype), self.merge.bias.to(x.dtype), stride=2)
            found.append(x.flatten(2))
        hidden = rows(torch.cat(found, dim=2).mT, mosaic.node)
        out = F.linear(hidden, self.out.weight.to(x.dtype), self.out.bias.to(x.dtype))
        return out * (mosaic.leaf_level > 0).unsqueeze(-1)
