"""Panoptic quality: each pixel a class, and each thing (a car, a person) told from its neighbours.

Panoptic quality (Kirillov et al., arXiv 1801.00868) by torchmetrics. A set is laid out as pairs of
``split/images/name.jpg`` and ``split/panoptic/name.png`` (or without splits). The PNG is RGB: red is the class's value
as in label files (``saccade.tasks.segmentation.segmentation_data``); green · 256 + blue tells things of a class apart
(any number, also 0). COCO's own layout is read too (``saccade.tasks.segmentation.coco_panoptic``).

A segmenter knows classes alone. As a trivial baseline, and no more than that, things are the connected parts of its
map: two cars that touch are one, and a car behind a pole is two.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.checkpoint import Source, open_task
from saccade.errors import UserError, nearest
from saccade.evaluation.accuracy import spread
from saccade.evaluation.defined import require_many
from saccade.evaluation.stats import Interval
from saccade.tasks.segmentation.labelled_batches import looks
from saccade.tasks.segmentation.mean_iou import interval
from saccade.tasks.segmentation.panoptic_data import PanopticSet
from saccade.tasks.segmentation.segmentation_data import VOID
from saccade.tasks.segmentation.segmenter import How, SegmentationHead
from saccade.terminal.progress import Progress
from saccade.terminal.results import Scores, counted
from saccade.terminal.text_table import Column, Table

LEAST = 64  # pixels: smaller parts of a thing's map are said to be nothing


@dataclass(frozen=True)
class Panoptic:
    """One row of an evaluation; fractions."""

    setting: str
    images: int
    pq: Interval
    sq: float  # segmentation quality: mean IoU of what is found
    rq: float  # recognition quality: F1 of finding
    pq_things: float | None
    pq_stuff: float | None
    gmacs: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


class PanopticScores(Scores):
    """A row for each setting, the dense model first; and the pairs that could not be read."""

    __slots__ = ()
    rows: list[Panoptic]
    item = "pair"

    def table(self) -> Table:
        cells = [[r.setting, r.pq.percent(), *map(_percent, (r.sq, r.rq, r.pq_things, r.pq_stuff))] for r in self.rows]
        cells = [[*row, f"{r.gmacs:.3f}"] for row, r in zip(cells, self.rows, strict=True)]
        columns: list[Column | str] = ["setting", "PQ", "SQ", "RQ", "things", "stuff", Column("GMACs", 2)]
        said = "Intervals are at 95 %. Things are connected parts of the map of classes: a trivial baseline."
        return Table(counted(self.rows[0].images, "image"), columns, cells, said)


def evaluate_panoptic(
    model: Source,
    data: str | os.PathLike | PanopticSet,
    things: Sequence[str],
    settings: Sequence[str] = (),
    *,
    device: str | None = None,
    split: str | None = None,
    void: int | None = None,
    how: How = "fit",
    limit: int | None = None,
    batch: int = 8,
    least: int = LEAST,
    progress: Progress | None = None,
) -> PanopticScores:
    """Panoptic quality of every setting, things being connected parts of the map; and why which could not be read.

    Args:
        model: a segmenting one, or a folder that it was trained in; ``device`` as in ``saccade.checkpoint.open_model``.
        data: a folder or zip laid out as this module says, or as COCO's.
        things: the classes of which single things are told apart; the others are stuff.
        void: red of what has no class; None: as in label files of the training.
        least: pixels of the smallest part that counts as a thing.

    Raises:
        UserError: bad data, settings or things; torchmetrics or scipy missing.
    """
    model = open_task(model, SegmentationHead, device)
    head = SegmentationHead.of(model)
    void = head.void if void is None else void
    if isinstance(data, PanopticSet):
        pixels = data
    else:
        from saccade.tasks.segmentation.coco_panoptic import open_panoptic  # it is a set of this module's kind

        pixels = open_panoptic(os.fspath(data), split, head.classes, void)
    unknown = [name for name in things if name not in head.classes]
    if unknown or not things:
        found = f"there is no class {unknown[0]!r}{nearest(unknown[0], head.classes)}" if unknown else "no things"
        raise UserError(f"{found}: give things of {', '.join(head.classes)}")
    places = {head.classes.index(name) for name in things}
    require_many(len(head.classes), "classes", "panoptic quality")
    chosen = spread(len(pixels), limit)
    named = [s for s in map(str, settings) if s not in ("", "dense")]
    views = {name: model.at(name).eval() for name in ("dense", *named)}
    bar = (progress or Progress()).start("segmenting", len(chosen) * len(views))
    rows = []
    for name, view in views.items():
        bar(0, what=name)
        counts, macs = [], 0.0
        for seen, truths, _ in looks(view, pixels, chosen, how, batch, bar):
            for logits, truth in zip(seen.logits, truths, strict=True):
                said = parts(logits.argmax(0).cpu().numpy(), places, least)
                counts.append(compare(torch.from_numpy(said), truth, places, len(head.classes)))
                macs += seen.macs
        sums = [torch.stack(part) for part in zip(*counts, strict=True)]
        if not any(bool(part.any()) for part in sums[1:]):
            raise UserError(
                f"nothing in {len(counts)} images of {pixels.images.path} has a class (all is void): panoptic quality "
                "is not defined; check the label files, and --void"
            )
        rows.append(_row(name, sums, places, macs / len(counts) / 1e9))
    bar.finish()
    return PanopticScores(rows, pixels.failures)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def parts(classes: np.ndarray, things: set[int], least: int = LEAST) -> np.ndarray:
    """A map of classes [h, w] -> int64 [h, w, 2]: connected parts (of four neighbours) of things numbered from 1.

    Parts of things below ``least`` pixels become ``VOID``; stuff has number 0.
    """
    try:
        from scipy.ndimage import label
    except ImportError:
        raise UserError("telling things apart needs scipy: pip install 'saccade[tasks]'") from None
    found = np.stack([classes, np.zeros_like(classes)], axis=-1).astype(np.int64)
    for thing in things & set(np.unique(classes).tolist()):
        numbers, count = label(classes == thing)
        small = np.bincount(numbers.ravel(), minlength=count + 1) < least
        small[0] = False
        found[..., 1] += numbers
        found[small[numbers]] = (VOID, 0)
    return found


def compare(said: Tensor, truth: Tensor, things: set[int], classes: int) -> tuple[Tensor, ...]:
    """Two maps int64 [h, w, 2] -> Σ IoU of matches, matches, false alarms, misses: float64 [K] each, by class.

    Classes are 0 … K-1; void of the truth counts nowhere, what is said to be void is a miss.
    """
    from torchmetrics.detection import PanopticQuality

    stuff = set(range(classes)) - things
    metric = PanopticQuality(things=things, stuffs=stuff, allow_unknown_preds_category=True)
    metric.update(said.unsqueeze(0), truth.unsqueeze(0))
    order = torch.tensor([metric.cat_id_to_continuous_id[k] for k in range(classes)])
    states = (metric.iou_sum, metric.true_positives, metric.false_positives, metric.false_negatives)
    return tuple(state.double()[order] for state in states)


def quality(iou: Tensor, hits: Tensor, alarms: Tensor, misses: Tensor) -> Tensor:
    """Panoptic quality of each class, [..., K]; NaN for one that is neither there nor said."""
    return iou / (hits + alarms / 2 + misses / 2)


def mean_quality(iou: Tensor, hits: Tensor, alarms: Tensor, misses: Tensor) -> Tensor:
    """Its mean over the classes that are there or said, [...]."""
    return quality(iou, hits, alarms, misses).nanmean(-1)


def _row(setting: str, sums: list[Tensor], things: set[int], gmacs: float) -> Panoptic:
    iou, hits, alarms, misses = (part.sum(0) for part in sums)
    each = quality(iou, hits, alarms, misses)
    there = ~each.isnan()
    thing = torch.tensor([k in things for k in range(len(each))])

    def mean(values: Tensor, of: Tensor) -> float | None:
        return values[of & there].mean().item() if (of & there).any() else None

    found = iou / hits.clamp(min=1)
    recognised = hits / (hits + alarms / 2 + misses / 2)
    return Panoptic(
        setting=setting,
        images=len(sums[0]),
        pq=interval(mean_quality, sums),
        sq=mean(found, there) or 0.0,
        rq=mean(recognised, there) or 0.0,
        pq_things=mean(each, thing),
        pq_stuff=mean(each, ~thing),
        gmacs=gmacs,
    )
