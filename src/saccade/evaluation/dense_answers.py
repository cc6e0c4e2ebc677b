"""What the dense model gave for each image, kept so that every setting is compared with the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.runners.deployment import eager
from saccade.runners.runner import QUANTISED


class DenseAnswers:
    """By the place of an image: log-probabilities [K], the embedding [D], the feature map [D, gh, gw].

    Maps are kept in half precision: of vectors of length 1 that moves no cosine by more than some 1e-5.
    """

    def __init__(self) -> None:
        self._logp: dict[int, Tensor] = {}
        self._vectors: dict[int, Tensor] = {}
        self._maps: dict[int, Tensor] = {}

    def add(self, places: Tensor, logp: Tensor, vectors: Tensor | None = None, maps: Tensor | None = None) -> None:
        """What was given for the images at places [n]."""
        found = places.tolist()
        self._logp.update(zip(found, logp, strict=True))
        if vectors is not None:
            self._vectors.update(zip(found, vectors, strict=True))
        if maps is not None:
            self._maps.update(zip(found, maps.half(), strict=True))

    def __contains__(self, place: int) -> bool:
        return place in self._logp

    def logp(self, places: Sequence[int]) -> Tensor:
        """[n, K] float64"""
        return torch.stack([self._logp[i] for i in places])

    def vectors(self, places: Sequence[int]) -> Tensor:
        """[n, D] fp32, of length 1"""
        return torch.stack([self._vectors[i] for i in places])

    def maps(self, places: Sequence[int]) -> Tensor:
        """[n, D, gh, gw] fp32, every cell of length 1"""
        return torch.stack([self._maps[i] for i in places]).float()


def unit_map(model: AdaptiveViT, images: Tensor) -> Tensor:
    """images [n, C, h, w] as the model takes them -> its feature map [n, D, gh, gw] fp32, every cell of length 1.

    In the number type that the model is run in. Raises UserError for whole-number weights, which an engine runs.
    """
    runner = model.deployed
    if runner is not None and runner.dtype == QUANTISED:
        raise UserError(f"an engine in {runner.dtype} gives no feature map: the metric 'cells' is for fp32, bf16, fp16")
    own = eager(model)
    with torch.inference_mode():
        found = own.feature_map(images.to(next(own.parameters()).dtype))
    return F.normalize(found.float().cpu(), dim=1)


def cell_cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """Maps [n, D, h, w] and [n, D, gh, gw], cells of length 1 -> the mean cosine over the gh·gw cells [n] float64.

    A cell of another grid stands for every one of the gh·gw whose centre lies in it.
    """
    if ours.shape[-2:] != theirs.shape[-2:]:
        ours = F.interpolate(ours, theirs.shape[-2:], mode="nearest-exact")
    return (ours.double() * theirs.double()).sum(1).flatten(1).mean(1)
