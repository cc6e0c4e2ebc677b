"""The metrics that settings are compared by, and which of them fit a model and images.

Each gives every image a value of its own, so that two settings can be compared image by image. All but ``top-1`` and
``knn`` need no labels: they ask how near a setting stays to the dense model.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import UserError
from saccade.evaluation.candidates import Target
from saccade.evaluation.stats import Interval, bootstrap, paired_difference, proportion
from saccade.reports.scale import Scale
from saccade.terminal.results import counted

KINDS = {
    "top-1": "the share of images whose class is right",
    "agreement": "the share of images that get the dense model's class",
    "kl": "KL(dense ‖ setting) of the classes' probabilities: less is better",
    "cosine": "the cosine of an image's embedding to the dense model's of the same image",
    "recall@k": "the share of an image's {k} nearest by the dense model that the setting's embedding of it finds in "
    "the dense model's index, which stays as it is",
    "reindexed@k": "the share of an image's {k} nearest by the dense model that are its {k} nearest where the setting "
    "embeds the whole index anew",
    "knn": "the share of images whose class the neighbours in the dense model's index tell (weighted k-NN)",
    "cells": "the mean over grid cells of the cosine of the feature map to the dense model's",
}
OF_CLASSIFIERS = ("top-1", "agreement", "kl", "cells")
OF_ENCODERS = ("recall@10", "reindexed@10", "cosine", "knn", "cells")
LABELLED = ("top-1", "knn")
USUAL_K, ROOM = 10, 22  # neighbours of an unlabelled encoder's usual metric, and the images that it takes
MOST_ALONE = 0.5  # share of images that are the only one of their class, up to which neighbours tell classes


@dataclass(frozen=True)
class Metric:
    """A metric by its name, and why it is the one."""

    name: str  #      "top-1", "recall@10", …
    why: str = ""  #  empty: it was asked for by name

    @property
    def kind(self) -> str:
        """The name without its number: "recall@k"."""
        return re.sub(r"@\d+$", "@k", self.name)

    @property
    def k(self) -> int:
        """Neighbours, where it has any: 10 of "recall@10"; else 0."""
        found = re.search(r"@(\d+)$", self.name)
        return int(found[1]) if found else 0

    @property
    def labelled(self) -> bool:
        """Whether it reads the classes of folders."""
        return self.kind in LABELLED

    @property
    def hits(self) -> bool:
        """Whether an image is right or wrong."""
        return self.kind in ("top-1", "agreement", "knn")

    @property
    def scale(self) -> Scale:
        """How its values are written."""
        return Scale.of(self.name)

    def __str__(self) -> str:
        return self.name

    def described(self) -> str:
        """``recall@10, the share of …``, with the reason where it was not asked for."""
        said = f"{self.name}, {KINDS[self.kind].format(k=self.k)}"
        return f"{said}; {self.why}" if self.why else said

    def interval(self, values: Tensor) -> Interval:
        """The mean of values [n] with its interval: Wilson's for shares of images, else the bootstrap's."""
        if self.hits or (self.scale.share and len(values.unique()) == 1):
            return proportion(values)
        least = {"kl": 0.0}.get(self.kind, 0.0 if self.scale.share else -1.0)
        return bootstrap(values, least=least, most=math.inf if self.kind == "kl" else 1.0)

    def difference(self, a: Tensor, b: Tensor) -> Interval:
        """a − b, values [n] of the same images, in the metric's own unit."""
        return paired_difference(a, b) if self.scale.share else bootstrap(a.double() - b.double())

    def better(self, interval: Interval) -> Interval:
        """A difference as one of merit: above zero is better."""
        return Interval(-interval.mean, -interval.high, -interval.low) if self.scale.lower else interval

    def worded(self, interval: Interval, difference: bool = True) -> str:
        """``−1.2 points (95 %: −2.5 … +0.1)``, or a value with its interval."""
        say = self.scale.difference if difference else lambda v: self.scale.value(v, False)
        mean, low, high = map(say, interval.three())
        unit = f" {self.scale.step}".rstrip() if difference else self.scale.suffix
        return f"{mean}{unit} (95 %: {low} … {high})"

    def check_images(self, images: int, where: str) -> None:
        """Raises UserError where an image has k neighbours or fewer among so many images.

        Args:
            where: what to call the images.
        """
        if self.k and self.k > images - 2:
            fewer = (images - 1) // 2
            others = counted(max(images - 1, 0), "neighbour")
            raise UserError(
                f"metric {self.name!r} asks for {self.k} of the {others} that an image has in {where}: give more images"
                + (f", or {self.kind[:-1]}{fewer}" if fewer > 0 else "")
            )

    def aim(self, target: Target) -> str:
        """A target in words that this metric gives their meaning. Raises UserError for per cent of what is no share."""
        if target.kind != "drop" or self.scale.share:
            return str(target)
        if target.percent:
            raise UserError(
                f"--max-drop in per cent is a share, and {self.name} is none: give it in its own unit, like "
                f"--max-drop {target.value:g}{f' ({self.scale.unit})' if self.scale.unit else ''}"
            )
        return f"{self.name} {'up' if self.scale.lower else 'down'} by at most {target.value:g}{self.scale.suffix}"


def choose(
    name: str | None, *, encodes: bool, labelled: bool, images: int, alone: float = 0.0, where: str = "the images"
) -> Metric:
    """The metric of this name, or the usual one.

    Args:
        encodes: the model has no classifier.
        labelled: folders give the images classes.
        images: how many there are.
        alone: the share of them that are the only one of their class, which no neighbour can tell.
        where: what to call them.

    Raises:
        UserError: no such metric, or one that does not fit; the message names those that do.
    """
    if name is None:
        return _usual(encodes, labelled, images, alone)
    fit = [m for m in (OF_ENCODERS if encodes else OF_CLASSIFIERS) if labelled or m not in LABELLED]
    found, fitting = Metric(str(name).strip().lower()), f"{', '.join(fit[:-1])} or {fit[-1]}"
    numbered = found.kind.endswith("@k")
    if found.kind not in KINDS or (numbered and not found.k):
        known = ", ".join(KINDS)
        raise UserError(f"metric {str(name)[:40]!r} is not one of {known} (k: a number): here {fitting} fits")
    if found.kind not in [Metric(m).kind for m in (OF_ENCODERS if encodes else OF_CLASSIFIERS)]:
        has, other = ("has no classifier", "classifiers") if encodes else ("classifies", "encoders")
        how = "" if encodes else " (create_model(…, num_classes=0) takes the classifier off)"
        raise UserError(f"metric {found.name!r} is for {other}, and this model {has}: {fitting} fits{how}")
    if found.labelled and not labelled:
        raise UserError(f"metric {found.name!r} needs a folder for each class, and {where} has none: {fitting} fits")
    if found.kind == "knn" and alone == 1.0:
        raise UserError(f"metric 'knn' needs two images of a class, and every class in {where} has one: recall@10 fits")
    found.check_images(images, where)
    return found


def _usual(encodes: bool, labelled: bool, images: int, alone: float) -> Metric:
    if not encodes:
        return Metric("top-1", "the usual one where folders give classes") if labelled else Metric(
            "agreement", "the usual one of a classifier where no folder gives classes")  # fmt: skip
    if labelled and alone <= MOST_ALONE:
        return Metric("knn", "the usual one of an encoder where folders give classes")
    without = f"where {alone:.0%} of the images are the only one of their class" if labelled else "without classes"
    return Metric(
        f"recall@{USUAL_K if images >= ROOM else 1}",
        f"the usual one of an encoder {without}: what a search in an index shows"
        + ("" if images >= ROOM else f" (of so few images the nearest; from {ROOM} on, {USUAL_K})"),
    )


def overlap(ours: Tensor, theirs: Tensor) -> Tensor:
    """The share of each row of ``theirs`` [n, k] that stands in the same row of ``ours`` [n, k] -> [n] float64."""
    return (ours.unsqueeze(2) == theirs.unsqueeze(1)).any(1).double().mean(1)


def nearest(vectors: Tensor, k: int, chunk: int = 1024) -> Tensor:
    """vectors [n, D] of length 1 -> the k nearest others of each [n, k], by cosine; an image is not its own."""
    found = []
    for start in range(0, len(vectors), chunk):
        near = vectors[start : start + chunk] @ vectors.T
        rows = torch.arange(len(near))
        near[rows, rows + start] = -torch.inf
        found.append(near.topk(k).indices)
    return torch.cat(found) if found else torch.empty(0, k, dtype=torch.int64)
