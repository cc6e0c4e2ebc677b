"""The report's table: every setting, every number, sortable; a column that no row has a number for is left out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Generic, TypeVar

from saccade.reports.formatting import NONE, escape, known, number, percent, points, prose, times
from saccade.reports.plots import marker
from saccade.reports.scale import Scale
from saccade.reports.svg import tag

if TYPE_CHECKING:
    from saccade.reports.rows import Row


T = TypeVar("T")


@dataclass(frozen=True)
class Column(Generic[T]):
    """A heading with its explanation, the number that sorts, and how a cell looks."""

    name: str
    help: str
    value: Callable[[T], float | None]
    cell: Callable[[T], str]
    kind: str = ""


@dataclass(frozen=True)
class Head:
    """What stands at the left of a row: a setting, its marker, and the tags that it has earned."""

    setting: str
    family: str
    marks: Sequence[str] = ()
    note: str = ""
    label: str = ""  # the marker's accessible name; empty: it says nothing that the setting does not


def render_table(rows: Sequence[Row], metric: str, places: Collection[int] | None = None) -> str:
    """The whole ``<table>``, or the rows at these places, which keep their numbers and the columns of all."""

    def head(row: Row) -> Head:
        marks = [name for name, on in (("chosen", row.chosen), ("frontier", row.on_frontier)) if on]
        return Head(row.setting, row.family, marks, row.note, row.family)

    return lay_out(rows, head, _columns(rows, metric), places)


def lay_out(
    rows: Sequence[T], head: Callable[[T], Head], columns: Sequence[Column[T]], places: Collection[int] | None = None
) -> str:
    """Any table of settings, one row each; ``places``: of those alone."""
    columns = [c for c in columns if any(known(c.value(r)) for r in rows)]
    notes = any(head(r).note for r in rows)
    top = '<th scope="col" aria-sort="none"><button>setting</button></th>'
    top += "".join(
        f'<th scope="col" class="num" aria-sort="none"><button title="{escape(c.help)}">{escape(c.name)}</button></th>'
        for c in columns
    )
    top += '<th scope="col">note</th>' if notes else ""
    body = "".join(_row(i, r, head(r), columns, notes) for i, r in enumerate(rows) if places is None or i in places)
    return f"<table><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def _row(index: int, row: T, head: Head, columns: Sequence[Column[T]], notes: bool) -> str:
    tags = "".join(tag("span", name, kind=f"tag {name}") for name in head.marks)
    named = {"role": "img", "aria_label": head.label} if head.label else {"aria_hidden": "true"}
    key = tag("svg", marker(head.family), kind="key", viewBox="-10 -10 20 20", **named)
    name = f"<div>{key}<span><code>{escape(head.setting)}</code> {tags}</span></div>"
    cells = tag("th", name, scope="row", data_v=head.setting)
    for c in columns:
        value = c.value(row)
        v = f"{value:.9g}" if value is not None and known(value) else ""
        cells += f'<td class="num {c.kind}" data-v="{v}">{c.cell(row) if v else NONE}</td>'
    cells += tag("td", prose(head.note), kind="remark") if notes else ""
    return tag("tr", cells, kind=" ".join(head.marks), data_row=index) + "\n"


def _columns(rows: Sequence[Row], metric: str) -> list[Column[Row]]:
    deltas = [r.delta for r in rows if r.delta is not None and known(r.delta)]
    ends = [v for r in rows for v in (r.delta, r.delta_low, r.delta_high) if v is not None and known(v)]
    # One scale for all rows, wide enough for most: a hopeless setting stands at its end and presses no others together.
    floor = 2.5 * min(median(deltas) if deltas else 0.0, -0.01)
    low, high = max(floor, min([0.0, *ends])), min(-floor, max([0.0, *ends]))

    scale = Scale.of(metric)

    def accuracy(r: Row) -> str:
        low, high = scale.value(r.value_low, False), scale.value(r.value_high, False)
        bounds = f"{low}–{high}" if known(r.value_low, r.value_high) else ""
        return f"<b>{scale.value(r.value, False)}</b>" + (tag("small", bounds) if bounds else "")

    def delta(r: Row) -> str:
        return f"{whisker(r, low, high)}<b>{points(r.delta)}</b>"

    def tokens(r: Row) -> str:
        return f"{r.tokens:.1f}".removesuffix(".0")

    return [
        Column("tokens", "tokens in the MLP of a block, mean over blocks and images", lambda r: r.tokens, tokens),
        Column("GMACs", "10⁹ multiply-accumulates per image", lambda r: r.gmacs, lambda r: number(r.gmacs)),
        Column("MAC ratio", "MACs of dense ÷ MACs of this", lambda r: r.mac_ratio, lambda r: times(r.mac_ratio)),
        Column("speed-up", "measured, against dense", lambda r: r.speedup, lambda r: f"<b>{times(r.speedup)}</b>"),
        Column("conversion", "speed-up ÷ MAC ratio: saved time for saved compute", lambda r: r.conversion, _conversion),
        Column(
            f"{metric}{scale.suffix}",
            f"{scale.axis(metric)}, with its 95 % interval",
            lambda r: r.value,
            accuracy,
            "metric",
        ),
        Column("Δ points", "against dense, in points, with its 95 % interval", lambda r: r.delta, delta, "delta"),
        Column(
            "agreement %",
            "same answer as dense",
            lambda r: None if metric == "agreement" else r.agreement,
            lambda r: percent(r.agreement, ""),
        ),
        Column("images/s", "throughput", lambda r: r.images_per_s, lambda r: number(r.images_per_s)),
        Column("p50 ms", "median latency of one batch", lambda r: r.p50_ms, lambda r: number(r.p50_ms)),
        Column("MB", "peak memory", lambda r: r.memory_mb, lambda r: number(r.memory_mb)),
    ]


def _conversion(row: Row) -> str:
    """The number over a bar: a full bar is all of the saved compute saved as time."""
    share = min(max(row.conversion or 0.0, 0.0), 1.0)
    return f'{row.conversion:.2f}<span class="bar"><i style="width:{100 * share:.0f}%"></i></span>'


def whisker(row: Row, low: float, high: float) -> str:
    """A difference and its interval on a common scale ``low … high``, with a line at zero."""
    if row.delta is None or high <= low:
        return ""

    def at(value: float) -> float:
        return 5 + 60 * (min(max(value, low), high) - low) / (high - low)

    line = ""
    if row.delta_low is not None and row.delta_high is not None and known(row.delta_low, row.delta_high):
        line = tag("path", kind="whisker", d=f"M{at(row.delta_low):.1f} 8H{at(row.delta_high):.1f}")
    limits = f"{points(row.delta)} points"

    if line:
        limits = f"{points(row.delta_low)} … {points(row.delta_high)} points (95 %)"
    shape = tag("circle", cx=at(row.delta), cy=8, r=2.8) if row.delta >= low else tag("path", d="M1 8l5 -3.5v7z")
    parts = tag("title", limits) + tag("path", kind="zero", d=f"M{at(0.0):.1f} 1v14") + line
    parts += tag("g", shape, kind=f"mark {row.family}")
    return tag("svg", parts, kind="forest", viewBox="0 0 70 16", role="img", aria_label=limits)


def scrolling(table: str, label: str) -> str:
    """A table in a box of its own, which scrolls where the page is narrower than the table."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'
