"""The HTML report of a training run: the answer first, then loss, accuracy and cost of every setting, and speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from saccade.reports.curves import LOW, SMALL, Series, broken_note, curve_figure, step_range
from saccade.reports.figure import Figure
from saccade.reports.formatting import amount, compact, escape, known, number, percent, points, prose, whole
from saccade.reports.html_table import Column, Head, lay_out, scrolling
from saccade.reports.page import how_it_was, render_figures, render_legend, render_page, render_tiles, section
from saccade.reports.pictures import render_samples
from saccade.reports.plots import marker
from saccade.reports.rows import Sample
from saccade.reports.setting_curves import SERIES, Learned, accuracy_figure, frontier_figure, learned
from saccade.reports.svg import tag
from saccade.reports.training_rows import Checked, Share

STARVED = 0.2  # share of the time spent waiting for data from which a run is called data-bound


@dataclass(frozen=True)
class TrainingReport:
    """All that the page shows. ``verdict[0]`` is the answer; `` `code` `` in verdict and notes is set as code.

    ``steps`` are the rows of metrics.csv: step, epoch, loss, loss/…, lr, grad_norm, images_per_s, wait (0 … 1), gmacs
    and images (both so far). Any may be missing.
    """

    title: str
    command: str
    verdict: list[str]
    facts: dict[str, str]
    metric_name: str
    steps: list[dict[str, float]]
    checks: list[Checked]
    shares: list[Share]
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    running: bool = False  # the run has not ended yet


def render_training(report: TrainingReport) -> str:
    """The page as one string: styles, script, plots (SVG) and pictures (data URIs) are inside."""
    found = learned(report.checks, report.shares)
    logged = dict.fromkeys(name for row in report.steps for name in row)
    series = {name: Series.of(report.steps, name) for name in logged if name != "step"}
    at = [float(s.steps[k]) for s in series.values() if len(s.steps) for k in (0, -1)]
    steps = step_range([*at, *(float(c.step) for c in report.checks if known(c.step))])
    first, *rest = report.verdict or [report.title]
    bodies = [
        ("loss", "Loss", _loss(series, steps)),
        ("accuracy", "Accuracy of every setting", _accuracy(report, found, steps)),
        ("settings", "What each setting got", _table(report, found)),
        ("speed", "Throughput", _speed(series, steps)),
        ("maps", "What each token stands for", render_samples(report.samples) if report.samples else ""),
        ("how", "How it was run", how_it_was(report.command, report.facts, report.notes)),
    ]
    last = whole(max(at)) if at else ""
    so_far = f"Still running: this is the state at step {last}." if at else "Still running: no step is logged yet."
    return render_page(
        report.title,
        "plain" if report.running or not found else "good",
        first,
        rest,
        _tiles(report, found, series),
        [section(name, heading, body) for name, heading, body in bodies if body],
        style="training.css",
        banner=tag("p", so_far, kind="running") if report.running else "",
    )


def _tiles(report: TrainingReport, found: Sequence[Learned], series: dict[str, Series]) -> str:
    """The few numbers of the whole run, large."""
    metric = report.metric_name
    tiles: list[tuple[str, str, str]] = []
    facts = {name.strip().lower(): value for name, value in report.facts.items()}
    ranked = sorted((f for f in found if f.last), key=lambda f: -(f.top1 or 0.0))
    dense = _dense(found)
    shown = [(f, "best setting") for f in ranked[:1]]
    if dense and dense.last and dense not in ranked[:1]:
        shown.append((dense, "dense"))
    elif len(ranked) > 1:
        cheap = min(ranked, key=lambda f: math.inf if f.gmacs is None else f.gmacs)
        shown += [(cheap, "cheapest setting")] if cheap is not ranked[0] else []
    for f, role in shown:
        tiles.append((f"{metric}, {role}", percent(f.top1), f"<code>{escape(f.setting)}</code>{_limits(f, '<br>')}"))
    done = max((float(s.steps[-1]) for s in series.values() if len(s.steps)), default=None)
    if done is not None:
        epochs = f"{number(_last(series, 'epoch'))} epochs" if _last(series, "epoch") is not None else ""
        tiles.append(("steps", whole(done), epochs))
    images = _last(series, "images")
    if images is not None or "images seen" in facts:
        tiles.append(("images seen", amount(images) if images is not None else escape(facts["images seen"]), ""))
    pace = _typical(series, "images_per_s")
    if "wall time" in facts:
        tiles.append(
            (
                "wall time",
                escape(facts["wall time"].replace(" ", "\u202f")),
                f"{number(pace)} images/s" if pace is not None else "",
            )
        )
    elif pace is not None:
        tiles.append(("images/s", number(pace), "median"))
    spent = _last(series, "gmacs")
    total = sum(f.spent for f in found if f.spent is not None and known(f.spent))
    if spent is not None or total:
        tiles.append(("GMACs spent", amount(total if spent is None else spent), "forward and backward, all images"))
    return render_tiles(tiles) if tiles else ""


def _dense(found: Sequence[Learned]) -> Learned | None:
    return next((f for f in found if f.setting.strip().lower() in ("dense", "")), None)


def _last(series: dict[str, Series], name: str) -> float | None:
    good = list(series[name].good) if name in series else []
    return float(good[-1]) if good else None


def _typical(series: dict[str, Series], name: str) -> float | None:
    good = sorted(series[name].good) if name in series else []
    return float(good[len(good) // 2]) if good else None


def _limits(f: Learned, before: str) -> str:
    if not f.last or not known(f.last.low, f.last.high):
        return ""
    return f"{before}95 %: {percent(f.last.low, '')} … {percent(f.last.high)}"


def _loss(series: dict[str, Series], steps: tuple[float, float]) -> str:
    """The loss with its terms, learning rate and gradient norm, and a word on what was not finite."""
    names = [n for n in series if n == "loss" or n.startswith("loss/")]
    drawn = sorted((n for n in names if len(series[n].good)), key=lambda n: n != "loss")
    kinds = [f"{SERIES[k % len(SERIES)]} dash{k // len(SERIES) % 4}" for k in range(len(drawn))]
    figures = curve_figure("loss", [series[n] for n in drawn], steps, kinds=kinds)
    smalls = [
        curve_figure(title, [series[n]], steps, sizes=SMALL, kinds=["series s7"])
        for n, title in (("lr", "learning rate"), ("grad_norm", "gradient norm"))
        if n in series
    ]
    said = [broken_note(series[n]) for n in [*names, "grad_norm"] if n in series]
    text = "".join(tag("p", prose(s), kind="said bad-news") for s in said if s)
    kept = [f for f in (figures, *smalls) if f]
    if not kept:
        return text
    legend = ""
    if len(drawn) > 1:
        ends = {n: number(float(series[n].good[-1])) for n in drawn}
        legend = render_legend(
            [(_key(k), f"<code>{escape(n)}</code> {ends[n]}") for n, k in zip(drawn, kinds, strict=True)]
        )
    hint = tag("p", "The line is a running mean; the faint one keeps every extreme.", kind="hint")
    stacked = "".join((render_figures([figures], "bare") if figures else "", _small(smalls, "stack")))
    return hint + legend + tag("div", stacked, kind="figures split") + text


def _small(figures: Sequence[Figure | None], kind: str = "figures") -> str:
    kept = [f for f in figures if f]
    return render_figures(kept, kind) if kept else ""


def _key(kind: str) -> str:
    return f'<path class="line {kind}" d="M-9 0H9"/>'


def _accuracy(report: TrainingReport, found: Sequence[Learned], steps: tuple[float, float]) -> str:
    figures = [accuracy_figure(found, report.metric_name, steps), frontier_figure(found, report.metric_name)]
    kept = [f for f in figures if f]
    if not kept:
        return ""
    hint = "Measured on images never trained on; whiskers are 95 % intervals."
    keys = [
        (f'<path class="line {f.kind} dash{f.dash % 4}" d="M-10 0H10"/>{marker(f.kind)}',
         f"<code>{escape(f.setting)}</code>")
        for f in found
    ]  # fmt: skip
    return tag("p", hint, kind="hint") + render_legend(keys, rows=True) + render_figures(kept)


def _table(report: TrainingReport, found: Sequence[Learned]) -> str:
    if not found:
        return ""
    drawn = sum(f.steps for f in found if f.steps is not None)
    spent = sum(f.spent for f in found if f.spent is not None)
    dense = _dense(found)

    def part(value: float | None, whole: float) -> float | None:
        return value / whole if value is not None and whole > 0 else None

    def bar(value: float | None) -> str:
        width = 100 * min(max(value or 0.0, 0.0), 1.0)
        return f'{percent(value, "")}<span class="bar"><i style="width:{width:.0f}%"></i></span>'

    def accuracy(f: Learned) -> str:
        return f"<b>{percent(f.top1, '')}</b>" + (tag("small", _limits(f, "")[6:]) if _limits(f, "") else "")

    def delta(f: Learned) -> float | None:
        if not dense or dense.top1 is None or f.top1 is None:
            return None
        return f.top1 - dense.top1

    columns: list[Column[Learned]] = [
        Column("steps", "times drawn", lambda f: f.steps, lambda f: whole(f.steps)),
        Column("% of steps", "of all steps", lambda f: part(f.steps, drawn), lambda f: bar(part(f.steps, drawn))),
        Column("GMACs spent", "forward and backward, all images", lambda f: f.spent, lambda f: amount(f.spent)),
        Column("% of GMACs", "of all spent", lambda f: part(f.spent, spent), lambda f: bar(part(f.spent, spent))),
        Column("GMACs per image", "10⁹ multiply-accumulates per image", lambda f: f.gmacs, lambda f: number(f.gmacs)),
        Column(f"{report.metric_name} %", "at the last check, with its 95 % interval", lambda f: f.top1, accuracy),
        Column("Δ points", "against dense at the last check", delta, lambda f: points(delta(f))),
    ]
    last = max((f.last.step for f in found if f.last), default=0)

    def head(f: Learned) -> Head:
        note = f"last checked at step {whole(f.last.step)}" if f.last and f.last.step < last else ""
        return Head(f.setting, f.kind, note=note)

    table = lay_out(found, head, columns)
    box = scrolling(table, "What each setting got")
    return tag("p", "Select a heading to sort. Intervals are at 95 %.", kind="hint") + box


def _speed(series: dict[str, Series], steps: tuple[float, float]) -> str:
    pace = [series[n] for n in ("images_per_s",) if n in series]
    wait = [series[n] for n in ("wait",) if n in series]
    figures = [
        curve_figure("images/s", pace, steps, sizes=LOW, zero=True, kinds=["series s0"]),
        curve_figure(
            "time waiting for data, %", wait, steps, sizes=LOW, zero=True, kinds=["series s1"],
            text=lambda v: compact(float(f"{100 * v:.6g}")),
        ),
    ]  # fmt: skip
    said = ""
    if wait and len(wait[0].good):
        mean = float(wait[0].good.mean())
        bound = mean > STARVED
        lead = "The run was data-bound: it spent" if bound else "The run was not data-bound: it spent"
        said = tag(
            "p", f"{lead} {percent(mean)} of its time waiting for data.", kind="said bad-news" if bound else "said"
        )
    return _small(figures) + said
