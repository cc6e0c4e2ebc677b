"""Images and the dense model's answers to them: what every setting is compared with, on the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.timm_types import ViT
from saccade.data import ImageSet, Labels, Loaders, Preprocess, head_labels
from saccade.data.corrupt import Corruption, corrupted
from saccade.errors import UserError
from saccade.evaluation.answers import Predictions
from saccade.evaluation.defined import NonFinite, require_finite
from saccade.evaluation.dense_answers import DenseAnswers, cell_cosine, unit_map
from saccade.evaluation.metric import Metric, choose, nearest, overlap
from saccade.evaluation.neighbours import MOST, Neighbours
from saccade.model import AdaptiveViT
from saccade.terminal.results import counted

Step = Callable[[int], None]


NONE = -1  # the class of no answer
EMBEDDED = ("cosine", "reindexed@k")  # metrics that compare embeddings with the dense model's


class Evaluator:
    """Images and the dense model's answers to them: what every setting is compared with, on the same images."""

    def __init__(
        self,
        model: AdaptiveViT,
        images: ImageSet,
        *,
        batch: int = 32,
        corrupt: Corruption | None = None,
        metric: str | None = None,
    ) -> None:
        """metric: see ``saccade.evaluation.metric``; None: the usual one of such a model on such images."""
        check_head(model, encoders=True)
        self.dense, self.images, self.batch, self.corrupt = model.at("dense").eval(), images, batch, corrupt
        self.encodes = not model.vit.num_classes
        self.metric: Metric = choose(
            metric,
            encodes=self.encodes,
            labelled=images.labels is not None,
            images=min(len(images), MOST),
            alone=_alone(images.labels or []),
            where=str(images.path),
        )
        self.labels: Tensor | None = None
        self.notes = [*images.notes]  # for the user
        if self.metric.kind == "top-1":
            labels = _head_labels(images, model.vit)
            self.labels = torch.tensor(labels.indices)
            self.notes += [labels.how] if labels.how else []
        elif self.metric.kind == "knn":
            self.labels = torch.tensor(images.labels)
        self.notes.append(f"metric: {self.metric.described()}")
        self.failures: dict[str, str] = {}
        self._near: dict[ViT, Neighbours] = {}  # by the module that embeds the images
        self._loaders = Loaders(images)
        self._reference = DenseAnswers()
        self._asked: set[int] = set()  # places that the dense model was asked about; some cannot be read

    def preprocess(self, size: tuple[int, int] | None = None, model: AdaptiveViT | None = None) -> Preprocess:
        """How images become inputs of this size, for the dense model or another; None: the model's own."""
        return corrupted(Preprocess.of((model or self.dense).vit, size), self.corrupt)

    def predict(self, model: AdaptiveViT, indices: Sequence[int], step: Step = lambda done: None) -> Predictions:
        """Run a model on images; those that cannot be read, by it or by the dense model, are left out and named in
        ``failures``. None may be left.

        Raises UserError where the dense model's logits are no reference; NonFinite where another's are not finite.
        """
        if model is not self.dense:
            self._consult(indices)
            indices = [i for i in indices if i in self._reference]
        parts = [self._nothing(model)]
        for images, places in self._batches(model, indices):
            parts.append(self._said(model, images, places))
            step(len(places))
        if model is self.dense:
            self._asked.update(indices)
        return Predictions.join(parts)

    def _said(self, model: AdaptiveViT, images: Tensor, places: Tensor) -> Predictions:
        """What a model says of images [n, C, h, w] at these places."""
        weight = next(model.parameters())
        inputs = images.to(weight.device, weight.dtype)
        with torch.inference_mode():
            out = model(inputs)
        given = self._finite(out.logits.double().cpu(), model, places)
        logits = self._neighbours(model).logits(given, places) if self.encodes else given
        logp, answered = logits.log_softmax(-1), logits.amax(-1) > logits.amin(-1)
        kind, is_dense = self.metric.kind, model is self.dense
        vectors = F.normalize(given, dim=-1).float() if kind in EMBEDDED else None
        maps = require_finite(unit_map(model, inputs), model.setting, "features") if kind == "cells" else None
        if is_dense:
            self._check_answers(answered, places)
            self._reference.add(places, logp, vectors, maps)
        dense = self._reference.logp(places.tolist())
        truth = dense.argmax(-1) if self.labels is None else self.labels[places]
        nll = -logp.gather(1, truth.unsqueeze(1)).squeeze(1)
        kl = torch.where(dense.exp() > 0, dense.exp() * (dense - logp), 0.0).sum(-1).clamp(min=0)
        top = logp.topk(min(5, logp.shape[1])).indices
        top[~answered] = NONE  # all classes alike: whichever comes first is no answer
        nll, kl = (v.clamp(max=1e30).float() for v in (nll, kl))
        none = torch.empty(len(places), 0)
        if self.metric.hits:
            value, evidence = (top[:, 0] == truth).double(), (-nll.double()).exp()
        elif kind == "kl":
            value, evidence = kl.double(), -kl.double()
        elif kind == "recall@k":
            value = evidence = overlap(logp.topk(self.metric.k).indices, dense.topk(self.metric.k).indices)
        else:
            value = evidence = torch.ones(len(places)).double() if is_dense else self._likeness(vectors, maps, places)
        value = value if kind != "reindexed@k" else torch.full_like(value, torch.nan)
        tokens = torch.tensor(out.trace.tokens(), dtype=torch.float64).mean().expand(len(places))
        features = none if kind != "reindexed@k" or vectors is None else vectors
        return Predictions(places, top, nll, kl, out.trace.macs().cpu(), tokens, value, evidence, features)

    def _likeness(self, vectors: Tensor | None, maps: Tensor | None, places: Tensor) -> Tensor:
        """The cosine [n] float64 to what the dense model gave for the images: of feature maps, or of embeddings."""
        if maps is not None:
            return cell_cosine(maps, self._reference.maps(places.tolist()))
        assert vectors is not None
        dense = self._reference.vectors(places.tolist())
        if dense.shape != vectors.shape:  # a rival's, in a space of its own
            return torch.zeros(len(places), dtype=torch.float64)
        return (vectors.double() * dense.double()).sum(-1)

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
        if not answered.all() and not self.encodes:
            raise UserError(
                f"the dense model gives all {self.dense.vit.num_classes} classes the same logit "
                f"({int((~answered).sum())} of {len(answered)} images, such as "
                f"{self.images.names[int(places[~answered][0])]}): its head is untrained; train it or load weights"
            )

    def check_count(self, count: int) -> None:
        """Raises UserError where so many images, measured together, are too few for the metric."""
        if self.metric.kind == "reindexed@k":  # other indices hold images that are not measured too
            self.metric.check_images(count, f"{counted(count, 'image')} measured together")

    def need(self, found: Predictions, setting: str) -> None:
        """Raises UserError if there is not one image."""
        if not len(found.indices):
            reasons = ", ".join(f"{name} ({reason})" for name, reason in list(self.failures.items())[:3])
            reasons = reasons or "no images were asked for"
            raise UserError(f"nothing to measure {setting} on in {self.images.path}: {reasons}")

    def hits(self, found: Predictions) -> Tensor:
        """Whether the best class is the true one (the dense model's, without labels), [n] bool."""
        return found.top[:, 0] == self.truth(found)

    def values(self, found: Predictions) -> Tensor:
        """The metric of each image in its own unit, [n] float64; of an index embedded anew, among these images.

        Raises UserError as ``check_count``.
        """
        if self.metric.kind != "reindexed@k":
            return found.value
        self.check_count(len(found.indices))
        places, k = found.indices.tolist(), self.metric.k
        self._consult(places)
        return overlap(nearest(found.features, k), nearest(self._reference.vectors(places), k))

    def merits(self, found: Predictions) -> Tensor:
        """The same, of which more is better."""
        return self.metric.scale.merit(1.0) * self.values(found)

    def truth(self, found: Predictions) -> Tensor:
        """The class to find in each image, [n]."""
        return self.best(found) if self.labels is None else self.labels[found.indices]

    def best(self, found: Predictions) -> Tensor:
        """The dense model's best class for each image, [n]."""
        self._consult(found.indices.tolist())
        return self._reference.logp(found.indices.tolist()).argmax(-1)

    def reference(self, places: Sequence[int]) -> Tensor:
        """The dense model's log-probabilities of images that it can read, [n, K] float64."""
        self._consult(places)
        return self._reference.logp(places)

    def readable(self, places: Sequence[int]) -> list[int]:
        """Those of these images that the dense model has an answer to."""
        self._consult(places)
        return [i for i in places if i in self._reference]

    def _consult(self, indices: Sequence[int]) -> None:
        """Have the dense model's answers to these images."""
        if unseen := [i for i in indices if i not in self._asked]:
            self.predict(self.dense, unseen)

    def _batches(self, model: AdaptiveViT, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = self._loaders.of(self.preprocess(model.input_size(), model))
        try:
            for batch in loader.batches(self.batch, indices):
                yield batch.images, torch.tensor(batch.indices)
        except UserError:
            if len(loader.failures) < len(indices):  # else: not one could be read, which `failures` tells
                raise
        self.failures.update(loader.failures.items)

    def _neighbours(self, model: AdaptiveViT) -> Neighbours:
        """Images that others have for neighbours, as the dense model embeds them; of a rival, as it does."""
        if (found := self._near.get(model.vit)) is None:
            own = self.dense if model.vit is self.dense.vit else model.deploy(None)
            found = self._near[model.vit] = self._gallery(own)
        return found

    def _gallery(self, model: AdaptiveViT) -> Neighbours:
        count = len(self.images)
        some = [i * count // MOST for i in range(MOST)] if count > MOST else list(range(count))
        weight, found = next(model.parameters()), []
        for images, places in self._batches(model, some):
            with torch.inference_mode():
                features = model(images.to(weight.device, weight.dtype)).logits.double().cpu()
            found.append((self._finite(features, model, places), places))
        empty = torch.empty(0, model.vit.embed_dim), torch.empty(0, dtype=torch.int64)
        vectors, members = (torch.cat(parts) for parts in zip(empty, *found, strict=True))
        labels = None if self.labels is None else self.labels[members]
        return Neighbours(vectors, members, labels, len(self.images.classes or ()), least=self.metric.k + 1)

    def _nothing(self, model: AdaptiveViT) -> Predictions:
        """Predictions of no image."""
        classes = self._neighbours(model).width if self.encodes else self.dense.vit.num_classes
        none, width = torch.empty(0), model.vit.embed_dim if self.metric.kind == "reindexed@k" else 0
        places, top = torch.empty(0, dtype=torch.int64), torch.empty(0, min(5, classes), dtype=torch.int64)
        more = none.double(), none.double(), torch.empty(0, width)
        return Predictions(places, top, none, none, none.double(), none.double(), *more)


def _head_labels(images: ImageSet, vit: ViT) -> Labels:
    """The class of each image in the head. Raises UserError for folders of other classes, and says what needs none."""
    try:
        return head_labels(images, vit)
    except UserError as error:
        raise UserError(f"{error}; or compare without labels: --metric agreement, or kl") from None


def _alone(labels: Sequence[int]) -> float:
    """The share of images that are the only one of their class."""
    counts = Counter(labels).values()
    return sum(n == 1 for n in counts) / max(1, sum(counts))


def check_head(model: AdaptiveViT, *, encoders: bool = False) -> None:
    """Raises UserError unless a model classifies, into two classes or more: with one, every answer is right.

    encoders: or has no classifier, and is measured by its embeddings.
    """
    if (head := model.task_head) is not None and not (encoders and head.embeds):
        raise UserError(f"this is for classifiers, and the model is for task {head.task!r}: use `saccade {head.verb}`")
    if not model.classifies:
        raise UserError(f"this is for classifiers, and a {type(model).__name__} has a forward of its own")
    if (classes := model.vit.num_classes) < 2 and not (encoders and classes == 0):
        has = {0: "no classifier (num_classes=0)"}.get(classes, f"a head of {classes} class")
        raise UserError(
            f"this model has {has}: accuracy and agreement need 2 classes or more; give a model with a trained head, "
            "or measure its speed alone (saccade bench)"
        )
