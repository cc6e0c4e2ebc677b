"""Heads that say of every cell of a dense map what it shows: a linear one, and Segmenter's mask transformer."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.costs import block_cost
from saccade.core.timm_types import TimmBlock
from saccade.errors import UserError, nearest

LAYERS = 2  #       of the mask transformer, as in the paper
HEAD_WIDTH = 64
MOST_LAYERS = 48


class LinearHead(nn.Module):
    """One linear map for every cell."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.proj = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, features: Tensor) -> Tensor:
        """features [B, D, gh, gw] -> logits [B, K, gh, gw]."""
        return self.proj(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def macs(self, cells: int) -> int:
        """Multiply-accumulates for one image of so many cells."""
        return cells * self.proj.in_features * self.proj.out_features

    def describe(self) -> dict[str, Any]:
        """What ``build_head`` needs to make it again, beside its width."""
        return {"kind": "linear", "classes": self.classes}


class MaskTransformer(nn.Module):
    """Segmenter's decoder (Strudel et al., arXiv 2105.05633, §3.2).

    One learned token for each class goes through ``layers`` transformer blocks together with the cells. The mask of a
    class is the scalar product of its token with every cell, both of length 1, and a layer norm over the classes.
    """

    def __init__(self, dim: int, classes: int, layers: int = LAYERS) -> None:
        super().__init__()
        self.classes = classes
        self.embed = nn.Linear(dim, dim)
        self.class_tokens = nn.Parameter(torch.empty(1, classes, dim))
        heads = max(h for h in range(1, max(1, dim // HEAD_WIDTH) + 1) if dim % h == 0)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.cell_proj = nn.Linear(dim, dim, bias=False)
        self.class_proj = nn.Linear(dim, dim, bias=False)
        self.mask_norm = nn.LayerNorm(classes)
        nn.init.trunc_normal_(self.class_tokens, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for proj in (self.cell_proj, self.class_proj):
            nn.init.normal_(proj.weight, std=dim**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """features [B, D, gh, gw] -> logits [B, K, gh, gw]."""
        cells = self.embed(features.flatten(2).transpose(1, 2))  # [B, G, D]
        x = torch.cat([cells, self.class_tokens.expand(len(cells), -1, -1)], dim=1)
        x = self.norm(self.blocks(x))
        cells, classes = x[:, : -self.classes], x[:, -self.classes :]
        cells = F.normalize(self.cell_proj(cells), dim=-1)
        classes = F.normalize(self.class_proj(classes), dim=-1)
        masks = self.mask_norm(cells @ classes.transpose(1, 2))  # [B, G, K]
        return masks.transpose(1, 2).unflatten(2, features.shape[-2:])

    def macs(self, cells: int) -> int:
        """Multiply-accumulates for one image of so many cells."""
        dim, tokens = self.embed.in_features, cells + self.classes
        costs = [block_cost(cast(TimmBlock, block)) for block in self.blocks]
        blocks = sum(cast(int, cost.attention(tokens, tokens)) + tokens * cost.mlp for cost in costs)
        return cells * dim * dim + blocks + tokens * dim * dim + cells * self.classes * dim

    def describe(self) -> dict[str, Any]:
        """What ``build_head`` needs to make it again, beside its width."""
        return {"kind": "mask", "classes": self.classes, "layers": len(self.blocks)}


HEADS: dict[str, type[LinearHead] | type[MaskTransformer]] = {"linear": LinearHead, "mask": MaskTransformer}


def build_head(dim: int, /, kind: Any, **knobs: Any) -> LinearHead | MaskTransformer:
    """A head for features of width ``dim``, by its kind and knobs. Raises UserError for unknown ones, bad counts."""
    if not isinstance(kind, str) or kind not in HEADS:
        raise UserError(f"there is no head {kind!r}{nearest(str(kind), HEADS)}; give one of {', '.join(HEADS)}")
    limits = {"classes": 2**16} if kind == "linear" else {"classes": 2**16, "layers": MOST_LAYERS}
    if not knobs.keys() <= limits.keys():
        raise UserError(f"head {kind!r} has no {', '.join(sorted(knobs.keys() - limits.keys()))}")
    for name, value in knobs.items():
        if type(value) is not int or not 1 <= value <= limits[name]:
            raise UserError(f"head {kind!r}: {name}={value!r} is no whole number in 1 … {limits[name]}")
    if "classes" not in knobs:
        raise UserError(f"head {kind!r} needs to know how many classes there are")
    return HEADS[kind](dim, **knobs)
