"""The HTML report of a sweep: accuracy along each range against compute and against measured time, and the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from saccade.reports.figure import Figure
from saccade.reports.formatting import escape, known
from saccade.reports.frontier_report import FAMILIES, Report
from saccade.reports.html_table import render_table, scrolling
from saccade.reports.label_placement import place_labels
from saccade.reports.page import how_it_was, render_figures, render_legend, render_page, section
from saccade.reports.plots import LAYOUTS, conversion_figure, marker, sane, tip
from saccade.reports.scale import Scale
from saccade.reports.svg import Axis, Box, Line, canvas, frame, span, tag

HOLLOW = "fill: var(--card); stroke: var(--c, currentColor); stroke-width: 1.8"


def curve_kind(k: int) -> str:
    """The ``family`` of a row on the k-th curve; the first two series, which look like families, are left out."""
    return f"series s{2 + k % 6}"


@dataclass(frozen=True, kw_only=True)
class SweepReport(Report):
    """All that the page shows: a report, and which of its rows lie on a curve. It has no photos."""

    curves: dict[str, list[int]]  # rows of each range, in its order
    untrained: set[int] = field(default_factory=set)  # rows that the weights were not trained for


def render_sweep(report: SweepReport) -> str:
    """The page as one string: styles, script and plots (SVG) are inside."""
    first, *rest = report.verdict or [report.title]
    figures = sweep_figures(report)
    conversion = conversion_figure(report.rows)
    table = scrolling(render_table(report.rows, report.metric_name), "All settings")
    hint = tag("p", "Select a heading to sort. Intervals are at 95 %.", kind="hint")
    bodies = [
        ("sweep", "Accuracy along the range", _legend(report) + render_figures(figures) if figures else ""),
        ("time", "Does saved compute become saved time?", render_figures([conversion]) if conversion else ""),
        ("settings", "All settings", hint + table),
        ("how", "How it was measured", how_it_was(report.command, report.facts, report.notes)),
    ]
    sections = [section(name, heading, body) for name, heading, body in bodies if body]
    return render_page(report.title, "plain", first, rest, "", sections, style="training.css")


def sweep_figures(report: SweepReport) -> list[Figure]:
    """The metric against GMACs and against measured speed-up; none where fewer than two rows have both numbers."""
    metric, found = report.metric_name, []
    measures = (
        ({i: r.gmacs for i, r in enumerate(report.rows)}, "GMACs per image", "compute", False),
        ({i: r.speedup for i, r in enumerate(report.rows)}, "measured speed-up", "time", True),
    )
    for costs, axis, what, gain in measures:
        xs = {i: x for i, x in costs.items() if x is not None and sane(x) and known(report.rows[i].value)}
        if len(xs) > 1:
            svgs = {name: _draw(report, xs, axis, size, gain) for name, size in LAYOUTS.items()}
            hint = f"up and to the {'right' if gain else 'left'} is better"
            found.append(Figure(f"{Scale.of(metric).title or metric} against {what}", hint, svgs))
    return found


def _draw(report: SweepReport, xs: Mapping[int, float], name: str, size: tuple[int, int], gain: bool) -> str:
    rows = report.rows
    log = max(xs.values()) > 4 * min(xs.values())
    x = Axis(*span([*xs.values()], 0.07, log), 46, size[0] - 14, log)
    scale = Scale.of(report.metric_name)  # better is up, also where less is better
    ends = [scale.merit(v) for i in xs for v in (rows[i].value, rows[i].value_low, rows[i].value_high)
            if v is not None and known(v)]  # fmt: skip
    low, high = span(ends)
    low, high = (max(low, min(-0.02, *ends)), min(high, max(1.02, *ends))) if scale.share else (low, high)
    y = Axis(low, high, size[1] - 44, 26)
    step = min((b - a for a, b in pairwise(y.ticks(6))), default=1.0)
    spots = {i: (x(cost), y(scale.merit(rows[i].value or 0.0))) for i, cost in xs.items()}

    def cost(v: float) -> str:
        return f"{v:.10g}" + ("×" if gain else "")

    def height(v: float) -> str:
        return f"{100 * v:.3g}" if scale.share else scale.tick(v, step)

    out = frame(x, y, (name, scale.axis(report.metric_name)), (cost, height), "→" if gain else "←")
    lines: list[Line] = []
    for k, curve in enumerate(report.curves.values()):
        drawn = [spots[i] for i in curve if i in spots]
        lines += [(*a, *b) for a, b in pairwise(drawn)]
        if len(drawn) > 1:
            path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in drawn)
            out.append(tag("path", kind=f"line {curve_kind(k)}", d=path))
    for i, (px, _) in spots.items():
        r = rows[i]
        if r.value_low is not None and r.value_high is not None and known(r.value_low, r.value_high):
            d = f"M{px:.1f} {y(scale.merit(r.value_high)):.1f}V{y(scale.merit(r.value_low)):.1f}"
            out.append(tag("path", kind=f"whisker {r.family}", data_row=i, d=d))
    for i, (px, py) in spots.items():
        shapes = tag("title", escape(tip(rows[i]))) + '<circle class="hit" r="12"/>' + _mark(report, i)
        out.append(tag("g", shapes, kind="pt on", data_row=i, transform=f"translate({px:.1f},{py:.1f})"))
    out += _names(report, spots, lines, (x.start + 3.0, 20.0, x.end + 10.0, y.start - 2), 0.5 * x.end)
    return canvas(*size, out, f"{report.metric_name} against {name}, {len(spots)} settings")


def _names(
    report: SweepReport, spots: Mapping[int, tuple[float, float]], lines: Sequence[Line], area: Box, widest: float
) -> Iterator[str]:
    """Settings beside their points, those on the frontier first, wherever there is room."""
    order = sorted(spots, key=lambda i: (report.rows[i].setting != "dense", not report.rows[i].on_frontier, i))
    asked = [(*spots[i], report.rows[i].setting, 40.0) for i in order]
    for i, label in zip(order, place_labels(asked, area, [*spots.values()], lines, widest), strict=True):
        if label:
            left, _, right, bottom = label.box
            anchor, at = ("start", left) if left >= label.x else ("end", right)
            if left < label.x < right:
                anchor, at = "middle", (left + right) / 2
            yield tag("text", escape(label.text), kind="label", data_row=i, x=at, y=bottom - 4, text_anchor=anchor)


def _mark(report: SweepReport, i: int) -> str:
    """A row's marker, hollow where the weights were not trained for it."""
    shape = marker(report.rows[i].family)
    return shape.replace('<g class="mark', f'<g style="{HOLLOW}" class="mark') if i in report.untrained else shape


def _legend(report: SweepReport) -> str:
    rows, ranged = report.rows, {i for curve in report.curves.values() for i in curve}
    keys = [
        (f'<path class="line {kind}" d="M-10 0H10"/>{marker(kind)}', f"<code>{escape(text)}</code>")
        for text, kind in ((text, curve_kind(k)) for k, text in enumerate(report.curves))
    ]
    keys += [(marker(f), text) for f, text in FAMILIES.items() if any(r.family == f for r in rows)]
    if report.untrained:
        i = min(report.untrained, key=lambda i: (i not in ranged, i))
        keys.append((_mark(report, i), "hollow: the weights were not trained for it"))
    if any(known(r.value_low, r.value_high) for r in rows):
        keys.append(('<path class="whisker" d="M0 -8V8"/>', "95 % interval"))
    return render_legend(keys)
