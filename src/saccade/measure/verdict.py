"""What to conclude from a search: which option to take, and in plain words why — "no" first where it is no."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.measure.accuracy import Judge, paired
from saccade.measure.stats import Interval, bootstrap
from saccade.measure.tune import Measured, Search


@dataclass(frozen=True)
class Verdict:
    """The choice, and its reasons; the first line is the answer."""

    chosen: Measured
    lines: list[str]
    met: bool  # whether the chosen option is within the target


def conclude(search: Search) -> Verdict:
    """Choose by the selection half, judge by the reporting half."""
    dense = search.measured[0]
    serious = [m for m in search.measured if m.option.candidate.family != "random"]
    fastest = max(serious, key=lambda m: m.speed.speedup)
    if search.judge is None:
        return Verdict(dense, [_speed_only(search)], met=True)
    judge = search.judge
    fit = [m for m in serious if m.meets(search.target, dense)]
    if not fit:
        answer = f"No: nothing here is {search.target}. The fastest is {_told(fastest)}."
        return Verdict(fastest, [answer], met=False)
    plain, reduced = ([m for m in fit if m.option.plain is kind] for kind in (True, False))
    order = _by_speed if search.target.kind == "drop" else _by_rank
    best_plain, best_reduced = (max(group, key=order) if group else None for group in (plain, reduced))

    if best_plain is None or best_reduced is None:
        chosen = best_plain or best_reduced
        assert chosen is not None
        lines = [f"Only token reduction gets there: use {_told(chosen)}."] if best_reduced else []
        lines = lines or [f"No token reduction gets there, plain dense does: use {_told(chosen)}."]
    elif search.target.kind == "drop":
        chosen = max(best_plain, best_reduced, key=order)
        other = best_reduced if chosen is best_plain else best_plain
        no = (
            "No token reduction is needed: plain dense is the fastest within that loss. "
            if chosen is best_plain
            else ""
        )
        lines = [f"{no}Use {_told(chosen)}.", f"The rival is {_told(other)}."]
    else:
        gap = difference(best_reduced, best_plain, judge)
        # Reduction has to be preferred by the one half and confirmed by the other.
        preferred = order(best_reduced) > order(best_plain) and gap.mean > 0
        chosen = best_reduced if preferred else best_plain
        lines = _compared(best_reduced, best_plain, gap, chosen)
    usual = [m for m in fit if m.option.runner == dense.option.runner]
    lines += _same_runner(usual, order, judge, {chosen.option.name})
    lines += _against_chance(search, best_reduced, judge)
    return Verdict(chosen, lines, met=True)


def difference(a: Measured, b: Measured, judge: Judge) -> Interval:
    """a − b in the metric on the reporting half, paired by image."""
    assert a.found is not None and b.found is not None
    x, y = paired(a.found, b.found)
    return bootstrap(judge.hits(x).double() - judge.hits(y).double())


def _compared(reduced: Measured, plain: Measured, gap: Interval, chosen: Measured) -> list[str]:
    assert reduced.score is not None
    versus = f"`{reduced.option.name}` − `{plain.option.name}` = {points(gap)} on {reduced.score.images} images"
    if chosen is plain:
        return [
            f"No: plain dense is as good at that budget. Use {_told(plain)}.",
            f"The best token reduction there is {_told(reduced)}: {versus}.",
        ]
    if gap.low > 0:
        return [f"Use {_told(reduced)}.", f"It beats plain dense at that budget: {versus}."]
    return [
        f"Not decided: plain dense is as good at that budget as far as {reduced.score.images} images tell ({versus}).",
        f"By a hair, use {_told(reduced)}; the plain rival is {_told(plain)}.",
    ]


def _same_runner(fit: list[Measured], order, judge: Judge, said: set[str]) -> list[str]:  # type: ignore[no-untyped-def]
    """Token reduction against plain dense with nothing else changed (number type, compilation)."""
    plain, reduced = ([m for m in fit if m.option.plain is kind] for kind in (True, False))
    if not reduced or max(reduced, key=order).option.name in said:
        return []
    best = max(reduced, key=order)
    if not plain:
        return [f"With nothing changed but tokens, only reduction gets there: {_told(best)}."]
    rival = max(plain, key=order)
    gap = difference(best, rival, judge)
    return [f"With nothing changed but tokens: {_told(best)}; the best plain one is {_told(rival)} ({points(gap)})."]


def _against_chance(search: Search, best: Measured | None, judge: Judge) -> list[str]:
    """The best reduction against dropping tokens at random, at the nearest MACs."""
    controls = [m for m in search.measured if m.option.candidate.family == "random"]
    if best is None or not controls:
        return []
    control = min(controls, key=lambda m: abs(m.speed.gmacs - best.speed.gmacs))
    gap = difference(best, control, judge)
    cost = f"{best.speed.gmacs:.2f} and {control.speed.gmacs:.2f} GMACs"
    return [f"Against chance, at {cost}: `{best.option.name}` − `{control.option.name}` = {points(gap)}."]


def _by_rank(m: Measured) -> tuple:
    return m.rank, m.option.plain, m.speed.speedup  # a tie goes to the plain one


def _by_speed(m: Measured) -> tuple:
    return (m.speed.speedup,)


def _told(m: Measured) -> str:
    """``evit(0.7)``: 1.49× faster, −1.2 points (95 %: −2.5 … +0.1)."""
    text = f"`{m.option.name}` ({m.speed.speedup:.2f}×, {m.speed.gmacs:.2f} GMACs"
    if m.score is not None:
        loss = m.score.delta
        text += f", {points(loss)}" if loss is not None else f", {m.score.top1.mean:.1%} agreement"
    return text + ")"


def _speed_only(search: Search) -> str:
    others = search.measured[1:]
    saved = [m for m in others if m.speed.speedup > 1.0]
    return (
        f"Speed only, no images were given: {len(saved)} of {len(others)} settings are faster than dense here, up to "
        f"{max((m.speed.speedup for m in others), default=1.0):.2f}×. Nothing is said about accuracy."
    )


def points(interval: Interval) -> str:
    """``−1.2 points (95 %: −2.5 … +0.1)``."""
    mean, low, high = (f"{100 * v:+.1f}".replace("-", "−") for v in (interval.mean, interval.low, interval.high))
    return f"{mean} points (95 %: {low} … {high})"
