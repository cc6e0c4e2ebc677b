"""What to conclude from a search: which option to take, and in plain words why — "no" first where it is no."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from saccade.evaluation.accuracy import ITSELF, paired
from saccade.evaluation.candidates import RIVAL
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.options import Measured, Search
from saccade.evaluation.stats import Interval
from saccade.runners.runner import FP32
from saccade.terminal.results import counted

SURE = 1.96  # standard errors that a reduction has to be ahead of the dense model where that is faster
SAID = {  # what a setting costs where the dense model is all that it can be compared with
    "agreement": "the dense model's class on {} of the images",
    "kl": "KL from the dense model {}",
    "cosine": "cosine {} to the dense model's embeddings",
    "recall@k": "{} of the dense model's {k} nearest found in its index",
    "reindexed@k": "{} of the dense model's {k} nearest kept in an index embedded anew",
    "cells": "cosine {} to the dense model's feature map, cell by cell",
}


@dataclass(frozen=True)
class Recommendation:
    """The choice, and its reasons; the first line is the answer."""

    chosen: Measured
    lines: list[str]
    met: bool  # whether the chosen option is within the target


def conclude(search: Search) -> Recommendation:
    """Choose by the selection half and the measured speed; the words are about the half that no choice has seen."""
    dense = search.measured[0]
    serious = _serious(search)
    if search.evaluator is None:
        return Recommendation(dense, [_speed_only(search)], met=True)
    fit = [m for m in serious if m.meets(search.target, dense)]
    if not fit:
        fastest = max(serious, key=lambda m: m.speed.speedup)
        lines = [
            f"No: nothing here is within the target ({search.aim}). "
            f"The fastest is {described(fastest, search.evaluator)}."
        ]
        return Recommendation(fastest, lines + beside(fastest, search) + _alone(fastest, dense, search), met=False)
    chosen, reason = choose(fit, search)
    lines = [_answer(chosen, fit, dense, search)]
    lines += beside(chosen, search)
    lines += _parts(chosen, search)
    lines += _searched(chosen)
    lines += _alone(chosen, dense, search)
    lines += [reason] if reason else []
    lines += _other_kind(chosen, fit, search.evaluator)
    lines += _contradiction(chosen, serious, search)
    lines += _random_baseline(chosen, search)
    return Recommendation(chosen, lines, met=True)


def _serious(search: Search) -> list[Measured]:
    """What may be chosen: no random baseline, and no other model."""
    return [m for m in search.measured if m.option.candidate.family not in ("random", RIVAL)]


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
    """The dense model, what would be chosen, the best of either kind, other models, then the rest, by speed; random
    baselines last."""
    dense, *rest = search.measured
    serious = _serious(search)
    fit = [m for m in serious if m.meets(search.target, dense)]
    first = [dense, choose(fit, search)[0] if fit else max(serious, key=lambda m: m.speed.speedup)]
    for plain in (True, False):
        first += sorted((m for m in fit if m.option.plain is plain), key=lambda m: m.rank)[-1:]
    late = {RIVAL: 0, "random": 2}
    rest.sort(key=lambda m: (late.get(m.option.candidate.family, 1), m not in fit, -m.speed.speedup))
    return list({m.option.name: m for m in (*first, *rest)}.values())


def choose(fit: Sequence[Measured], search: Search) -> tuple[Measured, str]:
    """The option to use, of those within the target, and why it is not the most accurate; by the selection half alone.

    Where a loss is allowed: the fastest. Else the most accurate; of those that are less than one standard error of the
    paired difference behind it, the fastest (the rule of one standard error of Breiman et al., 1984). A reduction is
    left for the dense model, run another way, where that is faster and less than two standard errors behind (not for a
    smaller input, which loses as well); whatever another beats in both speed and accuracy for that one.
    """
    if search.target.kind == "drop":
        return max(fit, key=_by_speed), ""
    assert search.evaluator is not None
    best = max(fit, key=lambda m: (m.rank, m.option.plain, m.speed.speedup))
    chosen = max((m for m in fit if _is_tie(m, best, search.evaluator)), key=_by_speed)
    if not chosen.option.plain:
        whole = (m for m in fit if m.option.candidate.setting == "dense")
        chosen = max([chosen, *(m for m in whole if _is_tie(m, chosen, search.evaluator, SURE))], key=_by_speed)
    while better := [m for m in fit if _beats(m, chosen)]:
        chosen = max(better, key=lambda m: (m.selection or 0.0, m.speed.speedup))
    if chosen is best or best.selection == chosen.selection:
        return chosen, ""
    near = _is_tie(chosen, best, search.evaluator)
    gap = search.evaluator.metric.scale.amount((best.selection or 0.0) - (chosen.selection or 0.0))
    return chosen, (
        f"On the {search.selection_images} images that chose, `{best.option.name}` ({best.speed.speedup:.2f}×) was "
        f"{gap} better, which is within noise ({'one standard error' if near else 'two standard errors'}): so the "
        f"faster one{', which reduces no tokens' if chosen.option.plain and not near else ''}."
    )


def _by_speed(m: Measured) -> tuple:
    return m.speed.speedup, m.rank, m.option.plain  # of equals the one that reduces nothing


def _is_tie(m: Measured, best: Measured, evaluator: Evaluator, errors: float = 1.0) -> bool:
    """Whether an option is within so many standard errors of the best, on the selection half, image by image."""
    if m is best:
        return True
    if m.chosen_by is None or best.chosen_by is None:
        return m.selection == best.selection
    x, y = paired(best.chosen_by, m.chosen_by)
    gain = evaluator.merits(x) - evaluator.merits(y)
    more = float(evaluator.metric.scale.share)  # half an image more of each kind: few are noise
    return gain.sum().item() <= errors * math.sqrt(gain.square().sum().item() + more)


def _beats(a: Measured, b: Measured) -> bool:
    """Whether a is better than b in both speed and selection-half metric, in one of them strictly."""
    x, y = (a.speed.speedup, a.selection or 0.0), (b.speed.speedup, b.selection or 0.0)
    return x != y and x[0] >= y[0] and x[1] >= y[1]


def difference(a: Measured, b: Measured, evaluator: Evaluator) -> Interval:
    """a − b in the metric on the reporting half, paired by image, in the metric's own unit."""
    assert a.found is not None and b.found is not None
    if a is b:
        return ITSELF
    x, y = paired(a.found, b.found)
    return evaluator.metric.difference(evaluator.values(x), evaluator.values(y))


def _answer(chosen: Measured, fit: Sequence[Measured], dense: Measured, search: Search) -> str:
    """What to use, how much faster it is, and what it costs; ``fit`` are the options within the target."""
    if chosen is dense:
        return f"No: use the model as it is. Nothing faster here is within the target ({search.aim})."
    needed = "gets there" if all(m.option.plain for m in fit) else "is needed"
    no = f"No token reduction {needed}: " if chosen.option.plain else ""
    use = "use" if no else "Use"
    assert search.evaluator is not None
    speed = f"{chosen.speed.speedup:.2f}× as fast as dense on this machine, batch {chosen.speed.batch}"
    return f"{no}{use} `{chosen.option.name}`: {speed}, {_cost(chosen, dense, search.evaluator)}."


def _cost(m: Measured, dense: Measured, evaluator: Evaluator) -> str:
    metric = evaluator.metric
    if metric.labelled:
        return f"{metric.worded(difference(m, dense, evaluator))} of {metric}"
    assert m.score is not None
    low, high = (metric.scale.value(v, False) for v in (m.score.value.low, m.score.value.high))
    own = SAID[metric.kind].format(metric.scale.value(m.score.value.mean), k=metric.k)
    return f"{own} (95 %: {low} … {high}{metric.scale.suffix})"


def _alone(chosen: Measured, dense: Measured, search: Search) -> list[str]:
    """Whether this many images can tell what the choice costs."""
    evaluator = search.evaluator
    assert evaluator is not None and chosen.found is not None
    count = len(chosen.found.indices)
    if chosen is dense or not evaluator.metric.labelled:
        return []
    gap = difference(chosen, dense, evaluator)  # a share: labels tell right from wrong
    if gap.high < 0:
        return [f"{count} images can tell: that loss is real, at least {-100 * gap.high:.1f} points."]
    if gap.low > 0:
        return [f"{count} images can tell: that gain is real."]
    half = (gap.high - gap.low) / 2
    need = math.ceil(count * (half / 0.01) ** 2 / 100) * 100
    more = f"; about {need:,} labelled images would tell one point" if half > 0.01 else ""
    worst = f"a loss of {-100 * gap.low:.1f} points" if gap.low < 0 else "no loss"
    return [f"{count} images cannot tell it from no loss at all, nor from {worst}{more}."]


def _other_kind(chosen: Measured, fit: Sequence[Measured], evaluator: Evaluator) -> list[str]:
    """The best of the other kind: plain dense beside a reduction, a reduction beside plain dense."""
    others = [m for m in fit if m.option.plain is not chosen.option.plain]
    kind = "token reduction" if chosen.option.plain else "without reducing tokens"
    if not others:
        return [] if chosen.option.plain else ["Only token reduction gets there."]
    rival = max(others, key=lambda m: (m.rank, m.speed.speedup))
    gap = difference(chosen, rival, evaluator)
    sure = "" if gap.low > 0 or gap.high < 0 else ", which this many images cannot tell apart"
    said = evaluator.metric.worded(gap)
    return [f"The best {kind}: {described(rival, evaluator)}; the choice − this = {said}{sure}."]


def _contradiction(chosen: Measured, serious: Sequence[Measured], search: Search) -> list[str]:
    """Rows of the table that look better than the choice, and why they are not it."""
    assert chosen.score is not None and search.evaluator is not None
    lines, scale = [], search.evaluator.metric.scale
    for m in serious:
        assert m.score is not None
        ahead = scale.merit(m.score.value.mean) - scale.merit(chosen.score.value.mean)
        faster = m.speed.speedup - chosen.speed.speedup
        seen = faster >= 0 and ahead >= 0 and (faster, ahead) != (0, 0)
        if m is chosen or not (seen or _beats(m, chosen)):
            continue
        word = f"{'faster' if faster > 0 else 'as fast'} and {'better' if ahead > 0 else 'as good'}"
        if not m.meets(search.target, search.measured[0]):
            reason = f"is not within the target ({search.aim})"
        else:
            by = scale.amount((chosen.selection or 0.0) - (m.selection or 0.0))
            reason = f"was {by} behind on the images that chose; these decide, the others only report"
        lines.append(f"`{m.option.name}` is {word} on the reported images, but {reason}.")
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
    return [f"Against the random baseline `{control.option.name}` ({cost}): {search.evaluator.metric.worded(gap)}."]


def described(m: Measured, evaluator: Evaluator) -> str:
    """``evit(0.7)`` (1.49×, 0.79 GMACs, −1.2 points (95 %: −2.5 … +0.1))."""
    text = f"`{m.option.name}` ({m.speed.speedup:.2f}×, {m.speed.gmacs:.2f} GMACs"
    if m.score is not None:
        loss, metric = m.score.delta, evaluator.metric
        text += (
            f", {metric.worded(loss)}" if loss is not None else f", {metric} {metric.scale.value(m.score.value.mean)}"
        )
    return text + ")"


def beside(chosen: Measured, search: Search) -> list[str]:
    """What other models do at this budget, a line each: of the ways that each is run, that in which it does best."""
    evaluator, dense = search.evaluator, search.measured[0]
    assert evaluator is not None
    models: dict[str, list[Measured]] = {}
    for m in search.measured:
        if m.option.candidate.family == RIVAL:
            models.setdefault(m.option.candidate.setting, []).append(m)
    lines = []
    for ways in models.values():
        fit = [m for m in ways if m.meets(search.target, dense)]
        m = max(fit or ways, key=lambda m: (m.speed.speedup, m.rank))
        said = described(m, evaluator)
        if not fit:
            lines.append(f"Of the other models, {said} is not within the target ({search.aim}).")
            continue
        gap = difference(m, chosen, evaluator)
        merit, faster = evaluator.metric.better(gap), m.speed.speedup >= chosen.speed.speedup
        apart = f"this − the choice = {evaluator.metric.worded(gap)}"
        within_loss = search.target.kind == "drop" and faster
        if not chosen.meets(search.target, dense) or merit.low > 0 or within_loss:
            lines.append(f"Another model does better at this budget: {said}; {apart}. It is not exported: tune it.")
        elif merit.high < 0:
            lines.append(f"The other model {said} does worse at this budget; {apart}.")
        else:
            word = "and is the faster one" if faster else "and is the slower one"
            lines.append(f"The other model {said} cannot be told apart from the choice, {word}; {apart}.")
    return lines


def _speed_only(search: Search) -> str:
    others = search.measured[1:]
    saved = [m for m in others if m.speed.speedup > 1.0 and m.speed.finite]
    broken = [m.option.name for m in search.measured if not m.speed.finite]
    beyond = f" Of no use, since their logits hold NaN or infinity: {', '.join(broken)}." if broken else ""
    return (
        f"Speed only, no images were given. Faster than dense here: {len(saved)} of {counted(len(others), 'setting')}, "
        f"up to {max((m.speed.speedup for m in saved), default=1.0):.2f}×. Nothing is said about accuracy.{beyond}"
    )
