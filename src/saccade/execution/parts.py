"""Blocks whose tokens are masked, packed or skipped: by gates, in training, in ragged batches.

``Parts``     attention, reducers, MLP; ragged batches packed
``Masked``    gates multiply (training, and where skipping does not pay)
``Images``    branches run for the images that are on
``Rows``      single tokens are left out, packed
``Gathered``  the same tokens are left out of both branches: one gather serves the block
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from saccade.core.costs import kept_share, reading_macs, wanted_macs
from saccade.core.gates import Gates
from saccade.core.hooks import BLOCKS, require_plain, through
from saccade.core.lazy import changed, unread
from saccade.core.packing import Rows as PackedRows
from saccade.core.packing import gathered, packed, padded, rows_of, scattered
from saccade.core.program import Step
from saccade.core.record import BlockTrace, Count
from saccade.core.timm_types import TimmBlock
from saccade.core.tokens import NO_STATS, READINGS, Tokens
from saccade.execution.attention import Attended, attend
from saccade.execution.branches import attended_of, attention_input, mlp_input, mlp_output
from saccade.execution.heads import should_skip_heads
from saccade.execution.mixing import Asked
from saccade.execution.policy import Execution
from saccade.execution.residual import live_keys, residual

ALL_RUN = Gates()


@dataclass(frozen=True)
class Mixed:
    """How a block's attention ran."""

    count: Count  #           tokens of each image that were computed
    kernel: str
    read: frozenset[str]  #   what reducers read of it
    heads_skipped: bool  #    heads that are off were not computed


@dataclass(frozen=True)
class Parts:
    """Both branches for all tokens, what works between them, and the hooks of the block around it."""

    execution: Execution
    gates: Gates | None = None
    gating: int = 0  # MACs of deciding the gates
    skipped: ClassVar[str] = "rows"  # what of that which is off is not computed; see ``residual``

    def execute(self, step: Step, tokens: Tokens) -> tuple[Tokens, BlockTrace]:
        """Attention and MLP, each in its own way, within the block's hooks."""
        require_plain(step.block, f"blocks[{step.index}]", *BLOCKS)
        return through(step.block, partial(self.run, step), self.laid_out(step, tokens))

    def laid_out(self, step: Step, tokens: Tokens) -> Tokens:
        """Ragged batches packed; a rectangle for gates, for training and for hooks."""
        free = self.gates is None and not step.masked and not step.watched
        return packed(tokens) if free else padded(tokens)

    def run(self, step: Step, tokens: Tokens) -> tuple[Tokens, BlockTrace]:
        """What the block's own forward would do."""
        start, read = tokens, step.between(tokens).read
        skip, turn = self._skips_heads(step, read), self.turn(step, tokens)
        tokens, mixed = step.call(self.attention, step.block, tokens, read, skip, turn)
        tokens, deciding = step.reduce("attn", tokens)
        middle = self.laid_out(step, tokens.without(READINGS))
        tokens, updated = step.call(self.mlp, step.block, middle)
        return tokens, self.record(step, (start, middle, tokens), mixed, updated, deciding)

    def turn(self, step: Step, tokens: Tokens) -> Tensor | None:
        """Rotations of the tokens that attention sees."""
        return step.turn(tokens)

    def attention(
        self, block: TimmBlock, tokens: Tokens, read: frozenset[str], skip: bool, turn: Tensor | None
    ) -> tuple[Tokens, Mixed]:
        """``x + attn(norm1(x))``; with what reducers read, which needs attention to run for all images."""
        seen: list[Attended] = []
        gates = self.gates or ALL_RUN
        tokens = tokens if gates.patch is None else tokens.with_stats(gate_mask=gates.patch)
        how: dict[str, Any] = {"partial": gates.partial, "keep_mask": live_keys(tokens), "skip": skip, "read": read}
        how["inner"] = gates.inner and self.skipped == "nothing" and torch.is_grad_enabled()
        how["query_mask"] = tokens.query_mask() if "attn_received" in read or how["inner"] else None

        def branch(x: Tensor, bias: Tensor | None, heads: Tensor | None, rows: PackedRows | None) -> Tensor:
            ask = Asked(heads=heads, rows=rows, turn=turned(turn, x, rows, gates.attn), **how)
            seen.append(attend(block.attn, attention_input(block, x), bias, ask, self.execution))
            return attended_of(block, seen[0].x)

        skipped = "nothing" if read else self.skipped
        x, count = residual(tokens, branch, tokens.key_bias(), gates.attn, gates.head, skipped)
        readings = {name: getattr(seen[0].stats, name) for name in read}
        if (rows := rows_of(tokens)) is not None:
            readings = {name: rows.unpack(value) for name, value in readings.items()}
        readings = {name: value[:, tokens.num_prefix :] for name, value in readings.items()}
        tokens, mixed = changed(tokens, x=x), Mixed(count, seen[0].kernel if seen else "none", read, skip)
        return tokens.with_stats(**readings) if read else tokens, mixed

    def mlp(self, block: TimmBlock, tokens: Tokens) -> tuple[Tokens, Count]:
        """``x + mlp(norm2(x))``."""

        def branch(x: Tensor, bias: Tensor | None, heads: Tensor | None, rows: PackedRows | None) -> Tensor:
            x = mlp_input(block, x)
            x = x if heads is None else of_heads(x, heads, rows)
            return mlp_output(block, block.mlp(x))

        gates = self.gates or ALL_RUN
        heads = gates.head if gates.mlp_heads else None
        x, count = residual(tokens, branch, on=gates.mlp, heads=heads, skipped=self.skipped)
        return changed(tokens, x=x, stats=NO_STATS), count

    def record(
        self, step: Step, seen: tuple[Tokens, Tokens, Tokens], mixed: Mixed, updated: Count, deciding: int
    ) -> BlockTrace:
        """What ran. seen: tokens at the start, before the MLP, at the end; updated: how many the MLP computed."""
        (start, middle, end), gates, cost = seen, self.gates or ALL_RUN, step.cost
        before, kernel, computes_all = start.length, mixed.kernel, self.skipped == "nothing"
        overhead = self.gating + deciding + reading_macs(step.block, mixed.read, kernel) * before
        return BlockTrace(
            cost=cost,
            queries=mixed.count,
            keys=mixed.count,
            mlp=updated,
            attn=None if computes_all or mixed.read else gates.attn,
            mlp_on=None if computes_all else gates.mlp,
            heads=gates.head.mean(1) if gates.head is not None and mixed.heads_skipped else None,
            partial=gates.partial,
            static_counts=(before, end.length),
            aux_macs=overhead,
            kernel=kernel if self.skipped == "rows" or step.masked else f"{kernel}, masked",
            owner=unread(end),
            target_macs=wanted_macs(cost, start, middle, self.gates, overhead) if step.masked else None,
            gates=self.gates if step.masked else None,
            kept=kept_share(start),
        )

    def _skips_heads(self, step: Step, read: frozenset[str]) -> bool:
        if step.masked or read or self.gates is None or step.watched:
            return False
        return should_skip_heads(step.block.attn, self.gates)


def turned(turn: Tensor | None, x: Tensor, rows: PackedRows | None, on: Tensor | None) -> Tensor | None:
    """The rotations of the tokens that a branch is given: of all, of the images that are on [B], or of packed rows."""
    if turn is None or turn.ndim == 3:  # none, or packed already
        return turn
    if rows is not None:
        return rows.pack(turn)
    return turn if on is None or turn.shape[0] == x.shape[0] else turn.index_select(0, (on > 0).nonzero().squeeze(1))


def of_heads(x: Tensor, heads: Tensor, rows: PackedRows | None) -> Tensor:
    """Features [B, K, D], or packed [T, D], times 0/1 of heads [B, H], each of which has D / H of the channels."""
    on = heads.unsqueeze(1) if rows is None else heads.repeat_interleave(rows.counts(), dim=0, output_size=len(x))
    return (x.unflatten(-1, (heads.shape[1], -1)) * on.unsqueeze(-1).to(x.dtype)).flatten(-2)


@dataclass(frozen=True)
class Masked(Parts):
    """All is computed, and multiplied with what is on."""

    skipped: ClassVar[str] = "nothing"


@dataclass(frozen=True)
class Images(Parts):
    """Branches of images that are off are not computed; single tokens are masked."""

    skipped: ClassVar[str] = "images"


@dataclass(frozen=True)
class Rows(Parts):
    """Neither images nor tokens that are off are computed."""


@dataclass(frozen=True)
class Gathered(Rows):
    """Tokens that take part in both branches, with nothing between them: they are gathered once, and put back."""

    def run(self, step: Step, tokens: Tokens) -> tuple[Tokens, BlockTrace]:
        """Of the tokens that take part, what ``Rows`` does with all."""
        assert self.gates is not None
        some, index = gathered(tokens, self.gates)
        if (turn := step.turn(tokens)) is not None:
            turn = turn.flatten(0, 1).index_select(0, index).unflatten(0, some.x.shape[:-1])
        some, ran = _There(self.execution, changed(self.gates, patch=None), self.gating, turn).run(step, some)
        whole = scattered(some, tokens, index)
        counts = (tokens.length, tokens.length)
        return whole, changed(ran, static_counts=counts, owner=unread(whole))


@dataclass(frozen=True)
class _There(Rows):
    """Of gathered tokens: all of them are there, in both branches."""

    turns: Tensor | None = None  # their rotations, [B, k, H, 2d] or packed [T, H, 2d]

    def turn(self, step: Step, tokens: Tokens) -> Tensor | None:
        return self.turns

    def laid_out(self, step: Step, tokens: Tokens) -> Tokens:
        return tokens
