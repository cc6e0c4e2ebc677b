"""Intervals at 95 % and paired tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def three(self) -> tuple[float, float, float]:
        """(mean, low, high)."""
        return self.mean, self.low, self.high

    def percent(self, digits: int = 1) -> str:
        """A share as text: ``85.0% [80.7%, 88.5%]``."""
        return f"{self.mean:.{digits}%} [{self.low:.1%}, {self.high:.1%}]"

    def points(self) -> str:
        """A difference of shares as text, in points: ``-1.7 [-3.7, +0.3]``."""
        return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in self.three()))


def without_infinity(value: Any) -> Any:
    """A mapping of numbers with None for limits that are infinite, which JSON cannot write."""
    if isinstance(value, dict):
        return {name: without_infinity(one) for name, one in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value


def proportion(hits: Tensor) -> Interval:
    """Share of hits [n] (bool), with Wilson's interval."""
    n, p = len(hits), hits.double().mean().item()
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap(values: Tensor, seed: int = 0, *, least: float = -math.inf, most: float = math.inf) -> Interval:
    """Mean of values [n], with its percentile bootstrap interval over images; of paired differences too.

    One image tells nothing of others, and every resample of it is itself: its interval is all that a value can be, from
    ``least`` to ``most``.
    """
    values = values.double()
    n, mean = len(values), values.mean().item()
    if n == 1:
        return Interval(mean, least, most)
    kinds, counts = values.unique(return_counts=True)
    generator = torch.Generator().manual_seed(seed)
    if len(kinds) <= 16:  # few distinct values: resampling images is drawing how many of each
        means = _multinomial(counts, n, generator) @ kinds / n
    else:
        means = torch.cat(
            [values[torch.randint(n, (100, n), generator=generator)].mean(1) for _ in range(DRAWS // 100)]
        )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)


def paired_difference(a: Tensor, b: Tensor) -> Interval:
    """Share of hits a − of hits b [n] (bool, of the same images), in −1 … 1.

    The bootstrap interval; where all images agree about the difference, of which a bootstrap makes a width of zero
    however few they are, that of Agresti and Min (2005): Wald's, with half an image more of each kind.
    """
    gap = a.double() - b.double()
    n, mean = len(gap), gap.mean().item()
    if len(gap.unique()) > 1:
        return bootstrap(gap)
    only_a, only_b, more = (gap > 0).sum().item() + 0.5, (gap < 0).sum().item() + 0.5, n + 2
    centre = (only_a - only_b) / more
    half = Z * math.sqrt(max(0.0, only_a + only_b - (only_a - only_b) ** 2 / more)) / more
    return Interval(mean, max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def mcnemar(a: Tensor, b: Tensor) -> float:
    """Exact two-sided p-value that two sets of hits [n] (bool, paired) differ only by chance."""
    gained, lost = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    ways = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1))
    return min(1.0, 2 * math.fsum(math.exp(log_ways - n * math.log(2)) for log_ways in ways))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's ρ of two values [n] of the same images, equal values of one rank; 0 where all of one are equal."""
    return float(_ranks(a) @ _ranks(b))


def _ranks(values: Tensor) -> Tensor:
    """Ranks [n], equal for equal values, with mean 0 and length 1."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place].double()
    ranks = ranks - ranks.mean()
    return ranks / ranks.norm().clamp(min=1e-12)


def _multinomial(counts: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """DRAWS resamples of n images by kind, [DRAWS, kinds]: binomials, one kind after another."""
    left = torch.full((DRAWS,), float(n), dtype=torch.float64)
    remaining, drawn = float(n), []
    for count in counts.double().tolist()[:-1]:
        share = torch.full_like(left, min(1.0, count / remaining))
        drawn.append(torch.binomial(left, share, generator=generator))
        left, remaining = left - drawn[-1], remaining - count
    return torch.stack([*drawn, left], dim=1)
