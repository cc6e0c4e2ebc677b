"""Cases of a test of which some run always and all of them in ``make test-all``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest


def cases(quick: Sequence[tuple], every: Iterable[tuple]) -> list:
    """Every case; those that are not among the quick ones are slow."""
    every = list(every)
    assert all(case in every for case in quick), "a quick case is none of them"
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in every]
