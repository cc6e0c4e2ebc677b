"""Panoptic sets as COCO ships them: ``panoptic.json`` beside ``images/`` and ``panoptic/``, with or without splits.

A PNG's colour, red + 256 · green + 65536 · blue, is the id of a segment, 0 is void, and the JSON knows the category of
each segment (https://cocodataset.org/#format-data). Categories go by name: what the model does not know is void, and so
are crowds, as in COCO's own evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from saccade.data import ImageError
from saccade.data.source import read_bytes
from saccade.data.store import TooLong
from saccade.errors import UserError
from saccade.tasks.segmentation.panoptic_data import PanopticSet
from saccade.tasks.segmentation.segmentation_data import VOID, decode_ids, open_pixels

JSON = "panoptic.json"
LARGEST = 2**30  # bytes of it: COCO's own has 0.3 GB


@dataclass(frozen=True)
class CocoPanopticSet(PanopticSet):
    """Images whose every pixel belongs to a segment."""

    segments: Mapping[str, Mapping[int, int]] = field(default_factory=dict, compare=False)  # PNG -> id -> class

    def read(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """Image ``i``, RGB, and int64 [h, w, 2]: class (or ``VOID``) and number."""
        image, name = self.images.read(i), self.labels[i]
        values = decode_ids(read_bytes(self.images.store, name), name, ("RGB",))
        if values.shape[:2] != (image.height, image.width):
            height, width = values.shape[:2]
            raise ImageError(name, f"has {width}×{height} labels for {image.width}×{image.height} pixels")
        ids, places = np.unique(values @ np.array([1, 256, 65536]), return_inverse=True)
        known = {0: VOID, **self.segments.get(PurePosixPath(name).name, {})}
        missing = [int(one) for one in ids if int(one) not in known]
        if missing:
            raise ImageError(name, f"holds the segment {missing[0]}, of which {JSON} knows nothing")
        places = places.reshape(values.shape[:2])
        return image, np.stack([np.array([known[int(one)] for one in ids])[places], places], axis=-1)


def open_panoptic(path: str | Path, split: str | None, classes: Iterable[str], void: int) -> PanopticSet:
    """A panoptic set in either layout: COCO's where there is a ``panoptic.json``, else that of ``tasks.panoptic``.

    Args:
        classes: of the model, in order; void: as in `PanopticSet`, of no meaning to COCO's.

    Raises:
        UserError: nothing there, no such split, not one pair, a JSON that is none of COCO's.
    """
    pixels = open_pixels(path, split, classes, void, PanopticSet)
    store, top = pixels.images.store, f"{pixels.images.split}/" if pixels.images.split else ""
    if f"{top}{JSON}" not in store.names():
        return pixels
    order = {name: k for k, name in enumerate(pixels.classes)}
    try:
        told: dict[str, Any] = json.loads(store.read(f"{top}{JSON}", LARGEST))
        category = {c["id"]: order.get(c["name"], VOID) for c in told["categories"]}
        segments = {
            PurePosixPath(one["file_name"]).name: {
                s["id"]: VOID if s.get("iscrowd") else category[s["category_id"]] for s in one["segments_info"]
            }
            for one in told["annotations"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, TooLong, BadZipFile) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{top}{JSON} in {path} is not in COCO's panoptic format ({what})") from None
    if not set(category.values()) - {VOID}:
        raise UserError(
            f"{top}{JSON} in {path} has categories {_some(c['name'] for c in told['categories'])}, "
            f"the model {_some(order)}: give one that was trained on these classes"
        )
    return CocoPanopticSet(pixels.images, pixels.labels, pixels.void, pixels.failures, segments)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (", …" if len(listed) > 4 else "")
