"""``bench``: speed in ratios — interleaved runs in one process, medians, the dense model in the same run."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.checkpoint import Source, open_model
from saccade.errors import UserError
from saccade.evaluation.failures import described, is_systems
from saccade.evaluation.memory import peak_memory
from saccade.model import AdaptiveViT
from saccade.runners.allocator import steady_allocator
from saccade.runners.deployment import eager, engine_failure
from saccade.runners.runner import EAGER, FP32, Runner
from saccade.terminal.progress import Progress
from saccade.terminal.results import Result
from saccade.terminal.text_table import Table

LEAST_RUNS, MOST_RUNS = 7, 500
FEW_RUNS, ALWAYS, WARMING = 3, 4, 0.5  # where time is short: runs, models, and the share of it for what comes before
AGREE = 0.1  # of the largest logit: how far compiled logits may be from those of the same number type, not compiled


@dataclass(frozen=True)
class Speed:
    """One row of ``bench``: a setting at a batch size, against the first model of the same interleaved run."""

    setting: str
    runner: str
    batch: int
    images_per_s: float
    p50_ms: float  #      a batch
    p90_ms: float
    p99_ms: float
    speedup: float  #     dense's ÷ this one's median time
    speedup_low: float  # quartiles of dense's ÷ this one's time, run by run: how steady the machine was
    speedup_high: float
    mac_ratio: float  #   executed MACs of dense ÷ of this
    conversion: float  #  speed-up ÷ MAC ratio
    gmacs: float
    tokens: float  #      mean in the MLP of a block
    memory_mb: float  # peak of live tensors in a forward, without the weights
    kernels: str  #       attention paths that ran
    runs: int
    finite: bool = True  # False: its logits hold NaN or infinity, and what was timed is of no use

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    @property
    def worth_it(self) -> bool:
        """False where the setting saves MACs and no time."""
        return self.speedup >= 1.0 or self.mac_ratio <= 1.01

    @property
    def verdict(self) -> str:
        """What speaks against it; "" where nothing does."""
        if not self.finite:
            return "NaN or infinity"
        return "" if self.worth_it else "not worth it"


Way = Callable[[Tensor], Tensor]  # images -> logits
Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Timing:
    """What one interleaved run found: a row for each model that ran, and why the others did not, by name."""

    rows: list[Speed]
    failed: dict[str, str]


class Speeds(Result, list[Speed]):
    """What ``bench`` gives: a list of rows, dense first, for each batch size."""

    @property
    def rows(self) -> list[Speed]:
        """A plain list of them."""
        return [*self]

    def table(self) -> Table:
        """Columns by importance; what saves MACs and no time is said to be not worth it."""
        cells = [
            [
                s.setting,
                str(s.batch),
                f"{s.images_per_s:.1f}",
                f"{s.speedup:.2f}×",
                f"{s.mac_ratio:.2f}×",
                f"{s.conversion:.2f}",
                s.verdict,
                f"{s.p50_ms:.1f} / {s.p90_ms:.1f} / {s.p99_ms:.1f}",
                f"{s.memory_mb:.0f}",
                s.kernels,
            ]
            for s in self
        ]
        columns = ["setting", "batch", "images/s", "speed-up", "MAC ratio", "conversion", "verdict"]
        runs, runner = (min(s.runs for s in self), self[0].runner) if self else (0, "")
        caption = f"{runner}, {torch.get_num_threads()} threads; medians of {runs} or more interleaved runs."
        if broken := list(dict.fromkeys(s.setting for s in self if not s.finite)):
            caption += f" The logits of {', '.join(broken)} hold NaN or infinity in {runner}: of no use as it is."
        return Table("Speed", [*columns, "ms p50 / p90 / p99", "MB", "attention"], cells, caption)


def bench(
    model: Source,
    settings: Sequence[str] = (),
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | None = None,
    batch: Sequence[int] = (1, 8, 32),
    runner: Runner = FP32,
    seconds: float = 10.0,
    progress: Progress | None = None,
) -> Speeds:
    """Time settings against the dense model at each batch size, on random images.

    A row whose logits are not finite is timed all the same, and says so (``Speed.finite``).

    Args:
        model: a model, a folder, or a timm name, with or without ``weights`` or ``pretrained``; ``device`` as in
            ``saccade.checkpoint.open_model``.
        seconds: of timed runs for each batch size, all settings together; never fewer than 7 runs of each.
        progress: where to show it; None: nowhere.

    Raises:
        UserError: bad setting, batch below 1, unknown dtype.
    """
    if any(b < 1 for b in batch):
        raise UserError(f"batch sizes {list(batch)}: each must be 1 or more")
    model = open_model(model, weights, pretrained, device, trained=False)
    model = FP32.model(model)
    names = ["dense", *(s for s in map(str, settings) if s not in ("", "dense"))]
    base = model.deploy(runner)
    entries = {name: base.at(name).eval() for name in dict.fromkeys(names)}
    return Speeds([row for size in batch for row in time_together(entries, size, seconds, progress)])


def time_together(
    entries: Mapping[str, AdaptiveViT], batch: int, seconds: float = 10.0, progress: Progress | None = None
) -> list[Speed]:
    """Interleaved timing of models, each by its own runner, at one batch size; all are compared with the first.

    Raises UserError where the engine that a runner asks for does not work; other errors as they are.
    """
    return time_all(entries, batch, seconds, progress, strict=True).rows


def time_all(
    entries: Mapping[str, AdaptiveViT],
    batch: int,
    seconds: float = 10.0,
    progress: Progress | None = None,
    *,
    clock: Clock = time.perf_counter,
    least: int = LEAST_RUNS,
    most: float = math.inf,
    strict: bool = False,
) -> Timing:
    """The same for models of which some may fail: these have no row, and their error stands beside the rows.

    Args:
        seconds: of timed runs, all models in turn; never fewer than ``least`` of each.
        clock: what tells the time.
        most: seconds that all of this may take; the last models are left out, and fewer runs made, to keep to it.
        strict: the error of any is raised.
    """
    steady_allocator()
    advance = (progress or Progress()).start(f"timing, batch {batch}", len(entries) * (least + 1))
    ways: dict[str, Way] = {}
    inputs: dict[str, Tensor] = {}
    times: dict[str, list[float]] = {}
    facts: dict[str, tuple[float, float, str, float]] = {}
    broken: set[str] = set()
    failed: dict[str, str] = {}
    first, start = next(iter(entries)), clock()
    for name, model in entries.items():
        if len(ways) >= ALWAYS and clock() - start > WARMING * most:
            failed[name] = "not timed, to keep within the time"
            continue
        advance(0, what=f"warming up {name}, batch {batch}")
        size = (batch, model.backbone.channels, *model.input_size())
        images = torch.randn(size, device=next(model.parameters()).device)
        try:
            way = _way(model)
            if not _warm(way, model, images).isfinite().all():
                broken.add(name)
            facts[name] = _facts(eager(model), images)
        except Exception as error:
            if strict or name == first or is_systems(error):
                raise
            failed[name] = described(error)
            continue
        ways[name], inputs[name], times[name] = way, images, []
        advance(1)
    order, runs, begun = list(ways), 0, clock()

    def more() -> bool:
        late = runs >= FEW_RUNS and clock() - start > most
        return not late and (runs < least or (clock() - begun < seconds and runs < MOST_RUNS))

    while more():
        for name in order:
            advance(1 if runs < least else 0, what=f"timing {name}, batch {batch}")
            times[name].append(_timed(ways[name], inputs[name], clock))
        order = order[1:] + order[:1]  # no model is always first, or always after the heaviest
        runs += 1
    advance.finish()
    rows = [_speed(name, entries[name].deployed or FP32, batch, times, facts, first) for name in ways]
    return Timing([replace(row, finite=row.setting not in broken) for row in rows], failed)


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
            far = (plain - logits).abs().max().item()
            if plain.isfinite().all() and not far <= AGREE * plain.abs().max().item():
                raise UserError(f"{runner.engine_noun} gives other logits here, {far:.3g} away from PyTorch's")
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


def _facts(model: AdaptiveViT, images: Tensor) -> tuple[float, float, str, float]:
    """MACs an image, mean tokens, attention paths, and peak memory of one forward."""
    images = images.to(next(model.parameters()).dtype)
    with torch.inference_mode():
        trace = model(images).trace
        memory = peak_memory(lambda: model(images), images.device)
    kernels = ", ".join(f"{count}× {name}" for name, count in trace.kernels.items())
    tokens = trace.tokens()
    return trace.macs().mean().item(), sum(tokens) / len(tokens), kernels, memory


def _speed(name: str, runner: Runner, batch: int, times: dict, facts: dict, dense: str) -> Speed:
    own, first = (torch.tensor(times[n], dtype=torch.float64) for n in (name, dense))
    p50, p90, p99 = (own.quantile(q).item() for q in (0.5, 0.9, 0.99))
    speedup = first.quantile(0.5).item() / p50  # of the medians, so that one with more images/s has a higher speed-up
    low, high = ((first / own).quantile(q).item() for q in (0.25, 0.75))
    macs, tokens, kernels, memory = facts[name]
    ratio = max(facts[dense][0], 1.0) / max(macs, 1.0)
    return Speed(
        setting=name,
        runner=str(runner),
        batch=batch,
        images_per_s=batch / p50,
        p50_ms=p50 * 1e3,
        p90_ms=p90 * 1e3,
        p99_ms=p99 * 1e3,
        speedup=speedup,
        speedup_low=min(low, speedup),
        speedup_high=max(high, speedup),
        mac_ratio=ratio,
        conversion=speedup / ratio,
        gmacs=macs / 1e9,
        tokens=tokens,
        memory_mb=memory,
        kernels=kernels,
        runs=len(own),
    )
