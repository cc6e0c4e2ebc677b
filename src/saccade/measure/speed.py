"""``bench``: speed in ratios — interleaved runs in one process, medians, the dense model in the same run."""

from __future__ import annotations

import copy
import ctypes
import os
import platform
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.opening import Source, open_model
from saccade.progress import Progress
from saccade.results import Result
from saccade.tables import Table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_RUNS, MOST_RUNS = 7, 500


@dataclass(frozen=True)
class Runner:
    """A way to run a model: its number type, and whether compiled."""

    dtype: str = "fp32"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    def __str__(self) -> str:
        return f"{self.dtype} compiled" if self.compiled else self.dtype

    def model(self, model: AdaptiveViT) -> AdaptiveViT:
        """The model in this number type (a copy, unless it is its own)."""
        dtype = DTYPES[self.dtype]
        if next(model.parameters()).dtype == dtype:
            return model
        return copy.deepcopy(model).to(dtype)

    def prepare(self, model: AdaptiveViT) -> Callable[[Tensor], Tensor]:
        """images -> logits."""
        logits = Logits(self.model(model)).eval()
        return torch.compile(logits, dynamic=False) if self.compiled else logits


FP32 = Runner()


class Logits(nn.Module):
    """A model that gives its logits alone: what is compiled and exported."""

    def __init__(self, model: AdaptiveViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, h, w] -> logits [B, K]."""
        return self.model(images).logits


@dataclass(frozen=True)
class Speed:
    """One row of ``bench``: a setting at a batch size, against dense run by the same runner at the same batch."""

    setting: str
    runner: str
    batch: int
    images_per_s: float
    p50_ms: float  #      a batch
    p90_ms: float
    p99_ms: float
    speedup: float  #     median of dense's ÷ this one's time, run by run
    speedup_low: float  # its quartiles: how steady the machine was
    speedup_high: float
    mac_ratio: float  #   executed MACs of dense ÷ of this
    conversion: float  #  speed-up ÷ MAC ratio
    gmacs: float
    tokens: float  #      mean in the MLP of a block
    memory_mb: float  # peak of live tensors in a forward, without the weights
    kernels: str  #       attention paths that ran
    runs: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    @property
    def worth_it(self) -> bool:
        """False where the setting saves MACs and no time."""
        return self.speedup >= 1.0 or self.mac_ratio <= 1.01


Entry = tuple[AdaptiveViT, Runner]
Way = Callable[[Tensor], Tensor]  # images -> logits


class Speeds(Result, list[Speed]):
    """What ``bench`` gives: a list of rows, dense first, for each batch size."""

    @property
    def rows(self) -> list[Speed]:
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
                "" if s.worth_it else "not worth it",
                f"{s.p50_ms:.1f} / {s.p90_ms:.1f} / {s.p99_ms:.1f}",
                f"{s.memory_mb:.0f}",
                s.kernels,
            ]
            for s in self
        ]
        columns = ["setting", "batch", "images/s", "speed-up", "MAC ratio", "conversion", "verdict"]
        columns += ["ms p50 / p90 / p99", "MB", "attention"]
        runs, runner = (min(s.runs for s in self), self[0].runner) if self else (0, "")
        caption = f"{runner}, {torch.get_num_threads()} threads; medians of {runs} or more interleaved runs."
        return Table("Speed", columns, cells, caption)


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

    Args:
        model: a model, a folder, or a timm name, with or without ``weights`` or ``pretrained``; ``device`` as in
            ``saccade.opening.open_model``.
        seconds: of timed runs for each batch size, all settings together; never fewer than 7 runs of each.
        progress: where to show it; None: nowhere.

    Raises:
        UserError: bad setting, batch below 1, unknown dtype.
    """
    if any(b < 1 for b in batch):
        raise UserError(f"batch sizes {list(batch)}: each must be 1 or more")
    model = open_model(model, weights, pretrained, device, trained=False)
    names = ["dense", *(s for s in map(str, settings) if s not in ("", "dense"))]
    entries = {name: (model.at(name).eval(), runner) for name in dict.fromkeys(names)}
    rows = [row for size in batch for row in time_together(entries, size, seconds, progress)]
    if len(rows) < len(entries) * len(batch):
        raise UserError("torch.compile does not work here (is there a C++ compiler?); leave out --compile")
    return Speeds(rows)


def time_together(
    entries: dict[str, Entry], batch: int, seconds: float = 10.0, progress: Progress | None = None
) -> list[Speed]:
    """Interleaved timing of models, each by its runner, at one batch size; the others are compared with the first.

    Those that torch.compile cannot run here are missing in the result.
    """
    steady_allocator()
    advance = (progress or Progress()).start(f"timing, batch {batch}", len(entries) * (LEAST_RUNS + 1))
    ways: dict[str, Way] = {}
    inputs: dict[str, Tensor] = {}
    times: dict[str, list[float]] = {}
    for name, (model, runner) in entries.items():
        advance(0, what=f"warming up {name}, batch {batch}")
        size = (batch, model.backbone.channels, *model.input_size())
        images = torch.randn(size, device=next(model.parameters()).device).to(DTYPES[runner.dtype])
        if (way := _warm(runner.prepare(model), images, runner)) is not None:
            ways[name], inputs[name], times[name] = way, images, []
        advance(1)
    order, runs, start = list(ways), 0, time.perf_counter()
    while runs < LEAST_RUNS or (time.perf_counter() - start < seconds and runs < MOST_RUNS):
        for name in order:
            advance(1 if runs < LEAST_RUNS else 0, what=f"timing {name}, batch {batch}")
            times[name].append(_timed(ways[name], inputs[name]))
        order = order[1:] + order[:1]  # nobody is always first, or always after the heaviest
        runs += 1
    facts = {name: _facts(entries[name][1].model(entries[name][0]), inputs[name]) for name in ways}
    dense = next(iter(entries))
    return [_speed(name, str(entries[name][1]), batch, times, facts, dense) for name in ways]


def _warm(way: Way, images: Tensor, runner: Runner) -> Way | None:
    """Three runs; None where torch.compile does not work here (no compiler, for example)."""
    try:
        with torch.inference_mode():
            for _ in range(3):
                way(images)
    except Exception:
        if runner.compiled:
            return None
        raise
    return way


def _timed(way: Way, images: Tensor) -> float:
    device = images.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with torch.inference_mode():
        way(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _facts(model: AdaptiveViT, images: Tensor) -> tuple[float, float, str, float]:
    """MACs an image, mean tokens, attention paths, and peak memory of one forward."""
    with torch.inference_mode():
        trace = model(images).trace
        memory = peak_memory(lambda: model(images), images.device)
    kernels = ", ".join(f"{count}× {name}" for name, count in trace.kernels.items())
    tokens = trace.tokens()
    return trace.macs().mean().item(), sum(tokens) / len(tokens), kernels, memory


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """Peak of what a call allocates, MB (10^6 bytes)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with LiveMemory() as memory:
        run()
    return memory.peak / 1e6


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of live tensors made inside; scratch space within one operator is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {s._cdata for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        out = func(*args, **(kwargs or {}))
        for storage in map(_storage, tree_leaves(out)):
            if storage is not None and storage._cdata not in given and storage._cdata not in self._live:
                key = storage._cdata
                self._live[key] = (weakref.ref(storage, partial(self._gone, key)), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out

    def _gone(self, key: int, _: Any) -> None:
        self._live.pop(key, None)


def _storage(value: Any) -> torch.UntypedStorage | None:
    return value.untyped_storage() if isinstance(value, Tensor) else None


def _speed(name: str, runner: str, batch: int, times: dict, facts: dict, dense: str) -> Speed:
    own = torch.tensor(times[name], dtype=torch.float64)
    ratios = torch.tensor(times[dense], dtype=torch.float64) / own
    p50, p90, p99 = (own.quantile(q).item() for q in (0.5, 0.9, 0.99))
    low, speedup, high = (ratios.quantile(q).item() for q in (0.25, 0.5, 0.75))
    macs, tokens, kernels, memory = facts[name]
    ratio = facts[dense][0] / macs
    return Speed(
        setting=name,
        runner=runner,
        batch=batch,
        images_per_s=batch / p50,
        p50_ms=p50 * 1e3,
        p90_ms=p90 * 1e3,
        p99_ms=p99 * 1e3,
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        mac_ratio=ratio,
        conversion=speedup / ratio,
        gmacs=macs / 1e9,
        tokens=tokens,
        memory_mb=memory,
        kernels=kernels,
        runs=len(own),
    )


def steady_allocator() -> bool:
    """Keep large freed blocks in the process (glibc), so that no forward pays for page faults; True where it worked.

    At batch 32 the default allocator costs a dense fp32 ViT up to a fifth of its time, and a reduced one less, which
    would make reductions look better than their MACs.
    """
    if platform.system() != "Linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, 2**30) and mallopt(trim_threshold, 2**31 - 1))
