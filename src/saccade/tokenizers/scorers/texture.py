"""``entropy`` and ``laplacian``: how much there is to see in a block (APT, arXiv 2510.18091, §3.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.plan import Backbone
from saccade.core.timm_types import ViT
from saccade.methods.common.arguments import one_of
from saccade.tokenizers.mosaic.geometry import Geometry
from saccade.tokenizers.scorers.base import Scene, Scorer, block_mean, register_scorer

BINS = 512  # over 0 … 255, as published: 256 grey levels fall apart, in-between values of colour photos too
LUMA = (0.2989, 0.5870, 0.1140)
STATISTICS = ("mean", "max", "std")


class Entropy(Scorer):
    """Shannon entropy of a block's grey levels, in bits."""

    def forward(self, scene: Scene) -> list[Tensor]:
        g = scene.geometry
        # Eight-bit levels, so that the way through normalisation and back cannot move a pixel into another bin.
        grey = _grey((scene.pixels() * 255).round().clamp(0, 255))
        # The last bin is closed, as everywhere; 255 / 512 is not a number of fp32, times 512 / 255 is what histc does.
        bins = torch.nan_to_num(grey * (BINS / 255)).long().clamp(0, BINS - 1)
        counts = _histograms(bins, g)
        found = []
        for level in range(1, g.levels):
            h, w = g.grid(level)
            if level > 1:
                counts = counts[:, : 2 * h, : 2 * w].unflatten(1, (h, 2)).unflatten(3, (w, 2)).sum((2, 4))
            pixels = (g.patch << level) ** 2
            bits = (counts / pixels).add_(1e-10).log2_()
            found.append(bits.mul_(counts).sum(-1) / -pixels)
        return found[::-1]


def _histograms(bins: Tensor, g: Geometry) -> Tensor:
    """Counts of each block of level 1: [B, H, W] int64 -> [B, h, w, BINS] fp32, at most 8 numbers a pixel."""
    (h, w), edge, images = g.grid(1), 2 * g.patch, bins.shape[0]
    bins = bins[:, : h * edge, : w * edge].unflatten(1, (h, edge)).unflatten(3, (w, edge)).transpose(2, 3).flatten(3)
    counts = torch.zeros(images, h, w, BINS, device=bins.device)
    return counts.scatter_add(3, bins, torch.ones((), device=bins.device).expand(bins.shape))


class Laplacian(Scorer):
    """A statistic of |the eight-neighbour Laplacian| of a block's grey levels, 0 … 255."""

    def __init__(self, statistic: str) -> None:
        super().__init__()
        self.statistic = statistic

    def macs(self, vit: ViT, geometry: Geometry) -> int:
        return 9 * geometry.finest * geometry.patch**2

    def forward(self, scene: Scene) -> list[Tensor]:
        g = scene.geometry
        kernel = scene.images.new_tensor([[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]])[None, None]
        # In eighths, so that sums are exact and what is flat has no edges, on every device.
        grey = (_grey(scene.pixels() * 255) * 8).round() / 8
        grey = F.pad(grey.unsqueeze(1), (1, 1, 1, 1), mode="replicate")
        edges = F.conv2d(grey, kernel).squeeze(1).abs()  # [B, H, W]
        found = []
        for level in g.splittable:
            mean = block_mean(edges, g, level, g.patch)
            if self.statistic == "std":
                mean = (block_mean(edges.square(), g, level, g.patch) - mean.square()).clamp(min=0).sqrt()
            elif self.statistic == "max":
                (h, w), edge = g.grid(level), g.patch << level
                mean = edges[:, : h * edge, : w * edge].unflatten(1, (h, edge)).amax(2).unflatten(2, (w, edge)).amax(3)
            found.append(mean)
        return found


def _grey(pixels: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W]: luma of three channels, the mean of any other number."""
    if pixels.shape[1] != 3:
        return pixels.mean(1)
    r, g, b = pixels.unbind(1)
    return LUMA[0] * r + LUMA[1] * g + LUMA[2] * b


@register_scorer("entropy")
def entropy(backbone: Backbone) -> Entropy:
    """Entropy of a block's grey levels, 0 to 9 bits; with a threshold, APT's rule."""
    return Entropy()


@register_scorer("laplacian")
def laplacian(backbone: Backbone, statistic: str = "mean") -> Laplacian:
    """Edges: a statistic of the absolute eight-neighbour Laplacian of a block's grey levels.

    Args:
        statistic: 'mean', 'max' or 'std' over the block.
    """
    return Laplacian(one_of("scorer laplacian", "statistic", statistic, STATISTICS))
