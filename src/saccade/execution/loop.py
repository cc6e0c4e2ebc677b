"""The loop, the file to read first: ``reduce → gate → attend → reduce → mlp`` over timm's own blocks."""

from __future__ import annotations

from functools import partial

from torch import nn

from saccade.core.hooks import require_features, through
from saccade.core.packing import padded
from saccade.core.plan import Plan
from saccade.core.program import Step, lower, runs
from saccade.core.record import BlockTrace
from saccade.core.timm_types import ViT
from saccade.core.tokens import Tokens
from saccade.execution.executors import executor_for, run_as_timm
from saccade.execution.policy import AUTO, Execution
from saccade.execution.rectangles import Whole


def encode(
    vit: ViT, tokens: Tokens, plan: Plan, *, whole: bool = True, sparse: bool = True, execution: Execution = AUTO
) -> tuple[Tokens, tuple[BlockTrace, ...]]:
    """Run the blocks of a timm ViT on a token set.

    Args:
        whole: run the last block for all tokens. False: only for the prefix, which is all that class-token pooling
            reads (exact, and about 7 % of a 12-layer ViT); the tokens returned are then the prefix alone.
        sparse: gates skip what is off. False: compute everything and multiply (the differentiable training form).
        execution: how blocks are run where several ways give the same.

    Raises:
        UserError: a ViT with a forward of the user's own, or a module that a method works inside of.
    """
    require_features(vit)
    steps = lower(vit, plan, whole=whole, masked=not sparse)
    program = partial(run, runs(steps), execution)
    if isinstance(vit.blocks, nn.ModuleList):  # a list that timm never calls itself
        return program(tokens)
    return through(vit.blocks, program, tokens)


def run(
    program: tuple[tuple[Step, ...], ...], execution: Execution, tokens: Tokens
) -> tuple[Tokens, tuple[BlockTrace, ...]]:
    """The steps, one after the other: the tokens at the end, and what ran."""
    ran: list[BlockTrace] = []
    for steps in program:
        if run_as_timm(steps, tokens, execution):
            tokens, records = Whole().execute_all(steps, tokens)
            ran += records
            continue
        for step in steps:
            counted = step.counted_macs(tokens)
            tokens, deciding = step.reduce("block", tokens)
            executor = executor_for(step, tokens, execution)
            tokens, record = executor.execute(step, tokens)
            ran.append(record.with_overhead(deciding, counted))
    return padded(tokens), tuple(ran)
