"""Where a search for schedules starts: plain shapes of every rule on every tokenizer, and what sensitivity asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from saccade.evaluation.schedule import Cost, Rule, Schedule, Space

COARSE = 2  # batches of the second look; the first is on one
SHAPED = 8  # methods on tokenizers that are looked at twice, in several shapes
PROBE = 0.1  # share of all tokens that leave at one block, to see how sensitive it is


@dataclass(frozen=True)
class Tried:
    """A schedule, and its distance from the dense model on each batch."""

    schedule: Schedule
    distances: tuple[float, ...]

    @property
    def distance(self) -> float:
        """On all of them."""
        return sum(self.distances)


# A schedule, the distances to beat by batch, and on how many batches (None: all) -> None: it failed, or is hopeless.
Judge = Callable[[Schedule, Sequence[float], int | None], Tried | None]


@dataclass(frozen=True)
class Starts:
    """The schedules that a search of a space starts from, within a budget."""

    space: Space
    cost: Cost
    limit: float
    judge: Judge
    enough: Callable[[], bool]  # asked before each; no more are looked at once it is true

    def population(self, count: int) -> list[Tried]:
        """So many schedules, the nearest first: all are judged on a few images, the better ones on all."""
        looked = sorted(self._plain(), key=_distance)[: 2 * count]
        for tried in looked[:2]:
            found = self._by_sensitivity(tried.schedule)
            looked += [] if found is None else [found]
        whole = (self.judge(tried.schedule, (), None) for tried in looked)
        return sorted((found for found in whole if found is not None), key=_distance)[:count]

    def _plain(self) -> Iterator[Tried]:
        """Four shapes of the methods and tokenizers that one of the shapes, on a batch, tells to be the nearest.

        A tokenizer that is farther, alone, than a whole schedule is left out.
        """
        depth, best = self.space.depth, math.inf
        usual, *others = [
            [0.0] + [1.0] * (depth - 1),  # all blocks but the first
            [1.0] * depth,
            [min(block, 0.5 * (depth - 1 - block)) for block in range(depth)],  # most at a third of the depth
            [float(block in (depth // 4, depth // 2, 3 * depth // 4)) for block in range(depth)],  # deciding takes time
        ]
        first: list[tuple[Tried, dict[Rule, float]]] = []
        for tokenizer in self.space.tokenizers:
            alone = self.judge(self.space.empty(tokenizer), (), 1) if tokenizer else None
            if alone is not None and alone.distance > best:
                continue
            for rules in self._methods():
                if not self.enough() and (found := self._judged(tokenizer, rules, usual, 1)) is not None:
                    best = min(best, found.distance)
                    first.append((found, rules))
        for rank, (tried, rules) in enumerate(sorted(first, key=lambda pair: pair[0].distance)[:SHAPED]):
            if rank and self.enough():
                return
            for shape in (usual, *others):
                if (found := self._judged(tried.schedule.tokenizer, rules, shape, COARSE)) is not None:
                    yield found

    def _judged(self, tokenizer: str, rules: dict[Rule, float], shape: Sequence[float], batches: int) -> Tried | None:
        """What a shape comes to, brought to the budget, on so many batches."""
        if not sum(shape):
            return None
        found = self.space.within(self.space.shaped(tokenizer, rules, shape), self.cost, self.limit)
        return None if found is None else self.judge(found, (), batches)

    def _methods(self) -> list[dict[Rule, float]]:
        """For each method its rules, all alike."""
        kinds = dict.fromkeys((rule.method, rule.others) for rule in self.space.rules)
        return [{r: 1.0 for r in self.space.rules if (r.method, r.others) == kind} for kind in kinds]

    def _by_sensitivity(self, schedule: Schedule) -> Tried | None:
        """The same rules on the same tokens, with more of them leaving where that moves the answers less.

        At one block at a time a share of all tokens leaves. Where that costs a distance of s, a count r costs about
        s · r², and it saves as much as there are blocks behind: the sum is least with r ∝ blocks behind ÷ s.
        """
        space, depth = self.space, self.space.depth
        if not schedule.total:  # the tokenizer alone is within the budget
            return None
        rules = {rule: float(sum(counts)) for rule, counts in zip(space.rules, schedule.counts, strict=True)}
        line = [0.0] * depth
        many = max(1, round(PROBE * space.tokens(schedule.tokenizer)))
        for block in range(depth - 1):
            shape = [float(other == block) for other in range(depth)]
            probe = space.scaled(space.shaped(schedule.tokenizer, rules, shape), many)
            if (found := self.judge(probe, (), 1)) is not None:
                line[block] = (depth - 1 - block) / max(found.distance, 1e-9)
        return self._judged(schedule.tokenizer, rules, line, COARSE)


def _distance(tried: Tried) -> float:
    return tried.distance
