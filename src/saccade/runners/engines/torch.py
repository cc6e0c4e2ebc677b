"""PyTorch itself: the exported program as ``torch.export`` saves it, run operator by operator."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saccade.runners.engine import Session
from saccade.runners.exported import Exported, quiet

FILES = ("model.pt2",)
PACKAGES: tuple[str, ...] = ()
EXTRA = ""
NAMES = "outputs.txt"  # kept beside the program


def dtypes() -> tuple[str, ...]:
    """Number types of PyTorch's own kernels."""
    return "fp32", "bf16"


def parts(batch: int, threads: int) -> int:
    """One: all threads work on the whole batch."""
    return 1


def write(exported: Exported, folder: Path, dtype: str) -> None:
    """Write ``model.pt2``."""
    with quiet():
        torch.export.save(exported.program, folder / FILES[0], extra_files={NAMES: " ".join(exported.outputs)})


def open(folder: Path, dtype: str, threads: int) -> Session:
    """The program, loaded: PyTorch unpacks objects from it, so open none that you do not trust."""
    told = {NAMES: ""}
    program = torch.export.load(folder / FILES[0], extra_files=told).module()

    def run(images: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return tuple(program(images))

    return Session(run, tuple(told[NAMES].split()), "torch", dtype, dtype, "cpu", torch.get_num_threads())
