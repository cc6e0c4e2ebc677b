"""What a segmenter is worth under each setting: IoU of every class, their mean, pixel accuracy, with intervals."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from saccade.checkpoint import Source, open_task
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.evaluation.defined import require_many
from saccade.evaluation.stats import Interval
from saccade.model import AdaptiveViT
from saccade.renamed.finder import moved
from saccade.tasks.segmentation.labelled_batches import Step, looks
from saccade.tasks.segmentation.segmentation_data import VOID, PixelSet, open_pixels
from saccade.tasks.segmentation.segmenter import How, SegmentationHead
from saccade.terminal.progress import Progress
from saccade.terminal.results import Scores, counted
from saccade.terminal.text_table import Table

DRAWS, PART = 10_000, 500  # resamples of the images, and how many at once
__getattr__ = moved(__name__)


@dataclass(frozen=True)
class Counts:
    """Pixels of n images by class; those without one (void) are in none of them."""

    places: Tensor  #  [n] int64     places in the set
    hit: Tensor  #     [n, K] int64  rightly given the class
    there: Tensor  #   [n, K] int64  of the class
    said: Tensor  #    [n, K] int64  given the class
    macs: float = 0.0  #    mean of an image, ViT and decoder
    decoder: float = 0.0  # of these, the decoder's

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What a statistic takes."""
        return self.hit, self.there, self.said

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(hit, there, said) of one image, each [K]: logits [K, h, w], labels uint8 [h, w] with ``VOID``."""
        matrix = multiclass_confusion_matrix(logits.argmax(0), labels.long(), len(logits), None, VOID, False)
        return matrix.diagonal(), matrix.sum(1), matrix.sum(0)


def iou(hit: Tensor, there: Tensor, said: Tensor) -> Tensor:
    """Intersection over union of each class, [..., K]; NaN for a class that is neither there nor said."""
    return hit / (there + said - hit)


def mean_iou(hit: Tensor, there: Tensor, said: Tensor) -> Tensor:
    """Mean over the classes that are there or said, [...]."""
    return iou(hit, there, said).nanmean(-1)


def accuracy(hit: Tensor, there: Tensor, said: Tensor) -> Tensor:
    """Share of the pixels that are given their class, [...]."""
    return hit.sum(-1) / there.sum(-1)


def interval(statistic: Callable[..., Tensor], sums: Sequence[Tensor], other: Sequence[Tensor] = ()) -> Interval:
    """A statistic of the whole set with its 95 % percentile bootstrap over images; or its difference to ``other``'s.

    Args:
        statistic: takes the sums over the set, [draws, K] each, to [draws]. As a ratio of sums, it is no mean over
            images: these are resampled, and the sums taken anew.
        sums: what each image adds, [n, K] each.
        other: the same of the other side of a paired difference, for the same images: both see the same resamples.
    """
    sides = [[part.double() for part in side] for side in ((sums, other) if len(other) else (sums,))]

    def value(weights: Tensor) -> Tensor:
        found = [statistic(*(weights @ part for part in side)) for side in sides]
        return found[0] if len(found) == 1 else found[0] - found[1]

    n, generator = len(sums[0]), torch.Generator().manual_seed(0)
    mean = value(torch.ones(1, n, dtype=torch.float64)).item()
    if n == 1:  # of which every resample is itself: a share and a difference of shares can be anything
        return Interval(mean, 1.0 - len(sides), 1.0)
    drawn = []
    for _ in range(DRAWS // PART):
        rows = torch.randint(n, (PART, n), generator=generator)
        weights = torch.zeros(PART, n, dtype=torch.float64).scatter_add_(1, rows, torch.ones_like(rows).double())
        drawn.append(value(weights))
    low, high = torch.cat(drawn).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)


def count(model: AdaptiveViT, pixels: PixelSet, places: Sequence[int], how: How, batch: int, step: Step) -> Counts:
    """Run a segmenter on pairs; those that cannot be read are left out and named in ``segmentation_data.failures``."""
    kept: list[int] = []
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    macs = decoder = 0.0
    for seen, labels, at in looks(model, pixels, places, how, batch, step):
        rows += [Counts.of(one.cpu(), label) for one, label in zip(seen.logits, labels, strict=True)]
        kept += at
        macs, decoder = macs + seen.macs * len(at), decoder + seen.decoder * len(at)
    hit, there, said = (torch.stack(part) for part in zip(*rows, strict=True))
    if not there.any():
        raise UserError(
            f"no pixel of {len(kept)} images in {pixels.images.path} has a class (all are void): mIoU is not defined; "
            "check the label files, and --void"
        )
    return Counts(torch.tensor(kept), hit, there, said, macs / len(kept), decoder / len(kept))


@dataclass(frozen=True)
class Segmented:
    """One row of an evaluation; fractions, ``delta`` paired against the first row's setting."""

    setting: str
    images: int
    miou: Interval
    delta: Interval | None
    pixel_accuracy: Interval
    classes: dict[str, float | None]  # IoU of each; None: neither there nor said
    gmacs: float  #         of an image, ViT and decoder
    decoder_gmacs: float  # of these, the decoder's
    mac_ratio: float  #     first row ÷ this

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


class Segmentation(Scores):
    """What ``segment`` gives: a row for each setting, the dense model first; and the pairs that could not be read."""

    __slots__ = ()
    rows: list[Segmented]
    item = "pair"

    def tables(self) -> list[Table]:
        return [self.table(), self.classes()]

    def table(self) -> Table:
        columns = ["setting", "mIoU", "points vs dense", "GMACs", "pixel accuracy", "MAC ratio", "of these decoder"]
        cells = [
            [
                r.setting,
                r.miou.percent(2),
                "" if r.delta is None else r.delta.points(),
                f"{r.gmacs:.3f}",
                r.pixel_accuracy.percent(2),
                f"{r.mac_ratio:.2f}×",
                f"{r.decoder_gmacs:.3f}",
            ]
            for r in self.rows
        ]
        return Table(counted(self.rows[0].images, "image"), columns, cells, "Intervals are at 95 %, over images.")

    def classes(self) -> Table:
        """IoU of each class under each setting."""
        shares = {name: [row.classes[name] for row in self.rows] for name in self.rows[0].classes}
        cells = [[name, *("" if v is None else f"{v:.1%}" for v in found)] for name, found in shares.items()]
        return Table("IoU of each class", ["class", *(row.setting for row in self.rows)], cells)


def evaluate_segmentation(
    model: Source,
    data: str | os.PathLike | PixelSet,
    settings: Sequence[str] = (),
    *,
    device: str | None = None,
    split: str | None = None,
    void: int | None = None,
    how: How = "fit",
    limit: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> Segmentation:
    """Every setting of a segmenter on images with labels, the dense model first; and why which could not be read.

    Labels are compared at the images' own size. mIoU is that of all images together, as in the field.

    Args:
        model: a segmenting one, or a folder that it was trained in; ``device`` as in ``saccade.checkpoint.open_model``.
        data: a folder or zip, see ``saccade.tasks.segmentation.segmentation_data``; classes are the model's own.
        void: the value in label files that is no class; None: as in training.
        how: see ``saccade.tasks.segmentation.segmenter.look``.
        limit: at most this many images, spread evenly over the set.

    Raises:
        UserError: bad data or settings.
    """
    model = open_task(model, SegmentationHead, device)
    head = SegmentationHead.of(model)
    pixels = (
        data
        if isinstance(data, PixelSet)
        else open_pixels(os.fspath(data), split, head.classes, head.void if void is None else void)
    )
    if pixels.classes != head.classes:
        at = next((i for i, (a, b) in enumerate(zip(pixels.classes, head.classes, strict=False)) if a != b), None)
        first = "" if at is None else f"; class {at} is {pixels.classes[at]!r} and {head.classes[at]!r}"
        counts = f"{len(pixels.classes)} classes in {pixels.images.path}, {len(head.classes)} in the model"
        raise UserError(f"{counts}{first}: give the model's, in its order")
    require_many(len(head.classes), "classes", "mIoU")
    chosen = spread(len(pixels), limit)
    named = [s for s in map(str, settings) if s not in ("", "dense")]
    views = {name: model.at(name).eval() for name in ("dense", *named)}  # all checked before any is run
    progress = progress or Progress()
    for line in pixels.images.notes:
        progress.say(line)
    bar = progress.start("segmenting", len(chosen) * len(views))
    found: dict[str, Counts] = {}
    for name, view in views.items():
        bar(0, what=name)
        found[name] = count(view, pixels, chosen, how, batch, bar)
    bar.finish()
    rows = [summed(name, one, found["dense"], head.classes) for name, one in found.items()]
    return Segmentation(rows, pixels.failures)


def summed(setting: str, counts: Counts, first: Counts, classes: Sequence[str]) -> Segmented:
    """A row of counts against the first row's."""
    each = iou(*(part.sum(0).double() for part in (counts.hit, counts.there, counts.said))).tolist()
    return Segmented(
        setting=setting,
        images=len(counts.places),
        miou=interval(mean_iou, counts.sums),
        delta=None if counts is first else interval(mean_iou, counts.sums, first.sums),
        pixel_accuracy=interval(accuracy, counts.sums),
        classes={name: None if v != v else v for name, v in zip(classes, each, strict=True)},
        gmacs=counts.macs / 1e9,
        decoder_gmacs=counts.decoder / 1e9,
        mac_ratio=first.macs / counts.macs,
    )
