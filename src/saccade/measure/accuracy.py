"""``eval``: accuracy of settings on images, per image, with intervals and paired differences to the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.data import CACHE_BYTES, ImageSet, Loader, Preprocess, class_indices, open_images
from saccade.data.corrupt import Corruption, corrupted, corruption
from saccade.errors import UserError
from saccade.measure.stats import Interval, bootstrap, mcnemar, proportion
from saccade.model import AdaptiveViT
from saccade.progress import Progress

Step = Callable[[int], None]


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
        self.dense, self.images, self.batch, self.corrupt = model.at("dense").eval(), images, batch, corrupt
        labels = class_indices(images, model.vit.num_classes) if images.labels is not None else None
        self.labels = None if labels is None else torch.tensor(labels)
        self.metric = "agreement with dense" if labels is None else "top-1"
        self.failures: dict[str, str] = {}
        self._loaders: dict[tuple[int, int], Loader] = {}
        self._reference: dict[int, Tensor] = {}  # place -> the dense model's log-probabilities [K]
        self._asked: set[int] = set()  # places that the dense model was asked about; some cannot be read

    def preprocess(self, size: tuple[int, int] | None = None) -> Preprocess:
        """How images become inputs of this size; None: the model's own."""
        return corrupted(Preprocess.of(self.dense.vit, size), self.corrupt)

    def predict(self, model: AdaptiveViT, indices: Sequence[int], step: Step = lambda done: None) -> Predictions:
        """Run a model on images; those that cannot be read, by it or by the dense model, are left out and named in
        ``failures``. None may be left."""
        if model is not self.dense:
            self._consult(indices)
            indices = [i for i in indices if i in self._reference]
        weight = next(model.parameters())
        parts = [self._nothing()]
        for images, places in self._batches(model.input_size(), indices):
            with torch.inference_mode():
                out = model(images.to(weight.device, weight.dtype))
            logp = out.logits.float().log_softmax(-1).cpu()
            if model is self.dense:
                self._reference.update(zip(places.tolist(), logp, strict=True))
            dense = torch.stack([self._reference.get(i, row) for i, row in zip(places.tolist(), logp, strict=True)])
            truth = dense.argmax(-1) if self.labels is None else self.labels[places]
            nll = -logp.gather(1, truth.unsqueeze(1)).squeeze(1)
            kl = (dense.exp() * (dense - logp)).sum(-1)
            top = logp.topk(min(5, logp.shape[1])).indices
            tokens = torch.tensor(out.trace.tokens(), dtype=torch.float64).mean().expand(len(places))
            parts.append(Predictions(places, top, nll, kl, out.trace.macs().cpu(), tokens))
            step(len(places))
        if model is self.dense:
            self._asked.update(indices)
        return Predictions.join(parts)

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
        if size not in self._loaders:
            room = CACHE_BYTES // 8  # several input sizes stay decoded
            self._loaders[size] = Loader(self.images, self.preprocess(size), cache_bytes=room)
        loader = self._loaders[size]
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


def score(setting: str, found: Predictions, dense: Predictions, judge: Judge) -> Score:
    """Summarise predictions of a setting against those of the dense model, on the images that both could read.

    Raises UserError where there is no such image.
    """
    found, dense = paired(found, dense)
    judge.need(found, setting)
    hit, truth = judge.hits(found), judge.truth(found)
    delta = p_value = None
    if judge.labels is not None:
        delta = bootstrap(hit.double() - judge.hits(dense).double())
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
        mac_ratio=(dense.macs.mean() / found.macs.mean()).item(),
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
) -> tuple[list[Score], dict[str, str]]:
    """Scores of settings of a model on images, the dense model first; and why which images could not be read.

    Args:
        data: a folder or zip of images, ``class/name`` (see ``saccade.data.open_images``); without classes the metric
            is agreement with the dense model.
        split: of a folder of splits; None: the held-out one.
        limit: at most so many images, spread evenly over the set.
        cache: a folder for what settings said, so that an interrupted call goes on from there.
        corrupt: ``"masks:50"``, ``"gaussian_noise:3"``, … (``saccade.data.corrupt``), the same for all settings.
        progress: where to show it; None: nowhere.

    Raises:
        UserError: bad data or settings, labels that do not fit the head.
    """
    from saccade.measure.cache import Cache  # that file imports this one

    images = data if isinstance(data, ImageSet) else open_images(data, split)
    judge = Judge(model, images, batch=batch, corrupt=None if corrupt is None else corruption(corrupt))
    chosen = spread(len(images), limit)
    named = [s for s in map(str, settings) if s not in ("", "dense")]
    views = {"dense": judge.dense, **{name: model.at(name).eval() for name in named}}  # all checked before any is run
    found: dict[str, Predictions] = {}
    advance = (progress or Progress()).start("evaluating", len(chosen) * len(views))
    store = None if cache is None else Cache(cache, model, images.fingerprint(), judge.preprocess(), model.backbone)
    for name, view in views.items():
        advance(0, what=name)
        ask = partial(judge.predict, view, chosen, advance)
        found[name] = store.get(name, chosen, ask) if store and name != "dense" else ask()
        if store and (lost := sorted({*chosen} - {*found[name].indices.tolist()})):
            judge.predict(view, lost)  # names them again where the rest came from the cache
        judge.need(found[name], name)
    return [score(name, p, found["dense"], judge) for name, p in found.items()], judge.failures


def spread(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` of ``count`` places, evenly spread."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]
