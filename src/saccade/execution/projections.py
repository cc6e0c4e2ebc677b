"""Queries, keys and values by timm's kinds of attention (restated of their forwards, Apache-2.0), and rotations."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor
from torch.nn import functional as F

from saccade.core.hooks import plain_linear

Three = tuple[Tensor, Tensor, Tensor]


def sliceable(attn: Any) -> bool:
    """Whether queries of some tokens can be computed without those of others, by weights and biases alone."""
    if attn.qkv is None:
        return True  # each is a layer of its own, which is called
    return plain_linear(attn.qkv)


def project(attn: Any, x: Tensor) -> Three:
    """x [..., D] -> queries, keys and values [..., H, d], not normed."""
    if attn.qkv is None:
        return tuple(part(x).unflatten(-1, (attn.num_heads, -1)) for part in (attn.q_proj, attn.k_proj, attn.v_proj))  # type: ignore[return-value]
    return _joined(attn, x).unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)


def project_some(attn: Any, x: Tensor, queries: int) -> Three:
    """x [B, K, D] -> queries of the first tokens [B, Q, H, d], keys and values of all [B, K, H, d], not normed."""
    heads = attn.num_heads
    if attn.qkv is None:
        return tuple(  # type: ignore[return-value]
            part(some).unflatten(-1, (heads, -1))
            for part, some in ((attn.q_proj, x[:, :queries]), (attn.k_proj, x), (attn.v_proj, x))
        )
    weight, bias = attn.qkv.weight, _bias(attn)
    width = len(weight) // 3
    sides = [width, 2 * width]
    weights, offsets = weight.split(sides), (None, None) if bias is None else bias.split(sides)
    q = F.linear(x[:, :queries], weights[0], offsets[0]).unflatten(-1, (heads, -1))
    k, v = F.linear(x, weights[1], offsets[1]).unflatten(-1, (2, heads, -1)).unbind(-3)
    return q, k, v


def rotated(attn: Any, x: Tensor, turn: Tensor | None) -> Tensor:
    """Queries or keys [..., d], each turned by its own sines and cosines, [..., 2d] side by side; None: as they are."""
    return x if turn is None else apply_rot_embed_cat(x, turn, half=getattr(attn, "rotate_half", False))


def _joined(attn: Any, x: Tensor) -> Tensor:
    if type(attn) is not EvaAttention or attn.q_bias is None:
        return attn.qkv(x)
    if attn.qkv_bias_separate:
        return attn.qkv(x) + _bias(attn)
    return F.linear(x, attn.qkv.weight, _bias(attn))


def _bias(attn: Any) -> Tensor | None:
    apart: Any = attn if type(attn) is EvaAttention and attn.q_bias is not None else None
    return attn.qkv.bias if apart is None else torch.cat((apart.q_bias, apart.k_bias, apart.v_bias))
