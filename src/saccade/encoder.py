"""The loop, the file to read first: ``reduce → gate → attend → reduce → mlp`` over timm's own blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saccade.attention import Attended, attend
from saccade.gates import Gates, residual
from saccade.plan import Plan, TimmBlock, ViT
from saccade.tokens import READINGS, Tokens
from saccade.trace import BlockCost, BlockTrace


def encode(
    vit: ViT, tokens: Tokens, plan: Plan, *, whole: bool = True, sparse: bool = True
) -> tuple[Tokens, tuple[BlockTrace, ...]]:
    """Run the blocks of a timm ViT on a token set.

    Args:
        whole: run the last block for all tokens. False: only for the prefix, which is all that class-token pooling
            reads (exact, and about 7 % of a 12-layer ViT); the tokens returned are then the prefix alone.
        sparse: gates skip what is off. False: compute everything and multiply (the differentiable training form).
    """
    trace: list[BlockTrace] = []
    run = _recomputed if vit.grad_checkpointing and torch.is_grad_enabled() else _kept
    for i, block in enumerate(vit.blocks):
        tokens, overhead = plan.reduce(i, "block", tokens)
        gates, gating = plan.gates(i, tokens)
        short = gates is None and not whole and i == len(vit.blocks) - 1
        if short:
            tokens, ran = last_block(block, tokens, plan.planned(i, "attn", tokens.num_patches))
            trace.append(replace(ran, overhead=overhead))
            break
        before = tokens.x.shape[1]
        read = plan.readings(i, tokens.num_patches)
        tokens, attended, kernel = run(attention_branch, block, tokens, gates or Gates(), read, sparse)
        tokens, deciding = plan.reduce(i, "attn", tokens)
        tokens = tokens.without(READINGS)
        tokens, updated = run(mlp_branch, block, tokens, gates or Gates(), sparse)

        ran = BlockTrace(
            cost=block_cost(block),
            queries=attended,
            keys=attended,
            mlp=updated,
            attn=gates.attn if gates and sparse and not read else None,
            mlp_on=gates.mlp if gates and sparse else None,
            planned=(before, tokens.x.shape[1]),
            overhead=overhead + gating + deciding + _reading(block, read, kernel) * before,
            kernel=kernel,
            owner=tokens.owner,
        )
        trace.append(ran)
    return tokens, tuple(trace)


def _kept(branch: Callable, *args: Any) -> Any:
    """Run a branch; its activations stay for the backward pass."""
    return branch(*args)


def _recomputed(branch: Callable, *args: Any) -> Any:
    """Run a branch twice instead (timm's ``set_grad_checkpointing``)."""
    return checkpoint(branch, *args, use_reentrant=False)


def attention_branch(
    block: TimmBlock, tokens: Tokens, gates: Gates, read: frozenset[str], sparse: bool
) -> tuple[Tokens, int, str]:
    """``x + attn(norm1(x))``; with what reducers want to read, which needs attention to run for all images."""
    seen: list[Attended] = []

    def branch(x: Tensor, bias: Tensor | None, heads: Tensor | None) -> Tensor:
        seen.append(attend(block.attn, block.norm1(x), bias, heads=heads, read=read))
        return block.drop_path1(block.ls1(seen[0].x))

    tokens = replace(tokens, mask=gates.patch)
    x, count = residual(tokens, branch, tokens.key_bias(), gates.attn, gates.head, sparse=sparse and not read)
    readings = {name: getattr(seen[0], name)[:, tokens.num_prefix :] for name in read}
    return replace(tokens, x=x, **readings), count, seen[0].kernel if seen else "none"


def mlp_branch(block: TimmBlock, tokens: Tokens, gates: Gates, sparse: bool) -> tuple[Tokens, int]:
    """``x + mlp(norm2(x))``."""

    def branch(x: Tensor, bias: Tensor | None, heads: Tensor | None) -> Tensor:
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    x, count = residual(tokens, branch, on=gates.mlp, sparse=sparse)
    return replace(tokens, x=x, mask=None), count


def last_block(block: TimmBlock, tokens: Tokens, left: int) -> tuple[Tokens, BlockTrace]:
    """The last block for the prefix tokens only: they attend to all, and nobody reads what the patches would become."""
    prefix, before = tokens.num_prefix, tokens.x.shape[1]
    attended = attend(block.attn, block.norm1(tokens.x), tokens.key_bias(), queries=prefix)
    x = tokens.x[:, :prefix] + block.drop_path1(block.ls1(attended.x))
    x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    ran = BlockTrace(
        cost=block_cost(block),
        queries=prefix,
        keys=before,
        mlp=prefix,
        planned=(before, prefix + left),
        overhead=0,
        kernel=attended.kernel,
        owner=tokens.owner,
    )
    return replace(tokens, x=x), ran


def block_cost(block: TimmBlock) -> BlockCost:
    """MACs of a block's parts, from the shapes of its layers."""
    attn = block.attn
    gate = getattr(attn, "gate", None)
    linears = (m for m in block.mlp.modules() if isinstance(m, nn.Linear))
    return BlockCost(
        dim=attn.qkv.in_features,
        attn_dim=attn.num_heads * attn.head_dim,
        mlp=sum(m.in_features * m.out_features for m in linears),
        gate=0 if gate is None else gate.in_features * gate.out_features,
    )


def _reading(block: TimmBlock, read: frozenset[str], kernel: str) -> int:
    """MACs a token for reading class attention beside a fused kernel (an unfused one has it already)."""
    attn = block.attn
    return attn.num_heads**2 * attn.head_dim if "cls_attn" in read and kernel.startswith("fused") else 0
