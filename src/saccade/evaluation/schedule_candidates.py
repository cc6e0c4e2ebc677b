"""The schedules that ``tune`` puts into its race: found for its budget, by the images that choose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from saccade.evaluation.allowance import Allowance
from saccade.evaluation.candidates import RED, Candidate
from saccade.evaluation.defined import NonFinite
from saccade.evaluation.distance import Distance
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.latency_curve import LatencyCurve
from saccade.evaluation.schedule import Space
from saccade.evaluation.schedule_price import Price
from saccade.evaluation.schedule_search import TRIES, FoundSchedules, ScheduleSearch
from saccade.evaluation.schedule_starts import Tried
from saccade.terminal.progress import Progress

RACED = 3  # of the schedules found for a budget
RANKED = 384  # images that those are chosen by: of few, moves suit what the few have in particular
SHARE, LEAST_MINUTES = 0.15, 4.0  # of a limited time; and how much of it there must be
RANK_SHARE = 0.05  # of it, for ranking after the search


@dataclass(frozen=True)
class Schedules:
    """What was found: candidates, a line about how, and the latency curve that they were priced by, if any."""

    candidates: list[Candidate]
    note: str = ""
    curve: LatencyCurve | None = None


def schedules(
    evaluator: Evaluator,
    places: Sequence[int],
    price: Callable[[Space], Price | None],
    allowance: Allowance,
    *,
    tries: int | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Schedules:
    """Search for schedules within a budget (``schedule_search``).

    Args:
        places: of the images that choose; no other is looked at.
        price: what they may cost; None: there is nothing to look for.
        tries: schedules that are run, at most; None: 400, or as many as a seventh of a limited time suffices for.
        folder: for the state, so that an interrupted search goes on; None: none is kept.
    """
    if tries == 0 or (tries is None and allowance.limited and allowance.seconds < 60 * LEAST_MINUTES):
        return Schedules([])
    space, progress = Space.of(evaluator.dense), progress or Progress()
    budget = price(space) if space.rules else None
    if budget is None:
        return Schedules([])
    most, distance = TRIES if tries is None else tries, Distance(evaluator, places)
    until = allowance.spent() + SHARE * allowance.seconds
    key = hashlib.sha256(json.dumps([budget.key, distance.kind, seed, *map(int, places)]).encode()).hexdigest()[:24]
    advance = progress.start("searching for schedules", most)
    search = ScheduleSearch(
        space,
        distance,
        budget.cost,
        budget.limit,
        seed,
        most,
        enough=lambda: allowance.spent() > until,
        advance=advance,
        file=None if folder is None else folder / f"schedules-{key}.json",
        key=key,
    )
    found = search.run()
    advance.finish()
    if not found.nearest:
        why = "time did not suffice for a schedule" if allowance.spent() > until else "no schedule is within the budget"
        return Schedules([], why, budget.curve)
    later = allowance.spent() + RANK_SHARE * allowance.seconds
    ranked, images = _ranked(evaluator, places, space, found, lambda: allowance.spent() > later)
    best = {str(space.setting(t.schedule)): space.macs(t.schedule) for t in _apart(ranked)[:RACED]}
    nearest = f"the nearest {len(best)} to the dense model" + (f" on {images}" if images > found.images else "")
    note = (
        f"{found.tried} schedules were tried on {found.images} of the images that choose, without their labels, within "
        f"a budget of {budget.words}; {nearest} went into the race"
    )
    return Schedules([Candidate(s, RED, macs, True, found.tried) for s, macs in best.items()], note, budget.curve)


def _apart(ranked: Sequence[Tried]) -> list[Tried]:
    """The nearest of each tokenizer first: what is nearest and what is right most often may be different kinds."""
    first = {tried.schedule.tokenizer: tried for tried in reversed(ranked)}
    return sorted(ranked, key=lambda tried: first[tried.schedule.tokenizer] is not tried)


def _ranked(
    evaluator: Evaluator, places: Sequence[int], space: Space, found: FoundSchedules, enough: Callable[[], bool]
) -> tuple[list[Tried], int]:
    """What was found, and what the search started from, the nearest first by more images, or by the search's where time
    does not suffice; and by how many."""
    both = [*found.nearest, *(start for start in found.starts if start not in found.nearest)]
    known = sorted(both, key=lambda tried: tried.distance), found.images
    if len(places) <= found.images:
        return known
    distance, ranked = Distance(evaluator, places, RANKED), list[tuple[float, Tried]]()
    for tried in both:
        if enough():
            return known
        with suppress(NonFinite):
            ranked.append((sum(distance.of(str(space.setting(tried.schedule)))), tried))
    return [tried for _, tried in sorted(ranked, key=lambda pair: pair[0])], distance.images
