"""What every engine is: something that writes an exported program to files, and opens them again."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from saccade.errors import UserError
from saccade.runners.runner import QUANTISED, Runner

if TYPE_CHECKING:
    from saccade.runners.exported import Exported

Run = Callable[[Tensor], tuple[Tensor, ...]]


class Engine(Protocol):
    """One way to run an exported program. Each engine is a module of this package with these names."""

    FILES: tuple[str, ...]  # that ``write`` leaves in a folder, the one to open first
    PACKAGES: tuple[str, ...]  # that must be installed, as pip calls them
    EXTRA: str  # of saccade, that installs them; empty: none is needed

    def dtypes(self) -> tuple[str, ...]:
        """Number types that this machine computes in, by this engine."""

    def parts(self, batch: int, threads: int) -> int:
        """Of how many parts, computed side by side, a batch is run the fastest; equal ones."""

    def write(self, exported: Exported, folder: Path, dtype: str) -> None:
        """Write the program's files. Raises UserError for what this engine has no operator for."""

    def open(self, folder: Path, dtype: str, threads: int) -> Session:
        """The program that lies in a folder, ready to run."""


@dataclass(frozen=True)
class Session:
    """A model inside an engine: images [B, C, h, w] -> logits [B, K] (an encoder's features [B, D]), fp32 both.

    Any number of threads may call it at once.
    """

    run: Run
    outputs: tuple[str, ...]
    engine: str
    dtype: str  #      that was asked for
    precision: str  #  that the engine says it computes in
    device: str
    threads: int  #    of one call

    def __call__(self, images: Tensor) -> Tensor:
        """The first output: logits, or features."""
        return self.run(images)[0]

    def all(self, images: Tensor) -> dict[str, Tensor]:
        """All outputs by their names."""
        return dict(zip(self.outputs, self.run(images), strict=True))


def missing(engine: Engine) -> str | None:
    """What to install for an engine, as a command; None: all is there."""
    absent = [name for name in engine.PACKAGES if importlib.util.find_spec(name.replace("-", "_")) is None]
    return f"pip install 'saccade[{engine.EXTRA}]'" if absent else None


def engine_of(name: str) -> Engine:
    """The engine of that name. Raises UserError where a package of it is not installed, with the install line."""
    engine: Engine = import_module(f"saccade.runners.engines.{name}")  # type: ignore[assignment]
    if command := missing(engine):
        raise UserError(f"engine {name!r} is not installed here: {command}")
    return engine


def installed() -> list[Runner]:
    """Engines that are installed here, in every number type but quantised ones; none that has to compile first."""
    found = []
    for name in ("onnx", "openvino"):
        engine: Engine = import_module(f"saccade.runners.engines.{name}")  # type: ignore[assignment]
        if missing(engine) is None:
            found += [Runner(dtype, name) for dtype in engine.dtypes() if dtype != QUANTISED]
    return found


def engine_for(runner: Runner) -> Engine:
    """The engine of a runner that takes exported programs.

    Raises UserError where it is not installed, with the install line, or does not compute in the runner's number type.
    """
    engine = engine_of(runner.engine)
    check_dtype(engine, runner.engine, runner.dtype)
    return engine


def check_dtype(engine: Engine, name: str, dtype: str) -> None:
    """Raises UserError for a number type that this machine does not compute in, by this engine."""
    if dtype not in (known := engine.dtypes()):
        raise UserError(f"{name} does not run in {dtype} on this machine: use {' or '.join(known)}")


def versions(engine: Engine) -> dict[str, str]:
    """Of the packages that an engine needs, and of PyTorch."""
    return {name: metadata.version(name) for name in engine.PACKAGES} | {"torch": torch.__version__}
