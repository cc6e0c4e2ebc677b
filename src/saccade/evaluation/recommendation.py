"""What to conclude from a search: which option to take, and in plain words why — "no" first where it is no."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from saccade.evaluation.accuracy import ITSELF, paired
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.options import Measured, Search
from saccade.evaluation.stats import Interval, paired_difference
from saccade.runners.runner import FP32
from saccade.terminal.results import counted


@dataclass(frozen=True)
class Recommendation:
    """The choice, and its reasons; the first line is the answer."""

    chosen: Measured
    lines: list[str]
    met: bool  # whether the chosen option is within the target


def conclude(search: Search) -> Recommendation:
    """Choose by the selection half and the measured speed; the words are about the half that no choice has seen."""
    dense = search.measured[0]
    serious = [m for m in search.measured if m.option.candidate.family != "random"]
    if search.evaluator is None:
        return Recommendation(dense, [_speed_only(search)], met=True)
    fit = [m for m in serious if m.meets(search.target, dense)]
    if not fit:
        fastest = max(serious, key=lambda m: m.speed.speedup)
        lines = [f"No: nothing here is {search.target}. The fastest is {described(fastest)}."]
        return Recommendation(fastest, lines + _alone(fastest, dense, search), met=False)
    chosen, reason = choose(fit, search)
    lines = [_answer(chosen, fit, dense, search)]
    lines += _parts(chosen, search)
    lines += _searched(chosen)
    lines += _alone(chosen, dense, search)
    lines += [reason] if reason else []
    lines += _rival(chosen, fit, search.evaluator)
    lines += _contradiction(chosen, serious, search)
    lines += _random_baseline(chosen, search)
    return Recommendation(chosen, lines, met=True)


def _parts(chosen: Measured, search: Search) -> list[str]:
    """Which part of a gain is the runner's, and which the setting's."""
    option = chosen.option
    same = [m for m in search.measured if m.option.candidate.setting == "dense" and m.option.runner == option.runner]
    if option.candidate.setting == "dense" or option.runner == FP32 or not same:
        return []
    total, own = chosen.speed.speedup, same[0].speed.speedup
    return [f"Of its {total:.2f}×, {own:.2f}× is the runner's ({option.runner}), {total / own:.2f}× the setting's."]


def _searched(chosen: Measured) -> list[str]:
    """How many a choice was made from by a search, where it was."""
    tried = chosen.option.candidate.tried
    if not tried:
        return []
    return [
        f"It is the best of {tried} that a search tried, on the images that choose; those reported had no part in it."
    ]


def by_importance(search: Search) -> list[Measured]:
    """The dense model, what would be chosen, its best rivals, then the rest, by speed; random baselines last."""
    dense, *rest = search.measured
    serious = [m for m in search.measured if m.option.candidate.family != "random"]
    fit = [m for m in serious if m.meets(search.target, dense)]
    first = [dense, choose(fit, search)[0] if fit else max(serious, key=lambda m: m.speed.speedup)]
    for plain in (True, False):
        first += sorted((m for m in fit if m.option.plain is plain), key=lambda m: m.rank)[-1:]
    rest.sort(key=lambda m: (m.option.candidate.family == "random", m not in fit, -m.speed.speedup))
    return list({m.option.name: m for m in (*first, *rest)}.values())


def choose(fit: Sequence[Measured], search: Search) -> tuple[Measured, str]:
    """The option to use, of those within the target, and why it is not the most accurate; by the selection half alone.

    Where a loss is allowed: the fastest. Else the most accurate; of those that are less than one standard error of the
    paired difference behind it, the fastest (the rule of one standard error of Breiman et al., 1984). Whatever another
    beats in both speed and accuracy is left for that one.
    """
    if search.target.kind == "drop":
        return max(fit, key=_by_speed), ""
    assert search.evaluator is not None
    best = max(fit, key=lambda m: (m.rank, m.option.plain, m.speed.speedup))
    chosen = max((m for m in fit if _is_tie(m, best, search.evaluator)), key=_by_speed)
    while better := [m for m in fit if _beats(m, chosen)]:
        chosen = max(better, key=lambda m: (m.selection or 0.0, m.speed.speedup))
    if chosen is best or best.selection == chosen.selection:
        return chosen, ""
    gap = 100 * ((best.selection or 0.0) - (chosen.selection or 0.0))
    return chosen, (
        f"On the {search.selection_images} images that chose, `{best.option.name}` ({best.speed.speedup:.2f}×) was "
        f"{gap:.1f} points better, which is within noise (one standard error): so the faster one."
    )


def _by_speed(m: Measured) -> tuple:
    return m.speed.speedup, m.rank, m.option.plain  # of equals the one that reduces nothing


def _is_tie(m: Measured, best: Measured, evaluator: Evaluator) -> bool:
    """Whether an option is within one standard error of the best, on the selection half, image by image."""
    if m is best:
        return True
    if m.chosen_by is None or best.chosen_by is None:
        return m.selection == best.selection
    x, y = paired(best.chosen_by, m.chosen_by)
    gain = evaluator.hits(x).double() - evaluator.hits(y).double()
    return gain.sum().item() <= math.sqrt(gain.abs().sum().item() + 1)  # half an image more of each kind: few are noise


def _beats(a: Measured, b: Measured) -> bool:
    """Whether a is better than b in both speed and selection-half metric, in one of them strictly."""
    x, y = (a.speed.speedup, a.selection or 0.0), (b.speed.speedup, b.selection or 0.0)
    return x != y and x[0] >= y[0] and x[1] >= y[1]


def difference(a: Measured, b: Measured, evaluator: Evaluator) -> Interval:
    """a − b in the metric on the reporting half, paired by image."""
    assert a.found is not None and b.found is not None
    if a is b:
        return ITSELF
    x, y = paired(a.found, b.found)
    return paired_difference(evaluator.hits(x), evaluator.hits(y))


def _answer(chosen: Measured, fit: Sequence[Measured], dense: Measured, search: Search) -> str:
    """What to use, how much faster it is, and what it costs; ``fit`` are the options within the target."""
    if chosen is dense:
        return f"No: use the model as it is. Nothing faster here is {search.target}."
    needed = "gets there" if all(m.option.plain for m in fit) else "is needed"
    no = f"No token reduction {needed}: " if chosen.option.plain else ""
    use = "use" if no else "Use"
    assert search.evaluator is not None
    speed = f"{chosen.speed.speedup:.2f}× as fast as dense on this machine, batch {chosen.speed.batch}"
    return f"{no}{use} `{chosen.option.name}`: {speed}, {_cost(chosen, dense, search.evaluator)}."


def _cost(m: Measured, dense: Measured, evaluator: Evaluator) -> str:
    if evaluator.labels is None:
        assert m.score is not None
        low, high = 100 * m.score.top1.low, 100 * m.score.top1.high
        return f"the dense model's answer on {m.score.top1.mean:.1%} of the images (95 %: {low:.1f} … {high:.1f} %)"
    return f"{points(difference(m, dense, evaluator))} of {evaluator.metric}"


def _alone(chosen: Measured, dense: Measured, search: Search) -> list[str]:
    """Whether this many images can tell what the choice costs."""
    evaluator = search.evaluator
    assert evaluator is not None and chosen.found is not None
    count = len(chosen.found.indices)
    if chosen is dense or evaluator.labels is None:
        return []
    gap = difference(chosen, dense, evaluator)
    if gap.high < 0:
        return [f"{count} images can tell: that loss is real, at least {-100 * gap.high:.1f} points."]
    if gap.low > 0:
        return [f"{count} images can tell: that gain is real."]
    half = (gap.high - gap.low) / 2
    need = math.ceil(count * (half / 0.01) ** 2 / 100) * 100
    more = f"; about {need:,} labelled images would tell one point" if half > 0.01 else ""
    worst = f"a loss of {-100 * gap.low:.1f} points" if gap.low < 0 else "no loss"
    return [f"{count} images cannot tell it from no loss at all, nor from {worst}{more}."]


def _rival(chosen: Measured, fit: Sequence[Measured], evaluator: Evaluator) -> list[str]:
    """The best of the other kind: plain dense beside a reduction, a reduction beside plain dense."""
    others = [m for m in fit if m.option.plain is not chosen.option.plain]
    kind = "token reduction" if chosen.option.plain else "without reducing tokens"
    if not others:
        return [] if chosen.option.plain else ["Only token reduction gets there."]
    rival = max(others, key=lambda m: (m.rank, m.speed.speedup))
    gap = difference(chosen, rival, evaluator)
    sure = "" if gap.low > 0 or gap.high < 0 else ", which this many images cannot tell apart"
    return [f"The best {kind}: {described(rival)}; the choice − this = {points(gap)}{sure}."]


def _contradiction(chosen: Measured, serious: Sequence[Measured], search: Search) -> list[str]:
    """Rows of the table that look better than the choice, and why they are not it."""
    assert chosen.score is not None
    lines = []
    for m in serious:
        assert m.score is not None
        seen = m.speed.speedup >= chosen.speed.speedup and m.score.top1.mean > chosen.score.top1.mean
        if m is chosen or not (seen or _beats(m, chosen)):
            continue
        if not m.meets(search.target, search.measured[0]):
            reason = f"is not within the target ({search.target})"
        else:
            by = 100 * ((chosen.selection or 0.0) - (m.selection or 0.0))
            reason = f"was {by:.1f} points behind on the images that chose; these decide, the others only report"
        lines.append(f"`{m.option.name}` is as fast and better on the reported images, but {reason}.")
    return lines[:3]


def _random_baseline(chosen: Measured, search: Search) -> list[str]:
    """The choice against dropping tokens at random, at the nearest MACs."""
    controls = [m for m in search.measured if m.option.candidate.family == "random"]
    if chosen.option.plain or not controls:
        return []
    assert search.evaluator is not None
    control = min(controls, key=lambda m: abs(m.speed.gmacs - chosen.speed.gmacs))
    gap = difference(chosen, control, search.evaluator)
    cost = f"{chosen.speed.gmacs:.2f} and {control.speed.gmacs:.2f} GMACs"
    return [f"Against the random baseline `{control.option.name}` ({cost}): {points(gap)}."]


def described(m: Measured) -> str:
    """``evit(0.7)`` (1.49×, 0.79 GMACs, −1.2 points (95 %: −2.5 … +0.1))."""
    text = f"`{m.option.name}` ({m.speed.speedup:.2f}×, {m.speed.gmacs:.2f} GMACs"
    if m.score is not None:
        loss = m.score.delta
        text += f", {points(loss)}" if loss is not None else f", {m.score.top1.mean:.1%} agreement"
    return text + ")"


def _speed_only(search: Search) -> str:
    others = search.measured[1:]
    saved = [m for m in others if m.speed.speedup > 1.0 and m.speed.finite]
    broken = [m.option.name for m in search.measured if not m.speed.finite]
    beyond = f" Of no use, since their logits hold NaN or infinity: {', '.join(broken)}." if broken else ""
    return (
        f"Speed only, no images were given. Faster than dense here: {len(saved)} of {counted(len(others), 'setting')}, "
        f"up to {max((m.speed.speedup for m in saved), default=1.0):.2f}×. Nothing is said about accuracy.{beyond}"
    )


def points(interval: Interval) -> str:
    """``−1.2 points (95 %: −2.5 … +0.1)``."""
    mean, low, high = (f"{100 * v:+.1f}".replace("-", "−") for v in (interval.mean, interval.low, interval.high))
    return f"{mean} points (95 %: {low} … {high})"
