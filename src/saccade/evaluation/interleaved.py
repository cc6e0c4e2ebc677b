"""Interleaved timing: several models, each by its own runner, take turns in one process, so that all meet the same
machine."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from saccade.errors import UserError
from saccade.evaluation.failures import described, is_systems
from saccade.evaluation.memory import peak_memory
from saccade.model import AdaptiveViT
from saccade.runners.allocator import steady_allocator
from saccade.runners.deployment import eager, engine_failure
from saccade.runners.exported import has_fixed_counts
from saccade.runners.runner import EAGER, FP32, ON_PROCESSOR, Runner
from saccade.terminal.progress import Progress

LEAST_RUNS, MOST_RUNS = 7, 500
FEW_RUNS, ALWAYS, WARMING = 3, 4, 0.5  # where time is short: runs, models, and the share of it for what comes before
# How far an engine's logits may be from PyTorch's, as a share of their norm; other logits are 1.4 away. What is decided
# by numbers that were rounded is, on noise, decided otherwise in many a near tie.
AGREE, AGREE_ROUNDED = 0.1, 1.0
APART = 400_000  # numbers: the largest tensor between two runs, so that none has the luck of its addresses

Way = Callable[[Tensor], Any]  # images -> logits
Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Facts:
    """What one forward does, as far as PyTorch runs it."""

    macs: float  #   an image, as PyTorch skips
    tokens: float  # mean in the MLP of a block
    kernels: str  #  attention paths; empty: an engine's own
    memory_mb: float | None  # peak of live tensors, without the weights; None: an engine's own
    masked: bool  #  in the runner's graph, which computes what PyTorch skips


@dataclass(frozen=True)
class Timed:
    """One model of an interleaved run."""

    runner: Runner
    seconds: list[float]  # run by run
    facts: Facts
    finite: bool  # whether its logits are

    @property
    def p50(self) -> float:
        """The median of its runs, in seconds."""
        return median(self.seconds)


def interleaved(
    entries: Mapping[str, AdaptiveViT],
    batch: int,
    seconds: float,
    progress: Progress | None = None,
    *,
    clock: Clock = time.perf_counter,
    least: int = LEAST_RUNS,
    most: float = math.inf,
    strict: bool = False,
) -> tuple[dict[str, Timed], dict[str, str]]:
    """Time models on random images; and why some could not be timed, by name.

    Args:
        seconds: of timed runs, all models in turn; never fewer than ``least`` of each.
        clock: what tells the time.
        most: seconds that all of this may take; the last models are left out, and fewer runs made, to keep to it.
        strict: the error of any is raised; else that of the first alone.
    """
    steady_allocator()
    progress = progress or Progress()
    warming = progress.start(f"warming up, batch {batch}", len(entries))
    ready: dict[str, tuple[Way, Tensor]] = {}
    facts: dict[str, Facts] = {}
    broken: set[str] = set()
    failed: dict[str, str] = {}
    first, start = next(iter(entries)), clock()
    for name, model in entries.items():
        if len(ready) >= ALWAYS and clock() - start > WARMING * most:
            failed[name] = "not timed, to keep within the time"
            continue
        warming(0, what=f"warming up {name}, batch {batch}")
        size = (batch, model.backbone.channels, *model.input_size())
        images = torch.randn(size, device=next(model.parameters()).device)
        try:
            way = _way(model)
            if not _warm(way, model, images).isfinite().all():
                broken.add(name)
            facts[name] = _facts(model, images)
        except Exception as error:
            if strict and isinstance(error, UserError):
                raise UserError(f"{name}: {error}") from error
            if strict or name == first or is_systems(error):
                raise
            failed[name] = described(error)
            continue
        ready[name] = way, images
        warming(1)
    warming.finish()
    advance, begun = progress.start(f"timing, batch {batch}", len(ready) * least), clock()

    def more(runs: int) -> bool:
        advance(len(ready) if 0 < runs <= least else 0)
        late = runs >= FEW_RUNS and clock() - start > most
        return not late and (runs < least or (clock() - begun < seconds and runs < MOST_RUNS))

    runners = {name: entries[name].deployed or FP32 for name in ready}
    times = in_turn(ready, more, clock, {name: runner.engine in ON_PROCESSOR for name, runner in runners.items()})
    advance.finish()
    return {n: Timed(runners[n], times[n], facts[n], n not in broken) for n in ready}, failed


def in_turn(
    ways: Mapping[str, tuple[Way, Tensor]],
    more: Callable[[int], bool],
    clock: Clock = time.perf_counter,
    own_threads: Mapping[str, bool] = MappingProxyType({}),
) -> dict[str, list[float]]:
    """Seconds of each way on its images, round by round, for as long as there should be ``more`` than so many rounds.

    Each round has another order, the same in every process: none is always the first, or behind the heaviest.

    Args:
        own_threads: whether a way computes in threads of its own, not PyTorch's. Behind one of the other kind a way
            runs once untimed: PyTorch's threads wait for more work at full speed, for milliseconds that an engine's
            first run would have to share its cores with them.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    order, draw, rounds = list(ways), random.Random(0), 0
    before: bool | None = None
    while more(rounds):
        draw.shuffle(order)
        for name in order:
            apart = [torch.empty(draw.randrange(1, APART)) for _ in range(3)]
            kind = own_threads.get(name, False)
            if before not in (None, kind):
                _timed(*ways[name], clock)
            before = kind
            times[name].append(_timed(*ways[name], clock))
            del apart
        rounds += 1
    return times


def _way(model: AdaptiveViT) -> Way:
    return lambda images: _answer(model(images))  # two towers give no logits, but an embedding


def _answer(out: Any) -> Tensor:
    return out.logits if hasattr(out, "logits") else out.embedding


def _warm(way: Way, model: AdaptiveViT, images: Tensor) -> Tensor:
    """Three runs -> logits. Raises UserError where its engine does not work here, or computes something else."""
    runner = model.deployed or FP32
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that torch.compile failed is told below
        logits = [way(images) for _ in range(3)][-1]
        if reason := engine_failure(model):
            compiler = "is there a C++ compiler? " if runner.engine in ("compile", "aoti") else ""
            raise UserError(f"{runner.engine_noun} does not work here ({compiler}{reason}); leave it out")
        if runner.engine != EAGER:
            plain = eager(model)(images.to(runner.weights_dtype)).logits.float()
            far = ((plain - logits).norm() / plain.norm()).item()
            limit = AGREE_ROUNDED if runner.dtype != "fp32" and model.setting.calls else AGREE
            if plain.isfinite().all() and not far <= limit:
                raise UserError(f"{runner.engine_noun} gives other logits here, {far:.1%} away from PyTorch's")
    return logits


def _timed(way: Way, images: Tensor, clock: Clock) -> float:
    device = images.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    with torch.inference_mode():
        way(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def _facts(model: AdaptiveViT, images: Tensor) -> Facts:
    runner, model = model.deployed or FP32, eager(model)
    images = images.to(next(model.parameters()).dtype)
    with torch.inference_mode():
        trace = model(images).trace
        memory = None if runner.exported else peak_memory(lambda: model(images), images.device)
    kernels = "" if runner.exported else ", ".join(f"{count}× {name}" for name, count in trace.kernels.items())
    tokens = trace.tokens()
    masked = runner.engine != EAGER and not has_fixed_counts(model)
    return Facts(trace.macs().mean().item(), sum(tokens) / len(tokens), kernels, memory, masked)
