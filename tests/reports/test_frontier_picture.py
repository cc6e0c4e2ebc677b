"""The frontier as a picture: its line goes through what no other point beats in both."""

from __future__ import annotations

import pytest

from saccade.errors import UserError
from saccade.reports.frontier_picture import Point, _frontier, frontier_picture

POINTS = [
    Point("dense", "dense", 1.0, 0.8, 0.75, 0.85),
    Point("worse and slower", "random", 0.9, 0.7),
    Point("beaten", "reduction", 1.2, 0.6, 0.5, 0.7),
    Point("fast", "reduction", 1.5, 0.78, 0.7, 0.85, chosen=True),
    Point("as fast, worse", "random", 1.5, 0.5),
]


def test_the_line_goes_through_what_none_beats():
    assert [p.setting for p in _frontier(POINTS)] == ["dense", "fast"]


def test_a_picture_is_drawn_and_two_points_are_needed():
    first, second = frontier_picture(POINTS, "top-1", "a title"), frontier_picture(POINTS[:2])
    assert first.size == second.size and first.tobytes() != second.tobytes()
    with pytest.raises(UserError, match="1 settings have accuracy and speed"):
        frontier_picture(POINTS[:1])
