"""``calibrate``: the threshold at which a setting meets a budget, where its cost differs from image to image.

A threshold keeps what each image needs, whatever else is in its batch; only the mean over images can be aimed at
(`selection` spec, §9.6). A method that chooses at several blocks by a score gets a threshold for each: where, over all
images, as much is kept there as by a fixed count, and from there all are moved alike. Nothing is trained.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.checkpoint import Source, open_model
from saccade.core.registry import registry
from saccade.data import ImageSet, open_images
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.evaluation.answers import Predictions
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.knob_search import KnobSearch, learnable
from saccade.evaluation.prediction_cache import Cache
from saccade.evaluation.stats import Interval
from saccade.model import AdaptiveViT
from saccade.renamed.row_names import OldRowNames
from saccade.setting import Setting
from saccade.storage.files import check_folder
from saccade.storage.foreign import check_not_foreign
from saccade.storage.run_folder import check_apart
from saccade.terminal.progress import Progress
from saccade.terminal.results import Result, counted
from saccade.terminal.text_table import Table

KNOB = "threshold"
STEPS = 12  # of the bisection
WIDEST = 12.0  # logit of the highest threshold that is tried; the lowest is its mirror image
CLOSE = 0.005  # share of the budget that may be left over


@dataclass(frozen=True, repr=False)
class Calibrated(OldRowNames, Result):
    """A setting that meets a budget, and what it costs and knows on the images it was found on."""

    setting: str
    threshold: (
        float | tuple[float, ...] | None
    )  # several: one for each block that chooses; None: other knobs were found
    images: int
    gmacs: float  #     mean per image, that ran
    gmacs_p50: float
    gmacs_p95: float
    gmacs_dense: float
    metric: str  #      "top-1", "agreement", "knn", "recall@10", …
    value: Interval
    tried: int  #       thresholds; or steps and moves of learning

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The one row."""
        return [self.to_dict()]

    def table(self) -> Table:
        costs = (self.gmacs, self.gmacs_p50, self.gmacs_p95, self.gmacs_dense)
        value = f"{self.value.mean:.2%} [{self.value.low:.1%}, {self.value.high:.1%}]"
        cells = [self.setting, f"{costs[0]:.3f}", value, *(f"{cost:.3f}" for cost in costs[1:])]
        columns = ["setting", "GMACs, mean", self.metric, "p50", "p95", "dense"]
        return Table(counted(self.images, "image"), columns, [cells], "Intervals are at 95 %.")


def with_threshold(setting: str | Setting, value: float | tuple[float, ...] | None) -> str:
    """The setting with another threshold. Raises UserError unless exactly one of its methods has that knob."""
    setting, known = Setting.parse(setting), registry()
    able = [name for name, entry in known.items() if entry.kind == "method" and KNOB in entry.knobs]
    places = [i for i, call in enumerate(setting.calls) if call.name in able]
    if len(places) != 1:
        has = f"{len(places)} of its methods have one" if places else "none of its methods has one"
        alone = [name for name in known if learnable(name)]
        give = f"give one of {', '.join(able)}, or {' or '.join(alone)} alone"
        raise UserError(f"{setting} cannot be calibrated by a {KNOB}: {has}; {give}")
    call = setting.calls[places[0]]
    order = list(known[call.name].knobs).index(KNOB)
    if len(call.args) > order:
        changed = replace(call, args=(*call.args[:order], value, *call.args[order + 1 :]))
    else:
        changed = replace(call, kwargs=(*((k, v) for k, v in call.kwargs if k != KNOB), (KNOB, value)))
    return str(Setting(tuple(changed if i == places[0] else c for i, c in enumerate(setting.calls))))


def by_count(model: AdaptiveViT, setting: str | Setting) -> AdaptiveViT | None:
    """The view of a setting without its threshold, where its method then keeps a fixed count; else None."""
    known = registry()
    knobs = (known[call.name].knobs.get(KNOB) for call in Setting.parse(setting).calls)
    if not any(knob is not None and knob.default is None for knob in knobs):
        return None
    view = model.at(with_threshold(setting, None)).eval()
    return view if any(hasattr(step, "score") for steps in view.plan.at.values() for step in steps) else None


def fixed_levels(view: AdaptiveViT, run: Callable[[], object]) -> list[float]:
    """For each reducer that chooses by a score: the score above which, over all images, it keeps as much as it does.

    run: puts images through the view, which keeps fixed counts.
    """
    steps = [step for at in sorted(view.plan.at) for step in view.plan.at[at] if hasattr(step, "score")]
    seen: list[list[tuple[Tensor, int]]] = [[] for _ in steps]

    def look(found: list[tuple[Tensor, int]], step: Any, inputs: tuple, out: Any) -> None:
        found.append((step.score(inputs[0]), out.keep.shape[1]))

    handles = [step.register_forward_hook(partial(look, found)) for step, found in zip(steps, seen, strict=True)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [_level(found) for found in seen if found]


def _level(found: list[tuple[Tensor, int]]) -> float:
    scores = torch.cat([score.flatten() for score, _ in found]).float().sort(descending=True).values
    kept = sum(len(score) * count for score, count in found)
    return scores[min(kept, len(scores) - 1)].clamp(-WIDEST, WIDEST).item()


def calibrate(
    model: Source,
    data: str | os.PathLike | ImageSet,
    setting: str,
    gmacs: float,
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | None = None,
    split: str | None = None,
    limit: int | None = 200,
    batch: int = 32,
    cache: str | os.PathLike | None = None,
    search: KnobSearch | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Bisect the ``threshold`` of a setting until the mean MACs of an image are just within a budget.

    Where a method has no threshold but counts that can be learned for a budget, these are, from the images without
    their labels; the setting found says them in numbers.

    Args:
        model: a model, a folder, or a timm name with ``weights`` or ``pretrained``; ``device`` as in
            ``saccade.checkpoint.open_model``.
        data: images that the model was not trained on, as for ``saccade.eval``.
        setting: has exactly one method with a ``threshold``; that of the line itself is ignored. Or one method alone
            whose counts can be learned: those of the line are where learning starts, multiplied to meet the budget.
        gmacs: the budget, 10^9 MACs that run, mean over images.
        split: of a folder of splits; None: the held-out one.
        limit: at most this many images, spread evenly over the set.
        cache: a folder for what settings said, so that an interrupted call goes on from there.
        search: how counts are learned; None: by 150 moves.
        progress: where to show it; None: nowhere.

    Raises:
        UserError: bad data or setting, a budget that no threshold meets, a cache in a folder of somebody's data.
    """
    if isinstance(gmacs, bool) or not 0 < gmacs < 1e6:
        raise UserError(f"gmacs={gmacs!r} is not a number above 0 and below a million")
    if not (learns := learnable(setting)):
        with_threshold(setting, 0.5)  # refuses before anything is read
    if cache is not None:
        check_folder(cache)
        check_apart(cache, [model, data, weights])
        check_not_foreign(cache)
    model = open_model(model, weights, pretrained, device).deploy(None)
    images = data if isinstance(data, ImageSet) else open_images(os.fspath(data), split)
    evaluator = Evaluator(model, images, batch=batch)
    places = spread(len(images), limit)
    progress = progress or Progress()
    for line in evaluator.notes:
        progress.say(line)
    search = search or KnobSearch()
    work = search.work + 2 * len(places) if learns else (STEPS + 4) * len(places)
    advance = progress.start("calibrating", work)
    store = None if cache is None else Cache.of(Path(cache), evaluator)
    advance(0, what="calibrating: the dense model")
    dense = evaluator.predict(evaluator.dense, places, advance)
    evaluator.need(dense, "dense")
    if store is not None:
        store.check("dense", dense)
    if learns:
        advance(0, what="learning counts")
        seen_by_dense = dense.indices.tolist()
        name = search.learn(evaluator, setting, gmacs, seen_by_dense, None if store is None else store.folder, advance)
        ask = partial(evaluator.predict, model.at(name).eval(), places, advance)
        answers = ask() if store is None else store.get(name, places, ask)
        return _calibrated(evaluator, name, None, answers, dense, search.steps + search.moves)
    seen: dict[float, Predictions] = {}
    levels: list[float] = []
    if (view := by_count(model, setting)) is not None:
        advance(0, what="calibrating: where fixed counts lie")
        levels = fixed_levels(view, lambda: evaluator.predict(view, places, advance))

    def at(threshold: float) -> float | tuple[float, ...]:
        shift = logit(threshold)
        return tuple(sigmoid(level + shift) for level in levels) if len(levels) > 1 else threshold

    def cost(threshold: float) -> float:
        if threshold not in seen:
            name = with_threshold(setting, at(threshold))
            advance(0, what=f"calibrating: {name}")
            ask = partial(evaluator.predict, model.at(name).eval(), places, advance)
            seen[threshold] = ask() if store is None else store.get(name, places, ask)
            evaluator.need(seen[threshold], name)
        return seen[threshold].macs.mean().item() / 1e9

    threshold = bisect(cost, gmacs)
    name = with_threshold(setting, at(threshold))
    return _calibrated(evaluator, name, at(threshold), seen[threshold], dense, len(seen))


def _calibrated(
    evaluator: Evaluator,
    setting: str,
    threshold: float | tuple[float, ...] | None,
    found: Predictions,
    dense: Predictions,
    tried: int,
) -> Calibrated:
    each = found.macs / 1e9
    return Calibrated(
        setting=setting,
        threshold=threshold,
        images=len(each),
        gmacs=each.mean().item(),
        gmacs_p50=each.quantile(0.5).item(),
        gmacs_p95=each.quantile(0.95).item(),
        gmacs_dense=dense.macs.mean().item() / 1e9,
        metric=evaluator.metric.name,
        value=evaluator.metric.interval(evaluator.values(found)),
        tried=tried,
    )


def bisect(cost: Callable[[float], float], budget: float, steps: int = STEPS) -> float:
    """The threshold in (0, 1) of the highest cost within a budget, for a cost that falls as thresholds rise.

    Bisects logits, since what a network is sure of lies near 0 and 1. A cost that does not always fall gives a
    threshold within the budget all the same. Raises UserError where the highest threshold is over it.
    """
    low, high = -WIDEST, WIDEST
    if cost(sigmoid(low)) <= budget:
        return sigmoid(low)
    if (cheapest := cost(sigmoid(high))) > budget:
        raise UserError(f"gmacs={budget:g} is out of reach of a {KNOB}, the least is {cheapest:.3g}")
    for _ in range(steps):
        middle = (low + high) / 2
        spent = cost(sigmoid(middle))
        low, high = (low, middle) if spent <= budget else (middle, high)
        if (1 - CLOSE) * budget <= spent <= budget:
            break
    return sigmoid(high)


def logit(threshold: float) -> float:
    """The inverse of ``sigmoid``, as far as it is looked for."""
    return math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else math.copysign(WIDEST, threshold - 0.5)


def sigmoid(logit: float) -> float:
    """A probability that reads well: rounded to six digits, which moves the logit of none by more than a twelfth."""
    return round(1 / (1 + math.exp(-logit)), 6)
