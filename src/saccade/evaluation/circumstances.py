"""What was measured on what: the model, the machine, the versions, in a report's words."""

from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import saccade
from saccade.model import AdaptiveViT


def csv_text(rows: Sequence[Any]) -> str:
    """Dataclasses of one kind as a table with a heading, floats unrounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(vars(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(row) for row in rows)
    return text.getvalue()


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
