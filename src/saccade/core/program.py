"""A plan, lowered: one ``Step`` for each block that runs, which says who works there and what is read of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.core.costs import block_cost
from saccade.core.gates import Gates
from saccade.core.hooks import watched
from saccade.core.plan import Plan, Site
from saccade.core.record import BlockCost
from saccade.core.rotation import Rotations
from saccade.core.timm_types import TimmBlock, ViT
from saccade.core.tokens import Tokens


@dataclass(frozen=True)
class Step:
    """One block, and a plan's work in it."""

    plan: Plan
    index: int  #                 of the block, from 0
    block: TimmBlock
    idle: bool = False  #         no method works at it, and all of it is wanted
    prefix_only: bool = False  #  only the prefix is read of what it gives
    masked: bool = False  #       what is off is computed and multiplied with its gate (training), not skipped
    recompute: bool = False  #    activations are computed again in the backward pass (``set_grad_checkpointing``)
    rotations: Rotations = field(default_factory=Rotations)  # of this forward

    @property
    def cost(self) -> BlockCost:
        """MACs of the block's parts."""
        return block_cost(self.block)

    @property
    def watched(self) -> bool:
        """Whether the block has to see all tokens of all images side by side."""
        return watched(self.block)

    @property
    def is_gated(self) -> bool:
        """Whether a method decides which parts of the block run."""
        return self.plan.gated(self.index)

    def is_identity(self, tokens: Tokens) -> bool:
        """Whether no method has anything to do inside of the block."""
        return self.plan.is_identity(self.index, tokens.num_patches)

    def between(self, tokens: Tokens) -> Site:
        """What reducers do between attention and MLP."""
        return self.plan.site(self.index, "attn", tokens.num_patches)

    def turn(self, tokens: Tokens) -> Tensor | None:
        """Rotations of queries and keys of each token, [B, P+N, H, 2d]; None: the ViT has none."""
        return self.rotations.of(self.index, tokens)

    def timms_turn(self, tokens: Tokens) -> Tensor | None:
        """The same as timm's own block takes them, of patch tokens: [B, H, N, 2d]."""
        turn = self.rotations.of_patches(self.index, tokens)
        return None if turn is None else turn.transpose(1, 2)

    def reduce(self, site: str, tokens: Tokens) -> tuple[Tokens, int]:
        """The tokens after the reducers of a site ("block" or "attn"), and the MACs of deciding."""
        return self.plan.reduce(self.index, site, tokens, not self.masked)

    def counted_macs(self, tokens: Tokens) -> int:
        """Of the MACs of deciding before the block, those that the papers count, as planned for all tokens."""
        return self.plan.site(self.index, "block", tokens.num_patches).counted if self.index in self.plan.at else 0

    def gates(self, tokens: Tokens) -> tuple[Gates | None, int]:
        """What of the block runs, and the MACs of deciding."""
        return self.plan.gates(self.index, self.block, tokens)

    def call(self, branch: Callable, *args: Any) -> Any:
        """Run a part of the block, keeping its activations or not."""
        return checkpoint(branch, *args, use_reentrant=False) if self.recompute else branch(*args)


def lower(vit: ViT, plan: Plan, *, whole: bool, masked: bool) -> tuple[Step, ...]:
    """The steps of a plan on a timm ViT; whole: the last block is run for all tokens, not only for the prefix."""
    depth, recompute = plan.depth(len(vit.blocks)), vit.grad_checkpointing and torch.is_grad_enabled()
    last = depth if whole else depth - 1
    blocks = enumerate(list(vit.blocks)[:depth])
    how = masked, recompute, Rotations()
    return tuple([Step(plan, i, b, i != last and not plan.works_at(i), i == last, *how) for i, b in blocks])


def runs(steps: Iterable[Step]) -> tuple[tuple[Step, ...], ...]:
    """The steps with neighbours together where no method works; each other one alone."""
    found: list[tuple[Step, ...]] = []
    for step in steps:
        if step.idle and found and found[-1][-1].idle:
            found[-1] = (*found[-1], step)
        else:
            found.append((step,))
    return tuple(found)
