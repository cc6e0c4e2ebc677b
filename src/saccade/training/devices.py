"""Where training runs: one CPU or GPU, or one process for each, started by ``torchrun``; and how it is asked to stop.

Lightning Fabric supplies the device, the precision and the process group, and leaves the loop ours. Accelerate, tried
beside it, keeps process-wide state that a second run with another precision in the same process trips over.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from types import FrameType, TracebackType
from typing import Any

import torch

from saccade.errors import UserError
from saccade.training.config import Run

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}


def open_fabric(run: Run) -> Any:
    """A launched Fabric. Raises UserError for a GPU that is not there."""
    from lightning_fabric import Fabric

    kind = ("cuda" if torch.cuda.is_available() else "cpu") if run.device == "auto" else run.device
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device='cuda' and there is no GPU here: give run.device=cpu")
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if run.threads:
        torch.set_num_threads(run.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises DataLoader workers; ours are set elsewhere
        fabric = Fabric(
            accelerator=kind,
            devices=local,
            num_nodes=world // local,
            strategy="ddp" if world > 1 else "auto",
            precision=PRECISION[run.precision],  # type: ignore[arg-type]
        )
        fabric.launch()
    return fabric


class Stopping:
    """Ctrl-C and SIGTERM ask for a stop, which comes after a step and its checkpoint; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def agreed(self, world: int, device: torch.device) -> bool:
        """Whether any process was asked to stop: all must leave the loop at the same step."""
        if world == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=device)
        torch.distributed.all_reduce(flag)
        return bool(flag)
