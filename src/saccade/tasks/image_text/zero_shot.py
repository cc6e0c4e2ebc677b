"""What a space of images and texts is worth, under each setting: classes named in words, and finding each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.checkpoint import Source, open_task
from saccade.data import ImageSet, Loader, Loaders, Preprocess, open_images
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.evaluation.defined import require_choice, require_finite, require_many
from saccade.evaluation.stats import Interval, proportion
from saccade.model import AdaptiveViT
from saccade.tasks.image_text.image_text_data import PHOTO, Pairs, has_texts, open_pairs, prompts, readable
from saccade.tasks.image_text.two_tower import TwoTowerHead
from saccade.terminal.progress import Progress
from saccade.terminal.results import Scores, counted
from saccade.terminal.text_table import Column, Table

Step = Callable[[int], None]
CHUNK = 256  # images compared with all texts at once


@dataclass(frozen=True)
class ZeroShot:
    """Accuracy of naming classes under one setting."""

    setting: str
    images: int
    top1: Interval
    top5: Interval
    gmacs: float  # of an image

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Retrieval:
    """How often, under one setting, what belongs together is found: among the first, or the first five."""

    setting: str
    images: int
    texts: int  #             different ones
    gmacs: float  #           of an image
    text_at_1: Interval  #    an image finds one of its texts
    text_at_5: Interval
    image_at_1: Interval  #   a text finds one of its images
    image_at_5: Interval

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Seen:
    """Images of a set, in the space."""

    places: Tensor  #    [n] int64  those that could be read
    embedding: Tensor  # [n, E] fp32
    gmacs: float


class ZeroShots(Scores):
    """Accuracy of naming classes, a row for each setting; and the images that could not be read."""

    __slots__ = ()
    rows: list[ZeroShot]

    def table(self) -> Table:
        cells = [[r.setting, r.top1.percent(), f"{r.gmacs:.3f}", r.top5.percent()] for r in self.rows]
        columns = ["setting", "top-1", "GMACs", "top-5"]
        return Table(counted(self.rows[0].images, "image"), columns, cells, "Intervals are at 95 %.")


class Retrievals(Scores):
    """How often images and texts find each other, a row for each setting; and the images that could not be read."""

    __slots__ = ()
    rows: list[Retrieval]

    def table(self) -> Table:
        found = [(r.text_at_1, r.image_at_1, r.text_at_5, r.image_at_5) for r in self.rows]
        cells = [
            [r.setting, *(share.percent() for share in four), f"{r.gmacs:.3f}"]
            for r, four in zip(self.rows, found, strict=True)
        ]
        columns: list[Column | str] = ["setting", "text R@1", "image R@1", "text R@5", "image R@5", Column("GMACs", 2)]
        first = self.rows[0]
        return Table(
            f"{counted(first.images, 'image')}, {counted(first.texts, 'different text')}",
            columns,
            cells,
            "Intervals are at 95 %.",
        )


def evaluate_words(
    model: Source,
    data: str | Path,
    settings: Sequence[str] = (),
    *,
    device: str | None = None,
    templates: Sequence[str] | None = None,
    images: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch: int = 32,
    progress: Progress | None = None,
) -> ZeroShots | Retrievals:
    """``retrieval`` where ``data`` has texts (see ``open_pairs``), else ``zero_shot`` of its classes.

    ``model`` is one of two towers, or a folder that one was trained in.

    Raises UserError as these do, and for a split or templates where there are texts.
    """
    model = open_task(model, TwoTowerHead, device)
    more: dict[str, Any] = {"limit": limit, "batch": batch, "progress": progress}
    if has_texts(data):
        if split is not None or templates is not None:
            raise UserError(f"{data} has texts, which need neither split nor templates: leave these out")
        return retrieval(model, open_pairs(data, images), settings, **more)
    return zero_shot(model, open_images(data, split), settings, templates=templates or PHOTO, **more)


def zero_shot(
    model: AdaptiveViT,
    images: ImageSet,
    settings: Sequence[str] = (),
    *,
    templates: Sequence[str] = PHOTO,
    names: Sequence[str] | None = None,
    limit: int | None = None,
    batch: int = 32,
    progress: Progress | None = None,
) -> ZeroShots:
    """Accuracy with classes given as prompts, of the model's own setting and of others; and what could not be read.

    Args:
        templates: with one ``{}`` each for a class's name; a class is the mean of its prompts.
        names: of the classes; None: the folders' names in words.
        limit: at most this many images, spread evenly.

    Raises UserError for an unlabelled set, other than one name a class, or bad templates.
    """
    if images.labels is None or images.classes is None:
        raise UserError(f"no labels in {images.path}: lay the images out as class/name.jpg")
    named = readable(images.classes) if names is None else list(names)
    require_many(len(images.classes), "classes", "accuracy")
    if len(named) != len(images.classes):
        raise UserError(f"{len(named)} names for {len(images.classes)} classes in {images.path}")
    progress = progress or Progress()
    for line in images.notes:
        progress.say(line)
    labels, places = torch.tensor(images.labels), spread(len(images), limit)
    with torch.no_grad():
        classes = TwoTowerHead.of(model.eval()).classes([prompts(name, templates) for name in named]).cpu()
    found = []
    views, failures = _under(model, settings, images, places, batch, progress)
    for view, seen in views:
        near = require_choice(
            seen.embedding @ require_finite(classes, view.setting, "embeddings of classes").T, view.setting
        )
        best = near.topk(min(5, len(classes)), dim=1).indices
        hit = best == labels[seen.places].unsqueeze(1)
        found.append(ZeroShot(str(view.setting), len(hit), proportion(hit[:, 0]), proportion(hit.any(1)), seen.gmacs))
    return ZeroShots(found, failures)


def retrieval(
    model: AdaptiveViT,
    pairs: Pairs,
    settings: Sequence[str] = (),
    *,
    limit: int | None = None,
    batch: int = 32,
    progress: Progress | None = None,
) -> Retrievals:
    """Recall at 1 and 5, from images to texts and back, under the model's own setting and others.

    And why which images could not be read.

    Equal texts are one. A tie counts against the model: what is as near as the right one comes before it.
    """
    places = spread(len(pairs), limit)
    texts, own = belonging([pairs.texts[i] for i in places])
    require_many(len(texts), "different texts", "recall")
    require_many(len(places), "images", "recall")
    with torch.no_grad():
        words = require_finite(TwoTowerHead.of(model.eval()).words(texts).cpu(), model.setting, "embeddings of texts")
    place = {at: row for row, at in enumerate(places)}
    found = []
    views, failures = _under(model, settings, pairs.images, places, batch, progress)
    for view, seen in views:
        mine = own[[place[i] for i in seen.places.tolist()]]
        there = ranks(seen.embedding, words, mine)
        wanted = mine.any(0)  # texts of images that could not be read belong to none
        require_many(len(there), "images that could be read", "recall")
        back = ranks(words[wanted], seen.embedding, mine.T[wanted])
        at = (proportion(rank < k) for rank in (there, back) for k in (1, 5))
        found.append(Retrieval(str(view.setting), len(there), len(back), seen.gmacs, *at))
    return Retrievals(found, failures)


def belonging(texts: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """The different texts of n images, u of them, and which are whose, [n, u] bool."""
    different = {text: i for i, text in enumerate(dict.fromkeys(text for said in texts for text in said))}
    own = torch.zeros(len(texts), len(different), dtype=torch.bool)
    for row, said in enumerate(texts):
        own[row, [different[text] for text in said]] = True
    return list(different), own


def ranks(asking: Tensor, among: Tensor, own: Tensor) -> Tensor:
    """How many of others' [m, E] are at least as near to each asking one [n, E] as the nearest of its own: [n] int64.

    ``own`` [n, m] bool, at least one a row.
    """
    parts = [torch.empty(0, dtype=torch.int64)]
    for rows, mine in zip(asking.split(CHUNK), own.split(CHUNK), strict=True):
        near = rows @ among.T
        best = near.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        parts.append(((near >= best) & ~mine).sum(1))
    return torch.cat(parts)


def embed(model: AdaptiveViT, loader: Loader, places: Sequence[int], batch: int, step: Step = lambda n: None) -> Seen:
    """Images at ``places`` in the space; those that cannot be read are left out (``loader.failures`` names them)."""
    weight = next(model.parameters())
    kept: list[int] = []
    parts, macs = [], []
    with torch.no_grad():  # not inference mode, whose tensors must not meet training's
        for seen in loader.batches(batch, places):
            out = model(seen.images.to(weight.device, weight.dtype))
            kept += seen.indices
            parts.append(require_finite(out.embedding.float().cpu(), model.setting, "embeddings"))
            macs.append(out.trace.macs().cpu())
            step(len(seen.indices))
    return Seen(torch.tensor(kept), torch.cat(parts), torch.cat(macs).mean().item() / 1e9)


def _under(
    model: AdaptiveViT,
    settings: Sequence[str],
    images: ImageSet,
    places: list[int],
    batch: int,
    progress: Progress | None,
) -> tuple[list[tuple[AdaptiveViT, Seen]], dict[str, str]]:
    """The images under the model's own setting and others, each once; and why which could not be read."""
    views = {str(view.setting): view for view in (model, *map(model.at, settings))}
    bar, loaders, found = (progress or Progress()).start("embedding", len(places) * len(views)), Loaders(images), []
    failures: dict[str, str] = {}
    for name, view in views.items():
        bar(0, what=name)
        loader = loaders.of(Preprocess.of(view.vit, view.input_size()))
        found.append((view, embed(view.eval(), loader, places, batch, bar)))
        failures.update(loader.failures.items)
    bar.finish()
    return found, failures
