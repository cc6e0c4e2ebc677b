"""Images and the dense model's answers to them: what every setting is compared with, on the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from saccade.data import ImageSet, Loaders, Preprocess, head_labels
from saccade.data.corrupt import Corruption, corrupted
from saccade.errors import UserError
from saccade.evaluation.answers import Predictions
from saccade.evaluation.defined import NonFinite
from saccade.evaluation.neighbours import BY_CLASS, BY_IMAGE, MOST, Neighbours
from saccade.model import AdaptiveViT

Step = Callable[[int], None]


NONE = -1  # the class of no answer


class Evaluator:
    """Images and the dense model's opinion of them: what every setting is compared with, on the same images."""

    def __init__(
        self, model: AdaptiveViT, images: ImageSet, *, batch: int = 32, corrupt: Corruption | None = None
    ) -> None:
        check_head(model, encoders=True)
        self.dense, self.images, self.batch, self.corrupt = model.at("dense").eval(), images, batch, corrupt
        self.encodes = not model.vit.num_classes
        self._near: Neighbours | None = None
        labels = None if images.labels is None or self.encodes else head_labels(images, model.vit)
        indices = images.labels if labels is None else labels.indices
        self.labels = None if indices is None else torch.tensor(indices)
        self.notes = [*images.notes, *([labels.how] if labels is not None and labels.how else [])]  # for the user
        self.metric = "agreement with dense" if indices is None else "top-1"
        if self.encodes:
            self.metric = BY_IMAGE if indices is None else BY_CLASS
            self.notes.append(f"an encoder is measured by its embeddings, here by “{self.metric}”")
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
            logits = self._neighbours().logits(logits, places) if self.encodes else logits
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
        if not answered.all() and not self.encodes:
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

    def reference(self, places: Sequence[int]) -> Tensor:
        """The dense model's log-probabilities of images that it can read, [n, K] float64."""
        self._consult(places)
        return torch.stack([self._reference[i] for i in places])

    def readable(self, places: Sequence[int]) -> list[int]:
        """Those of these images that the dense model has an answer to."""
        self._consult(places)
        return [i for i in places if i in self._reference]

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

    def _neighbours(self) -> Neighbours:
        """Images that others have for neighbours, as the dense model embeds them."""
        if self._near is None:
            count = len(self.images)
            some = [i * count // MOST for i in range(MOST)] if count > MOST else list(range(count))
            weight, found = next(self.dense.parameters()), []
            for images, places in self._batches(self.dense.input_size(), some):
                with torch.inference_mode():
                    features = self.dense(images.to(weight.device, weight.dtype)).logits.double().cpu()
                found.append((self._finite(features, self.dense, places), places))
            empty = torch.empty(0, self.dense.vit.embed_dim), torch.empty(0, dtype=torch.int64)
            vectors, members = (torch.cat(parts) for parts in zip(empty, *found, strict=True))
            labels = None if self.labels is None else self.labels[members]
            self._near = Neighbours(vectors, members, labels, len(self.images.classes or ()))
        return self._near

    def _nothing(self) -> Predictions:
        """Predictions of no image."""
        classes = self._neighbours().width if self.encodes else self.dense.vit.num_classes
        none, best = torch.empty(0), min(5, classes)
        places, top = torch.empty(0, dtype=torch.int64), torch.empty(0, best, dtype=torch.int64)
        return Predictions(places, top, none, none, none.double(), none.double())


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
