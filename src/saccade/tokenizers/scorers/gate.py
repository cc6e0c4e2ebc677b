"""``gate``: a learned scorer, which starts as the pixel scorer and is told by the task's loss what to change.

In the spirit of MSViT's gate (arXiv 2307.02321): a small network on each block. Which blocks are split is not
differentiable, so a leaf's token is multiplied by one: in the backward pass, by the probability of this leaf.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.init import init_module
from saccade.core.plan import Backbone
from saccade.core.timm_types import ViT
from saccade.methods.common.arguments import whole
from saccade.tokenizers.mosaic.geometry import Geometry, Mosaic, covering
from saccade.tokenizers.mosaic.selection import over_path
from saccade.tokenizers.scorers.base import Scene, Scorer, register_scorer
from saccade.tokenizers.scorers.pixel import Pixel

LIMIT = 20.0  # of the factor's logarithm
SIDE = 4  # a block is looked at as a thumbnail of so many pixels a side


class Gate(Scorer):
    """Pixel scores, times a learned factor of each block that starts as 1."""

    learns: ClassVar[bool] = True

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.base = Pixel("edge", "box")
        self.hidden = init_module(lambda: nn.Linear(channels * SIDE**2 + 2, hidden))
        self.out = init_module(lambda: nn.Linear(hidden, 1))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def macs(self, vit: ViT, geometry: Geometry) -> int:
        return geometry.splits * (self.hidden.in_features + 1) * self.hidden.out_features

    def forward(self, scene: Scene) -> list[Tensor]:
        g = scene.geometry
        with torch.no_grad():
            base, seen = self.base(scene), []
            for level, score in zip(g.splittable, base, strict=True):
                h, w = g.grid(level)
                image = scene.levels[level][..., : h * g.patch, : w * g.patch]
                small = F.adaptive_avg_pool2d(image, (h * SIDE, w * SIDE))
                small = small.unflatten(2, (h, SIDE)).unflatten(4, (w, SIDE)).permute(0, 2, 4, 1, 3, 5).flatten(3)
                facts = torch.stack([(score + 1e-6).log(), torch.full_like(score, level)], dim=-1)
                seen.append(torch.cat([small.to(facts), facts], dim=-1).flatten(1, 2))
        weight = self.hidden.weight.dtype
        factor = self.out(F.gelu(self.hidden(torch.cat(seen, dim=1).to(weight)))).squeeze(-1).float()  # [B, S]
        parts = factor.split([g.nodes(level) for level in g.splittable], dim=1)
        soft = [LIMIT * torch.tanh(part / LIMIT) for part in parts]
        return [score * part.view(score.shape).exp() for score, part in zip(base, soft, strict=True)]


def credit(scores: list[Tensor], mosaic: Mosaic) -> Tensor:
    """One for every leaf [B, N], whose gradient is that of the log probability of the leaf.

    A block is split with the probability σ(log of the lowest score on its path − log of the lowest that was split), a
    leaf is there when its parent is split and it is not.
    """
    g, images = mosaic.geometry, mosaic.level.shape[0]
    flat = torch.cat([(score + 1e-6).log().flatten(1) for score in scores], dim=1)  # [B, S]
    flat = over_path(F.pad(flat, (0, 1), value=torch.inf), scores).amin(1)
    levels = mosaic.level.unflatten(1, g.cells)
    split = [levels[:, :: 1 << i, :: 1 << i][:, : g.grid(i)[0], : g.grid(i)[1]].flatten(1) < i for i in g.splittable]
    was = torch.cat(split, dim=1)
    edge = torch.where(was, flat, torch.inf).amin(1, keepdim=True).detach()
    edge = torch.where(edge.isinf(), flat.amax(1, keepdim=True).detach(), edge)  # nothing was split
    logit = flat - edge
    sure = logit.new_zeros(images, 1)
    over = covering(g, logit.device)[:, mosaic.cell].transpose(0, 1)  # [B, L-1, N]  blocks over each leaf, coarse first
    place = g.levels - 1 - mosaic.leaf_level.unsqueeze(1)  # [B, 1, N]  of the leaf itself among them
    none = torch.full_like(over[:, :1], g.splits)
    itself = torch.cat([over, none], dim=1).gather(1, place).squeeze(1)
    parent = torch.cat([none, over], dim=1).gather(1, place).squeeze(1)
    whole_leaf = torch.cat([F.logsigmoid(-logit), sure], dim=1).gather(1, itself)
    log_probability = torch.cat([F.logsigmoid(logit), sure], dim=1).gather(1, parent) + whole_leaf
    return (log_probability - log_probability.detach()).exp()


@register_scorer("gate")
def gate(backbone: Backbone, hidden: int = 64) -> Gate:
    """A small network on each block, trained with the model; it starts as the pixel scorer.

    Args:
        hidden: its width.
    """
    return Gate(backbone.channels, whole("scorer gate", "hidden", hidden, 1, 4096))
