"""What reports are made of: rows of numbers, and samples of pictures."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from saccade.renamed.row_names import OldRowNames
from saccade.reports.scale import Scale


@dataclass(frozen=True)
class Row(OldRowNames):
    """One measured setting. Shares are fractions 0 … 1, ``delta`` is against dense; None: not measured."""

    setting: str
    family: str  # "dense" | "reduction" | "random" | "rival"
    gmacs: float
    mac_ratio: float  # MACs of dense ÷ MACs of this setting, 1 and more
    value: float | None  # of ``metric``, in its own unit, with its 95 % interval
    value_low: float | None
    value_high: float | None
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
    metric: str = "top-1"  # of which ``value`` and ``delta`` are; empty: none was measured

    @property
    def merit(self) -> float:
        """The metric as a number of which more is better; 0 where it was not measured."""
        return Scale.of(self.metric).merit(self.value or 0.0)


@dataclass(frozen=True)
class Sample:
    """One image under several settings: ``(caption, picture)`` each."""

    name: str
    panels: list[tuple[str, Image.Image]]
