"""Which settings a training step runs: a pure function of (seed, step), the same on every rank and after a resume."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from saccade.training.config import Knot, Ramp, Sampling


class Sampler:
    """Draws settings, given what each costs.

    Args:
        rule: settings, and how to draw among them.
        macs: forward MACs per image of each setting, in their order.
        steps: of the whole training, which a curriculum is stretched over.
    """

    def __init__(self, rule: Sampling, macs: Sequence[float], steps: int, seed: int) -> None:
        self.rule, self.steps, self.seed = rule, steps, seed
        self.macs = np.asarray(macs, dtype=np.float64)
        ends = {"largest": int(self.macs.argmax()), "smallest": int(self.macs.argmin())}
        self.every = [ends[name] if name in ends else rule.settings.index(name) for name in rule.every]

    def weights(self, step: int) -> np.ndarray:
        """Probabilities of the settings at a step, [S]."""
        given, count, done = self.rule.weights, len(self.rule.settings), step / max(1, self.steps - 1)
        if given == "uniform":
            raw = np.ones(count)
        elif given == "compute":  # each setting gets the same share of the MACs
            raw = 1 / self.macs
        elif isinstance(given, Ramp):
            raw = np.clip(1 - np.abs(np.arange(count) - (count - 1) * ramped(given, done)), 0, None)
        elif isinstance(given[0], Knot):
            knots: list[Knot] = sorted(given, key=lambda knot: knot.at)  # type: ignore[arg-type, attr-defined]
            at = [knot.at for knot in knots]
            rows = np.array([np.divide(knot.weights, sum(knot.weights)) for knot in knots])
            raw = np.array([np.interp(done, at, column) for column in rows.T])
        else:
            raw = np.asarray(given, dtype=np.float64)
        return raw / raw.sum()

    def draw(self, step: int) -> list[int]:
        """Places of the settings of a step, the dearest first and none twice."""
        p = self.weights(step)
        p[self.every] = 0.0
        count = min(self.rule.random, int((p > 0).sum()))
        drawn = np.random.default_rng([self.seed, 0x5E77, step]).choice(
            len(p), size=count, replace=False, p=p / p.sum() if count else None
        )
        return sorted({*self.every, *map(int, drawn)}, key=lambda i: (-self.macs[i], i))

    def histogram(self, start: int, stop: int) -> Counter[int]:
        """How often each setting is drawn in steps start … stop-1."""
        return Counter(i for step in range(start, stop) for i in self.draw(step))

    def cost(self, start: int, stop: int) -> float:
        """Forward MACs per image of all that steps start … stop-1 run."""
        return float(sum(self.macs[i] * times for i, times in self.histogram(start, stop).items()))


def ramped(ramp: Ramp, done: float) -> float:
    """How far along a ramp a training is of which a share is done: 0 … 1, half a cosine."""
    if not ramp.start < done < ramp.stop:
        return float(done >= ramp.stop)
    return (1 - math.cos(math.pi * (done - ramp.start) / (ramp.stop - ramp.start))) / 2
