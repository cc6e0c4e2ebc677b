"""A plan, lowered: one ``Step`` for each block that runs, which says who works there and what is read of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from saccade.core.gates import Gates
from saccade.core.plan import Plan
from saccade.core.timm_types import TimmBlock, ViT
from saccade.core.tokens import Tokens


@dataclass(frozen=True)
class Step:
    """One block, and a plan's work in it."""

    plan: Plan
    index: int  #         of the block, from 0
    block: TimmBlock
    prefix_only: bool  #  only the prefix is read of what it gives
    masked: bool  #       what is off is computed and multiplied with its gate (training), not skipped
    recompute: bool  #    activations are computed again in the backward pass (timm's ``set_grad_checkpointing``)

    def reduce(self, site: str, tokens: Tokens) -> tuple[Tokens, int]:
        """The tokens after the reducers of a site ("block" or "attn"), and the MACs of deciding."""
        return self.plan.reduce(self.index, site, tokens, not self.masked)

    def gates(self, tokens: Tokens) -> tuple[Gates | None, int]:
        """What of the block runs, and the MACs of deciding."""
        return self.plan.gates(self.index, self.block, tokens)

    def readings(self, tokens: Tokens) -> frozenset[str]:
        """What the reducers between attention and MLP read of attention."""
        return self.plan.site(self.index, "attn", tokens.num_patches).read

    def reduces_between(self, tokens: Tokens) -> bool:
        """Whether a reducer works between attention and MLP."""
        return len(self.plan.site(self.index, "attn", tokens.num_patches).reducers) > 0

    @property
    def is_gated(self) -> bool:
        """Whether a method decides which parts of the block run."""
        return self.plan.gated(self.index)

    def is_identity(self, tokens: Tokens) -> bool:
        """Whether no method has anything to do inside of the block."""
        return self.plan.is_identity(self.index, tokens.num_patches)

    def left(self, tokens: Tokens) -> int:
        """Patch tokens after the block, by the static counts."""
        return self.plan.site(self.index, "attn", tokens.num_patches).left

    def call(self, branch: Callable, *args: Any) -> Any:
        """Run a part of the block, keeping its activations or not."""
        return checkpoint(branch, *args, use_reentrant=False) if self.recompute else branch(*args)


def lower(vit: ViT, plan: Plan, *, whole: bool, masked: bool) -> tuple[Step, ...]:
    """The steps of a plan on a timm ViT; whole: the last block is run for all tokens, not only for the prefix."""
    depth, recompute = plan.depth(len(vit.blocks)), vit.grad_checkpointing and torch.is_grad_enabled()
    blocks = list(vit.blocks)[:depth]
    return tuple(Step(plan, i, b, not whole and i == depth - 1, masked, recompute) for i, b in enumerate(blocks))
