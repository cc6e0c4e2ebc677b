"""``eval``: accuracy of settings on images, per image, with intervals and paired differences to the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.data import ImageSet, open_images
from saccade.data.corrupt import corruption
from saccade.errors import UserError
from saccade.evaluation.answers import Predictions
from saccade.evaluation.defined import NonFinite
from saccade.evaluation.evaluator import Evaluator, check_head
from saccade.evaluation.rivals import Rival
from saccade.evaluation.stats import Interval, bootstrap, mcnemar, proportion, without_infinity
from saccade.model import AdaptiveViT
from saccade.renamed.row_names import OldRowNames
from saccade.terminal.progress import Progress
from saccade.terminal.results import Result

ITSELF = Interval(0.0, 0.0, 0.0)  # the difference of a model to itself


@dataclass(frozen=True)
class Score(OldRowNames):
    """One row of ``eval``. Shares are fractions; ``delta`` is paired, against the dense model."""

    setting: str
    metric: str  #           "top-1", "agreement", "recall@10", … (``saccade.evaluation.metric``)
    images: int
    value: Interval  #        of the metric, whichever it is, in its own unit
    top5: Interval
    nll: Interval
    delta: Interval | None
    p_value: float | None  # exact McNemar test against dense, where an image is right or wrong
    agreement: Interval  #   same best class as the dense model
    kl: Interval  #          KL(dense ‖ setting), nats
    tokens: float  #         mean tokens in the MLP of a block
    gmacs: float  #          mean per image, that ran
    gmacs_p50: float
    gmacs_p95: float
    mac_ratio: float  #      dense ÷ this

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; None for a limit of an interval that is infinite."""
        return without_infinity(asdict(self))


def score(setting: str, found: Predictions, dense: Predictions, evaluator: Evaluator) -> Score:
    """Summarise predictions of a setting against those of the dense model, on the images that both could read.

    Raises UserError where there is no such image.
    """
    found, dense = (found, found) if found is dense else paired(found, dense)
    evaluator.need(found, setting)
    metric, values, truth = evaluator.metric, evaluator.values(found), evaluator.truth(found)
    own, delta, p_value = metric.interval(values), None, None
    if found is dense and not metric.labelled:  # it is compared with itself: certain, however few the images
        own = Interval(own.mean, own.mean, own.mean)
    if metric.labelled:
        delta = ITSELF if found is dense else metric.difference(values, evaluator.values(dense))
        p_value = mcnemar(evaluator.hits(found), evaluator.hits(dense))
    gmacs = found.macs / 1e9
    return Score(
        setting=setting,
        metric=metric.name,
        images=len(found.indices),
        value=own,
        top5=proportion((found.top == truth.unsqueeze(1)).any(1)),
        nll=bootstrap(found.nll, least=0.0),
        delta=delta,
        p_value=p_value,
        agreement=proportion(found.top[:, 0] == evaluator.best(found)),
        kl=ITSELF if found is dense else bootstrap(found.kl, least=0.0),
        tokens=found.tokens.mean().item(),
        gmacs=gmacs.mean().item(),
        gmacs_p50=gmacs.quantile(0.5).item(),
        gmacs_p95=gmacs.quantile(0.95).item(),
        mac_ratio=(dense.macs.mean() / found.macs.mean().clamp(min=1)).item(),
    )


def paired(a: Predictions, b: Predictions) -> tuple[Predictions, Predictions]:
    """Both, on the images that both have, in the same order."""
    if torch.equal(a.indices, b.indices):
        return a, b
    common = sorted(set(a.indices.tolist()) & set(b.indices.tolist()))

    def rows(p: Predictions) -> Tensor:
        place = {i: row for row, i in enumerate(p.indices.tolist())}
        return torch.tensor([place[i] for i in common], dtype=torch.int64)

    return a.at(rows(a)), b.at(rows(b))


@dataclass(frozen=True, repr=False)
class Evaluated(Result):
    """What ``eval`` gives back: ``rows, failures = …`` takes the first two apart."""

    rows: list[Any]  #           ``Score`` each, the dense model's first
    failures: dict[str, str]  #  images that could not be read, and why
    left_out: dict[str, str]  #  settings whose logits are not finite
    metric: str = ""  #          in words, and why it is the one
    item = "image"  #           what ``failures`` names

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {"rows": [row.to_dict() for row in self.rows], "not_read": self.failures, "left_out": self.left_out}

    def __iter__(self) -> Iterator[Any]:
        return iter((self.rows, self.failures))

    def __getitem__(self, place: int) -> Any:
        return (self.rows, self.failures)[place]


def evaluate(
    model: AdaptiveViT,
    data: str | ImageSet,
    settings: Sequence[str] = (),
    *,
    split: str | None = None,
    limit: int | None = None,
    batch: int = 32,
    cache: Path | None = None,
    corrupt: str | None = None,
    metric: str | None = None,
    rivals: Sequence[Rival] = (),
    progress: Progress | None = None,
) -> Evaluated:
    """Scores of settings on images, the dense model first; and why which images and settings have none.

    Args:
        data: a folder or zip of images, ``class/name`` (see ``saccade.data.open_images``).
        limit: at most this many images, spread evenly over the set.
        cache: a folder for what settings said, so that an interrupted call goes on from there.
        corrupt: ``"masks:50"``, ``"gaussian_noise:3"``, … (``saccade.data.corrupt``), the same for all settings.
        metric: see ``saccade.evaluation.metric``; None: the usual one of such a model on such images.
        rivals: other models, each measured on the same images as they come to it.
        progress: where to show it; None: nowhere.

    Raises:
        UserError: bad data or settings, labels that do not fit the head, a model or settings whose logits are not
            finite, or all alike.
    """
    from saccade.evaluation.prediction_cache import Cache  # that file imports this one

    check_head(model, encoders=True)
    images = data if isinstance(data, ImageSet) else open_images(data, split)
    how = None if corrupt is None else corruption(corrupt)
    evaluator = Evaluator(model, images, batch=batch, corrupt=how, metric=metric)
    for rival in rivals:
        rival.check(evaluator)
    chosen = spread(len(images), limit)
    evaluator.check_count(len(chosen))
    named = [s for s in map(str, settings) if s not in ("", "dense")]
    views = {
        "dense": evaluator.dense,
        **{name: model.at(name).eval() for name in named},
        **{rival.name: rival.model for rival in rivals},
    }  # all checked before any is run
    found: dict[str, Predictions] = {}
    left_out: dict[str, str] = {}
    progress = progress or Progress()
    for line in evaluator.notes:
        progress.say(line)
    apart = {rival.name for rival in rivals}  # their weights are not what the cache is named by
    advance = progress.start("evaluating", len(chosen) * len(views))
    store = None if cache is None else Cache.of(cache, evaluator)
    for name, view in views.items():
        advance(0, what=name)
        ask = partial(evaluator.predict, view, chosen, advance)
        try:
            keyed = store and name != "dense" and name not in apart
            found[name] = store.get(name, chosen, ask) if store and keyed else ask()
        except NonFinite as error:
            left_out[name] = str(error)
            continue
        if store and name == "dense":
            store.check(name, found[name])
        if store and (lost := sorted({*chosen} - {*found[name].indices.tolist()})):
            evaluator.predict(view, lost)  # names them again where the rest came from the cache
        evaluator.need(found[name], name)
    if left_out and len(found) == 1:
        raise UserError("; ".join(f"{name} cannot be scored: {reason}" for name, reason in left_out.items()))
    scores = [score(name, p, found["dense"], evaluator) for name, p in found.items()]
    return Evaluated(scores, evaluator.failures, left_out, evaluator.metric.described())


def spread(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` of ``count`` places, evenly spread."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]
