"""Labels that keep out of each other's way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from saccade.reports.svg import TEXT, Box, Line
from saccade.reports.token_map import elide, font

_WAYS = [(math.cos(a), -math.sin(a)) for a in (math.radians(15 * k) for k in range(24))]
_REACH = (9, 15, 22, 30, 40, 52, 66)


@dataclass(frozen=True)
class Label:
    """A placed label: ``box`` is where its text stands, ``x, y`` its point, ``leader`` whether a line joins them."""

    text: str
    box: Box
    x: float
    y: float
    leader: bool

    def leader_end(self) -> tuple[float, float]:
        """The place on the box nearest to the point."""
        left, top, right, bottom = self.box
        return min(max(self.x, left), right), min(max(self.y, top + 3), bottom - 3)


def place_labels(
    wanted: Sequence[tuple[float, float, str, float]],
    area: Box,
    marks: Sequence[tuple[float, float]],
    lines: Sequence[Line],
    widest: float,
) -> list[Label | None]:
    """Place a label for each ``(x, y, text, reach)``, most important first; None where none fits.

    Greedy: each label takes the cheapest place at most ``reach`` from its point. None ever touches another label or a
    mark or leaves ``area``; crossing one of ``lines`` (whiskers, the frontier) and standing far off only cost.
    """
    face = font(TEXT)
    taken: list[Box] = []
    leaders: list[Line] = []
    placed: list[Label | None] = []
    for x, y, text, furthest in wanted:
        text = elide(text, widest, face)
        width, height = face.getlength(text), TEXT + 4
        best: Label | None = None
        least = math.inf
        for reach in _REACH:
            if reach > furthest or reach / 6 >= least:  # a place costs at least its distance
                break
            for dx, dy in _WAYS:
                # The label's centre: its nearest edge lies ``reach`` away from the point in direction (dx, dy).
                cx, cy = x + dx * (reach + width / 2 * abs(dx)), y + dy * (reach + height / 2)
                if abs(dx) > 0.9:
                    cx = x + math.copysign(reach + width / 2, dx)
                box = cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
                label = Label(text, box, x, y, reach > 15)
                cost = _cost(label, reach, area, marks, lines, taken, leaders)
                if cost < least:
                    best, least = label, cost
        placed.append(best)
        if best:
            taken.append(best.box)
            if best.leader:
                leaders.append((x, y, *best.leader_end()))
    return placed


def _cost(
    label: Label,
    reach: float,
    area: Box,
    marks: Sequence[tuple[float, float]],
    lines: Sequence[Line],
    taken: Sequence[Box],
    leaders: Sequence[Line],
) -> float:
    """How bad a place is; infinite where it is not allowed."""
    left, top, right, bottom = label.box
    if left < area[0] or top < area[1] or right > area[2] or bottom > area[3]:
        return math.inf
    if any(left - 4 < b[2] and b[0] < right + 4 and top < b[3] and b[1] < bottom for b in taken):
        return math.inf
    if any(left - 6 < mx < right + 6 and top - 4 < my < bottom + 4 for mx, my in marks):
        return math.inf
    cost = reach / 6 + sum(8.0 * _crosses(line, label.box) for line in leaders)
    cost += sum(1.6 * _crosses(line, label.box) for line in lines)
    if label.leader:
        ex, ey = label.leader_end()
        line = label.x, label.y, ex, ey
        cost += (
            1.0 + sum(12.0 * _crosses(line, box) for box in taken) + sum(5.0 * _meet(line, other) for other in leaders)
        )
        cost += sum(
            4.0 * _crosses(line, (mx - 4, my - 4, mx + 4, my + 4)) for mx, my in marks if (mx, my) != (label.x, label.y)
        )
    return cost


def _crosses(line: Line, box: Box) -> bool:
    """Whether a segment passes through a box (Liang-Barsky clipping)."""
    x0, y0, x1, y1 = line
    start, end = 0.0, 1.0
    for origin, delta, low, high in ((x0, x1 - x0, box[0], box[2]), (y0, y1 - y0, box[1], box[3])):
        if delta == 0:
            if not low <= origin <= high:
                return False
            continue
        a, b = sorted(((low - origin) / delta, (high - origin) / delta))
        start, end = max(start, a), min(end, b)
    return start <= end


def _meet(a: Line, b: Line) -> bool:
    """Whether two segments cross."""

    def side(line: Line, x: float, y: float) -> float:
        return (line[2] - line[0]) * (y - line[1]) - (line[3] - line[1]) * (x - line[0])

    return side(a, *b[:2]) * side(a, *b[2:]) < 0 and side(b, *a[:2]) * side(b, *a[2:]) < 0
