"""``pixel``: what is lost when a block is brought to the size of the finest patch (Quadformer, arXiv 2304.00287)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.plan import Backbone
from saccade.methods.common.arguments import one_of
from saccade.tokenizers.mosaic.geometry import Geometry
from saccade.tokenizers.mosaic.pyramid import bilinear
from saccade.tokenizers.scorers.base import Scene, Scorer, block_mean, register_scorer

# Powers of the block's edge that its mean squared error is multiplied by: the paper's text, its code, the whole error.
WEIGHTS = {"mean": 0, "edge": 1, "area": 2}
BLURS = ("box", "bilinear")
NOISE = 1e-5  # of rounding, far below an 8-bit step: what is flat must score 0 on every device, or ties are no ties


class Pixel(Scorer):
    """Squared error of a block after it was made small and large again."""

    def __init__(self, weight: str, blur: str) -> None:
        super().__init__()
        self.weight, self.blur = weight, blur

    def forward(self, scene: Scene) -> list[Tensor]:
        g = scene.geometry
        errors = (_from_boxes if self.blur == "box" else _from_bilinear)(scene.images, g)
        return [
            e * float(g.patch << level) ** WEIGHTS[self.weight] for level, e in zip(g.splittable, errors, strict=True)
        ]


def _from_boxes(images: Tensor, g: Geometry) -> list[Tensor]:
    """Down and up by means: the variance within the boxes, which adds up from level to level (Haar's wavelets)."""
    x, total, found = images, None, []
    for level in range(1, g.levels):
        (gh, gw), s = g.grid(level), g.patch
        if tuple(x.shape[-2:]) != (2 * gh * s, 2 * gw * s):
            x = x[..., : 2 * gh * s, : 2 * gw * s]
        upper, lower = x.unflatten(2, (gh * s, 2)).unbind(3)
        rows, across = upper + lower, (upper - lower).square_()
        left, right = rows.unflatten(3, (gw * s, 2)).unbind(4)
        along = (left - right).square_()  # [B, C, h/2, w/2]
        # Of the two rows of a pair each is off by half of their difference; so are the columns of their mean.
        of_rows, of_columns = F.avg_pool2d(across.mean(1, True), (s, 2 * s)), F.avg_pool2d(along.mean(1, True), s)
        lost = torch.add(of_columns, of_rows, alpha=4) / 16
        if total is not None:
            lost = lost + F.avg_pool2d(total, 2)
        total = lost
        found.append(lost.squeeze(1))
        if level + 1 < g.levels:
            x = (left + right) * 0.25
    return found[::-1]


def _from_bilinear(images: Tensor, g: Geometry) -> list[Tensor]:
    """Down and up as published: the whole image, bilinear, no antialiasing."""
    found = []
    for level in g.splittable:
        h, w = (side * g.patch << level for side in g.grid(level))
        x = images[..., :h, :w]
        again = F.interpolate(bilinear(x, 1 << level), size=(h, w), mode="bilinear")
        lost = F.hardshrink(again.sub_(x), NOISE).square_()
        found.append(block_mean(lost, g, level, g.patch).mean(1))
    return found


@register_scorer("pixel")
def pixel(backbone: Backbone, weight: str = "edge", blur: str = "box") -> Pixel:
    """Squared error of a block after it was made small and large again.

    Args:
        weight: of the mean squared error: 'mean', none (the paper's text); times the block's 'edge' (its code, and the
            better reconstruction); times its 'area', the whole error.
        blur: 'box': by means, cheap and of the same quality; 'bilinear': as published.
    """
    return Pixel(one_of("scorer pixel", "weight", weight, WEIGHTS), one_of("scorer pixel", "blur", blur, BLURS))
