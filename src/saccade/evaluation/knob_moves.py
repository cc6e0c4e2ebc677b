"""Knobs of a setting by moves on the real thing: a change that brings the answers nearer to the dense model's is kept.

No gradient, no mask and no label: each setting that is tried runs as it would be deployed, on the same images. A change
is drawn by the method (``KnobLearner.moved``) and keeps to the budget. All is a function of (seed, move), so that what
was interrupted goes on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.core.registry import KnobLearner
from saccade.evaluation.defined import NonFinite
from saccade.evaluation.distance import IMAGES, Distance
from saccade.evaluation.evaluator import Evaluator
from saccade.storage.files import write_json

Knobs = dict[str, Any]


@dataclass
class Moves:
    """One search by moves.

    Args:
        evaluator: the dense model, and images that it has been asked about.
        setting: the setting of some knobs.
    """

    evaluator: Evaluator
    setting: Callable[[Knobs], str]
    learner: KnobLearner
    seed: int = 0

    def improve(
        self,
        knobs: Knobs,
        places: Sequence[int],
        count: int,
        file: Path | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> Knobs:
        """The best knobs of ``count`` moves from these, by the images at some of the places.

        file: holds how far a search came, and is taken up; None: none is kept.
        """
        distance = Distance(self.evaluator, places)
        done, best = _taken_up(file, count) or (0, knobs)
        advance(done * IMAGES)
        least = distance.of(self.setting(best))
        for move in range(done, count):
            tried = self.learner.moved(best, random.Random(f"{self.seed} {move}"))
            found = list[float]()
            with suppress(NonFinite):  # such a setting is no better one
                found = [] if tried == best else distance.of(self.setting(tried), least)
            if len(found) == len(least) and sum(found) < sum(least):
                best, least = tried, found
            if file is not None:
                write_json(file, {"moves": move + 1, "knobs": best})
            advance(IMAGES)
        return best


def _taken_up(file: Path | None, most: int) -> tuple[int, Knobs] | None:
    """Moves that were made, ``most`` at most, and the best knobs; None where there is nothing that can be read."""
    if file is None or not file.is_file():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        knobs = {str(name): tuple(map(int, value)) for name, value in told["knobs"].items()}
        return (int(told["moves"]), knobs) if 0 <= int(told["moves"]) <= most else None
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        return None
