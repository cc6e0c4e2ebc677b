"""Time that a command may take, and how much measuring fits into it: images, settings, timed runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from saccade.errors import UserError
from saccade.evaluation.candidates import RIVAL, Candidate
from saccade.evaluation.speed import LEAST_RUNS

Clock = Callable[[], float]  # seconds

LEAST_IMAGES, FEW_IMAGES = 20, 80  # fewer are refused; below the other number rather settings are left out
WARM_RUNS = 6  # forwards of a setting before it is timed: three, and what memory and MACs are read from
RESERVE = 0.12  # of the time: for the report, its pictures, and what was estimated too low


@dataclass(frozen=True)
class Allowance:
    """Seconds that may be spent from ``started`` on; ``seconds`` infinite: as many as it needs."""

    seconds: float = math.inf
    clock: Clock = time.perf_counter
    started: float = field(default=math.nan)

    def __post_init__(self) -> None:
        if math.isnan(self.started):
            object.__setattr__(self, "started", self.clock())

    @classmethod
    def of(cls, minutes: float | None, clock: Clock = time.perf_counter) -> Allowance:
        """So many minutes from now; None: no limit. Raises UserError for what is no time."""
        if minutes is None:
            return cls(clock=clock)
        if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes <= 1e5:
            raise UserError(f"minutes={minutes!r} is not a number above 0 and up to 100000")
        return cls(60.0 * minutes, clock)

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return math.isfinite(self.seconds)

    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    def beyond(self, share: float) -> bool:
        """Whether this share of the time is over; never, where there is no limit."""
        return self.limited and self.spent() >= share * self.seconds


@dataclass(frozen=True)
class Costs:
    """What was measured before planning, in seconds."""

    image: float  #   a forward of the dense model, for one image of a batch
    decode: float  #  reading one image and making it an input


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    images: int  #                  half of them choose, half report
    candidates: list[Candidate]  #  that are raced
    survivors: int  #               reductions that are timed and reported
    timing: float  #                seconds of timed runs
    seconds: float  #               that all of this is expected to take


def plan(
    candidates: Sequence[Candidate],
    costs: Costs,
    allowance: Allowance,
    *,
    images: int,
    batch: int,
    survivors: int,
    runners: int,
    timing: float,
    ratio: float | None,
) -> Sizes:
    """What fits into the time that is left; all of it where there is no limit.

    Fewer images first, then fewer settings, those nearest to what is aimed at staying. Never fewer than 20 images: a
    time too short even for that is overdrawn, and ``seconds`` says it.

    Args:
        images: at most this many.
        runners: other ways to run that are timed beside the survivors, in settings.
        timing: seconds of timed runs, if there is time for them.
        ratio: the MAC ratio aimed at.
    """
    left = allowance.seconds * (1 - RESERVE) - allowance.spent()
    kept = list(candidates)
    while True:
        work = _Work(kept, survivors, runners)
        least = work.timed * (LEAST_RUNS + WARM_RUNS) * batch * costs.image
        timed = max(least, min(timing, 0.25 * left))
        each = costs.image * work.an_image + costs.decode
        fit = images if not allowance.limited else int((left - timed) / each)
        if fit >= min(FEW_IMAGES, images) or len(kept) <= 6:
            break
        kept, survivors, runners = _fewer(kept, ratio), max(3, survivors // 2), max(2, runners // 2)
    count = max(min(images, LEAST_IMAGES), min(images, fit))
    return Sizes(count, kept, survivors, timed, count * each + timed)


class _Work:
    """Forwards of the dense model that are worth as much as measuring these candidates: for one image, and timing."""

    def __init__(self, kept: Sequence[Candidate], survivors: int, runners: int) -> None:
        dense = max(c.macs for c in kept)
        base = sum(c.macs for c in kept if c.is_baseline) / dense
        free = sum(c.macs for c in kept if not c.is_baseline) / dense
        count = sum(not c.is_baseline for c in kept)
        last = base + free * min(1.0, survivors / max(count, 1))
        raced = (base + free) / 4 + (base + max(free / 2, last - base)) / 4 + last / 2
        self.timed = last + runners
        self.an_image = (raced + last + 2 * runners) / 2  # one image chooses or reports


def _fewer(kept: list[Candidate], ratio: float | None) -> list[Candidate]:
    """Half of the candidates: the dense model, and of each family those nearest to the ratio."""
    dense, aim = kept[0], ratio or 1.5
    out = [dense]
    for family in ("dense", "random", "reduction"):
        found = [c for c in kept[1:] if c.family == family]
        near = sorted(found, key=lambda c: abs(math.log(dense.macs / c.macs / aim)))
        out += near[: max(1, len(found) // 2)] if len(found) > 1 else near
    out += [c for c in kept if c.family == RIVAL]
    return [c for c in kept if c in out]
