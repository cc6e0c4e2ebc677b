"""Attention with its readings: the only restatement of timm code here (timm's ``Attention.forward``, Apache-2.0)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from timm.layers import Attention
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F

from saccade.core.hooks import ATTENTIONS, applied, around, exact, is_heard, require_plain
from saccade.core.lazy import changed
from saccade.core.packing import Rows
from saccade.core.tokens import NO_STATS, AttentionStats
from saccade.execution.heads import some_heads
from saccade.execution.mixing import NOTHING, Asked, Packed, mix, mix_one_by_one, mix_packed
from saccade.execution.policy import AUTO, Execution
from saccade.execution.projections import project, project_some, rotated


@dataclass(frozen=True)
class Attended:
    """What one attention gives."""

    x: Tensor  #                         [B, Q, D]
    kernel: str  #                       which path ran: "fused", "unfused", with "+bias" where keys count differently;
    #                                    "varlen", CUDA's for ragged batches; "heads", only those that are on
    stats: AttentionStats = field(default_factory=lambda: NO_STATS)  # what was read, of all K keys (prefix too)


def attend(
    attn: Attention, x: Tensor, bias: Tensor | None = None, ask: Asked = NOTHING, execution: Execution = AUTO
) -> Attended:
    """timm's attention on x [B, K, D]; hooks on ``attn`` run around it.

    Args:
        bias: [B, K] fp32, added to every score of a key (log size, -inf for padding); None keeps the fastest kernel.
        ask: what is asked beside the output, and of whom.
        execution: which path to take where either would do.

    UserError where its forward is not timm's and more is asked of it than its output.
    """
    if not exact(attn, *ATTENTIONS):
        if ask.anything:
            require_plain(attn, "attention", *ATTENTIONS)
        y = attn(x) if bias is None else attn(x, attn_mask=bias.to(x.dtype)[:, None, None, :])
        return Attended(y, "its own")
    if not is_heard(attn):
        return _attend(attn, x, bias, ask, execution)
    seen: list[Attended] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(_attend(attn, x, bias, ask, execution))
        return seen[-1].x

    y = around(attn, forward, x)
    return seen[-1] if y is seen[-1].x else replace(seen[-1], x=y)


def _attend(attn: Attention, x: Tensor, bias: Tensor | None, ask: Asked, execution: Execution) -> Attended:
    """By the heads that are on, on packed rows, or on the rectangle."""
    if ask.skip and ask.heads is not None:
        lengths = (x.shape[1],) * x.shape[0] if ask.rows is None else ask.rows.lengths
        shift, mixing = None if bias is None else bias.flatten(), partial(mix_packed, attn, execution)
        y = some_heads(attn, x.reshape(-1, x.shape[-1]), (ask.heads, ask.partial), lengths, shift, mixing)
        return Attended(applied(y.view(x.shape), attn.proj_drop), "heads")
    if ask.rows is not None:
        return _packed(attn, x, bias, ask.rows, ask, execution)
    q, key, v = _projected(attn, x, ask.queries)
    turn = None if ask.turn is None else ask.turn.transpose(1, 2)
    q, k = rotated(attn, q, turn if turn is None else turn[:, :, : q.shape[2]]), rotated(attn, key, turn)
    gate = _output_gate(attn, x, ask.queries)
    if ask.inner and ask.heads is not None and not ask.partial:
        q, k, v = (value * ask.heads[:, :, None, None].to(value.dtype) for value in (q, k, v))
    y, stats, kernel = mix(attn, (q, k, v), bias, ask, execution)
    if ask.inner and ask.query_mask is not None:
        y = torch.where(ask.query_mask[:, None, :, None] > 0, y, v)
    if ask.heads is not None:
        on = (ask.heads if ask.heads.dtype == y.dtype else ask.heads.to(y.dtype)).view(*ask.heads.shape, 1, 1)
        y = y * on + v[:, :, : ask.queries] * (1 - on) if ask.partial else y * on
    # of a single query the heads stand side by side already
    y = y.reshape(y.shape[0], 1, v.shape[1] * v.shape[3]) if ask.queries == 1 else y.transpose(1, 2).flatten(2)
    y = applied(y, attn.norm)
    y = applied(attn.proj(y if gate is None else y * gate), attn.proj_drop)
    if "key" in ask.read:
        stats = changed(stats, key=key.mean(1))  # as projected: what a token is, not where
    if "value_norm" in ask.read:
        stats = changed(stats, value_norm=vector_norm(v.float(), dim=(1, 3)))
    return Attended(y, kernel if bias is None else f"{kernel}+bias", stats)


def _projected(attn: Attention, x: Tensor, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, Q, d], keys and values [B, H, K, d], normed."""
    B, K, _ = x.shape
    H, d = attn.num_heads, attn.head_dim
    if type(attn) is not Attention:
        parts = project(attn, x) if queries is None else project_some(attn, x, queries)
        q, k, v = (part.transpose(1, 2) for part in parts)
    elif queries is None:
        q, k, v = attn.qkv(x).reshape(B, K, 3, H, d).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        sides, qkv = [H * d, 2 * H * d], attn.qkv
        weight, offset = qkv.weight.split(sides), (None, None) if qkv.bias is None else qkv.bias.split(sides)
        q = F.linear(x[:, :queries], weight[0], offset[0])
        q = q.view(B, H, 1, d) if queries == 1 else q.view(B, queries, H, d).transpose(1, 2)
        k, v = F.linear(x, weight[1], offset[1]).reshape(B, K, 2, H, d).permute(2, 0, 3, 1, 4).unbind(0)
    return applied(q, attn.q_norm), applied(k, attn.k_norm), v


def _output_gate(attn: Attention, x: Tensor, queries: int | None = None) -> Tensor | None:
    """The gate that some attentions multiply their output with, as wide as it."""
    gated = attn._modules.get("gate")  # newer than the oldest timm supported
    return None if gated is None else gated(x if queries is None else x[:, :queries]).sigmoid()


def _packed(attn: Attention, x: Tensor, bias: Tensor | None, rows: Rows, ask: Asked, execution: Execution) -> Attended:
    """On packed rows x [T, D]: projections at once, attention image by image, or by CUDA's own kernel."""
    q, k, v = project(attn, x)  # [T, H, d]
    q, key = applied(q, attn.q_norm), applied(k, attn.k_norm)
    parts = Packed(rotated(attn, q, ask.turn), rotated(attn, key, ask.turn), v, rows.lengths, bias)
    stats = NO_STATS
    if ask.read <= {"key", "value_norm"}:
        y, kernel = mix_packed(attn, execution, parts)
    else:
        y, stats, kernel = mix_one_by_one(attn, execution, parts, ask.read)
    if "key" in ask.read:
        stats = changed(stats, key=key.mean(1))
    if "value_norm" in ask.read:
        stats = changed(stats, value_norm=vector_norm(v.float(), dim=(1, 2)))
    if ask.heads is not None:
        each = ask.heads.repeat_interleave(rows.counts(), dim=0, output_size=len(x))
        on = each.unsqueeze(-1).to(y.dtype)
        y = y * on + v * (1 - on) if ask.partial else y * on
    y, gate = applied(y.flatten(1), attn.norm), _output_gate(attn, x)
    y = applied(attn.proj(y if gate is None else y * gate), attn.proj_drop)
    return Attended(y, kernel if bias is None else f"{kernel}+bias", stats)
