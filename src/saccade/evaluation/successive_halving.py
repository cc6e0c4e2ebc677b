"""Successive halving: many settings on few images, few settings on many — always paired, on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from saccade.evaluation.accuracy import paired
from saccade.evaluation.answers import Predictions
from saccade.evaluation.candidates import RIVAL, Candidate

SAME_COST = 1.01  # MACs within one percent count as equal
Z90 = 1.645


def successive_halving(
    candidates: Sequence[Candidate],
    places: Sequence[int],
    predict: Callable[[Candidate, list[int]], Predictions | None],
    survivors: int,
) -> dict[Candidate, Predictions]:
    """The best settings for their cost, judged on the images at ``places`` (in random order).

    Rounds on 1/4, 1/2 and all of the images. After each, a setting leaves that another of no higher cost beats by more
    than noise (one-sided 95 %, paired), then the worst until half are left, but no fewer than ``survivors``; what
    counts is the evidence: the metric, or the probability given to the true class, which says more than a hit on few
    images. Baselines never leave, nor what a search found for the budget, whose time is not told by its MACs; rivals,
    which are other models, beat none.

    Args:
        predict: what a setting says about images; None: it failed, and leaves. Baselines are asked first.

    Returns:
        what each survivor said on all the images.
    """
    alive = list(candidates)
    said: dict[Candidate, list[Predictions]] = {c: [] for c in alive}
    edges = [0, *(max(1, len(places) * q // 4) for q in (1, 2)), len(places)]
    for start, end in pairwise(edges):
        if end <= start:
            continue
        found = {c: predict(c, list(places[start:end])) for c in sorted(alive, key=lambda c: not c.is_baseline)}
        alive = [c for c in alive if found[c] is not None]
        for candidate in alive:
            said[candidate].append(found[candidate])  # type: ignore[arg-type]
        alive = _halve(alive, {c: Predictions.join(said[c]) for c in alive}, survivors, last=end == len(places))
    return {c: Predictions.join(said[c]) for c in alive}


def _halve(alive: list[Candidate], found: dict[Candidate, Predictions], survivors: int, last: bool) -> list[Candidate]:
    regrets = {}
    for own in alive:
        others = [c for c in alive if c is not own and c.family != RIVAL and c.macs <= own.macs * SAME_COST]
        gaps = [_gap(found[other], found[own]) for other in others]
        beaten = any(mean - Z90 * error > 0 for mean, error in gaps)
        regrets[own] = (beaten, max((mean for mean, _ in gaps), default=0.0))
    free = sorted((c for c in alive if not _stays(c)), key=lambda c: regrets[c])
    allowed = survivors if last else max(survivors, len(free) // 2)
    unbeaten = [c for c in free if not regrets[c][0]]
    kept = set(unbeaten[:allowed] if len(unbeaten) >= min(survivors, len(free)) else free[:survivors])
    return [c for c in alive if _stays(c) or c in kept]


def _stays(candidate: Candidate) -> bool:
    return candidate.is_baseline or candidate.tried > 0


def _gap(a: Predictions, b: Predictions) -> tuple[float, float]:
    """Mean and standard error of a's advantage in evidence."""
    a, b = paired(a, b)
    if len(a.nll) == 0:
        return 0.0, float("inf")
    gain: Tensor = a.evidence - b.evidence
    return gain.mean().item(), (gain.std(correction=0) / len(gain) ** 0.5).item()


T = TypeVar("T")


def front(points: dict[T, tuple[float, float]]) -> set[T]:
    """Those with (cost, value) that no other beats: lower cost and higher value, one of them strictly."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    return {c for c, own in points.items() if not any(beats(other, own) for other in points.values())}


def shuffled_halves(count: int, seed: int, groups: Tensor | None = None) -> tuple[list[int], list[int]]:
    """Places 0 … count-1 in two random halves of the same mix of groups [count] (labels), each in random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    if groups is not None:
        order = order[groups[order].argsort(stable=True)]  # class by class, at random within
    halves = order[0::2], order[1::2]
    first, second = (half[torch.randperm(len(half), generator=generator)].tolist() for half in halves)
    return first, second
