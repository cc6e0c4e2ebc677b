"""Starting an engine on a model, in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.runners.captured import GRAPHS, Captured, warn_of_size
from saccade.runners.engine import Run, Session, engine_for
from saccade.runners.exported import Answer, Exported, has_fixed_counts
from saccade.runners.runner import COMPILE, CUDAGRAPH, Runner

if TYPE_CHECKING:
    from saccade.model import AdaptiveViT

_NUMBERS = count()  # of functions that are compiled


def start(
    model: AdaptiveViT, runner: Runner, *, threads: int | None = None, fixed: bool = False, provenance: bool = False
) -> Session:
    """A model under its setting, inside an engine.

    Args:
        threads: of one call, where the engine has threads of its own; None: as many as torch has now.
        fixed: for the runner's batch alone; else for any number of images.
        provenance: outputs ``owner`` and ``tokens`` too.

    Raises:
        UserError: an engine that is not installed, a number type that this machine does not compute in, a program that
            the engine has no operator for.
    """
    if not runner.exported:
        return _in_torch(model, runner, provenance)
    engine, threads = engine_for(runner), threads or torch.get_num_threads()
    batch, parts = runner.batch if fixed else None, 1
    if batch:
        parts = engine.parts(batch, threads)
        batch //= parts
    exported = replace(Exported.of(model, runner, batch, provenance), parts=parts)
    with TemporaryDirectory(prefix="saccade-", ignore_cleanup_errors=True) as folder:
        engine.write(exported, Path(folder), runner.dtype)
        return engine.open(Path(folder), runner.dtype, threads)


class Compiled:
    """A model by ``torch.compile``: one graph for each size of batch, whole where the setting's counts are static.

    Sizes beyond the first few run operator by operator, and a RuntimeWarning says so. Torch itself falls back for what
    it meets as the ninth variant of one function, be it another model, and only logs it: here each has its own.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer, self.whole = answer, has_fixed_counts(answer.model)
        self._graphs: dict[torch.Size, Callable] = {}
        self._lock = threading.Lock()

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """images [B, C, h, w] -> the answer's outputs."""
        with self._lock:
            known = len(self._graphs)
            if images.shape not in self._graphs:
                self._graphs[images.shape] = self._compiled() if known < GRAPHS else self.answer
        if known >= GRAPHS and self._graphs[images.shape] is self.answer:
            warn_of_size(f"torch.compile has made {GRAPHS} graphs", self.answer, images)
        return self._graphs[images.shape](images)

    def _compiled(self) -> Callable:
        def forward(images: Tensor) -> tuple[Tensor, ...]:
            return self.answer(images)

        forward.__code__ = forward.__code__.replace(co_name=f"forward_{next(_NUMBERS)}")
        return torch.compile(forward, dynamic=False, fullgraph=self.whole)


def _in_torch(model: AdaptiveViT, runner: Runner, provenance: bool) -> Session:
    answer = Answer(runner.model(model), provenance)
    device = next(answer.parameters()).device
    made: dict[str, Callable[[Answer], Run]] = {COMPILE: Compiled, CUDAGRAPH: Captured}
    way = made[runner.engine](answer) if runner.engine in made else answer

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return way(images.to(device))

    facts = {"engine": runner.engine, "dtype": runner.dtype, "precision": runner.dtype, "device": str(device)}
    return Session(run, answer.outputs, threads=torch.get_num_threads(), **facts)
