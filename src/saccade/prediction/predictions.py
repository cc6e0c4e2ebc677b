"""What is said of one image, and of many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from saccade.terminal.results import Result, counted
from saccade.terminal.text_table import Column, Table

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Details:
    """What ran for one image, and what it gave beside the classes."""

    embedding: np.ndarray  # fp32 [D]  what the classifier reads
    owner: np.ndarray  #     int32 [gh, gw]  which token stands for a cell at the end, -1: dropped
    macs: int  #             multiply-accumulates that ran


@dataclass(frozen=True, repr=False, eq=False)
class Prediction:
    """What a model says of one image; where ``error`` says why the image could not be used, nothing else is there."""

    name: str  #  of the file, or the image's place among those given: "image 3"
    labels: tuple[str, ...] = ()  #          the best classes in words, best first: "tabby"
    classes: tuple[str, ...] = ()  #         the same as folders call them: "n02123045", "cat"
    indices: tuple[int, ...] = ()  #         their places in the head
    probabilities: tuple[float, ...] = ()  # of each, of all classes together 1
    error: str | None = None  #              why the image could not be used
    read: Callable[[], Tensor] | None = None  #      the image as the model sees it, uint8 [3, h, w]; raises ImageError
    look: Callable[[], Details] | None = None  #     what it ran; a compiled model runs again to tell
    known: Details | None = None  #                  the same, where it is known already
    vector: np.ndarray | None = None  #              fp32 [D], of an encoder, whose answer it is

    @cached_property
    def details(self) -> Details | None:
        """Embedding, tokens and MACs; None: the image could not be used."""
        return self.look() if self.known is None and self.look is not None else self.known

    @property
    def embedding(self) -> np.ndarray | None:
        """fp32 [D]: what the classifier reads, or what an encoder answers."""
        if self.vector is not None:
            return self.vector
        return None if self.details is None else self.details.embedding

    @property
    def owner(self) -> np.ndarray | None:
        """int32 [gh, gw]: which token stands for each cell after the last block; -1: it was dropped."""
        return None if self.details is None else self.details.owner

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates that ran."""
        return None if self.details is None else self.details.macs

    @property
    def label(self) -> str | None:
        """The best class, in words."""
        return self.labels[0] if self.labels else None

    @property
    def index(self) -> int | None:
        """Its place in the head."""
        return self.indices[0] if self.indices else None

    @property
    def probability(self) -> float | None:
        """Of the best class; None where there are no classes."""
        return self.probabilities[0] if self.probabilities else None

    @property
    def gmacs(self) -> float | None:
        """10^9 multiply-accumulates that ran."""
        return None if self.macs is None else self.macs / 1e9

    def token_map(self, side: int = 512) -> Image.Image:
        """A picture of what each token stands for, drawn when asked for: the image is read again.

        Raises ImageError where it can no longer be read, ValueError for an image that could not be used.
        """
        from torchvision.transforms.functional import to_pil_image

        from saccade.reports.token_map import draw_tokens

        if self.read is None or self.owner is None:
            raise ValueError(f"{self.name} has no tokens: {self.error}")
        grid = (self.owner.shape[0], self.owner.shape[1])
        return draw_tokens(to_pil_image(self.read()), self.owner.reshape(-1), grid, side=side)

    def to_dict(self) -> dict[str, Any]:
        """Names and numbers, for JSON: classes, or of an encoder the embedding; tokens are left out."""
        if self.error is not None:
            return {"image": self.name, "error": self.error}
        spent = {} if self.known is None else {"gmacs": self.gmacs}
        if self.vector is not None:
            return {"image": self.name, "embedding": self.vector.tolist(), **spent}
        found = zip(self.labels, self.classes, self.indices, self.probabilities, strict=True)
        named = [{"label": w, "class": c, "index": i, "probability": p} for w, c, i, p in found]
        return {"image": self.name, "predictions": named, **spent}

    def row(self) -> dict[str, Any]:
        """The best class, its probability, what ran, and why the image could not be used: a row of a table."""
        return {
            "image": self.name,
            "label": self.label,
            "class": self.classes[0] if self.classes else None,
            "index": self.index,
            "probability": self.probability,
            "gmacs": None if self.known is None else self.gmacs,
            "error": self.error,
        }

    def line(self, width: int | None = None) -> str:
        """One line of text: the name, and as many of the best classes as there is room for, the first in any case."""
        if self.error is not None:
            return f"{self.name}: {self.error}"
        if self.vector is not None:
            return f"{self.name}: an embedding of {len(self.vector)} numbers"
        said = [f"{label} {share:.1%}" for label, share in zip(self.labels, self.probabilities, strict=True)]
        text = f"{self.name}: {said[0]}"
        for more in said[1:]:
            if width is not None and len(text) + 2 + len(more) > width:
                break
            text += f", {more}"
        return text

    def __repr__(self) -> str:
        return f"Prediction({self.line(80)})"


class Predictions(Result, list[Prediction]):
    """What ``predict`` gives: a list, one prediction for each image, in the order of the images."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of each image the best class, its probability, what ran, and why it could not be used."""
        return [p.row() for p in self]

    @property
    def failures(self) -> dict[str, str]:
        """The images that could not be used, and why."""
        return {p.name: p.error for p in self if p.error is not None}

    @property
    def embeddings(self) -> np.ndarray:
        """Of the images that could be used, fp32 [n, D]."""
        found = [p.embedding for p in self if p.embedding is not None]
        return np.stack(found) if found else np.zeros((0, 0), np.float32)

    def table(self) -> Table:
        cells = [
            [
                p.name,
                p.label or "",
                "" if p.probability is None else f"{p.probability:.1%}",
                "" if p.known is None else f"{p.gmacs:.3f}",
                p.error or "",
            ]
            for p in self
        ]
        columns: list[Column | str] = ["image", "label", "probability", "GMACs", Column("error", 0, prose=True)]
        return Table(counted(len(self), "image"), columns, cells)
