"""Encoders without a classifier, measured by neighbours: what their embeddings are for.

An image's answer is a distribution over other images, by the cosine of its embedding to the *dense* model's of them. So
what is measured of classifiers is measured of encoders: with labels, whether the neighbours' classes tell the image's
own (weighted k-NN, every neighbour by exp(cosine / 0.07); Wu et al. 2018, arXiv 1805.01978); without, which images are
its nearest. The index is the dense model's: a setting embeds what is asked, and nothing in the index is embedded anew.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.errors import UserError
from saccade.terminal.results import counted

TEMPERATURE = 0.07  # of the published k-NN protocol
MOST = 2000  # images that others may have for neighbours, evenly spread over the set
LEAST = 3  # an image, and two that may be its nearest
NOTHING = 1e-30  # the share of a class that has no image but the one that asks


class Neighbours:
    """Images of which an embedding has its neighbours, by the dense model's embeddings of them."""

    def __init__(
        self, embeddings: Tensor, places: Tensor, labels: Tensor | None, classes: int = 0, *, least: int = LEAST
    ) -> None:
        """embeddings [N, D] of the images at ``places`` [N] of a set, and their labels [N] of so many classes.

        Raises UserError for fewer than ``least`` images, or than three.
        """
        if len(places) < max(least, LEAST):
            raise UserError(f"{counted(len(places), 'image')}: neighbours are told from {max(least, LEAST)} or more")
        self.embeddings, self.places = F.normalize(embeddings.double(), dim=-1), places
        self.shares = None if labels is None else F.one_hot(labels, classes).double()  # [N, K]

    @property
    def width(self) -> int:
        """K, classes, or images where there are no labels."""
        return len(self.places) if self.shares is None else self.shares.shape[1]

    def logits(self, embeddings: Tensor, places: Tensor) -> Tensor:
        """embeddings [n, D] of the images at ``places`` [n] -> [n, K] float64; an image is not its own neighbour."""
        near = F.normalize(embeddings.double(), dim=-1) @ self.embeddings.T / TEMPERATURE  # [n, N]
        itself = places.unsqueeze(1) == self.places.unsqueeze(0)
        if self.shares is None:
            return near.masked_fill(itself, -2 / TEMPERATURE)  # below the farthest
        largest = near.masked_fill(itself, -torch.inf).amax(1, keepdim=True)
        weight = (near - largest).exp().masked_fill(itself, 0.0)
        return (weight @ self.shares).clamp(min=NOTHING).log()
