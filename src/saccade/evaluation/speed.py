"""``bench``: speed in ratios — interleaved runs in one process, medians, the dense model in the same run."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from saccade.checkpoint import Source, open_model
from saccade.errors import UserError
from saccade.evaluation.ideal import decides, ideal_of
from saccade.evaluation.interleaved import ALWAYS, LEAST_RUNS, Clock, Timed, interleaved
from saccade.model import AdaptiveViT
from saccade.runners.engine import engine_for
from saccade.runners.runner import FP32, Runner
from saccade.terminal.progress import Progress
from saccade.terminal.results import Result, counted
from saccade.terminal.text_table import Table

__all__ = ["ALWAYS", "LEAST_RUNS", "Speed", "Speeds", "Timing", "bench", "time_all", "time_together"]


@dataclass(frozen=True)
class Speed:
    """One row of ``bench``: a setting in a runner at a batch size, against others of the same interleaved run."""

    setting: str
    runner: str
    batch: int
    images_per_s: float
    p50_ms: float  #      a batch
    p90_ms: float
    p99_ms: float
    speedup: float  #     median time of the first model (dense, in the first runner) ÷ this one's
    speedup_low: float  # quartiles of the same, run by run: how steady the machine was
    speedup_high: float
    mac_ratio: float  #   executed MACs of dense ÷ of this
    conversion: float  #  speed-up over dense in the same runner ÷ MAC ratio
    gmacs: float
    tokens: float  #      mean in the MLP of a block
    memory_mb: float | None  # peak of live tensors in a forward, without the weights; None: an engine's own
    kernels: str  #       attention paths that ran; empty: an engine's own
    runs: int
    finite: bool = True  # False: its logits hold NaN or infinity, and what was timed is of no use
    kept: float | None = None  # median time of its ideal, in the same runner, ÷ this one's; None: not measured
    ideal: str = ""  #    the ideal, as a setting: the same token counts by slicing
    no_ideal: str = ""  # why there is none, where one was asked for
    masked: bool = False  # its graph computes what the setting leaves out, so its MACs are more than what is said

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    @property
    def worth_it(self) -> bool:
        """False where the setting saves MACs and no time, against dense in the same runner."""
        return self.conversion * self.mac_ratio >= 1.0 - 1e-9 or self.mac_ratio <= 1.01

    @property
    def verdict(self) -> str:
        """What speaks against it; "" where nothing does."""
        if not self.finite:
            return "NaN or infinity"
        return "" if self.worth_it else "saves no time"


@dataclass(frozen=True)
class Timing:
    """What one interleaved run found: a row for each model that ran, and why the others did not, by name."""

    rows: list[Speed]
    failed: dict[str, str]


class Speeds(Result, list[Speed]):
    """What ``bench`` gives: a list of rows, dense first, for each batch size and runner."""

    @property
    def rows(self) -> list[Speed]:
        """A plain list of them."""
        return [*self]

    def table(self) -> Table:
        """Columns by importance; what saves MACs and no time has that for a verdict."""
        several = len({s.runner for s in self}) > 1
        cells = [
            [
                s.setting,
                s.runner if several else "",
                str(s.batch),
                f"{s.images_per_s:.1f}",
                f"{s.speedup:.2f}×",
                "" if s.kept is None else f"{s.kept:.2f}",
                f"{s.mac_ratio:.2f}×",
                f"{s.conversion:.2f}",
                s.verdict,
                f"{s.p50_ms:.1f} / {s.p90_ms:.1f} / {s.p99_ms:.1f}",
                "" if s.memory_mb is None else f"{s.memory_mb:.0f}",
                s.kernels,
            ]
            for s in self
        ]
        columns = ["setting", "runner", "batch", "images/s", "speed-up", "kept", "MAC ratio", "conversion", "verdict"]
        return Table("Speed", [*columns, "ms p50 / p90 / p99", "MB", "attention"], cells, self._caption())

    def _caption(self) -> str:
        runs, runners = min((s.runs for s in self), default=0), list(dict.fromkeys(s.runner for s in self))
        threads = counted(torch.get_num_threads(), "thread")
        said = [f"{', '.join(runners)}, {threads}; medians of {runs} or more interleaved runs."]
        if len(runners) > 1:
            said.append(f"Speed-up: over dense in {runners[0]}; conversion: over dense in the same runner ÷ MAC ratio.")
        else:
            said.append("Speed-up: over dense; conversion: speed-up ÷ MAC ratio.")
        if any(s.ideal for s in self):
            said.append("Kept: time of the same token counts by slicing ÷ time; the rest is what deciding costs.")
        said += dict.fromkeys(f"{s.no_ideal}." for s in self if s.no_ideal)
        if masked := dict.fromkeys(f"{s.setting} in {s.runner}" for s in self if s.masked):
            said.append(f"Masked, not skipped, so with more MACs than is said: {', '.join(masked)}.")
        for runner in runners:
            broken = list(dict.fromkeys(s.setting for s in self if s.runner == runner and not s.finite))
            if broken:
                said.append(f"The logits of {', '.join(broken)} hold NaN or infinity in {runner}: of no use as it is.")
        return " ".join(said)


def bench(
    model: Source,
    settings: Sequence[str] = (),
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | None = None,
    batch: Sequence[int] = (1, 8, 32),
    runner: Runner | str | Sequence[Runner | str] = FP32,
    ideal: bool = False,
    seconds: float = 10.0,
    progress: Progress | None = None,
) -> Speeds:
    """Time settings against the dense model at each batch size, on random images.

    A row whose logits are not finite is timed all the same, and says so (``Speed.finite``).

    Args:
        model: a model, a folder, or a timm name, with or without ``weights`` or ``pretrained``; ``device`` as in
            ``saccade.checkpoint.open_model``.
        runner: one or several, as in ``"bf16"`` or ``["eager", "openvino bf16"]``, all in the same interleaved run;
            speed-ups are over dense in the first, and conversion over dense in the same.
        ideal: also time the *ideal* of each setting whose counts are static, its token counts by slicing
            (``evaluation/ideal.py``): ``Speed.kept`` is ideal time ÷ time, and ``Speed.no_ideal`` why there is none.
        seconds: of timed runs for each batch size, all settings together; never fewer than 7 runs of each.
        progress: where to show it; None: nowhere.

    Raises:
        UserError: bad setting, batch below 1, unknown runner, an engine that is not installed (with the line that
            installs it), that does not compute in this number type here, or has no form for a setting.
    """
    if any(b < 1 for b in batch):
        raise UserError(f"batch sizes {list(batch)}: each must be 1 or more")
    runners = _runners(runner)
    model = open_model(model, weights, pretrained, device, trained=False)
    for one in runners:
        _require(one, next(model.parameters()).device)
    model = FP32.model(model)
    names = list(dict.fromkeys(["dense", *(s for s in map(str, settings) if s not in ("", "dense"))]))
    ideals = {name: _ideal(model.at(name)) if ideal else ("", "") for name in names}
    timed = dict.fromkeys([*names, *(cut for cut, _ in ideals.values() if cut)])
    key = partial(_key, several=len(runners) > 1)
    rows = []
    for size in batch:
        entries: dict[str, AdaptiveViT] = {}
        for one in runners:
            base = model.deploy(replace(one, batch=size))
            entries |= {key(name, one): base.at(name).eval() for name in timed}
        found, _ = interleaved(entries, size, seconds, progress, strict=True)
        first = found[key("dense", runners[0])]
        for one in runners:
            dense = found[key("dense", one)]
            for name, (cut, reason) in ideals.items():
                best = found[key(cut, one)] if cut else None
                rows.append(_speed(name, size, found[key(name, one)], first, dense, best, ideal=cut, no_ideal=reason))
    return Speeds(rows)


def _runners(given: Runner | str | Sequence[Runner | str]) -> list[Runner]:
    several = [given] if isinstance(given, (Runner, str)) else given
    return list(dict.fromkeys(map(Runner.of, several))) or [FP32]


def _require(runner: Runner, device: torch.device) -> None:
    """Raises UserError where a runner's engine is not installed, or does not compute in its number type there."""
    if not runner.exported:
        return
    engine_for(runner)
    if device.type != "cpu":
        raise UserError(f"{runner.engine_noun} runs on the processor here, and the model is on {device}: device='cpu'")


def _key(setting: str, runner: Runner, several: bool) -> str:
    return f"{setting} · {runner}" if several else setting


def _ideal(model: AdaptiveViT) -> tuple[str, str]:
    """The ideal of a model's setting, or why there is none; neither where no method works in the blocks."""
    if not decides(model):
        return "", ""
    try:
        return str(ideal_of(model)), ""
    except UserError as error:
        return "", str(error)


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
    found, failed = interleaved(entries, batch, seconds, progress, clock=clock, least=least, most=most, strict=strict)
    first = found[next(iter(entries))]
    return Timing([_speed(name, batch, own, first, first) for name, own in found.items()], failed)


def _speed(
    name: str, batch: int, timed: Timed, first: Timed, dense: Timed, best: Timed | None = None, **more: Any
) -> Speed:
    """A row of what was timed, against the first of its run, dense in its runner, and its ideal."""
    own, base = (torch.tensor(t.seconds, dtype=torch.float64) for t in (timed, first))
    p50, (p90, p99) = timed.p50, (own.quantile(q).item() for q in (0.9, 0.99))
    speedup = first.p50 / p50  # of the medians, so that one with more images/s has a higher speed-up
    low, high = ((base / own).quantile(q).item() for q in (0.25, 0.75))
    facts = timed.facts
    ratio = max(dense.facts.macs, 1.0) / max(facts.macs, 1.0)
    return Speed(
        setting=name,
        runner=str(timed.runner),
        batch=batch,
        images_per_s=batch / p50,
        p50_ms=p50 * 1e3,
        p90_ms=p90 * 1e3,
        p99_ms=p99 * 1e3,
        speedup=speedup,
        speedup_low=min(low, speedup),
        speedup_high=max(high, speedup),
        mac_ratio=ratio,
        conversion=dense.p50 / p50 / ratio,
        gmacs=facts.macs / 1e9,
        tokens=facts.tokens,
        memory_mb=facts.memory_mb,
        kernels=facts.kernels,
        runs=len(own),
        finite=timed.finite,
        masked=facts.masked,
        kept=None if best is None else best.p50 / p50,
        **more,
    )
