"""The record of what ran. MACs, pictures, budget losses and reports all read it; none knows a method's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.core.lazy import changed, lazy

if TYPE_CHECKING:
    from saccade.core.gates import Gates

Count = int | Tensor  # the same for every image, or one number per image [B] (differentiable where gates are)


@dataclass(frozen=True)
class BlockCost:
    """Multiply-accumulates of one block's parts, from the shapes of its layers."""

    dim: int  #       D
    attn_dim: int  #  heads * head width
    mlp: int  #       MACs of the MLP for one token
    gate: int = 0  #  MACs of an attention output gate for one token

    def attention(self, queries: Count, keys: Count, heads: Tensor | None = None, partial: bool = False) -> Count:
        """Projections of queries, keys and values, scores, weighted sum, output projection.

        heads: share of the heads that run [B]; None: all. partial: values and output of the others are
        projected all the same.
        """
        once = self.dim * self.attn_dim
        whole = queries * (2 * once + self.gate) + keys * (2 * once) + queries * keys * (2 * self.attn_dim)
        if heads is None:
            return whole
        return whole * heads + ((queries + keys) * once * (1 - heads) if partial else 0)


@lazy("owner")
@dataclass(frozen=True)
class BlockTrace:
    """What ran in one block. Token counts include the prefix and, in a ragged batch, the padding."""

    cost: BlockCost
    queries: Count  #        tokens that asked
    keys: Count  #           tokens that were attended to
    mlp: Count  #            tokens in the MLP
    static_counts: tuple[int, int]  # tokens in attention and in the MLP, were the block run whole, for all
    aux_macs: int  #         MACs of reading attention, deciding and reducing, per image
    kernel: str  #           attention path: "fused", "unfused", "fused+bias", "unfused+bias", "none"
    owner: Tensor  #         [B, G]  what each token stands for, after the block
    attn: Tensor | None = None  #    [B]  1 where the attention branch ran; None: for all
    mlp_on: Tensor | None = None  #  [B]  1 where the MLP branch ran; None: for all
    heads: Tensor | None = None  #   [B]  share of the heads that ran; None: all
    partial: bool = False  #              heads that did not run passed their own values on
    target_macs: Tensor | None = (
        None  # [B]  MACs, had all been skipped that masks leave out (differentiable); None: as ran
    )
    gates: Gates | None = None  #         masks that were multiplied with (differentiable); None: none were
    kept: Tensor | None = None  #    [B]  share of patch tokens not dropped, where that is a mask (differentiable)
    counted_macs: int = 0  #              of ``aux_macs``, those of networks that decide, had the block all its tokens

    def with_overhead(self, macs: int, counted: int = 0) -> BlockTrace:
        """The same with MACs that were spent before the block; ``counted``: of them, those that the papers count."""
        if macs == counted == 0:
            return self
        wanted = None if self.target_macs is None else self.target_macs + macs
        return changed(self, aux_macs=self.aux_macs + macs, target_macs=wanted, counted_macs=counted)

    def macs(self, nominal: bool = False) -> Count:
        """MACs of this block per image; nominal: whole block, of all overhead only networks that decide (the papers'
        convention)."""
        if nominal:
            tokens, after = self.static_counts
            return self.cost.attention(tokens, tokens) + after * self.cost.mlp + self.counted_macs
        attention = self.cost.attention(self.queries, self.keys, self.heads, self.partial)
        mlp = self.mlp * self.cost.mlp
        attention = attention if self.attn is None else attention * self.attn
        mlp = mlp if self.mlp_on is None else mlp * self.mlp_on
        return attention + mlp + self.aux_macs


@lazy("first")
@dataclass(frozen=True)
class Trace:
    """What ran, from the pixels to the logits."""

    blocks: tuple[BlockTrace, ...]
    embed: int  #  MACs of the tokenizer, per image
    head: int  #   MACs of pooling and classifier, per image
    images: int  # B
    first: Tensor  # [B, G]  owner map of the tokenizer, before any block
    grid: tuple[int, int]
    state: Mapping[str, Tensor] = field(default_factory=dict)  # what methods remembered (``Tokens.state``), for losses

    def macs(self, nominal: bool = False) -> Tensor:
        """MACs per image, [B] float64: those that ran; nominal: the papers' convention, every block whole."""
        costs = [self.embed + self.head, *(block.macs(nominal) for block in self.blocks)]
        known = float(sum(cost for cost in costs if not isinstance(cost, Tensor)))
        total = torch.full((self.images,), known, dtype=torch.float64, device="cpu")
        for cost in costs:
            if isinstance(cost, Tensor):
                total = total.to(cost.device) + cost.double()
        return total

    def target_macs(self) -> Tensor:
        """MACs per image [B] of skipping all that masks leave out: the price of what gates decided, differentiable."""
        total = self.embed + self.head + torch.zeros(self.images, dtype=torch.float64, device="cpu")
        for block in self.blocks:
            cost = block.macs() if block.target_macs is None else block.target_macs
            total = total.to(cost.device) + cost.double() if isinstance(cost, Tensor) else total + cost
        return total

    def tokens(self) -> list[int]:
        """Patch and prefix tokens that enter the MLP of each block, as planned for a whole block."""
        return [block.static_counts[1] for block in self.blocks]

    @property
    def kernels(self) -> dict[str, int]:
        """Attention paths that ran, and in how many blocks."""
        names = [block.kernel for block in self.blocks]
        return {name: names.count(name) for name in dict.fromkeys(names)}
