"""``depth(8)``: the first blocks only, and the classifier after them — the plainest way to compute less.

FlexiViT (arXiv 2212.08013, §7) compares flexible patch sizes with it: one head shared by all depths, or one for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.init import init_module
from saccade.core.plan import Backbone, Method
from saccade.core.registry import register
from saccade.core.timm_types import ViT
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.budget import fit

HEADS = ("shared", "own")


class Depth(Method):
    """Stops after so many blocks; with a final norm and a classifier of its own, if asked to."""

    def __init__(self, blocks: int, own: nn.Module | None) -> None:
        super().__init__([])
        self.depth = blocks
        # under the depth, so that every depth learns its own
        self.heads: Any = nn.ModuleDict({} if own is None else {str(blocks): own})

    def head(self, vit: ViT, tokens: Tokens) -> Tensor | None:
        own = self.heads[str(self.depth)] if len(self.heads) else None
        return None if own is None else own(tokens.x[:, 0])


def _menu(backbone: Backbone) -> list[str]:
    return [f"depth({n})" for n in range(backbone.depth - 1, backbone.depth // 2 - 1, -1)]


@register("depth", sources={"paper": "head"}, menu=_menu)
def depth(
    backbone: Backbone,
    blocks: int | None = None,
    head: str = "shared",
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Run the first blocks only (flexible depth, arXiv 2212.08013, §7).

    Args:
        blocks: how many; None: all of them.
        head: 'shared', the ViT's own norm and classifier; 'own', one of each for this depth, which has to be learned
            (it reads the class token).
        gmacs: find ``blocks`` for this many GMACs per image (at its own size) instead.
        speed: find ``blocks`` for this many times fewer MACs instead.
    """
    blocks = backbone.depth if blocks is None else blocks
    if type(blocks) is not int or not 1 <= blocks <= backbone.depth:
        raise UserError(f"depth: blocks={blocks!r} is not a whole number in [1, {backbone.depth}]")
    if head not in HEADS:
        raise UserError(f"depth: head={head!r} is not one of {', '.join(HEADS)}")
    if head == "own" and (backbone.pool != "token" or not backbone.num_classes):
        raise UserError("depth: head='own' reads the class token, and this model pools otherwise: use head='shared'")

    def build(blocks: int) -> Depth:
        return Depth(blocks, _head(backbone) if head == "own" else None)

    if gmacs is None and speed is None:
        return build(blocks)
    return fit("depth", backbone, lambda i: build(backbone.depth - i), backbone.depth - 1, gmacs, speed)


def _head(backbone: Backbone) -> nn.Module:
    classify = init_module(lambda: nn.Linear(backbone.dim, backbone.num_classes))
    generator = torch.Generator("cpu").manual_seed(0)  # the same every time
    nn.init.trunc_normal_(classify.weight, std=0.02, generator=generator)
    return nn.Sequential(nn.LayerNorm(backbone.dim, eps=1e-6, dtype=torch.float32), classify)
