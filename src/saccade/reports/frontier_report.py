"""The HTML report: one file without a single outside reference, the answer first, how it was measured last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from saccade.reports.figure import Figure
from saccade.reports.formatting import escape, known, number, percent, points, prose, times
from saccade.reports.html_table import render_table, scrolling
from saccade.reports.page import (
    how_it_was,
    render_figure,
    render_figures,
    render_legend,
    render_page,
    render_tiles,
    section,
)
from saccade.reports.pictures import render_samples
from saccade.reports.plots import conversion_figure, frontier_figures, marker
from saccade.reports.rows import Row, Sample
from saccade.reports.scale import Scale
from saccade.reports.svg import tag
from saccade.terminal.results import counted

FAMILIES = {
    "dense": "dense, smaller or coarser",
    "reduction": "token reduction",
    "random": "random baseline",
    "rival": "another model",
}


@dataclass(frozen=True)
class Report:
    """All that the page shows. ``verdict[0]`` is the answer; `` `code` `` in verdict and notes is set as code."""

    title: str
    command: str
    verdict: list[str]
    facts: dict[str, str]
    metric_name: str
    rows: list[Row]
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    curve: list[Figure] = field(default_factory=list)  # the latency curve, where schedules were priced by one
    about: str = ""  # the metric, in a sentence


def render_report(report: Report) -> str:
    """The page as one string: styles, script, plots (SVG) and pictures (data URIs) are inside."""
    chosen = next((r for r in report.rows if r.chosen), None)
    rows, saved = report.rows, ""
    first, *rest = report.verdict or [report.title]
    figures = frontier_figures(rows, report.metric_name)
    conversion = conversion_figure(rows)
    about = tag("p", prose(report.about), kind="hint") if report.about else ""
    if conversion:
        saved = ("" if figures else _legend(rows, False)) + _saved(conversion, rows)
    sections = [
        section("frontier", "The frontier", about + _legend(rows, True) + render_figures(figures)) if figures else "",
        section("time", "Does saved compute become saved time?", saved) if saved else "",
        section("settings", "All settings", _table(report)) if rows else "",
        section("curve", "What a forward's time is made of", render_figures(report.curve)) if report.curve else "",
        section("maps", "What each token stands for", render_samples(report.samples)) if report.samples else "",
        section("how", "How it was measured", how_it_was(report.command, report.facts, report.notes)),
    ]
    tone = "good" if chosen and chosen.family == "reduction" else "plain"
    cells = _tiles(chosen, report.metric_name) if chosen else ""
    return render_page(report.title, tone, first, rest, cells, sections)


def _tiles(row: Row, metric: str) -> str:
    """The chosen setting's few numbers, large."""
    tiles = []
    if known(row.speedup):
        below = f"{number(row.images_per_s)} images/s" if known(row.images_per_s) else ""
        tiles.append(("speed-up, measured", times(row.speedup), below))
    saved = 1 - 1 / row.mac_ratio if known(row.mac_ratio) and row.mac_ratio > 0 else None
    share = f"{percent(abs(saved))} {'fewer' if saved >= 0 else 'more'} than dense" if saved is not None else ""
    share = "as many as dense" if saved is not None and abs(saved) < 5e-4 else share
    tiles.append(("GMACs per image", number(row.gmacs), share))
    if known(row.delta):
        limits = (
            f"95 %: {points(row.delta_low)} … {points(row.delta_high)}" if known(row.delta_low, row.delta_high) else ""
        )
        tiles.append((f"{metric}, points against dense", points(row.delta), limits))
    if known(row.value):
        scale = Scale.of(metric)
        low, high = scale.value(row.value_low, False), scale.value(row.value_high)
        limits = f"95 %: {low} … {high}" if known(row.value_low, row.value_high) else ""
        tiles.append((metric, scale.value(row.value), limits))
    elif known(row.p50_ms):
        tiles.append(("median latency", f"{number(row.p50_ms)} ms", ""))
    return render_tiles(tiles)


def _legend(rows: Sequence[Row], frontier: bool) -> str:
    keys = [(marker(f), text) for f, text in FAMILIES.items() if any(r.family == f for r in rows)]
    if any(r.chosen for r in rows):
        keys.append((marker(next(r.family for r in rows if r.chosen), True), "chosen"))
    if frontier:
        keys.append(('<path class="frontier-line" d="M-9 6H0V-6H9"/>', "frontier"))
    if frontier and any(known(r.value_low, r.value_high) for r in rows):
        keys.append(('<path class="whisker" d="M0 -8V8M-3 -8h6M-3 8h6"/>', "95 % interval"))
    return render_legend(keys)


def _saved(figure: Figure, rows: Sequence[Row]) -> str:
    """The conversion plot beside what it says in numbers."""
    lines = []
    for family, name in FAMILIES.items():
        found = sorted(
            r.conversion
            for r in rows
            if r.family == family and r.conversion is not None and known(r.conversion) and r.mac_ratio > 1.01
        )
        if found:
            spread = f", {found[0]:.2f} to {found[-1]:.2f}" if found[-1] - found[0] >= 0.005 else ""
            count = f"{len(found)} setting" + "s" * (len(found) > 1)
            lines.append(f"<li><b>{median(found):.2f}</b> {name}<small>{count}{spread}</small></li>")
    slow = [r.setting for r in rows if r.speedup is not None and r.speedup < 1 and r.mac_ratio > 1.01]
    text = (
        "<p><dfn>Conversion</dfn> is the measured speed-up divided by the MAC ratio: "
        "1.00 means that all of the saved compute became saved time.</p>"
    )
    text += f'<p class="cap">Median conversion</p><ul class="medians">{"".join(lines)}</ul>' if lines else ""
    if slow:
        text += f"<p>Fewer MACs but slower than dense: {', '.join(f'<code>{escape(s)}</code>' for s in slow)}.</p>"
    return f'<div class="figures">{render_figure(figure)}<div class="aside">{text}</div></div>'


def _table(report: Report) -> str:
    """All rows; blind controls stand in a table of their own, which has to be unfolded."""
    hint = "Select a heading to sort."
    if any(known(r.value_low) for r in report.rows):
        hint += " Intervals are at 95 %."
    blind = {i for i, r in enumerate(report.rows) if r.family == "random"}
    blind = blind if len(blind) < len(report.rows) else set()
    out = tag("p", hint, kind="hint") + _box(report, set(range(len(report.rows))) - blind, "All settings")
    if not blind:
        return out
    name = f"{counted(len(blind), 'random baseline')}: what dropping tokens blindly gives"
    return out + tag("details", tag("summary", name) + _box(report, blind, "Random baselines"))


def _box(report: Report, places: set[int], label: str) -> str:
    return scrolling(render_table(report.rows, report.metric_name, places), label)
