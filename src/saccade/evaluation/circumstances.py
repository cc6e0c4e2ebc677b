"""What was measured on what: the model, the machine, the versions, in a report's words."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import saccade
from saccade.model import AdaptiveViT

RUN = "run"  # what files say of the run that wrote them


def csv_text(rows: Sequence[Any], run: str) -> str:
    """Dataclasses of one kind as a table with a heading, floats unrounded; their run is in the last column."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*vars(rows[0]), RUN], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**vars(row), RUN: run} for row in rows)
    return text.getvalue()


def run_name(command: str, written: Mapping[str, Any]) -> str:
    """A name for what a run writes, by its content: 12 hex digits.

    Page, table and numbers of one run take their places one after another. A process that is killed between leaves
    whole files of two runs: each file names its own, as ``run``, so that this can be seen.
    """
    return hashlib.sha256(json.dumps([command, written]).encode()).hexdigest()[:12]


def model_name(model: AdaptiveViT) -> str:
    """timm's name of it."""
    return model.vit.pretrained_cfg.get("architecture") or type(model.vit).__name__


def circumstances(model: AdaptiveViT) -> dict[str, str]:
    """What every report says of the model and the machine."""
    device = next(model.parameters()).device
    return {
        "model": f"{model_name(model)}, {sum(p.numel() for p in model.vit.parameters()) / 1e6:.1f} M parameters",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "versions": f"saccade {saccade.__version__}, torch {torch.__version__}, timm {timm.__version__}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"CPU, {name}, {os.cpu_count()} cores"
