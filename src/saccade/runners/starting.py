"""Starting an engine on a model, in this process."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.runners.engine import Session, engine_for
from saccade.runners.exported import Answer, Exported
from saccade.runners.runner import Runner

if TYPE_CHECKING:
    from saccade.model import AdaptiveViT


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
    engine = engine_for(runner)
    exported = Exported.of(model, runner, runner.batch if fixed else None, provenance)
    with TemporaryDirectory(prefix="saccade-", ignore_cleanup_errors=True) as folder:
        engine.write(exported, Path(folder), runner.dtype)
        return engine.open(Path(folder), runner.dtype, threads or torch.get_num_threads())


def _in_torch(model: AdaptiveViT, runner: Runner, provenance: bool) -> Session:
    answer = Answer(runner.model(model), provenance)
    device = next(answer.parameters()).device
    way = torch.compile(answer, dynamic=False) if runner.compiled else answer

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return way(images.to(device))

    facts = {"engine": runner.engine, "dtype": runner.dtype, "precision": runner.dtype, "device": str(device)}
    return Session(run, answer.outputs, threads=torch.get_num_threads(), **facts)
