"""``feature``: how much a small network's features change where a block is blurred (Quadformer, arXiv 2304.00287)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.plan import Backbone
from saccade.core.timm_types import ViT
from saccade.errors import UserError
from saccade.methods.common.arguments import fraction, one_of, whole
from saccade.tokenizers.mosaic.geometry import Geometry
from saccade.tokenizers.mosaic.pyramid import bilinear
from saccade.tokenizers.scorers.base import Scene, Scorer, block_mean, normalisation, on_cells, register_scorer
from saccade.tokenizers.scorers.networks import Network, open_network

METRICS = ("mse", "cosine")


class Feature(Scorer):
    """Difference between the features of the image and of the image blurred to a block's resolution."""

    def __init__(self, network: Network, stride: int, scale: float, metric: str) -> None:
        super().__init__()
        self.network, self.stride, self.scale, self.metric = network, stride, scale, metric

    def check(self, patch: int) -> None:
        if self.stride / self.scale > 2 * patch:
            raise UserError(
                f"scorer feature: maps of stride {self.stride} on an image of {self.scale:g} times its size are too "
                f"coarse for blocks of {2 * patch} pixels: give a stride of at most {int(2 * patch * self.scale)}"
            )

    def _size(self, g: Geometry) -> tuple[int, int]:
        """Pixels that the network sees; blurring needs them to be multiples of the coarsest blur."""
        unit = 1 << (g.levels - 1)
        h, w = (max(1, round(side * g.patch * self.scale / unit)) * unit for side in g.cells)
        return h, w

    def macs(self, vit: ViT, geometry: Geometry) -> int:
        return geometry.levels * self.network.macs(*self._size(geometry))

    def forward(self, scene: Scene) -> list[Tensor]:
        g = scene.geometry
        if scene.images.shape[1] != 3:
            raise UserError(f"scorer feature needs 3 channels, images have {scene.images.shape[1]}: take 'pixel'")
        (mean, std), (own_mean, own_std) = normalisation(scene.vit, scene.images), self.network.statistics(scene.images)
        # From the one normalisation to the other in one pass.
        x = torch.addcmul((mean - own_mean) / own_std, scene.images, std / own_std).float()
        x = x.contiguous(memory_format=torch.channels_last)
        size = self._size(g)
        if tuple(x.shape[-2:]) != size:
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        blurred = [F.interpolate(bilinear(x, 1 << level), size=size, mode="bilinear") for level in g.splittable]
        passes = torch.cat([x, *blurred]).contiguous(memory_format=torch.channels_last)
        features = self.network.on(x.device)(passes)  # all passes as one batch
        sharp, *others = features.unflatten(0, (g.levels, -1)).unbind(0)
        found = []
        for level, other in zip(g.splittable, others, strict=True):
            if self.metric == "mse":
                change = (other - sharp).square().mean(1)
            else:
                change = 1 - F.cosine_similarity(other, sharp, dim=1)
            found.append(block_mean(on_cells(change, g), g, level, 1))
        return found


@register_scorer("feature")
def feature(
    backbone: Backbone,
    network: str = "shufflenet_v2_x0_5",
    stride: int = 32,
    scale: float = 1.0,
    metric: str = "mse",
    weights: str = "pretrained",
    blocks: int | None = None,
) -> Feature:
    """Features of a small network, of the image and of its blurred forms: the paper's scorer.

    Args:
        network: a ShuffleNet of torchvision, or any timm model that gives feature maps, ViTs too.
        stride: pixels between the places of its map; at most twice the finest patch.
        scale: of the image that the network sees, in (0, 1]; 0.5 is a quarter of the cost.
        metric: 'mse', mean squared difference over channels, or 'cosine' distance.
        weights: 'pretrained', 'random' or a safetensors file.
        blocks: of a ViT as network: after how many it is cut; None: all.
    """
    scale = fraction("scorer feature", "scale", scale, 0.05)
    if blocks is not None:
        whole("scorer feature", "blocks", blocks, 1, 1000)
    found = open_network(network, stride, weights, blocks)
    return Feature(found, stride, scale, one_of("scorer feature", "metric", metric, METRICS))
