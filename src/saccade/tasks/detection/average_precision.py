"""Average precision of a detector under each setting, with an interval."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from saccade.checkpoint import Source, open_task
from saccade.data import Loader, Loaders
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.evaluation.defined import require_choice, require_finite
from saccade.evaluation.stats import Interval
from saccade.model import AdaptiveViT
from saccade.tasks.detection.detection_data import BoxSet, Objects, open_boxes
from saccade.tasks.detection.detector import TOP, DetectionHead, Found, detections, squashed
from saccade.terminal.progress import Progress
from saccade.terminal.results import Scores, counted
from saccade.terminal.text_table import Table

GROUPS = 10  #  of images, whose spread gives the interval
T_QUANTILE = 2.262  # 97.5 % of Student's t with GROUPS - 1 degrees of freedom

Step = Callable[[int], None]


@dataclass(frozen=True)
class Precision:
    """What one setting finds."""

    setting: str
    images: int
    ap: Interval  # COCO's: mean over classes and IoU 0.5 … 0.95
    ap50: float
    ap75: float
    gmacs: float  # of an image; queries are made once for all

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Detection(Scores):
    """What ``detect`` gives: a row for each setting, the model's own first; and the images that could not be read."""

    __slots__ = ()
    rows: list[Precision]

    def table(self) -> Table:
        cells = [
            [
                r.setting,
                "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * value for value in r.ap.three())),
                f"{r.gmacs:.3f}",
                f"{100 * r.ap50:.1f}",
                f"{100 * r.ap75:.1f}",
            ]
            for r in self.rows
        ]
        said = "Intervals are at 95 %, from the spread over groups of images."
        return Table(counted(self.rows[0].images, "image"), ["setting", "AP", "GMACs", "AP50", "AP75"], cells, said)


def evaluate_detection(
    model: Source,
    boxes: str | os.PathLike | BoxSet,
    settings: Sequence[str] = (),
    *,
    device: str | None = None,
    images: str | os.PathLike | None = None,
    split: str | None = None,
    limit: int | None = None,
    top: int = TOP,
    batch: int = 32,
    progress: Progress | None = None,
) -> Detection:
    """Average precision of the model's own setting and of others, asked for the names of the set's classes.

    And why which images could not be read.

    Args:
        model: a detector, or a folder that one was trained in; ``device`` as in ``saccade.checkpoint.open_model``.
        boxes: a set, a COCO file, or the word "scenes", which has splits.
        images: the folder or zip that the file's images lie in; None: the file's own folder.
        limit: at most this many images, spread evenly.
        top: detections of an image that count, at most 100.

    Raises UserError where nothing can be read, nothing is there to be found, or a class is no query that is known.
    """
    model = open_task(model, DetectionHead, device)
    boxes = boxes if isinstance(boxes, BoxSet) else open_boxes(os.fspath(boxes), split, images)
    views = {str(view.setting): view for view in (model, *map(model.at, settings))}
    places, loaders = spread(len(boxes), limit), Loaders(boxes.images)
    bar, rows = (progress or Progress()).start("detecting", len(places) * len(views)), []
    failures: dict[str, str] = {}
    for name, view in views.items():
        bar(0, what=name)
        loader = loaders.of(squashed(view))
        found, seen, gmacs = find(view.eval(), loader, boxes.classes, places, batch, top, bar)
        failures.update(loader.failures.items)
        rows.append(score(name, found, truths([boxes.objects[i] for i in seen]), gmacs))
    bar.finish()
    return Detection(rows, failures)


def score(setting: str, found: Sequence[Found], there: Sequence[Found], gmacs: float) -> Precision:
    """Sum up detections, in the order of what is there."""
    whole = average_precision(found, there)

    def of(places: Sequence[int]) -> float:
        if len(places) == len(found):
            return whole["ap"]
        return average_precision([found[i] for i in places], [there[i] for i in places])["ap"]

    ap = with_spread(of, len(found))
    ap = Interval(ap.mean, max(0.0, ap.low), min(1.0, ap.high))
    return Precision(setting, len(found), ap, whole["ap50"], whole["ap75"], gmacs)


def find(
    view: AdaptiveViT,
    loader: Loader,
    names: Sequence[str],
    places: Sequence[int],
    batch: int,
    top: int,
    step: Step = lambda n: None,
) -> tuple[list[Found], list[int], float]:
    """Detections of the images at ``places``, the places of those that could be read, and 10^9 MACs per image."""
    weight = view.vit.patch_embed.proj.weight
    found: list[Found] = []
    seen: list[int] = []
    macs = []
    with torch.no_grad():  # not inference mode, whose tensors must not meet training's
        queries = DetectionHead.of(view).ask(names)
        for images in loader.batches(batch, places):
            out = view(images.images.to(weight.device, weight.dtype), queries)
            require_finite(out.boxes, view.setting, "boxes")
            require_choice(require_finite(out.logits, view.setting).flatten(1), view.setting, "cells and queries")
            found += detections(out, top)
            seen += images.indices
            macs.append(out.trace.macs().cpu())
            step(len(images.indices))
    return found, seen, torch.cat(macs).mean().item() / 1e9


def truths(objects: Sequence[Objects]) -> list[Found]:
    """What is there, as torchmetrics takes it."""
    return [{"boxes": o.boxes, "labels": o.labels, "iscrowd": o.crowd.long()} for o in objects]


def average_precision(found: Sequence[Found], there: Sequence[Found]) -> dict[str, float]:
    """COCO's AP (mean over classes and IoU 0.5 … 0.95), and AP at IoU 0.5 and 0.75, by torchmetrics and pycocotools.

    Raises UserError where these are missing, or nothing is there to be found.
    """
    try:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(backend="pycocotools")
    except ImportError:  # ModuleNotFoundError too
        raise UserError("average precision needs torchmetrics and pycocotools: pip install 'saccade[tasks]'") from None
    metric.update(list(found), list(there))
    values = metric.compute()
    names = {"ap": "map", "ap50": "map_50", "ap75": "map_75"}
    result = {ours: float(values[theirs]) for ours, theirs in names.items()}
    if result["ap"] < 0:
        raise UserError("no objects in these images: there is no average precision of finding none")
    return result


def with_spread(of: Callable[[Sequence[int]], float], count: int) -> Interval:
    """A statistic of ``count`` images with its 95 % interval, from its spread over ``GROUPS`` groups of them.

    ``of`` takes places of images. Every tenth image is a group; t · s / √GROUPS of the groups' values is half the
    interval's length. For a statistic of the whole, like AP, which no image has for itself; with few images a class,
    groups scatter more than the whole does, so that the interval is rather too long. It is 0 … 1, which is
    no news, where a group has nothing to be found.
    """
    whole = of(range(count))
    try:
        values = torch.tensor([of(range(first, count, GROUPS)) for first in range(GROUPS)], dtype=torch.float64)
    except UserError:
        return Interval(whole, 0.0, 1.0)
    half = T_QUANTILE * values.std().item() / GROUPS**0.5
    return Interval(whole, whole - half, whole + half)
