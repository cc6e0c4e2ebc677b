"""How far a setting's answers are from the dense model's: what is made small where no label tells what is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.data import Loaders
from saccade.evaluation.accuracy import spread
from saccade.evaluation.defined import require_finite
from saccade.evaluation.dense_answers import cell_cosine, unit_map
from saccade.evaluation.evaluator import Evaluator
from saccade.model import AdaptiveViT

IMAGES, BATCH = 96, 16  # that a setting is judged on; a bad one is given up after some of the batches
HOPELESS = 1.1  # times the distance of the one to beat, on the same batches


class Distance:
    """Total variation between the classes' probabilities, ½ Σ |p − q|, on a few images: the share of probability that
    moves to other classes. Of an encoder 1 − cosine of the embeddings; where the metric compares feature maps, 1 − its
    mean cosine of a cell.

    KL has no upper bound, so that a few images decide it: five of 96 make a third of the sum, and the nearest schedule
    is then the one that suits these five.

    Each setting sees the images as it would in use, in its own input size.
    """

    def __init__(self, evaluator: Evaluator, places: Sequence[int], images: int = IMAGES) -> None:
        """places: of images; so many of them are taken, evenly, but for those that the dense model cannot read."""
        self.evaluator, self._loaders = evaluator, Loaders(evaluator.images)
        self._of_maps = evaluator.metric.kind == "cells"
        some = evaluator.readable([places[i] for i in spread(len(places), images)])
        self._batches = [some[start : start + BATCH] for start in range(0, len(some), BATCH)]
        self._dense = [self._answer(evaluator.dense, batch) for batch in self._batches]

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return "cells" if self._of_maps else "cosine" if self.evaluator.encodes else "total variation"

    @property
    def images(self) -> int:
        """How many."""
        return sum(map(len, self._batches))

    def of(self, setting: str, least: Sequence[float] = (), batches: int | None = None) -> list[float]:
        """The sum over the images of each batch; of the first few alone where these are hopeless.

        Args:
            least: distances of the setting to beat, by batch.
            batches: no more than so many of them.

        Raises:
            NonFinite: logits, embeddings or features of the setting are not finite.
        """
        view, found = self.evaluator.dense.at(setting).eval(), list[float]()
        for batch, dense in list(zip(self._batches, self._dense, strict=True))[:batches]:
            found.append(self._between(dense, self._answer(view, batch)))
            if least and sum(found) > HOPELESS * sum(least[: len(found)]):
                break
        return found

    def _answer(self, view: AdaptiveViT, places: Sequence[int]) -> Tensor:
        """Probabilities [n, K], embeddings of length 1 [n, D], or feature maps [n, D, h, w]. Raises NonFinite."""
        weight = next(view.parameters())
        loader = self._loaders.of(self.evaluator.preprocess(view.input_size()))
        (seen,) = loader.batches(len(places), places)
        images = seen.images.to(weight.device, weight.dtype)
        if self._of_maps:
            return require_finite(unit_map(view, images), view.setting, "features")
        with torch.inference_mode():
            given = require_finite(view(images).logits.double(), view.setting)
        return F.normalize(given, dim=-1) if self.evaluator.encodes else given.softmax(-1)

    def _between(self, dense: Tensor, said: Tensor) -> float:
        if self._of_maps:
            return (1 - cell_cosine(said, dense)).sum().item()
        if self.evaluator.encodes:
            return (1 - (dense * said).sum(-1)).sum().item()
        return 0.5 * (said - dense).abs().sum().item()
