"""Intervals and paired tests against published figures, brute force and exact sums."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.evaluation.stats import bootstrap, mcnemar, proportion, rank_correlation


def hits(good: int, n: int) -> torch.Tensor:
    return torch.arange(n) < good


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
@pytest.mark.parametrize(
    "good, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_the_published_one(good, n, low, high):
    found = proportion(hits(good, n))
    assert found.mean == pytest.approx(good / n)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(st.integers(1, 400), st.data())
def test_wilson_holds_the_share_stays_in_range_and_is_symmetric(n, data):
    good = data.draw(st.integers(0, n))
    a, b = proportion(hits(good, n)), proportion(hits(n - good, n))
    assert 0 <= a.low <= a.mean + 1e-12 and a.mean - 1e-12 <= a.high <= 1
    assert a.low == pytest.approx(1 - b.high, abs=1e-12)
    assert a.three() == (a.mean, a.low, a.high)


def resampled(values: np.ndarray, draws: int = 40_000) -> tuple[float, float]:
    generator = np.random.default_rng(7)
    means = values[generator.integers(len(values), size=(draws, len(values)))].mean(1)
    return tuple(np.percentile(means, [2.5, 97.5]))


DIFFERENCES = np.random.default_rng(0).choice([-1.0, 0.0, 0.0, 0.0, 1.0], 173)
CONTINUOUS = np.random.default_rng(1).gamma(0.7, size=61)


@pytest.mark.parametrize("values", [DIFFERENCES, CONTINUOUS, DIFFERENCES[:9], CONTINUOUS[:17], CONTINUOUS[:16]])
def test_bootstrap_is_brute_force_resampling(values):
    found = bootstrap(torch.tensor(values))
    low, high = resampled(values)
    error = values.std() / math.sqrt(
        len(values)
    )  # of the mean; quantiles of 10,000 draws are within a few percent of it
    grain = (1 / len(values)) if len(np.unique(values)) <= 3 else 0  # means of −1, 0, 1 come in steps
    assert found.mean == pytest.approx(values.mean())
    assert abs(found.low - low) <= 0.12 * error + grain
    assert abs(found.high - high) <= 0.12 * error + grain


def test_both_ways_of_drawing_agree():
    """The same values, told apart by a hair: the other branch."""
    plain = torch.tensor(DIFFERENCES)
    apart = plain + torch.arange(len(plain)) * 1e-9
    a, b = bootstrap(plain), bootstrap(apart)
    assert a.low == pytest.approx(b.low, abs=1.5 / len(plain))
    assert a.high == pytest.approx(b.high, abs=1.5 / len(plain))


def test_bootstrap_repeats_itself_and_follows_the_seed():
    values = torch.tensor(CONTINUOUS)
    assert bootstrap(values, 3) == bootstrap(values, 3) != bootstrap(values, 4)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("n", [2, 50])
def test_equal_values_leave_no_doubt_to_the_bootstrap(value, n):
    assert bootstrap(torch.full((n,), value)).three() == (value, value, value)


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_one_value_has_the_widest_interval(value):
    assert bootstrap(torch.tensor([value])).three() == (value, -math.inf, math.inf)
    assert bootstrap(torch.tensor([value]), least=-3.0, most=1.0).three() == (value, -3.0, 1.0)


def test_one_image_says_little():
    for good in (0, 1):
        found = proportion(hits(good, 1))
        assert found.mean == good
        assert found.high - found.low > 0.7


def test_intervals_cover_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    n, rounds, share, covered = 80, 400, 0.7, [0, 0]
    for seed in range(rounds):
        a, b = (torch.rand(2, n, generator=generator) < torch.tensor([[share], [0.6]])).unbind()
        covered[0] += (lambda i: i.low <= share <= i.high)(proportion(a))
        covered[1] += (lambda i: i.low <= share - 0.6 <= i.high)(bootstrap(a.double() - b.double(), seed))
    # 95 % of 400 has a standard deviation of 1.1 points; the percentile bootstrap is a touch too narrow at n = 80
    assert 0.92 <= covered[0] / rounds <= 0.985
    assert 0.90 <= covered[1] / rounds <= 0.985


def exact(gained: int, lost: int) -> float:
    n, k = gained + lost, min(gained, lost)
    tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(k + 1))
    return float(min(Fraction(1), 2 * tail))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5), st.integers(0, 5))
def test_mcnemar_is_the_exact_binomial(gained, lost, both, neither):
    a = torch.tensor([1] * gained + [0] * lost + [1] * both + [0] * neither).bool()
    b = torch.tensor([0] * gained + [1] * lost + [1] * both + [0] * neither).bool()
    assert mcnemar(a, b) == pytest.approx(exact(gained, lost), rel=1e-9)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_by_hand():
    a, b = torch.tensor([1] * 8 + [0] * 2).bool(), torch.tensor([0] * 8 + [1] * 2).bool()
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(a, a) == 1.0


def test_mcnemar_does_not_overflow_on_many_images():
    a = torch.arange(40_000) % 2 == 0
    assert mcnemar(a, ~a) == 1.0
    assert 0 <= mcnemar(torch.ones(5000).bool(), torch.zeros(5000).bool()) < 1e-300


def test_rank_correlation_by_hand():
    """Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: a covariance of 4.5 over the root of 4.5 · 5."""
    a, b = torch.tensor([0.1, 7.0, 7.0, 8.0]), torch.tensor([-2, 5, 3, 100])
    assert rank_correlation(a, b) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(a, -a) == pytest.approx(-1.0) and rank_correlation(a, torch.ones(4)) == 0.0
