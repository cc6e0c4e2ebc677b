"""What reports are made of: rows of numbers, and samples of pictures."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Row:
    """One measured setting. Accuracies are fractions 0 … 1, ``delta`` is against dense; None: not measured."""

    setting: str
    family: str  # "dense" | "reduction" | "random"
    gmacs: float
    mac_ratio: float  # MACs of dense ÷ MACs of this setting, 1 and more
    top1: float | None  # the metric that the report names, with its 95 % interval
    top1_low: float | None
    top1_high: float | None
    delta: float | None
    delta_low: float | None
    delta_high: float | None
    agreement: float | None
    speedup: float | None
    conversion: float | None
    images_per_s: float | None
    p50_ms: float | None
    memory_mb: float | None
    tokens: float
    on_frontier: bool
    chosen: bool
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One image under several settings: ``(caption, picture)`` each."""

    name: str
    panels: list[tuple[str, Image.Image]]
