"""What the report of a training run is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Checked:
    """Accuracy of one setting at one step, on images never trained on; fractions 0 … 1 with the 95 % interval."""

    step: int
    setting: str
    top1: float
    low: float
    high: float
    gmacs: float  # per image


@dataclass(frozen=True)
class Share:
    """What one setting got of the training."""

    setting: str
    steps: int  # times drawn
    gmacs: float  # spent in all, 10⁹ MACs, forward and backward, for all images
