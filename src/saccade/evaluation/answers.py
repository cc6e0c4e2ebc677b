"""What one setting said about each image, and what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """What one setting said about each of n images, and what that cost."""

    indices: Tensor  #  [n] int64  places in the image set
    top: Tensor  #      [n, 5] int64  best classes, best first
    nll: Tensor  #      [n] fp32  -log probability of the true class (of the dense model's best, without labels)
    kl: Tensor  #       [n] fp32  KL(dense ‖ this), nats
    macs: Tensor  #     [n] float64  that ran
    tokens: Tensor  #   [n] float64  mean tokens in the MLP of a block
    value: Tensor  #    [n] float64  of the metric, in its own unit; NaN where only all images together have one
    evidence: Tensor  # [n] float64  what few images are compared by, more is better: finer than right or wrong
    features: Tensor  # [n, D] fp32  embeddings of length 1 where the metric needs them, else D = 0

    def at(self, rows: Tensor) -> Predictions:
        """Some of the rows."""
        return Predictions(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Several, of different images, as one."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))
