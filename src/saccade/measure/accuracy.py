"""``eval``: accuracy of settings on images, per image, with intervals and paired differences to the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.data import ImageSet, Loaders, Preprocess, head_labels, open_images
from saccade.data.corrupt import Corruption, corrupted, corruption
from saccade.errors import UserError
from saccade.measure.defined import NonFinite
from saccade.measure.stats import Interval, bootstrap, mcnemar, paired_difference, proportion
from saccade.model import AdaptiveViT
from saccade.progress import Progress
from saccade.results import Result

Step = Callable[[int], None]
ITSELF = Interval(0.0, 0.0, 0.0)  # the difference of a model to itself
NONE = -1  # the class of no answer


@dataclass(frozen=True)
class Predictions:
    """What one setting said about each of n images, and what that cost."""

    indices: Tensor  # [n] int64  places in the image set
    top: Tensor  #     [n, 5] int64  best classes, best first
    nll: Tensor  #     [n] fp32  -log probability of the true class (of the dense model's best, without labels)
    kl: Tensor  #      [n] fp32  KL(dense ‖ this), nats
    macs: Tensor  #    [n] float64  that ran
    tokens: Tensor  #  [n] float64  mean tokens in the MLP of a block

    def at(self, rows: Tensor) -> Predictions:
        """Some of the rows."""
        return Predictions(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Several, of different images, as one."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class Judge:
    """Images and the dense model's opinion of them: what every setting is compared with, on the same images."""

    def __init__(
        self, model: AdaptiveViT, images: ImageSet, *, batch: int = 32, corrupt: Corruption | None = None
    ) -> None:
        check_head(model)
        self.dense, self.images, self.batch, self.corrupt = model.at("dense").eval(), images, batch, corrupt
        labels = None if images.labels is None else head_labels(images, model.vit)
        self.labels = None if labels is None else torch.tensor(labels.indices)
        self.notes = [*images.notes, *([labels.how] if labels is not None and labels.how else [])]  # for the user
        self.metric = "agreement with dense" if labels is None else "top-1"
        self.failures: dict[str, str] = {}
        self._loaders = Loaders(images)
        self._reference: dict[int, Tensor] = {}  # place -> the dense model's log-probabilities [K]
        self._asked: set[int] = set()  # places that the dense model was asked about; some cannot be read

    def preprocess(self, size: tuple[int, int] | None = None) -> Preprocess:
        """How images become inputs of this size; None: the model's own."""
        return corrupted(Preprocess.of(self.dense.vit, size), self.corrupt)

    def predict(self, model: AdaptiveViT, indices: Sequence[int], step: Step = lambda done: None) -> Predictions:
        """Run a model on images; those that cannot be read, by it or by the dense model, are left out and named in
        ``failures``. None may be left.

        Raises UserError where the dense model's logits are no reference; NonFinite where another's are not finite.
        """
        if model is not self.dense:
            self._consult(indices)
            indices = [i for i in indices if i in self._reference]
        weight = next(model.parameters())
        parts = [self._nothing()]
        for images, places in self._batches(model.input_size(), indices):
            with torch.inference_mode():
                out = model(images.to(weight.device, weight.dtype))
            logits = self._finite(out.logits.double().cpu(), model, places)
            logp = logits.log_softmax(-1)
            answered = logits.amax(-1) > logits.amin(-1)
            if model is self.dense:
                self._check_answers(answered, places)
                self._reference.update(zip(places.tolist(), logp, strict=True))
            dense = torch.stack([self._reference.get(i, row) for i, row in zip(places.tolist(), logp, strict=True)])
            truth = dense.argmax(-1) if self.labels is None else self.labels[places]
            nll = -logp.gather(1, truth.unsqueeze(1)).squeeze(1)
            kl = torch.where(dense.exp() > 0, dense.exp() * (dense - logp), 0.0).sum(-1).clamp(min=0)
            top = logp.topk(min(5, logp.shape[1])).indices
            top[~answered] = NONE  # all classes alike: whichever comes first is no answer
            nll, kl = (v.clamp(max=1e30).float() for v in (nll, kl))
            tokens = torch.tensor(out.trace.tokens(), dtype=torch.float64).mean().expand(len(places))
            parts.append(Predictions(places, top, nll, kl, out.trace.macs().cpu(), tokens))
            step(len(places))
        if model is self.dense:
            self._asked.update(indices)
        return Predictions.join(parts)

    def _finite(self, logits: Tensor, model: AdaptiveViT, places: Tensor) -> Tensor:
        """The logits [n, K] themselves, if all are finite."""
        bad = ~logits.isfinite().all(-1)
        if not bad.any():
            return logits
        name = self.images.names[int(places[bad][0])]
        if model is not self.dense:
            raise NonFinite(
                f"the logits of `{model.setting}` hold NaN or infinity ({int(bad.sum())} of {len(bad)} images, such as "
                f"{name})"
            )
        raise UserError(
            f"the dense model's logits hold NaN or infinity ({int(bad.sum())} of {len(bad)} images, such as {name}): "
            "nothing can be compared with it; check its weights and the images"
        )

    def _check_answers(self, answered: Tensor, places: Tensor) -> None:
        """Raises UserError unless the dense model prefers some class in every image."""
        if not answered.all():
            raise UserError(
                f"the dense model gives all {self.dense.vit.num_classes} classes the same logit "
                f"({int((~answered).sum())} of {len(answered)} images, such as "
                f"{self.images.names[int(places[~answered][0])]}): its head is untrained; train it or load weights"
            )

    def need(self, found: Predictions, setting: str) -> None:
        """Raises UserError if there is not one image."""
        if not len(found.indices):
            reasons = ", ".join(f"{name} ({reason})" for name, reason in list(self.failures.items())[:3])
            reasons = reasons or "no images were asked for"
            raise UserError(f"nothing to measure {setting} on in {self.images.path}: {reasons}")

    def hits(self, found: Predictions) -> Tensor:
        """Whether the best class is the true one (the dense model's, without labels), [n] bool."""
        return found.top[:, 0] == self.truth(found)

    def truth(self, found: Predictions) -> Tensor:
        """The class to find in each image, [n]."""
        return self.best(found) if self.labels is None else self.labels[found.indices]

    def best(self, found: Predictions) -> Tensor:
        """The dense model's best class for each image, [n]."""
        self._consult(found.indices.tolist())
        return torch.stack([self._reference[i].argmax() for i in found.indices.tolist()])

    def _consult(self, indices: Sequence[int]) -> None:
        """Have the dense model's opinion of these images."""
        if unseen := [i for i in indices if i not in self._asked]:
            self.predict(self.dense, unseen)

    def _batches(self, size: tuple[int, int], indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = self._loaders.of(self.preprocess(size))
        try:
            for batch in loader.batches(self.batch, indices):
                yield batch.images, torch.tensor(batch.indices)
        except UserError:
            if len(loader.failures) < len(indices):  # else: not one could be read, which `failures` tells
                raise
        self.failures.update(loader.failures.items)

    def _nothing(self) -> Predictions:
        """Predictions of no image."""
        none, best = torch.empty(0), min(5, self.dense.vit.num_classes)
        places, top = torch.empty(0, dtype=torch.int64), torch.empty(0, best, dtype=torch.int64)
        return Predictions(places, top, none, none, none.double(), none.double())


@dataclass(frozen=True)
class Score:
    """One row of ``eval``. Accuracies are fractions; ``delta`` is paired, against the dense model."""

    setting: str
    metric: str  #           "top-1", or "agreement with dense" where there are no labels
    images: int
    top1: Interval  #        of the metric
    top5: Interval
    nll: Interval
    delta: Interval | None
    p_value: float | None  # exact McNemar test against dense
    agreement: Interval  #   same best class as the dense model
    kl: Interval  #          KL(dense ‖ setting), nats
    tokens: float  #         mean tokens in the MLP of a block
    gmacs: float  #          mean per image, that ran
    gmacs_p50: float
    gmacs_p95: float
    mac_ratio: float  #      dense ÷ this

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


def check_head(model: AdaptiveViT) -> None:
    """Raises UserError unless a model classifies, into two classes or more: with one, every answer is right."""
    if type(model).forward is not AdaptiveViT.forward:
        verbs = {"segment": "segment", "detect": "detect", "textimage": "zeroshot"}
        verb = verbs.get(model.describe().get("task", ""), "the verb of its task")
        raise UserError(f"this is for classifiers, and the model is a {type(model).__name__}: use `saccade {verb}`")
    if (classes := model.vit.num_classes) < 2:
        has = {0: "no classifier (num_classes=0)"}.get(classes, f"a head of {classes} class")
        raise UserError(
            f"this model has {has}: accuracy and agreement need 2 classes or more; give a model with a trained head, "
            "or measure its speed alone (saccade bench)"
        )


def score(setting: str, found: Predictions, dense: Predictions, judge: Judge) -> Score:
    """Summarise predictions of a setting against those of the dense model, on the images that both could read.

    Raises UserError where there is no such image.
    """
    found, dense = (found, found) if found is dense else paired(found, dense)
    judge.need(found, setting)
    hit, truth = judge.hits(found), judge.truth(found)
    delta = p_value = None
    if judge.labels is not None:
        delta = ITSELF if found is dense else paired_difference(hit, judge.hits(dense))
        p_value = mcnemar(hit, judge.hits(dense))
    gmacs = found.macs / 1e9
    return Score(
        setting=setting,
        metric=judge.metric,
        images=len(found.indices),
        top1=proportion(hit),
        top5=proportion((found.top == truth.unsqueeze(1)).any(1)),
        nll=bootstrap(found.nll),
        delta=delta,
        p_value=p_value,
        agreement=proportion(found.top[:, 0] == judge.best(found)),
        kl=bootstrap(found.kl),
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
    progress: Progress | None = None,
) -> Evaluated:
    """Scores of settings on images, the dense model first; and why which images and settings have none.

    Args:
        data: a folder or zip of images, ``class/name`` (see ``saccade.data.open_images``); without classes the metric
            is agreement with the dense model.
        limit: at most so many images, spread evenly over the set.
        cache: a folder for what settings said, so that an interrupted call goes on from there.
        corrupt: ``"masks:50"``, ``"gaussian_noise:3"``, … (``saccade.data.corrupt``), the same for all settings.
        progress: where to show it; None: nowhere.

    Raises:
        UserError: bad data or settings, labels that do not fit the head, a model or settings whose logits are not
            finite, or all alike.
    """
    from saccade.measure.cache import Cache  # that file imports this one

    check_head(model)
    images = data if isinstance(data, ImageSet) else open_images(data, split)
    judge = Judge(model, images, batch=batch, corrupt=None if corrupt is None else corruption(corrupt))
    chosen = spread(len(images), limit)
    named = [s for s in map(str, settings) if s not in ("", "dense")]
    views = {"dense": judge.dense, **{name: model.at(name).eval() for name in named}}  # all checked before any is run
    found: dict[str, Predictions] = {}
    left_out: dict[str, str] = {}
    progress = progress or Progress()
    for line in judge.notes:
        progress.say(line)
    advance = progress.start("evaluating", len(chosen) * len(views))
    store = None if cache is None else Cache.of(cache, judge)
    for name, view in views.items():
        advance(0, what=name)
        ask = partial(judge.predict, view, chosen, advance)
        try:
            found[name] = store.get(name, chosen, ask) if store and name != "dense" else ask()
        except NonFinite as error:
            left_out[name] = str(error)
            continue
        if store and name == "dense":
            store.check(name, found[name])
        if store and (lost := sorted({*chosen} - {*found[name].indices.tolist()})):
            judge.predict(view, lost)  # names them again where the rest came from the cache
        judge.need(found[name], name)
    if left_out and len(found) == 1:
        raise UserError("; ".join(f"{name} cannot be scored: {reason}" for name, reason in left_out.items()))
    scores = [score(name, p, found["dense"], judge) for name, p in found.items()]
    return Evaluated(scores, judge.failures, left_out)


def spread(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` of ``count`` places, evenly spread."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]
