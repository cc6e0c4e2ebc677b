"""MACs of a block: of its parts, and as they are wanted of gates that can be learned."""

from __future__ import annotations

from torch import Tensor, nn

from saccade.core.gates import Gates
from saccade.core.hooks import layer_in
from saccade.core.record import BlockCost
from saccade.core.timm_types import TimmBlock
from saccade.core.tokens import Tokens


def wanted_macs(cost: BlockCost, start: Tokens, middle: Tokens, gates: Gates | None, overhead: int) -> Tensor | None:
    """MACs [B] of a block that skips all that its masks leave out, differentiable; None where nothing is masked."""
    if gates is None and start.keep_mask is None and middle.keep_mask is None:
        return None
    gates = gates or Gates()
    attending, updated = (
        taking_part(start.with_stats(gate_mask=gates.patch)),
        taking_part(middle),
    )  # its mask went where tokens went
    attention = cost.attention(attending, attending, None if gates.head is None else gates.head.mean(1), gates.partial)
    attention = attention if gates.attn is None else attention * gates.attn
    return attention + updated * cost.mlp * (1.0 if gates.mlp is None else gates.mlp) + overhead


def taking_part(tokens: Tokens) -> Tensor:
    """Tokens of each image that take part, prefix included, [B]."""
    part = tokens.takes_part()
    live = tokens.x.new_ones(tokens.x.shape[0], tokens.num_patches) if part is None else part
    return tokens.num_prefix + (live if tokens.valid is None else live * tokens.valid).sum(1)


def kept_share(tokens: Tokens) -> Tensor | None:
    """Share of each image's patch tokens that are not dropped [B], where dropping is a mask; else None."""
    if tokens.keep_mask is None:
        return None
    if tokens.valid is None:
        return tokens.keep_mask.mean(1)
    return (tokens.keep_mask * tokens.valid).sum(1) / tokens.valid.sum(1).clamp(min=1)


def block_cost(block: TimmBlock) -> BlockCost:
    """MACs of a block's parts, from the shapes of its layers."""
    attn = block.attn
    first, gate = attn.qkv if attn.qkv is not None else attn.q_proj, attn._modules.get("gate")
    dim = (first if type(first) is nn.Linear else layer_in(first, nn.Linear, "in_features")).in_features
    return BlockCost(dim, attn.num_heads * attn.head_dim, _macs(block.mlp), 0 if gate is None else _macs(gate))


def _macs(module: nn.Module) -> int:
    """MACs of a token in the linear layers of a module; a walk without what ``modules()`` remembers."""
    macs, waiting = 0, [module]
    while waiting:
        one = waiting.pop()
        macs += one.in_features * one.out_features if isinstance(one, nn.Linear) else 0
        for inside in one._modules.values():
            if inside is not None:
                waiting.append(inside)
    return macs


def reading_macs(block: TimmBlock, read: frozenset[str], kernel: str) -> int:
    """MACs a token for reading class attention beside a fused kernel (an unfused one has it already)."""
    attn = block.attn
    return attn.num_heads**2 * attn.head_dim if "cls_attn" in read and kernel.startswith("fused") else 0
