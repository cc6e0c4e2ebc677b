"""The report's plots as inline SVG: the frontier against compute and time, and saved time against saved compute.

SVG written here and not by a plotting library, so that text is text, colours follow the reader's light or dark theme,
and each figure exists in two layouts, for a wide and for a narrow screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from saccade.reports.figure import Figure
from saccade.reports.formatting import escape, known, number, points, times
from saccade.reports.label_placement import Label, place_labels
from saccade.reports.scale import SHARE, Scale
from saccade.reports.svg import Axis, Line, canvas, frame, segment, span, tag

if TYPE_CHECKING:
    from saccade.reports.rows import Row

APART = ("random", "rival")  # families that make no frontier unless the report says that they do
LAYOUTS = {"wide": (580, 420), "narrow": (360, 380)}
MARKERS = {  # drawn around (0, 0); shape and colour both tell the family
    "reduction": '<circle r="4.6"/>',
    "dense": '<rect x="-4.4" y="-4.4" width="8.8" height="8.8"/>',
    "random": '<path d="M-4 -4L4 4M-4 4L4 -4"/>',
    "rival": '<path d="M0 -5.8L5.2 0L0 5.8L-5.2 0z"/>',
}
MARKERS |= {  # one of many that have no family: told apart by shape too, for who sees few colours
    f"series s{k}": f'<path d="{path}"/>'
    for k, path in enumerate(
        (
            "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0 -9.2 0z",
            "M-4.2 -4.2h8.4v8.4h-8.4z",
            "M0 -5.4L5 3.6H-5z",
            "M0 -5.8L5.2 0L0 5.8L-5.2 0z",
            "M0 5.4L5 -3.6H-5z",
            "M-1.8 -5.4h3.6v3.6h3.6v3.6h-3.6v3.6h-3.6v-3.6h-3.6v-3.6h3.6z",
            "M-5 -3.2L0 -5.4L5 -3.2V3.2L0 5.4L-5 3.2z",
            "M-5.6 -2.4h11.2v4.8h-11.2z",
        )
    )
}


def frontier_figures(rows: Sequence[Row], metric: str) -> list[Figure]:
    """Metric against GMACs and against measured speed-up; no figure where fewer than two rows have both numbers."""
    measures = (
        (
            [r.gmacs for r in rows],
            "GMACs per image",
            f"{Scale.of(metric).title or metric} against compute",
            "up and to the left is better",
            False,
        ),
        (
            [r.speedup for r in rows],
            "measured speed-up",
            f"{Scale.of(metric).title or metric} against time",
            "up and to the right is better",
            True,
        ),
    )
    figures, scale = [], Scale.of(metric)
    for xs, axis, title, hint, gain in measures:
        found = []
        for i, (row, x) in enumerate(zip(rows, xs, strict=True)):
            if x is not None and row.value is not None and known(row.value) and sane(x):
                found.append(_Point(i, row, x, *_merits(row, scale)))
        if len(found) > 1:
            svgs = {name: _frontier(found, axis, metric, size, gain) for name, size in LAYOUTS.items()}
            figures.append(Figure(title, hint, svgs))
    return figures


def _merits(row: Row, scale: Scale) -> tuple[float, float | None, float | None]:
    """The metric and the ends of its interval as heights: better is up, also where less is better."""
    ends = [scale.merit(v) for v in (row.value_low, row.value_high) if v is not None and known(v)]
    low, high = (min(ends), max(ends)) if len(ends) > 1 else (None, None)
    return scale.merit(row.value or 0.0), low, high


def conversion_figure(rows: Sequence[Row]) -> Figure | None:
    """Measured speed-up against MAC ratio: how much of the saved compute became saved time."""
    found = [_Point(i, r, r.mac_ratio, r.speedup or 0.0) for i, r in enumerate(rows) if known(r.mac_ratio, r.speedup)]
    found = [p for p in found if sane(p.x) and sane(p.y)]
    if len(found) < 2:
        return None
    hint = "on the dashed line, all saved compute became saved time"
    svgs = {name: _conversion(found, (width, height - 60)) for name, (width, height) in LAYOUTS.items()}
    return Figure("speed-up against saved compute", hint, svgs)


def sane(value: float) -> bool:
    """Whether a cost or a ratio can stand on an axis, a logarithmic one too."""
    return 1e-9 < value < 1e9


def marker(family: str, chosen: bool = False) -> str:
    """A family's marker as an SVG group around (0, 0)."""
    family = family if family in MARKERS else "reduction"
    return ('<circle class="ring" r="9"/>' if chosen else "") + tag("g", MARKERS[family], kind=f"mark {family}")


def stairs(found: Sequence[tuple[float, float]], gain: bool) -> list[tuple[float, float]]:
    """The points that none beats in both, lowest first: more ``y`` is better, and less ``x`` (more if ``gain``)."""
    best, kept = -math.inf, []
    for x, y in sorted(found, key=lambda p: (-p[0] if gain else p[0], -p[1])):
        if y > best:
            best = y
            kept.append((x, y))
    return kept


def tip(row: Row) -> str:
    """One row in a few words, for the pointer."""
    parts = [row.setting, f"{number(row.gmacs)} GMACs"]
    if known(row.value):
        scale = Scale.of(row.metric)
        parts.append(scale.value(row.value) + (f" ({points(row.delta)} points)" if known(row.delta) else ""))
    if known(row.speedup):
        parts.append(f"speed {times(row.speedup)}")
    return " · ".join(parts)


@dataclass(frozen=True)
class _Point:
    index: int  # row of the table
    row: Row
    x: float
    y: float
    low: float | None = None
    high: float | None = None

    @property
    def main(self) -> bool:
        return self.row.on_frontier or self.row.chosen


def _frontier(found: list[_Point], name: str, metric: str, size: tuple[int, int], gain: bool) -> str:
    log = not gain and max(p.x for p in found) > 8 * min(p.x for p in found)
    x = Axis(*span([p.x for p in found], 0.07, log), 46, size[0] - 14, log)
    scale = Scale.of(metric)
    y = Axis(*_metric_span(found, scale), size[1] - 44, 26)
    plot = _Plot(x, y, found, scale)

    # A random baseline is there to be beaten: it does not make the frontier unless the report says that it does.
    steps = stairs([(p.x, p.y) for p in found if p.row.family not in APART or p.row.on_frontier], gain)
    corners = steps[:1]
    for (_, y0), (x1, y1) in pairwise(steps):  # what a point reaches holds until the next, better one
        corners += [(x1, y0), (x1, y1)]
    corners += [(x.low if gain else x.high, best) for _, best in steps[-1:]]  # and the best holds for any higher cost
    dense = sorted((p.x, p.y) for p in found if p.row.family == "dense")
    curves = plot.path("dense-line", dense) + plot.path("frontier-line", corners)
    lines = [(x(a[0]), y(a[1]), x(b[0]), y(b[1])) for a, b in pairwise(corners)]

    out = [*plot.frame(name, scale.axis(metric), gain), plot.clip(curves)]
    for p in found:
        if p.low is not None and p.high is not None and p.high >= y.low:
            px, top, bottom = x(p.x), y.clamp(p.high), y.clamp(p.low)
            ends = "".join(f"M{px - 3:.1f} {y(v):.1f}h6" for v in (p.low, p.high) if y.low <= v <= y.high)
            kind = f"whisker {p.row.family}" + ("" if p.main else " off")
            out.append(tag("path", kind=kind, data_row=p.index, d=f"M{px:.1f} {top:.1f}V{bottom:.1f}{ends}"))
            lines.append((px, top, px, bottom))
    others = [p for p in found if p.row.family == "rival"]
    named = [p for p in found if p.main or p in others or (p.x, p.y) in steps or p.y < y.low]
    out += plot.points() + plot.labels(named, lines, far=[p for p in found if p.main or p in others])
    return plot.svg(out, f"{metric} against {name}, {len(found)} settings")


def _conversion(found: list[_Point], size: tuple[int, int]) -> str:
    x = Axis(*span([1.0, *(p.x for p in found)], 0.08, True), 46, size[0] - 14, True)
    y = Axis(*span([1.0, *(p.y for p in found)], 0.08, True), size[1] - 44, 26, True)
    plot = _Plot(x, y, found)
    out = plot.frame("MAC ratio (dense ÷ setting)", "measured speed-up", True, ratio=True)
    lines: list[Line] = []
    start, end = max(x.low, y.low), min(x.high, y.high)
    if end > start:
        lines.append((x(start), y(start), x(end), y(end)))
        out.append(segment("guide", lines[0]))
    out.append(segment("guide flat", (x.start, y(1.0), x.end, y(1.0))))
    if y(1.0) + 16 < y.start:
        out.append(tag("text", "slower than dense", kind="note", x=x.end - 4, y=y(1.0) + 14, text_anchor="end"))
    # The choice, the frontier and what turns least of its saving into time are named; others where there is room.
    worst = sorted(found, key=lambda p: p.y / p.x)[:2]
    out += plot.points() + plot.labels(found, lines, far=[p for p in found if p.main or p.y < 1 or p in worst])
    return plot.svg(out, f"speed-up against MAC ratio, {len(found)} settings")


def _metric_span(found: list[_Point], scale: Scale) -> tuple[float, float]:
    """The range of the metric that decides: 10 points below the best, more where the choice or half of all are lower.

    A few hopeless settings would otherwise press all others into a line; they stand at the lower edge with an arrow.
    """
    if not scale.share:
        return _free_span(found)
    best = max(p.y for p in found)
    picked = [p.y if p.low is None else p.low for p in found if p.row.chosen]
    floor = min(best - 0.10, best - 2.0 * (best - min(picked, default=best)), median(p.y for p in found) - 0.02)
    shown = [v for p in found for v in (p.y, p.low, p.high) if v is not None and v >= floor]
    low, high = span(shown, 0.06)
    return max(low, min(-0.02, *shown)), min(high, max(1.02, *shown))


def _free_span(found: list[_Point]) -> tuple[float, float]:
    """The same of a metric that is no share: twice as far below the best as half of all, or as far as the choice."""
    best = max(p.y for p in found)
    picked = [p.y if p.low is None else p.low for p in found if p.row.chosen]
    floor = min(best - 2.0 * (best - median(p.y for p in found)), *picked, best - 1e-3)
    return span([v for p in found for v in (p.y, p.low, p.high) if v is not None and v >= floor], 0.06)


@dataclass(frozen=True)
class _Plot:
    """Two axes and the points between them; every method returns elements."""

    x: Axis
    y: Axis
    found: list[_Point]
    scale: Scale = SHARE

    def frame(self, x_name: str, y_name: str, gain: bool, ratio: bool = False) -> list[str]:
        """Grid lines, tick labels and the names of both axes; ``ratio``: the vertical axis counts times."""
        step = min((b - a for a, b in pairwise(self.y.ticks(6))), default=1.0)
        digits = 3 if step < 0.1 else 2

        def share(v: float) -> str:
            return f"{number(v, digits)}×" if ratio else self.scale.tick(v, step)

        def cost(v: float) -> str:
            return f"{v:.10g}" + ("×" if gain else "")

        return frame(self.x, self.y, (x_name, y_name), (cost, share), "→" if gain else "←")

    def path(self, kind: str, found: Sequence[tuple[float, float]]) -> str:
        spots = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in found)
        return tag("polyline", kind=kind, points=spots) if len(found) > 1 else ""

    def clip(self, content: str) -> str:
        """An inner svg in the same coordinates that cuts off what leaves the plot's area."""
        left, top, width, height = (
            self.x.start,
            self.y.end - 8,
            self.x.end - self.x.start,
            self.y.start - self.y.end + 8,
        )
        view = f"{left} {top} {width} {height}"
        return tag("svg", content, x=left, y=top, width=width, height=height, viewBox=view)

    def points(self) -> list[str]:
        """Markers, the unimportant first so that the frontier and the choice lie on top."""
        out = []
        for p in sorted(self.found, key=lambda p: (p.row.chosen, p.row.on_frontier)):
            below = '<path class="below" d="M0 10v8m-3.5 -4l3.5 4l3.5 -4"/>' if p.y < self.y.low else ""
            shapes = f'<circle class="hit" r="12"/>{marker(p.row.family, p.row.chosen)}{below}'
            kind, (px, py) = "pt on" if p.main or p.row.family == "rival" else "pt", self.spot(p)
            place = f"translate({px:.1f},{py:.1f})"
            out.append(
                tag("g", tag("title", escape(tip(p.row))) + shapes, kind=kind, data_row=p.index, transform=place)
            )
        return out

    def labels(self, wanted: list[_Point], lines: Sequence[Line], far: list[_Point]) -> list[str]:
        """Names beside the points, the chosen first; those of ``far`` may stand off at the end of a line."""
        rank = {p.index: (not p.row.chosen, p not in far, not p.main, p.row.family == "random", -p.y) for p in wanted}
        order = sorted(wanted, key=lambda p: rank[p.index])
        asked = []
        for p in order:
            name = p.row.setting + (f" {self.scale.value(self.scale.merit(p.y))}" if p.y < self.y.low else "")
            asked.append((*self.spot(p), name, 70.0 if p in far else 15.0))
        area = self.x.start + 3.0, 20.0, self.x.end + 10.0, self.y.start - 2
        placed = place_labels(asked, area, [self.spot(p) for p in self.found], lines, 0.5 * self.x.end)
        return [_label(label, p) for p, label in zip(order, placed, strict=True) if label]

    def spot(self, p: _Point) -> tuple[float, float]:
        """Where a point's marker stands; what is off the scale stands just above the lower edge."""
        return self.x(p.x), self.y(p.y) if p.y >= self.y.low else self.y.start - 22

    def svg(self, parts: list[str], name: str) -> str:
        return canvas(self.x.end + 14, self.y.start + 44, parts, name)


def _label(label: Label, p: _Point) -> str:
    left, _, right, bottom = label.box
    line = segment("leader", (label.x, label.y, *label.leader_end())) if label.leader else ""
    # The text keeps to the side of its box that faces the point: the page's font may be narrower than the measured one.
    middle = (left + right) / 2
    anchor, at = ("start", left) if left >= label.x else ("end", right) if right <= label.x else ("middle", middle)
    kind = "label chosen" if p.row.chosen else "label"
    text = escape(label.text)
    return line + tag("text", text, kind=kind, data_row=p.index, x=at, y=bottom - 4, text_anchor=anchor)
