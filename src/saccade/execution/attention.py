"""Attention with its readings: the only restatement of timm code here (timm's ``Attention.forward``, Apache-2.0)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.hooks import around, exact, require_plain
from saccade.core.packing import Rows
from saccade.core.softmax import masked_softmax
from saccade.execution.heads import some_heads
from saccade.execution.policy import AUTO, Execution


@dataclass(frozen=True)
class Attended:
    """What one attention gives."""

    x: Tensor  #                      [B, Q, D]
    kernel: str  #                    which path ran: "fused", "unfused", with "+bias" where keys count differently …
    #                                 … "varlen", CUDA's for ragged batches; "heads", only those that are on
    key: Tensor | None = None  #      [B, K, d]  mean key over heads
    cls_attn: Tensor | None = None  # [B, K] fp32  first token's attention, mean over heads
    attn_received: Tensor | None = None  # [B, K] fp32  attention received, mean over heads and queries
    value_norm: Tensor | None = None  # [B, K] fp32  length of each value, all heads together


def attend(
    attn: Attention, x: Tensor, bias: Tensor | None = None, execution: Execution = AUTO, **asked: Any
) -> Attended:
    """timm's attention on x [B, K, D], with what ``_attend`` takes and gives; hooks on ``attn`` run around it.

    UserError where its forward is not timm's and more is asked of it than its output.
    """
    if not exact(attn, Attention):
        if any(value is not None and value is not False and value != frozenset() for value in asked.values()):
            require_plain(attn, Attention, "attention")
        y = attn(x) if bias is None else attn(x, attn_mask=bias.to(x.dtype)[:, None, None, :])
        return Attended(y, "its own")
    seen: list[Attended] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(_attend(attn, x, bias, execution=execution, **asked))
        return seen[-1].x

    y = around(attn, forward, x)
    return seen[-1] if y is seen[-1].x else replace(seen[-1], x=y)


def _attend(
    attn: Attention,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    queries: int | None = None,
    heads: Tensor | None = None,
    partial: bool = False,
    read: frozenset[str] = frozenset(),
    keep_mask: Tensor | None = None,
    rows: Rows | None = None,
    query_mask: Tensor | None = None,
    skip: bool = False,
    execution: Execution = AUTO,
) -> Attended:
    """timm's attention on x [B, K, D], with an additive key bias, fewer queries, and what reducers want to read.

    Args:
        bias: [B, K] fp32, added to every score of a key (log size, -inf for padding); None keeps the fastest kernel.
        queries: only the first so many tokens ask (the last block needs no more than the prefix); None: all.
        heads: [B, H] 0/1, heads that take part; None: all.
        own: a head that is off gives each token its own value (AdaViT's partial deactivation); False: zeros (full).
        read: which readings to return; ``cls_attn`` is one row, O(H·K·D), and ``received`` needs all scores.
        alive: [B, K] 0/1, straight-through: keys that count. Gives what a bias of -inf gives, and a gradient.
        rows: x is packed [T, D] and holds these rows; bias, readings and output are packed alike, and all of them ask.
        asking: [B, K] 0/1, queries that count in ``received`` (padding and what is dropped do not); None: all.
        skip: do not compute heads that are off (for all queries, without readings; ``heads.should_skip_heads`` says
        where).
        execution: which path to take where either would do.
    """
    if skip and heads is not None:
        lengths = (x.shape[1],) * x.shape[0] if rows is None else rows.lengths
        offset = None if bias is None else bias.flatten()
        y = some_heads(
            attn,
            x.reshape(-1, x.shape[-1]),
            heads,
            partial,
            lengths,
            offset,
            functools.partial(_mixed, attn, execution),
        )
        return Attended(attn.proj_drop(y.view(x.shape)), "heads")
    if rows is not None:
        return _packed(attn, x, rows, bias, heads, partial, read, execution)
    B, K, _ = x.shape
    H, d = attn.num_heads, attn.head_dim
    gated: nn.Module | None = getattr(attn, "gate", None)  # newer than the oldest timm supported
    gate = None if gated is None else gated(x[:, :queries]).sigmoid()
    if queries is None:
        q, k, v = attn.qkv(x).reshape(B, K, 3, H, d).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        sides, qkv = [H * d, 2 * H * d], attn.qkv
        weight, offset = qkv.weight.split(sides), (None, None) if qkv.bias is None else qkv.bias.split(sides)
        q = F.linear(x[:, :queries], weight[0], offset[0])
        q = q.view(B, H, 1, d) if queries == 1 else q.view(B, queries, H, d).transpose(1, 2)
        k, v = F.linear(x, weight[1], offset[1]).reshape(B, K, 2, H, d).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)

    mask = None if bias is None else (bias if bias.dtype == q.dtype else bias.to(q.dtype)).view(B, 1, 1, K)
    drop = attn.attn_drop.p if attn.training else 0.0
    fused = attn.fused_attn and "attn_received" not in read and keep_mask is None and execution.kernel(q, K) == "fused"
    cls_attn = received = None
    if fused:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        if "cls_attn" in read:
            cls_attn = class_attention(q[:, :, 0] * attn.scale, k, bias)
    else:
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        if keep_mask is not None:
            shares = masked_softmax(scores, keep_mask[:, None, None, :])
        else:
            shares = (scores if mask is None else scores + mask).softmax(dim=-1)  # [B, H, Q, K]
        y = attn.attn_drop(shares) @ v
        if "cls_attn" in read:
            cls_attn = shares[:, :, 0].float().mean(1)
        if "attn_received" in read:
            received = _received(shares.float(), query_mask)
    if heads is not None:
        on = (heads if heads.dtype == y.dtype else heads.to(y.dtype)).view(B, H, 1, 1)
        y = y * on + v[:, :, :queries] * (1 - on) if partial else y * on
    y = attn.norm(y.reshape(B, 1, H * d) if queries == 1 else y.transpose(1, 2).flatten(2))
    y = attn.proj_drop(attn.proj(y if gate is None else y * gate))
    kernel = ("fused" if fused else "unfused") + ("" if bias is None else "+bias")
    value = torch.linalg.vector_norm(v.float(), dim=(1, 3)) if "value_norm" in read else None
    return Attended(y, kernel, k.mean(1) if "key" in read else None, cls_attn, received, value)


def _received(shares: Tensor, query_mask: Tensor | None) -> Tensor:
    """Mean over heads and over the queries that count: shares [B, H, Q, K], asking [B, Q] 0/1 -> [B, K]."""
    if query_mask is None:
        return shares.mean((1, 2))
    weight = query_mask / query_mask.sum(1, keepdim=True).clamp(min=1.0)
    return (shares.mean(1) * weight.unsqueeze(-1)).sum(1)


def _packed(
    attn: Attention,
    x: Tensor,
    rows: Rows,
    bias: Tensor | None,
    heads: Tensor | None,
    partial: bool,
    read: frozenset[str],
    execution: Execution,
) -> Attended:
    """``attend`` on packed rows x [T, D]: projections at once, attention image by image, or by CUDA's own kernel."""
    H, d = attn.num_heads, attn.head_dim
    gated: nn.Module | None = getattr(attn, "gate", None)
    q, k, v = attn.qkv(x).reshape(-1, 3, H, d).unbind(1)  # [T, H, d]
    q, k = attn.q_norm(q), attn.k_norm(k)
    readings: dict[str, Tensor] = {}
    if read <= {"key", "value_norm"}:
        y, kernel = _mixed(attn, execution, q, k, v, rows.lengths, bias)
    else:
        y, readings, kernel = _image_by_image(attn, execution, q, k, v, rows.lengths, bias, read)
    if "value_norm" in read:
        readings["value_norm"] = torch.linalg.vector_norm(v.float(), dim=(1, 2))
    if heads is not None:
        each = heads.repeat_interleave(rows.counts(), dim=0, output_size=len(x))
        on = each.unsqueeze(-1).to(y.dtype)
        y = y * on + v * (1 - on) if partial else y * on
    y = attn.norm(y.flatten(1))
    y = attn.proj_drop(attn.proj(y if gated is None else y * gated(x).sigmoid()))
    return Attended(y, kernel + ("" if bias is None else "+bias"), k.mean(1) if "key" in read else None, **readings)


def _mixed(
    attn: Attention,
    execution: Execution,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    bias: Tensor | None,
) -> tuple[Tensor, str]:
    """Attention of images side by side, without projections: q, k, v [T, h, d], bias [T] -> [T, h, d], the kernel."""
    lengths = tuple(n for n in lengths if n)
    if not lengths:  # no token takes part
        return v, "none"
    if len(set(lengths)) > 1:
        if _has_varlen(q, bias):
            return _varlen(q, k, v, lengths), "varlen"
        y, _, kernel = _image_by_image(attn, execution, q, k, v, lengths, bias, frozenset())
        return y, kernel
    q, k, v = (part.unflatten(0, (len(lengths), -1)).transpose(1, 2) for part in (q, k, v))  # [b, h, n, d]
    mask = None if bias is None else bias.to(q.dtype).view(len(lengths), 1, 1, -1)
    if attn.fused_attn and execution.kernel(q, q.shape[2]) == "fused":
        y, kernel = F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "fused"
    else:
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        y, kernel = (scores if mask is None else scores + mask).softmax(dim=-1) @ v, "unfused"
    return y.transpose(1, 2).flatten(0, 1), kernel


def _image_by_image(
    attn: Attention,
    execution: Execution,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    bias: Tensor | None,
    read: frozenset[str],
) -> tuple[Tensor, dict[str, Tensor], str]:
    """A loop over images, where a measured table says that it is faster than padding (``benchmarks/ragged.py``)."""
    outputs: list[Tensor] = []
    readings: dict[str, list[Tensor]] = {name: [] for name in ("cls_attn", "attn_received") if name in read}
    longest = max(lengths)
    fused = (
        attn.fused_attn
        and "attn_received" not in read
        and execution.kernel(q[None].transpose(1, 2), longest) == "fused"
    )
    biases = [None] * len(lengths) if bias is None else bias.split(lengths)
    parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v)), biases, strict=True)
    for qi, ki, vi, b in parts:  # [1, H, n, d]
        if fused:
            mask = None if b is None else b.to(qi.dtype)[None, None, None]
            yi = F.scaled_dot_product_attention(qi, ki, vi, attn_mask=mask)
            if "cls_attn" in readings:
                one = None if b is None else b.unsqueeze(0)
                readings["cls_attn"].append(class_attention(qi[:, :, 0] * attn.scale, ki, one)[0])
        else:
            scores = (qi * attn.scale) @ ki.transpose(-2, -1)
            shares = (scores if b is None else scores + b.to(scores.dtype)).softmax(dim=-1)
            yi = shares @ vi
            if "cls_attn" in readings:
                readings["cls_attn"].append(shares[0, :, 0].float().mean(0))
            if "attn_received" in readings:
                readings["attn_received"].append(shares[0].float().mean((0, 1)))
        outputs.append(yi[0].transpose(0, 1))
    found = {name: torch.cat(values) for name, values in readings.items()}
    return torch.cat(outputs), found, "fused" if fused else "unfused"


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
