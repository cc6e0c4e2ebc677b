"""A rectangle of tokens that are all there and all take part: nothing is masked, packed or skipped.

``Whole``       timm's own forward: nothing is asked of the block
``PrefixOnly``  the last block, where only the class token is read
``Straight``    attention, reducers, MLP
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saccade.core.costs import kept_share, reading_macs, taking_part
from saccade.core.hooks import plain_block, untouched
from saccade.core.lazy import changed, unread
from saccade.core.packing import packed, padded
from saccade.core.program import Step
from saccade.core.record import BlockTrace
from saccade.core.timm_types import TimmBlock
from saccade.core.tokens import READINGS, Tokens
from saccade.execution.attention import attend
from saccade.execution.branches import attended_of, attention_input, mlp_input, mlp_output
from saccade.execution.mixing import NOTHING, Asked
from saccade.execution.policy import Execution
from saccade.execution.projections import sliceable
from saccade.execution.residual import Branch, live_keys, residual


@dataclass(frozen=True)
class Whole:
    """timm's own forward, with its hooks, and no operator of ours."""

    def execute(self, step: Step, tokens: Tokens) -> tuple[Tokens, BlockTrace]:
        """The block as it is called."""
        tokens, ran = self.execute_all((step,), tokens)
        return tokens, ran[0]

    def execute_all(self, steps: tuple[Step, ...], tokens: Tokens) -> tuple[Tokens, list[BlockTrace]]:
        """Several blocks, one after the other."""
        x, n, owner = tokens.x, tokens.length, unread(tokens)
        for step in steps:
            turn = step.timms_turn(tokens)
            x = step.call(step.block, x) if turn is None else step.call(step.block, x, turn)
        return changed(tokens, x=x), [self._record(step, n, owner) for step in steps]

    @staticmethod
    def _record(step: Step, n: int, owner: Any) -> BlockTrace:
        kernel = "fused" if step.block.attn.fused_attn else "unfused"
        return BlockTrace(step.cost, n, n, n, (n, n), 0, kernel, owner)


@dataclass(frozen=True)
class PrefixOnly:
    """The prefix attends to all; what the patches would become is not computed (exact, 7 % of a 12-layer ViT)."""

    execution: Execution

    def execute(self, step: Step, tokens: Tokens) -> tuple[Tokens, BlockTrace]:
        """The block for the prefix; patches stay as they are."""
        block, left, tokens = step.block, step.between(tokens).left, padded(tokens)
        prefix, before = tokens.num_prefix, tokens.x.shape[1]
        ask = Asked(queries=prefix, keep_mask=live_keys(tokens), turn=step.turn(tokens))
        attended = attend(block.attn, attention_input(block, tokens.x), tokens.key_bias(), ask, self.execution)
        x = tokens.x[:, :prefix] + attended_of(block, attended.x)
        x = x + mlp_output(block, block.mlp(mlp_input(block, x)))
        cost, counts = step.cost, (before, prefix + left)
        live = None if tokens.keep_mask is None else taking_part(tokens)
        wanted: Any = None if live is None else cost.attention(prefix, live) + prefix * cost.mlp
        ran = BlockTrace(cost, prefix, before, prefix, counts, 0, attended.kernel, unread(tokens), target_macs=wanted)
        return changed(tokens, x=x), changed(ran, kept=kept_share(tokens))

    @staticmethod
    def is_exact(block: TimmBlock) -> bool:
        """Whether the prefix tokens alone may go through: no hook sees the block, and its layers are what we think."""
        return plain_block(block) and sliceable(block.attn) and untouched(block)


@dataclass(frozen=True)
class Straight:
    """Attention, what reducers make of it, and the MLP."""

    execution: Execution
    read: frozenset[str]  # readings of attention that the reducers need

    def execute(self, step: Step, tokens: Tokens) -> tuple[Tokens, BlockTrace]:
        """The parts of the block, with timm's layers; after a ragged reduction the MLP's rows are packed."""
        block, read, before = step.block, self.read, tokens.x.shape[1]
        turn = step.turn(tokens)
        ask = Asked(read=read, turn=turn) if read or turn is not None else NOTHING
        attended = attend(block.attn, attention_input(block, tokens.x), tokens.key_bias(), ask, self.execution)
        x = tokens.x + attended_of(block, attended.x)
        stats = attended.stats.of_patches(tokens.num_prefix) if read else tokens.stats
        tokens, macs = step.reduce("attn", changed(tokens, x=x, stats=stats))
        tokens = packed(tokens.without(READINGS))
        x, updated = residual(tokens, _mlp(block), skipped="rows")
        overhead = macs + reading_macs(block, read, attended.kernel) * before if read else macs
        counts, kernel, owner = (before, tokens.length), attended.kernel, unread(tokens)
        ran = BlockTrace(step.cost, before, before, updated, counts, overhead, kernel, owner)
        return changed(tokens, x=x), ran


def _mlp(block: TimmBlock) -> Branch:
    return lambda x, bias, heads, rows: mlp_output(block, block.mlp(mlp_input(block, x)))
