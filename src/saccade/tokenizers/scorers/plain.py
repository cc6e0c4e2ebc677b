"""``random`` and ``maps``: scores that need no look at the image."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.plan import Backbone
from saccade.errors import UserError
from saccade.methods.common.arguments import whole
from saccade.methods.common.matching import scrambled
from saccade.tokenizers.scorers.base import Scene, Scorer, current, pooled, register_scorer


class Random(Scorer):
    """Uniform scores, the same for every image: a batch equals its images one by one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, scene: Scene) -> list[Tensor]:
        g, images = scene.geometry, scene.images
        found = []
        for level in g.splittable:
            noise = scrambled(g.nodes(level), self.seed + (g.patch << level), images.device)
            found.append((noise.float() / 2**32).view(1, *g.grid(level)).expand(images.shape[0], -1, -1))
        return found


class Maps(Scorer):
    """Importance maps that were computed before."""

    def forward(self, scene: Scene) -> list[Tensor]:
        maps = current().maps
        if maps is None:
            raise UserError("scorer maps: none were given; run the model within 'with given(maps=...)', [B, h, w]")
        if maps.ndim != 3 or maps.shape[0] != scene.images.shape[0]:
            raise UserError(
                f"scorer maps: maps of shape {tuple(maps.shape)} for {scene.images.shape[0]} images: give [B, h, w]"
            )
        return pooled(maps.to(scene.images.device, torch.float32), scene.geometry)


@register_scorer("random")
def random(backbone: Backbone, seed: int = 0) -> Random:
    """Random scores: the control for every other scorer.

    Args:
        seed: of the scores.
    """
    return Random(whole("scorer random", "seed", seed, 0, 2**31 - 1))


@register_scorer("maps")
def maps(backbone: Backbone) -> Maps:
    """The mean over each block of importance maps, given with ``scorers.given(maps=...)``."""
    return Maps()
