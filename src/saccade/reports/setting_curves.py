"""What became of every setting that was trained: accuracy over the steps, and against compute at the last check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from saccade.reports.curves import Series, path, thin
from saccade.reports.figure import Figure
from saccade.reports.formatting import escape, known, percent, whole
from saccade.reports.plots import LAYOUTS, MARKERS, frontier_figures, marker, sane, stairs
from saccade.reports.rows import Row
from saccade.reports.svg import TEXT, Axis, canvas, frame, span, tag
from saccade.reports.token_map import elide, font

if TYPE_CHECKING:
    from saccade.reports.training_rows import Checked, Share

SERIES = [kind for kind in MARKERS if kind.startswith("series")]
NAMED = 12  # of more settings than this, the legend alone tells the lines apart


@dataclass(frozen=True)
class Learned:
    """One setting: what it got of the training, and its checks in order."""

    setting: str
    kind: str  # the class of its colour and shape
    dash: int  # its pattern, where there are more settings than colours
    steps: int | None
    spent: float | None
    checks: tuple[Checked, ...]

    @property
    def last(self) -> Checked | None:
        """The last check that gave an accuracy."""
        return next((c for c in reversed(self.checks) if known(c.top1)), None)

    @property
    def gmacs(self) -> float | None:
        """At the last check that knows it."""
        return next((c.gmacs for c in reversed(self.checks) if known(c.gmacs)), None)

    @property
    def top1(self) -> float | None:
        """At the last check that has one."""
        return self.last.top1 if self.last else None


def learned(checks: Sequence[Checked], shares: Sequence[Share]) -> list[Learned]:
    """Every setting that was trained or checked, what computes most first."""
    names = list(dict.fromkeys([s.setting for s in shares] + [c.setting for c in checks]))
    own = {n: sorted((c for c in checks if c.setting == n and known(c.step)), key=lambda c: c.step) for n in names}
    costs = {n: max((c.gmacs for c in own[n] if known(c.gmacs)), default=0.0) for n in names}
    found = []
    for k, name in enumerate(sorted(names, key=lambda n: -costs[n])):
        got = [s for s in shares if s.setting == name]
        steps = sum(s.steps for s in got if known(s.steps)) if got else None
        spent = sum(s.gmacs for s in got if known(s.gmacs)) if got else None
        found.append(Learned(name, SERIES[k % len(SERIES)], k // len(SERIES), steps, spent, tuple(own[name])))
    return found


def accuracy_figure(found: Sequence[Learned], metric: str, steps: tuple[float, float]) -> Figure | None:
    """One line per setting; beside the last points their 95 % intervals and, where there is room, their names."""
    if not any(f.last for f in found):
        return None
    svgs = {name: _accuracy(found, metric, steps, size, name == "wide") for name, size in LAYOUTS.items()}
    return Figure(f"{metric} over the training", "at the right, the last check with its 95 % interval", svgs)


def _accuracy(
    found: Sequence[Learned], metric: str, steps: tuple[float, float], size: tuple[int, int], wide: bool
) -> str:
    ranked = sorted((f for f in found if f.last), key=lambda f: -(f.top1 or 0.0))
    many = len(ranked) > NAMED
    slot = min(3.0 if many else 5.0, 90.0 / len(ranked))
    strip = 10 + slot * len(ranked)
    names = 0.0 if many or not wide else 14 + min(150.0, max(font(TEXT).getlength(f.setting) for f in ranked))
    x = Axis(*steps, 46, size[0] - 14 - strip - names)
    values = [v for f in found for c in f.checks for v in (c.top1,) if known(v)]
    values += [v for f in ranked if f.last for v in (f.last.low, f.last.high) if known(v)]
    low, high = span(values)
    y = Axis(max(low, min(-0.02, *values)), min(high, max(1.02, *values)), size[1] - 44, 26)
    out = frame(x, y, ("step", f"{metric} (%)"), (whole, lambda v: f"{100 * v:.3g}"), "→")
    for k, f in enumerate(found):
        series = Series.of([{"step": c.step, "top1": c.top1} for c in f.checks], "top1")
        drawn = thin(series, 60).raw
        name = f"{f.setting} · {percent(f.top1)}"
        shapes = tag("title", escape(name)) + path(f"line {f.kind} dash{f.dash % 4}", drawn, x, y)
        shapes += path("hit-line", drawn, x, y)
        if len(drawn) <= 25:
            at = [(x(a), y(b)) for a, b in drawn if known(b)]
            shapes += "".join(
                f'<g transform="translate({a:.1f},{b:.1f}) scale(.8)">{marker(f.kind)}</g>' for a, b in at
            )
        out.append(tag("g", shapes, kind="curve", data_row=k))
    tops = _apart([y(f.top1 or 0.0) for f in ranked], 15.0, y.end, y.start)
    for k, (f, top) in enumerate(zip(ranked, tops, strict=True)):
        last, px = f.last, x.end + 12 + slot * k
        if not last:
            continue
        row = list(found).index(f)
        if known(last.low, last.high):
            d = f"M{px:.1f} {y(last.low):.1f}V{y(last.high):.1f}"
            out.append(tag("path", kind=f"whisker {f.kind}", data_row=row, d=d))
        out.append(tag("circle", kind=f"dot {f.kind}", data_row=row, cx=px, cy=y(last.top1), r=2.2))
        if names:
            left, py = x.end + strip + 14, y(last.top1)
            text = escape(elide(f.setting, 150.0, font(TEXT)))
            out.append(tag("path", kind="leader", d=f"M{px + 4:.1f} {py:.1f}L{left - 10:.1f} {top:.1f}h6"))
            out.append(tag("text", text, kind=f"end {f.kind}", data_row=row, x=left, y=top + 4))
    return canvas(*size, out, f"{metric} of {len(ranked)} settings over the steps of the training")


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """``wanted``, in order, at least ``gap`` apart and within the limits, each as near as a few passes bring it."""
    placed: list[list[float]] = []  # groups that touch: [first place, sum of wished first places, members]
    for value in wanted:
        placed.append([value, value, 1.0])
        while len(placed) > 1 and placed[-2][0] + gap * placed[-2][2] > placed[-1][0]:
            _, wish, members = placed.pop()
            before = placed[-1]
            before[1] += wish - members * gap * before[2]
            before[2] += members
            before[0] = before[1] / before[2]
    flat = [first + gap * k for first, _, members in placed for k in range(int(members))]
    shift = max(0.0, low - flat[0]) if flat else 0.0
    flat = [v + shift for v in flat]
    for k in reversed(range(len(flat))):
        flat[k] = min(flat[k], high - gap * (len(flat) - 1 - k))
    return flat


def frontier_figure(found: Sequence[Learned], metric: str) -> Figure | None:
    """Accuracy against compute at the last check, drawn as the report of a tuning draws it."""
    costs = {f.setting: f.gmacs or 0.0 for f in found if f.last}
    spots = [(costs[f.setting], f.top1 or 0.0) for f in found if f.last and sane(costs[f.setting])]
    best = set(stairs(spots, gain=False))
    rows = []
    for f in found:
        low, high = (f.last.low, f.last.high) if f.last else (None, None)
        on = f.top1 is not None and (costs[f.setting], f.top1) in best
        rows.append(Row(
            f.setting, f.kind, costs.get(f.setting, 0.0), 1.0, f.top1, low, high, delta=None, delta_low=None,
            delta_high=None, agreement=None, speedup=None, conversion=None, images_per_s=None, p50_ms=None,
            memory_mb=None, tokens=0.0, on_frontier=on, chosen=False,
        ))  # fmt: skip
    figures = frontier_figures(rows, metric)
    return figures[0] if figures else None
