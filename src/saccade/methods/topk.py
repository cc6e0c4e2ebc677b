"""``topk``: every block computes only the patches that its class token asks for most; the others wait (IdleViT).

Xu et al. 2023, arXiv 2310.05654: AdaViT's patch axis with one count for all images and nothing to learn. A token that
a block leaves out rides the residual and may be chosen by the next block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.gates import Gates, Places
from saccade.core.hooks import plain_linear
from saccade.core.plan import Backbone, Gater, Method
from saccade.core.registry import register
from saccade.core.timm_types import TimmBlock
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import blocks, fraction
from saccade.methods.common.budget import Used, gated, macs, strength
from saccade.methods.common.matching import ceil_share
from saccade.methods.common.sampling import there

ASKS = ("class", "mean")


class Choose(Gater):
    """Run the ⌈keep · n⌉ patches with the highest q · k, mean over heads, before the softmax."""

    def __init__(self, keep: float, asks: str, dim: int, attn_dim: int) -> None:
        super().__init__()
        self.keep, self.asks, self.dim, self.attn_dim = keep, asks, dim, attn_dim

    def macs(self, n: int) -> int:
        return 2 * self.dim * self.attn_dim + n * self.dim

    @torch.no_grad()
    def gates_for(self, block: TimmBlock, tokens: Tokens) -> Gates:
        x = block.norm1(tokens.x)
        if self.asks == "class" and tokens.num_prefix == 1:
            asker, patches = x.split([1, tokens.num_patches], dim=1)
        else:
            patches = x[:, tokens.num_prefix :]
            asker = x[:, :1] if self.asks == "class" else patches.mean(1, keepdim=True)
        score = asked(block.attn, asker, patches)
        score = there(tokens, score if score.dtype == torch.float32 else score.float())
        chosen = score.argsort(dim=1, descending=True, stable=True)[:, : ceil_share(self.keep, tokens.num_patches)]
        mask: Any = Places(chosen, tokens.num_patches)
        return Gates(mask, patch_indices=chosen if tokens.valid is None and tokens.keep_mask is None else None)


def asked(attn: Attention, asker: Tensor, x: Tensor) -> Tensor:
    """Σ over heads of q · k: asker [B, 1, D], x [B, N, D] -> [B, N], but for what is the same for all tokens.

    A sum over heads of what is linear in x is one vector for each image, Wkᵀ q: no key has to be made. (Where a model
    norms its keys, these are the keys before that.)
    """
    heads, width = attn.num_heads, attn.head_dim
    inner, plain = heads * width, plain_linear(attn.qkv)
    if plain:
        query, key, _ = attn.qkv.weight.split(inner)
        q = F.linear(asker, query, None if attn.qkv.bias is None else attn.qkv.bias[:inner])
    else:
        q = attn.qkv(asker)[..., :inner]
    if not isinstance(attn.q_norm, nn.Identity):
        q = attn.q_norm(q.unflatten(-1, (heads, width))).flatten(2)
    keys = x if plain else attn.qkv(x)[..., inner : 2 * inner]
    return (keys @ (q @ key if plain else q).mT).squeeze(-1)


def _default(backbone: Backbone) -> tuple[int, ...]:
    """From a third of the depth on; the last block computes the class token alone anyway, where it alone is read."""
    return tuple(range(max(1, backbone.depth // 3), backbone.depth - (backbone.pool == "token")))


def _menu(backbone: Backbone) -> list[str]:
    able = _default(backbone) and backbone.attention == Attention.__name__
    return [f"topk({k})" for k in (0.8, 0.6, 0.5, 0.4)] if able else []


@register("topk", sources={"paper": "at asks"}, menu=_menu)
def topk(
    backbone: Backbone,
    keep: float | tuple[float, ...] = 0.5,
    at: int | Iterable[int] | None = None,
    asks: str | None = None,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Let each block compute only the patches that score highest in it, chosen anew every time (arXiv 2310.05654).

    Args:
        keep: share of patch tokens that a block computes, in (0, 1]; one for all blocks, or one for each.
        at: 0-based blocks that choose; None: all from a third of the depth on, but the last where only the class token
            is read after it (there it alone is computed anyway).
        asks: whose query scores the patches, the 'class' token's or the 'mean' patch's; None: the class token's, where
            there is one.
        gmacs: find one ``keep`` for this many GMACs per image (at its own size) instead.
        speed: find it for this many times fewer MACs instead.
    """
    asks = ("class" if backbone.has_class_token else "mean") if asks is None else asks
    if asks not in ASKS:
        raise UserError(f"topk: asks={asks!r} is not one of {', '.join(ASKS)}")
    if asks == "class" and not backbone.has_class_token:
        raise UserError("topk: asks='class' and this model has no class token: take asks='mean'")
    if backbone.attention != Attention.__name__:
        raise UserError(f"topk reads the weights of timm's Attention, and this model has {backbone.attention}")
    chosen = blocks("topk", at, _default(backbone), backbone.depth)
    if gmacs is not None or speed is not None:
        keep = 1 - strength("topk", backbone, lambda i: price(backbone, chosen, 1 - i / 1000), 999, gmacs, speed) / 1000
    shares = tuple(keep) if isinstance(keep, (tuple, list)) else (keep,) * len(chosen)
    if len(shares) != len(chosen):
        raise UserError(f"topk: {len(shares)} values of keep for {len(chosen)} blocks ({', '.join(map(str, chosen))})")
    for share in shares:
        fraction("topk", "keep", share, 0.001)
    pairs = zip(chosen, shares, strict=True)
    return Method((i, Choose(share, asks, backbone.dim, backbone.cost.attn_dim)) for i, share in pairs if share < 1)


def price(backbone: Backbone, at: tuple[int, ...], keep: float) -> float:
    """MACs of an image with one share for all blocks that choose, choosing included."""
    if keep == 1:
        return macs(backbone)
    n = backbone.num_patches
    choosing = Choose(keep, "", backbone.dim, backbone.cost.attn_dim).macs(n)
    return gated(backbone, dict.fromkeys(at, Used(ceil_share(keep, n)))) + len(at) * choosing
