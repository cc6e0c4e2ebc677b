"""Curves over the steps of a training run: a smoothed line over the raw one, few points however long the run was."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from saccade.reports.figure import Figure
from saccade.reports.formatting import compact, whole
from saccade.reports.plots import LAYOUTS
from saccade.reports.svg import Axis, canvas, frame, span, tag

BUCKETS = 300  # of a curve: two points of the raw line and one of the smoothed line in each
SMALL = {"any": (380, 200)}  # beside a large one
LOW = {"wide": (580, 230), "narrow": (360, 220)}
HUGE = 1e30  # a number beyond it counts as not finite: no axis could hold it beside the others


@dataclass(frozen=True)
class Series:
    """The values of one name over the steps; what was logged but not finite is NaN, what was not logged is absent."""

    name: str
    steps: np.ndarray  # float64 [n], in order
    values: np.ndarray  # float64 [n]

    @property
    def broken(self) -> np.ndarray:
        """The steps whose value was not finite."""
        return self.steps[np.isnan(self.values)]

    @property
    def good(self) -> np.ndarray:
        """The values that are numbers."""
        return self.values[~np.isnan(self.values)]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, float]], name: str) -> Series:
        """A column of a log by step; rows without it are left out."""
        pairs = [(_real(r.get("step", i)), _real(r[name])) for i, r in enumerate(rows) if r.get(name) is not None]
        table = np.array([p for p in pairs if not math.isnan(p[0])], dtype=np.float64).reshape(-1, 2)
        table = table[np.argsort(table[:, 0], kind="stable")]  # a resumed run may have logged a step twice
        return cls(name, table[:, 0], table[:, 1])


def _real(value: object) -> float:
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return found if abs(found) < HUGE else math.nan


@dataclass(frozen=True)
class Thin:
    """A series as drawn, ``(step, value)`` each; NaN parts what a value that was not finite parts."""

    raw: list[tuple[float, float]]
    smooth: list[tuple[float, float]]


def thin(series: Series, buckets: int = BUCKETS) -> Thin:
    """The least and the greatest value of each bucket, in their order, and a running mean over buckets."""
    count = len(series.steps)
    edges = np.unique(np.linspace(0, count, min(buckets, count) + 1).astype(int)) if count else np.zeros(1, int)
    raw: list[tuple[float, float]] = []
    middles: list[float] = []
    means: list[float] = []
    sizes: list[int] = []  # of the finite values; below zero where others were not
    for first, last in pairwise(edges):
        part, at = series.values[first:last], series.steps[first:last]
        good = np.flatnonzero(~np.isnan(part))
        if len(good):
            ends = {int(good[np.argmin(part[good])]), int(good[np.argmax(part[good])])}
            raw += [(float(at[k]), float(part[k])) for k in sorted(ends)]
        if len(good) < len(part):
            raw.append((float(at[-1]), math.nan))
        middles.append(float(at[good].mean()) if len(good) else float(at[0]))
        means.append(float(part[good].mean()) if len(good) else math.nan)
        sizes.append(len(good) if len(good) == len(part) else -len(good))
    reach = min(6, len(means) // 12)
    smooth: list[tuple[float, float]] = []
    for k, (step, size) in enumerate(zip(middles, sizes, strict=True)):
        near = slice(max(0, k - reach), k + reach + 1)
        weights = np.abs(np.array(sizes[near])) * (1.0 + reach - np.abs(np.arange(len(means))[near] - k))
        value = math.nan
        if size:
            value = float(np.dot(np.nan_to_num(np.array(means[near])), weights) / weights.sum())
        smooth.append((step, value))
        if size < 0:
            smooth.append((step, math.nan))
    return Thin(raw, smooth)


def path(kind: str, found: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    """A line that NaN parts; a point alone is a dot (a line of no length with round ends)."""
    words, open_ = [], False
    for k, (a, b) in enumerate(found):
        if math.isnan(b):
            open_ = False
            continue
        alone = not open_ and (k + 1 == len(found) or math.isnan(found[k + 1][1]))
        words.append(f"{'L' if open_ else 'M'}{x(a):.1f} {y.clamp(b):.1f}{'h.01' if alone else ''}")
        open_ = True
    return tag("path", kind=kind, d="".join(words)) if words else ""


def step_range(steps: Sequence[float]) -> tuple[float, float]:
    """The range of the horizontal axis, the same for all curves of a page; from zero where it starts near it."""
    low, high = min(steps, default=0.0), max(steps, default=1.0)
    low = min(0.0, low) if low <= 0.1 * high else low
    return (low, high) if high - low > 1e-9 * abs(high) else (low - 1.0, high + 1.0)


def value_axis(values: Sequence[float], start: float, end: float, *, zero: bool = False) -> tuple[Axis, float, float]:
    """An axis for ``values`` and the range that it leaves out; logarithmic where they are positive and far apart."""
    low, high = min(values), max(values)
    if not zero and low > 0 and high > 20 * low:
        return Axis(*span([low, high], 0.04, True), start, end, True), low, high
    if zero:
        low = min(0.0, low)
    calm_low, calm_high = (float(v) for v in np.quantile(values, (0.02, 0.98)))
    room = 1.5 * (calm_high - calm_low)
    if room > 0:  # a few spikes would press all else into a line: they end at the edge, and the page says so
        low, high = max(low, calm_low - room) if not zero else low, min(high, calm_high + room)
    low, high = (low, low) if high - low <= 1e-9 * max(abs(low), abs(high), 1e-20) else (low, high)
    bottom, top = span([low, high])
    return Axis(low if zero and top > low else bottom, top, start, end), low, high


def curve_figure(
    title: str,
    found: Sequence[Series],
    steps: tuple[float, float],
    *,
    text: Callable[[float], str] = compact,
    sizes: Mapping[str, tuple[int, int]] = LAYOUTS,
    zero: bool = False,
    kinds: Sequence[str] = (),
) -> Figure | None:
    """All of ``found`` on one axis; None where nothing was logged."""
    found = [s for s in found if len(s.good)]
    if not found:
        return None
    # The whole range of every series, and enough of what lies between to know what is a rare spike.
    values = [float(v) for s in found for v in np.quantile(s.good, np.linspace(0, 1, 101))]
    lines = [thin(s) for s in found]
    kinds = kinds or ["series s0"] * len(found)
    svgs, hint = {}, ""
    for name, (width, height) in sizes.items():
        x = Axis(*steps, 58, width - 14)
        y, low, high = value_axis(values, height - 44, 26, zero=zero)
        out = frame(x, y, ("step", f"{title}, logarithmic" if y.log else title), (compact, text), "→")
        out += [path(f"raw {k}", line.raw, x, y) for k, line in zip(kinds, lines, strict=True)]
        out += [path(f"line {k}", line.smooth, x, y) for k, line in zip(kinds, lines, strict=True)]
        broken = [float(v) for s in found for v in s.broken]
        if broken:  # at most one mark per pixel
            marks = "".join(f"M{v} {y.end:.0f}V{y.start:.0f}" for v in sorted({round(x(b)) for b in broken}))
            out.append(tag("path", tag("title", "not finite"), kind="bad", d=marks))
        over = sum(int((s.good > high).sum() + (s.good < low).sum()) for s in found)
        if over:
            furthest = max((v for s in found for v in (s.good.max(), s.good.min())), key=lambda v: abs(v - high))
            many = "values are" if over > 1 else "value is"
            hint = f"{whole(over)} {many} beyond the scale, the furthest {compact(float(f'{furthest:.3g}'))}"
        last = ", ".join(f"{s.name} ends at {text(float(f'{s.good[-1]:.3g}'))}" for s in found[:4])
        svgs[name] = canvas(width, height, out, f"{title} over steps; {last}")
    return Figure(title, hint, svgs)


def broken_note(series: Series) -> str:
    """One sentence about values that were not finite, or nothing."""
    bad = series.broken
    if not len(bad):
        return ""
    where = f"at step {whole(float(bad[0]))}"
    if len(bad) > 1:
        where = f"at {whole(len(bad))} of {whole(len(series.steps))} logged steps, first {where}"
    return f"`{series.name}` was not a finite number {where}: a gap with a red mark."
