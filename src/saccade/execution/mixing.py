"""Attention without its projections: of a rectangle, or of images of different lengths side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import Attention
from torch import Tensor
from torch.nn import functional as F

from saccade.core.packing import Rows
from saccade.core.softmax import LARGEST, masked_softmax
from saccade.core.tokens import NO_STATS, AttentionStats
from saccade.execution.policy import Execution


@dataclass(frozen=True)
class Asked:
    """What is asked of one attention beside its output, and of whom."""

    queries: int | None = None  #  only the first so many tokens ask (all that the last block needs); None: all
    heads: Tensor | None = None  # [B, H] 0/1, heads that take part; None: all
    partial: bool = False  #       a head that is off gives each token its own value (AdaViT); False: zeros
    read: frozenset[str] = frozenset()  # readings: ``cls_attn`` is one row, ``attn_received`` needs all scores
    keep_mask: Tensor | None = None  #  [B, K] 0/1, straight-through: keys that count, with a gradient; or [B, Q', K],
    #                            Q' ≥ Q, for each query, and a key's gradient then goes by all that it would get
    query_mask: Tensor | None = None  # [B, K] 0/1, queries that count in ``attn_received``, and ``inner``; None: all
    inner: bool = False  #         heads multiply queries, keys and values too, and what ``query_mask`` leaves out
    #                              attends to itself alone: the same output with another gradient (``Gates.inner``)
    rows: Rows | None = None  #    x is packed [T, D] and holds these rows; bias, readings and output are packed alike
    turn: Tensor | None = None  #  [B, K, H, 2d], H may be 1: sines and cosines by which queries and keys of
    #                              each token are rotated (RoPE); of packed rows [T, H, 2d]; None: they are not
    skip: bool = False  #          do not compute heads that are off (``heads.should_skip_heads`` says where)

    @property
    def anything(self) -> bool:
        """Whether timm's own forward would not do."""
        return any(value is not None and value is not False and value != frozenset() for value in vars(self).values())

    def fused(self, attn: Attention, q: Tensor, keys: int, execution: Execution) -> bool:
        """Whether torch's kernel can give it, and is the way to: q [B, H, Q, d]."""
        able = attn.fused_attn and "attn_received" not in self.read and self.keep_mask is None
        return able and execution.kernel(q, keys) == "fused"


NOTHING = Asked()


@dataclass(frozen=True)
class Packed:
    """Queries, keys and values of images side by side."""

    q: Tensor  #                  [T, h, d]
    k: Tensor  #                  [T, h, d]
    v: Tensor  #                  [T, h, d]
    lengths: tuple[int, ...]  #   rows of each image; their sum is T
    bias: Tensor | None = None  # [T] fp32, of the keys; None: all count alike


def mix(
    attn: Attention, qkv: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, ask: Asked, execution: Execution
) -> tuple[Tensor, AttentionStats, str]:
    """q [B, H, Q, d], k and v [B, H, K, d], bias of the keys [B, K] -> [B, H, Q, d], what was read, and the kernel."""
    if ask.fused(attn, qkv[0], qkv[1].shape[2], execution):
        return *_fused(attn, *qkv, bias, ask.read), "fused"
    return *_unfused(attn, *qkv, bias, ask), "unfused"


def mix_packed(attn: Attention, execution: Execution, parts: Packed) -> tuple[Tensor, str]:
    """[T, h, d], and the kernel that ran: by CUDA's ragged kernel, as a rectangle, or image by image."""
    lengths = tuple(n for n in parts.lengths if n)
    if not lengths:  # no token takes part
        return parts.v, "none"
    if len(set(lengths)) > 1:
        if _has_varlen(parts.q, parts.bias):
            return _varlen(parts.q, parts.k, parts.v, lengths), "varlen"
        y, _, kernel = mix_one_by_one(attn, execution, parts, frozenset())
        return y, kernel
    q, k, v = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (parts.q, parts.k, parts.v))  # [b, h, n, d]
    bias = None if parts.bias is None else parts.bias.view(len(lengths), -1)
    y, _, kernel = mix(attn, (q, k, v), bias, NOTHING, execution)
    return y.transpose(1, 2).flatten(0, 1), kernel


def mix_one_by_one(
    attn: Attention, execution: Execution, parts: Packed, read: frozenset[str]
) -> tuple[Tensor, AttentionStats, str]:
    """A loop over images, where a measured table says that it is faster than padding (``benchmarks/ragged.py``)."""
    longest = execution.kernel(parts.q[None].transpose(1, 2), max(parts.lengths))
    execution, ask = Execution(attention=longest), Asked(read=read)  # one kernel for all; all that is packed asks
    lengths = tuple(n for n in parts.lengths if n)
    biases = [None] * len(lengths) if parts.bias is None else parts.bias.split(lengths)
    split = (x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (parts.q, parts.k, parts.v))
    found = [
        mix(attn, (q, k, v), None if b is None else b.unsqueeze(0), ask, execution)  # [1, H, n, d]
        for q, k, v, b in zip(*split, biases, strict=True)
    ]
    readings: dict[str, Tensor] = {}
    for name in read & {"cls_attn", "attn_received"}:
        readings[name] = torch.cat([getattr(stats, name)[0] for _, stats, _ in found])
    return torch.cat([y[0].transpose(0, 1) for y, _, _ in found]), AttentionStats(**readings), found[0][2]


def _mask(bias: Tensor, q: Tensor) -> Tensor:
    """[B, K] -> [B, 1, 1, K], of the queries' type."""
    return (bias if bias.dtype == q.dtype else bias.to(q.dtype)).view(bias.shape[0], 1, 1, bias.shape[1])


def _fused(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, read: frozenset[str]
) -> tuple[Tensor, AttentionStats]:
    """torch's kernel, and the class token's row beside it."""
    drop = attn.attn_drop.p if attn.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else _mask(bias, q), dropout_p=drop)
    if "cls_attn" not in read:
        return y, NO_STATS
    return y, AttentionStats(cls_attn=class_attention(q[:, :, 0] * attn.scale, k, bias))


def _unfused(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, ask: Asked
) -> tuple[Tensor, AttentionStats]:
    """Scores, softmax, product: where all scores are read, or keys count by a mask that has a gradient."""
    scores = (q * attn.scale) @ k.transpose(-2, -1)
    if ask.keep_mask is not None:
        shares = _masked(scores, ask.keep_mask)
    else:
        shares = (scores if bias is None else scores + _mask(bias, q)).softmax(dim=-1)  # [B, H, Q, K]
    y = attn.attn_drop(shares) @ v
    first = shares[:, :, 0].float().mean(1) if "cls_attn" in ask.read else None
    received = _received(shares.float(), ask.query_mask) if "attn_received" in ask.read else None
    return y, NO_STATS if first is received is None else AttentionStats(cls_attn=first, attn_received=received)


def _masked(scores: Tensor, keep_mask: Tensor) -> Tensor:
    """Shares of scores [B, H, Q, K], by ``Asked.keep_mask``."""
    if keep_mask.ndim == 2:
        return masked_softmax(scores, keep_mask[:, None, None, :])
    return masked_softmax(scores, keep_mask[:, None, : scores.shape[2]], LARGEST)


def _received(shares: Tensor, query_mask: Tensor | None) -> Tensor:
    """Mean over heads and over the queries that count: shares [B, H, Q, K], query_mask [B, Q] 0/1 -> [B, K]."""
    if query_mask is None:
        return shares.mean((1, 2))
    weight = query_mask / query_mask.sum(1, keepdim=True).clamp(min=1.0)
    return (shares.mean(1) * weight.unsqueeze(-1)).sum(1)


def _has_varlen(q: Tensor, bias: Tensor | None) -> bool:
    """Whether torch has a kernel for this ragged batch: on CUDA, in half precision, where all keys count alike."""
    return q.device.type == "cuda" and bias is None and q.dtype != torch.float32


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """torch's kernel for ragged batches: q, k, v [T, H, d] -> [T, H, d]."""
    from torch.nn.attention.varlen import varlen_attn

    ends = F.pad(torch.tensor(lengths, device=q.device).cumsum(0), (1, 0)).to(torch.int32)
    longest = max(lengths)
    y = varlen_attn(q, k, v, ends, ends, longest, longest)
    assert isinstance(y, Tensor)
    return y


def class_attention(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """One row of attention, mean over heads: q [B, H, d] (scaled), k [B, H, K, d] -> [B, K] fp32.

    The queries of all heads stand in one block-diagonal matrix [H, H*d], so that keys are read once, in the layout
    in which the projection wrote them, by one matrix product; H*d*H MACs a token, about 0.1 % of a block.
    """
    B, H, d = q.shape
    blocks = torch.diag_embed(q.transpose(1, 2), dim1=1, dim2=2).reshape(B, H, H * d)
    scores = blocks @ k.transpose(1, 2).flatten(2).mT  # [B, H, K]
    scores = scores if scores.dtype == torch.float32 else scores.float()
    if bias is not None:
        scores = scores + bias.unsqueeze(1)
    return scores.softmax(dim=-1).mean(1)
