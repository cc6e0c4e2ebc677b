"""Search for the schedule that stays nearest to the dense model within a budget: coarse to fine, on the real thing.

From a few plain shapes (``schedule_starts``) a small population grows, whose moves are kept where they are nearer to
the dense model's answers. No label is read. All is a function of (seed, try), so that what was interrupted goes on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.evaluation.distance import Distance
from saccade.evaluation.failures import is_systems
from saccade.evaluation.schedule import Cost, Schedule, Space
from saccade.evaluation.schedule_starts import Starts, Tried
from saccade.storage.files import write_json

POPULATION = 6
PRESSURE = 0.7  # rate of the exponential by which parents are drawn, the nearest most often
TRIES = 400


@dataclass(frozen=True)
class FoundSchedules:
    """What a search gives."""

    nearest: list[Tried]  # nearest first
    starts: list[Tried]  #  the nearest that it started from, of plain shapes
    tried: int  #           schedules that were run, on some of the images at least
    images: int  #          that they were judged by


def never() -> bool:
    """There is no limit."""
    return False


def unwatched(done: int) -> None:
    """Progress that is shown nowhere."""


@dataclass
class ScheduleSearch:
    """One search.

    Args:
        cost: what a schedule costs, in the unit of ``limit``.
        tries: schedules that are drawn, at most; those that it starts from count too, and are run in any case.
        enough: asked before each; no more are run once it is true.
        advance: told of each setting that was run.
        file: holds how far a search came, and is taken up; None: none is kept.
        key: what the content of the file follows from.
    """

    space: Space
    distance: Distance
    cost: Cost
    limit: float
    seed: int = 0
    tries: int = TRIES
    enough: Callable[[], bool] = never
    advance: Callable[[int], None] = unwatched
    file: Path | None = None
    key: str = ""
    tried: int = field(default=0, init=False)
    drawn: int = field(default=0, init=False)  # those tried, and draws that gave no new schedule
    starts: list[Tried] = field(default_factory=list, init=False)

    def run(self) -> FoundSchedules:
        """The nearest schedules within the budget; none where none is."""
        population = self._taken_up()
        if population is None:
            starts = Starts(self.space, self.cost, self.limit, self.judge, self.enough)
            population = self.starts = starts.population(POPULATION)
            self._keep(population)
        while population and self.drawn < self.tries and not self.enough():
            population = self._after_move(population)
            self._keep(population)
        return FoundSchedules(population, self.starts, self.tried, self.distance.images)

    def judge(self, schedule: Schedule, least: Sequence[float], batches: int | None) -> Tried | None:
        """Its distances; None where it fails, or is given up."""
        self.tried += 1
        self.drawn += 1
        self.advance(1)
        try:
            found = self.distance.of(str(self.space.setting(schedule)), least, batches)
        except Exception as error:
            if is_systems(error):
                raise
            return None
        return None if least and len(found) < len(least) else Tried(schedule, tuple(found))

    def _after_move(self, population: list[Tried]) -> list[Tried]:
        """The population after one of it has moved: a nearer child takes the place of the farthest."""
        draw = random.Random(f"{self.seed} {self.drawn}")
        parent = population[min(len(population) - 1, int(draw.expovariate(PRESSURE)))]
        child = self.space.within(self.space.tidied(self.space.moved(parent.schedule, draw)), self.cost, self.limit)
        if child is None or any(child == other.schedule for other in population):
            self.drawn += 1
            self.advance(1)
            return population
        found = self.judge(child, population[-1].distances, None)
        if found is None or (len(population) >= POPULATION and found.distance >= population[-1].distance):
            return population
        return sorted([*population, found], key=lambda tried: tried.distance)[:POPULATION]

    def _keep(self, population: list[Tried]) -> None:
        if self.file is not None and population:  # none where there was no time
            counts = {"tried": self.tried, "drawn": self.drawn}
            kept = {"population": _rows(population), "starts": _rows(self.starts)}
            write_json(self.file, {"key": self.key, **counts, **kept})

    def _taken_up(self) -> list[Tried] | None:
        """The population that the file holds; None where it holds none of this search."""
        try:
            told = json.loads(self.file.read_text(encoding="utf-8")) if self.file is not None else None
            if told is None or told["key"] != self.key:
                return None
            found = [self._read(*row) for row in told["population"]]
            self.starts = [self._read(*row) for row in told.get("starts", [])]
            self.tried, self.drawn = int(told["tried"]), int(told.get("drawn", told["tried"]))
        except (ValueError, TypeError, KeyError, AttributeError, OSError):
            return None
        self.advance(self.drawn)
        return found

    def _read(self, tokenizer: Any, counts: Any, distances: Any) -> Tried:
        """A row of the file. Raises ValueError for one that is not of this space."""
        lists = tuple(tuple(map(int, rule)) for rule in counts)
        fits = len(lists) == len(self.space.rules) and all(len(rule) == self.space.depth for rule in lists)
        if tokenizer not in self.space.tokenizers or not fits or min(map(min, lists)) < 0:
            raise ValueError
        return Tried(Schedule(tokenizer, lists), tuple(map(float, distances)))


def _rows(some: Sequence[Tried]) -> list[Any]:
    """As a file holds them."""
    return [[t.schedule.tokenizer, t.schedule.counts, t.distances] for t in some]
