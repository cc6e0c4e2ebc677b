"""Executors: the ways to run one block, and which of them runs. Each takes tokens and gives tokens, and what ran.

``rectangles.py``  all tokens are there and take part: timm's own forward, or attention, reducers, MLP
``parts.py``       they are masked, packed or skipped
"""

from __future__ import annotations

from typing import Protocol

import torch

from saccade.core.gates import Gates
from saccade.core.hooks import is_heard
from saccade.core.lazy import changed
from saccade.core.program import Step
from saccade.core.record import BlockTrace
from saccade.core.tokens import Tokens
from saccade.execution.parts import Gathered, Images, Masked, Parts, Rows
from saccade.execution.policy import Execution, images_that_run, rows_that_run
from saccade.execution.rectangles import PrefixOnly, Straight, Whole


class Executor(Protocol):
    """A way to run a block."""

    def execute(self, step: Step, tokens: Tokens) -> tuple[Tokens, BlockTrace]:
        """Run a step's block: tokens afterwards, and what ran."""


def run_as_timm(steps: tuple[Step, ...], tokens: Tokens, execution: Execution) -> bool:
    """Whether timm's own forward, one block after the other, is what these steps ask for."""
    return steps[0].idle and tokens.plain and execution.is_timms()


def executor_for(step: Step, tokens: Tokens, execution: Execution) -> Executor:
    """The way to run a step: a constant where nothing depends on the image."""
    if step.prefix_only and not step.is_gated and PrefixOnly.is_exact(step.block):
        return PrefixOnly(execution)
    shown = step.watched
    if tokens.plain and (shown or execution.is_timms()) and step.is_identity(tokens):
        return Whole()
    if tokens.complete and not (step.is_gated or shown or step.masked or step.recompute or is_heard(step.block)):
        return Straight(execution, step.between(tokens).read)
    gates, gating = step.gates(tokens)
    if gates is None or step.masked:
        return (Masked if step.masked else Parts)(execution, gates, gating)
    if shown:  # hooks want to see all tokens of all images
        return (Masked if gates.some_rows else Images)(execution, gates, gating)
    if torch.compiler.is_compiling():  # a graph has the same shapes for all images
        fixed = gates.static and len(step.between(tokens).reducers) == 0
        return (Gathered if fixed else Masked)(execution, gates, gating)
    return _by_share(step, tokens, execution, gates, gating)


def _by_share(step: Step, tokens: Tokens, execution: Execution, gates: Gates, gating: int) -> Executor:
    """By how much is on. Waits for the device, unless the gates are by index."""
    if (some := rows_that_run(tokens, gates)) == 1:
        gates = changed(gates, patch=None, patch_indices=None)
    pack = not gates.some_rows or execution.skips(some, tokens, gates)
    if (on := images_that_run(gates)) == 1:
        gates = changed(gates, attn=None, mlp=None)
    branches = changed(gates, patch=None, patch_indices=None)
    skip = branches.all_run or execution.skips(on, tokens, branches)
    if not gates.some_rows and branches.all_run and gates.head is None:
        return Parts(execution, None, gating)
    if gates.some_rows and pack:
        once = gates.whole_rows and len(step.between(tokens).reducers) == 0
        return (Gathered if once else Rows)(execution, gates, gating)
    if not skip or (gates.some_rows and branches.all_run):
        return Masked(execution, gates, gating)
    return (Images if gates.some_rows else Rows)(execution, gates, gating)
