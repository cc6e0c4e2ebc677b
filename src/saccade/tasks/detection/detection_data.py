"""Objects in images: where their boxes come from, and how they follow a view of a part of the image.

Boxes are (x1, y1, x2, y2) as shares of the image's width and height, so that they hold at any input size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from saccade.data import ImageSet
from saccade.data.listed import open_listed
from saccade.data.scenes import CLASSES, NAME, SIZE, Rendered, scenes
from saccade.data.store import NoFile, TooLong, read_regular
from saccade.errors import UserError

LARGEST = 2 * 2**30  # bytes of a COCO file: COCO's own has 0.5 GB
LEAST = 1e-4  # of the image's side: a thinner box is none


@dataclass(frozen=True)
class Objects:
    """The objects of one image."""

    boxes: Tensor  #  [n, 4] fp32
    labels: Tensor  # [n] int64  places in the classes
    crowd: Tensor  #  [n] bool   a group whose members are not told apart: not trained on, no miss, no false alarm


@dataclass(frozen=True)
class BoxSet:
    """Images and the objects in them, by place."""

    images: ImageSet
    classes: list[str]
    objects: Sequence[Objects] = field(repr=False, compare=False)
    most: int  # objects in one image, crowds left out

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """32 hex digits of the objects and their classes, in order."""
        whole = blake2b(repr((self.classes, self.most)).encode(), digest_size=16)
        if not _rendered(self.objects):  # those are decided by the images
            for one in self.objects:
                whole.update(repr((one.boxes.tolist(), one.labels.tolist(), one.crowd.tolist())).encode())
        return whole.hexdigest()

    def subset(self, places: Sequence[int]) -> BoxSet:
        """Some of the images, in that order."""
        chosen = list(places)
        return BoxSet(self.images.subset(chosen), self.classes, _Chosen(self.objects, chosen), self.most)


def open_boxes(path: str | Path, split: str | None = None, images: str | os.PathLike | None = None) -> BoxSet:
    """The built-in scenes for the word ``scenes``, else a COCO file; see ``read_coco``."""
    if str(path) == NAME and not Path(path).exists():
        found = scenes(split)
        return BoxSet(found, list(CLASSES), _SceneObjects(found), 1)
    if split is not None:
        raise UserError(f"a COCO file has no splits, so no {split!r}: give the file of the split")
    return read_coco(path, images)


def read_coco(file: str | Path, images: str | os.PathLike | None = None) -> BoxSet:
    """Boxes of a COCO JSON, its images below ``images``: a folder or zip (None: the folder of the JSON).

    Classes are the categories by their ids. Boxes are cut at the image's edges; those of which nothing is left are
    dropped. Names are relative to ``images``.

    Raises UserError for a file that is no COCO JSON, categories or sizes that are missing, names that lead elsewhere.
    """
    file = Path(file)
    where = Path(images) if images is not None else file.parent
    try:
        read = json.loads(read_regular(file, LARGEST).decode())
        categories = sorted((c["id"], str(c["name"])) for c in read["categories"])
        place = {number: i for i, (number, _) in enumerate(categories)}
        sizes = {i["id"]: (str(i["file_name"]), float(i["width"]), float(i["height"])) for i in read["images"]}
        rows: dict[Any, list[list[float]]] = {number: [] for number in sizes}
        for a in read["annotations"]:
            (_, width, height), (x, y, w, h) = sizes[a["image_id"]], map(float, a["bbox"])
            box = [x / width, y / height, (x + w) / width, (y + h) / height]
            rows[a["image_id"]].append([*box, place[a["category_id"]], float(a.get("iscrowd", 0))])
    except (OSError, NoFile, TooLong) as error:
        raise UserError(f"cannot read {str(file)!r}: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise UserError(
            f"{str(file)!r} is no COCO file of boxes ({reason}): it needs images (id, file_name, width, height), "
            "annotations (image_id, category_id, bbox) and categories (id, name)"
        ) from None
    names = [name for name, _, _ in sizes.values()]
    found = open_listed(names, where, file)
    objects = [_objects(rows[number]) for number in sizes]
    most = max(int((~o.crowd).sum()) for o in objects)
    return BoxSet(found, [name for _, name in categories], objects, max(1, most))


def _objects(rows: list[list[float]]) -> Objects:
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    table[:, :4] = table[:, :4].clamp(0, 1)
    kept = table[(table[:, 2:4] - table[:, :2] > LEAST).all(1)]  # not for NaN either
    return Objects(kept[:, :4], kept[:, 4].long(), kept[:, 5] > 0)


class _Lazy(Sequence[Objects]):
    """Objects that are asked for one at a time."""

    @overload
    def __getitem__(self, i: int) -> Objects: ...
    @overload
    def __getitem__(self, i: slice) -> list[Objects]: ...
    def __getitem__(self, i: int | slice) -> Objects | list[Objects]:
        return [self.at(k) for k in range(len(self))[i]] if isinstance(i, slice) else self.at(range(len(self))[i])

    def at(self, i: int) -> Objects:
        raise NotImplementedError


class _SceneObjects(_Lazy):
    """The one object of each scene, by the word of its folder."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def at(self, i: int) -> Objects:
        store, labels = self.images.store, self.images.labels
        assert isinstance(store, Rendered) and labels is not None
        top, left, bottom, right = store.box(self.images.names[i])
        box = torch.tensor([[left, top, right, bottom]], dtype=torch.float32) / SIZE
        return Objects(box, torch.tensor([labels[i]]), torch.tensor([False]))


class _Chosen(_Lazy):
    def __init__(self, of: Sequence[Objects], places: list[int]) -> None:
        self.of, self.places = of, places

    def __len__(self) -> int:
        return len(self.places)

    def at(self, i: int) -> Objects:
        return self.of[self.places[i]]


def _rendered(objects: Sequence[Objects]) -> bool:
    return isinstance(objects, _SceneObjects) or (isinstance(objects, _Chosen) and _rendered(objects.of))


# Views


def pad(objects: Objects, most: int) -> Tensor:
    """What is to be found in one image, [most, 5]: a box and its label, -1 where there is none. Crowds are left out."""
    rows = torch.full((most, 5), -1.0)
    wanted = ~objects.crowd
    rows[: int(wanted.sum())] = torch.cat([objects.boxes, objects.labels.unsqueeze(1)], 1)[wanted]
    return rows


def seen(boxes: Tensor, left: float, top: float, width: float, height: float) -> tuple[Tensor, Tensor]:
    """Boxes [n, 4] in a window of the image (in shares of it): cut at its edges, and the share of each in it, [n]."""
    offset, scale = boxes.new_tensor([left, top] * 2), boxes.new_tensor([width, height] * 2)
    cut = ((boxes - offset) / scale).clamp(0, 1)
    return cut, _area(cut) * width * height / _area(boxes)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)
