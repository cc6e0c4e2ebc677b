"""The images that are trained on, and those that are only looked at to check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saccade.data import ImageSet, open_images, splits
from saccade.data.decoded import Decoded, estimated_bytes
from saccade.data.labels import some
from saccade.data.splits import divide, held_out
from saccade.errors import UserError
from saccade.storage.image_names import CHECK, TEST, kind_of
from saccade.terminal.progress import Progress
from saccade.training.config import Data

ROOM = 8 / 7  # the usual 256 for 224: crops are rarely enlarged


def open_sets(data: Data) -> tuple[ImageSet, ImageSet | None]:
    """Training images, and held-out ones of which none is trained on; None where ``holdout`` is 0.

    The held-out ones are the validation split, or else a share of the training images, chosen by names, of every class.

    Raises:
        UserError: no path, no such split, or a held-out one to train on.
    """
    check_split(data)
    known = splits(data.path)
    images = open_images(data.path, data.split if known else None)
    if data.holdout == 0:
        return images, None
    if name := checking(known):
        return images, open_images(data.path, name)
    train, held = divided(images, data)
    return images.subset(train), images.subset(held)


def check_split(data: Data) -> None:
    """Raises UserError where there is no path, or a held-out split is to be trained on."""
    if not data.path:
        raise UserError("no images to train on: give data.path=FOLDER_OR_ZIP")
    if kind_of(data.split) in (CHECK, TEST):
        raise UserError(f"data.split={data.split!r} is a held-out split and never trained on: give another")


def checking(known: Sequence[str]) -> str | None:
    """The split to check on, of those there are: one to test on is for the last word, after training."""
    return held_out(known, CHECK)


def divided(images: ImageSet, data: Data) -> tuple[list[int], list[int]]:
    """Places of the images to train on, and of the share ``data.holdout`` to check on: see ``splits.divide``.

    Raises UserError where either would be none.
    """
    train, held = divide(images.names, data.holdout, images.labels)
    if not train or not held:
        raise UserError(
            f"{len(images)} images in {Path(data.path)} are too few for data.holdout={data.holdout:g}: set it to 0"
        )
    return train, held


def check_data(now: Mapping[str, Any], facts: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError, naming what changed, unless a run goes on with the data it began with (``Task.identity``)."""
    before = facts.get("data")
    if before is None:
        raise UserError(
            f"{str(folder)!r} was begun by an earlier version, which did not note what it was trained on: "
            "give another --out"
        )
    if before == now:
        return
    raise UserError(
        f"{str(folder)!r} was trained on other data: {_changed(before, now)}; bring it back, or give another --out"
    )


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    was, are = before.get("classes") or [], now.get("classes") or []
    gone, come = ([n for n in a if n not in b] for a, b in ((was, are), (are, was)))
    if gone or come:
        return " and ".join(
            [*([f"class {some(gone)} is gone"] if gone else []), *([f"{some(come)} is new"] if come else [])]
        )
    if was != are:
        return f"its classes were in the order {some(was)}, now {some(are)}"
    for name, value in now.items():
        if before.get(name) != value:
            counts = [d.get("count") if isinstance(d, dict) else None for d in (before.get(name), value)]
            if None not in counts and counts[0] != counts[1]:
                return f"{name}: {counts[0]} then, {counts[1]} now"
            return f"{name}: the content of some is not what it was"
    return "some of it is gone"


def decode_once(data: Data, images: ImageSet, side: int, folder: Path, progress: Progress) -> Decoded | None:
    """The images decoded into one file, a little larger than they are looked at; None where they are too many."""
    side = round(side * ROOM)
    if estimated_bytes(images, side) > data.cache_gb * 1e9:
        return None
    return Decoded.make(images, side, folder, workers=max(1, data.workers), progress=progress)
