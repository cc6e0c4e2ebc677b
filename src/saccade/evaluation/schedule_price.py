"""What a schedule may cost, and what that is counted in: milliseconds of this device, or executed MACs."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.evaluation.allowance import Allowance
from saccade.evaluation.candidates import Target
from saccade.evaluation.device_curve import curve_of, known_curve, some_of_each
from saccade.evaluation.latency_curve import LatencyCurve, family, split
from saccade.evaluation.latency_curve import points as curve_points
from saccade.evaluation.schedule import Cost, Space, by_macs
from saccade.evaluation.ways import Ways
from saccade.runners.runner import FP32, Runner
from saccade.setting import Setting
from saccade.terminal.progress import Progress

ASSUMED = 1.5  # the ratio, where none is aimed at
MACS_MARGIN = 1.06  # fewer MACs than the ratio asks for: not all of what they save becomes time
TIME_MARGIN = 1.02  # less time than asked for: what a curve tells is not exact
CURVE_SHARE = 0.2  # of a limited time, for measuring a curve
CURVE_SECONDS = 5.0  # of timed runs for it


@dataclass(frozen=True)
class Price:
    """A cost of schedules, and the most that one may have."""

    cost: Cost
    limit: float
    words: str  # what it counts
    key: str  #   the budget in words, without measured times, which differ from run to run
    curve: LatencyCurve | None = None  # that milliseconds follow from


def price_of(
    target: Target, ways: Ways, batch: int, allowance: Allowance, progress: Progress, space: Space
) -> Price | None:
    """What a target comes to: GMACs, or else milliseconds in the fastest way to run, if its latency curve is known or
    there is time to measure it; else MACs. None where the dense model meets the target by that way alone.

    A target without a budget aims at a ratio of 1.5.
    """
    dense = space.macs(space.empty(""))
    if target.kind == "gmacs":
        return macs(space, dense / (target.value * 1e9)) if dense > target.value * 1e9 else None
    eager, there = ways.ms[FP32], ways.ms[ways.runner]
    limit = {"speedup": eager / target.value, "ms": target.value}.get(target.kind, there / ASSUMED)
    if limit >= there:
        return None
    settings = points(space)
    if known_curve(space.model, settings, ways.runner, batch) is None:
        needed = ways.each * len(curve_points(space.model, settings))
        if allowance.limited and needed > CURVE_SHARE * allowance.seconds:
            return macs(space, MACS_MARGIN * there / limit, f"{target}")
    return milliseconds(space, limit, there, ways.runner, batch, f"{target}", progress)


def macs(space: Space, ratio: float, key: str = "") -> Price:
    """Executed MACs: a ratio of dense's. ``key``: of the budget; empty: the ratio."""
    return Price(by_macs, space.macs(space.empty("")) / ratio, "MACs", f"MACs {key or ratio}")


def milliseconds(
    space: Space,
    limit: float,
    dense_ms: float,
    runner: Runner,
    batch: int,
    key: str = "",
    progress: Progress | None = None,
) -> Price:
    """Milliseconds of a batch in a runner, by its latency curve; measured where it is not known here.

    Args:
        limit: milliseconds.
        dense_ms: what the dense model takes in that runner now; the curve is brought to it.
        key: of the budget.
    """
    model = space.model
    curve = curve_of(model, points(space), runner=runner, batch=batch, seconds=CURVE_SECONDS, progress=progress)
    told = curve.predict(model.at("dense").eval())
    assert told is not None  # a curve knows the dense model
    words = f"milliseconds in {runner}, batch {batch}"
    now = curve.scaled(dense_ms / told)
    return Price(now.schedule_ms, limit / TIME_MARGIN, words, f"{words} {key}", now)


def points(space: Space) -> list[str]:
    """Settings that tell what schedules cost: of each method of theirs two strengths, the stronger on a smaller input
    as well; of tokenizers that of the smaller input, and of each family but grids the one in the middle."""
    methods = {rule.method for rule in space.rules}
    parts = {s: split(Setting.parse(s)) for s in some_of_each(space.model)}
    alone = {s: first for s, (first, own) in parts.items() if own.calls and own.calls[0].name in methods}
    by_tokens = sorted((t for t in space.tokenizers if t), key=space.tokens)
    between = [first for first in alone.values() if first] or by_tokens[len(by_tokens) // 2 :][:1]
    families = [[t for t in by_tokens if family(t) == name] for name in dict.fromkeys(map(family, by_tokens)) if name]
    return [*alone, *dict.fromkeys([*between, *(alike[len(alike) // 2] for alike in families)])]
