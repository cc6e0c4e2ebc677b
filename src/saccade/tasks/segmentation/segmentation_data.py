"""Images whose every pixel has a class: ``split/images/name.jpg`` with ``split/labels/name.png``, or without splits.

Label files are single-channel PNGs (TIFF, BMP too) of class numbers, as large as their images. One value, ``void``, is
no class and counts nowhere; the others, in order, are the classes: with void 11, values 0 … 10 are classes 0 … 10, and
with void 0, values 1 … 150 are classes 0 … 149. Inside the library void is ``VOID``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import ClassVar, TypeVar

import numpy as np
from PIL import Image

from saccade.data import ImageError, ImageSet
from saccade.data.decode import open_image, pixel_limit
from saccade.data.source import hidden, passed_over_note, read_bytes
from saccade.data.splits import choose_split
from saccade.data.store import Store, open_store
from saccade.errors import UserError
from saccade.storage.image_names import is_image
from saccade.tasks.segmentation.segmenter import VOID

IMAGES = "images"
LAYOUT = "images/name.jpg with labels/name.png, or split/images/… with split/labels/…"
FORMATS = ("PNG", "TIFF", "BMP", "PPM")
# A grey map of the PPM family, its two sizes and its largest value; comments may stand between them.
GREY_MAP = re.compile(rb"P[25](?:(?:\s|#[^\n]*\n)+(\d{1,9})){3}\s")
MODES = ("1", "L", "P", "I;16", "I")


@dataclass(frozen=True)
class PixelSet:
    """Images and their labels, read pair by pair. ``failures`` are images without labels and labels without images."""

    images: ImageSet  # names, split, and the names of the classes
    labels: list[str]  # name of image i's labels
    void: int
    failures: dict[str, str] = field(default_factory=dict, compare=False)

    folder: ClassVar[str] = "labels"  # where they lie, beside "images"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in order of number."""
        return tuple(self.images.classes or ())

    def read(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """Image ``i``, RGB, and its labels, uint8 [h, w] with ``VOID``. Raises ImageError where either is unusable."""
        image, name = self.images.read(i), self.labels[i]
        values = decode_ids(read_bytes(self.images.store, name), name)
        return image, self.checked(values, image, name)

    def checked(self, values: np.ndarray, image: Image.Image, name: str) -> np.ndarray:
        """The classes of values [h, w], uint8. Raises ImageError for another size, or values that are no class."""
        if values.shape != (image.height, image.width):
            height, width = values.shape
            raise ImageError(name, f"has {width}×{height} labels for {image.width}×{image.height} pixels")
        found = lookup(len(self.classes), self.void)[np.minimum(values, 2**16 - 1)]
        if (found < 0).any():
            odd = int(values[found < 0].min())
            raise ImageError(name, f"holds {odd}: neither one of {len(self.classes)} classes nor void={self.void}")
        return found.astype(np.uint8)

    def fingerprint(self) -> str:
        """32 hex digits of the labels' names and bytes, of the classes and of void; reads every file of labels."""
        labels = replace(self.images, names=self.labels, classes=[*self.classes, str(self.void)], labels=None)
        return labels.fingerprint()

    def subset(self, places: Iterable[int]) -> PixelSet:
        """The pairs at ``places``, in that order."""
        chosen = list(places)
        return replace(self, images=self.images.subset(chosen), labels=[self.labels[i] for i in chosen])


Set = TypeVar("Set", bound=PixelSet)


def open_pixels(
    path: str | Path,
    split: str | None,
    classes: Iterable[str],
    void: int = VOID,
    kind: type[Set] = PixelSet,  # type: ignore[assignment]
) -> Set:
    """The pairs below a folder or in a zip, laid out as ``LAYOUT`` says; nothing is decoded here.

    Args:
        split: None: the held-out one where there are splits.
        classes: what they are called, in the order of their values.
        kind: of labels; each knows its ``folder``.

    Raises:
        UserError: nothing there, no such split, not one pair.
    """
    path = Path(path)
    store = open_store(path)
    known, names, others = _splits(store, kind.folder)
    if known:
        split = choose_split(path, known, split)
    elif split is not None:
        raise UserError(f"no split {split!r} in {path}: it has none")
    top = "" if split is None else f"{split}/"
    images = {PurePosixPath(n).stem: n for n in names if n.startswith(f"{top}{IMAGES}/")}
    labels = {PurePosixPath(n).stem: n for n in names if n.startswith(f"{top}{kind.folder}/")}
    both = sorted(images.keys() & labels.keys(), key=lambda stem: images[stem])
    if not both:
        raise UserError(f"no pairs of images and {kind.folder} in {path}: lay them out as {LAYOUT}")
    alone = {images[stem]: f"has no labels in {top}{kind.folder}/" for stem in sorted(images.keys() - labels.keys())}
    alone |= {labels[stem]: f"has no image in {top}{IMAGES}/" for stem in sorted(labels.keys() - images.keys())}
    found = ImageSet(path, split, [images[stem] for stem in both], None, list(classes), store)
    found = replace(found, notes=passed_over_note(path, others))
    return kind(found, [labels[stem] for stem in both], void, alone)


def pixel_splits(path: str | Path) -> list[str]:
    """The splits of a set of pairs; none where there are none."""
    return _splits(open_store(Path(path)), PixelSet.folder)[0]


def _splits(store: Store, folder: str) -> tuple[list[str], list[str], list[str]]:
    """Splits, the names of all files that may be images or labels, and those of the others."""
    names: list[str] = []
    others: list[str] = []
    for name in store.names():
        (names if is_image(name) and not hidden(name) else others).append(name)
    known = {n.split("/")[0] for n in names if n.count("/") == 2 and n.split("/")[1] in (IMAGES, folder)}
    return sorted(known), names, others


def decode_ids(data: bytes, name: str, modes: tuple[str, ...] = MODES) -> np.ndarray:
    """The numbers of a single-channel image, int64 [h, w]; of a palette image, the places in the palette.

    Raises ImageError for a file that is damaged, too large or in another of Pillow's modes (colours).
    """
    image = open_image(data, name, FORMATS, pixel_limit())
    if image.mode not in modes:
        raise ImageError(name, f"labels in mode {image.mode}: store them as {', '.join(modes)}")
    grey = GREY_MAP.match(data[:4096])
    if grey and int(grey[1]) not in (255, 65535):  # Pillow stretches other ranges to these, numbers and all
        raise ImageError(name, f"labels in a grey map up to {int(grey[1])}: store them up to 255 or 65535, or as PNG")
    try:
        values = np.asarray(image).astype(np.int64)
    except Exception as error:
        raise ImageError(name, _line(error)) from error
    if values.min(initial=0) < 0:
        raise ImageError(name, "holds numbers below 0: labels count from 0")
    return values


def lookup(classes: int, void: int) -> np.ndarray:
    """Class of each value, int16 [65536]: ``VOID`` for void, -1 for values beyond the classes."""
    values = [v for v in range(classes + 1) if v != void][:classes]
    table = np.full(2**16, -1, dtype=np.int16)
    table[values] = np.arange(classes)
    table[void] = VOID
    return table


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
