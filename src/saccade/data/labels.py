"""From the folders of an image set to the classes of a model's head: by name, or by place where a head has no names."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils import natural_key

from saccade.backbones.vit import class_names_of
from saccade.core.timm_types import ViT
from saccade.data.source import ImageSet, are_numbers
from saccade.errors import UserError

IMAGENET = 1000
SHOWN = 4  # names in a message


@dataclass(frozen=True)
class Labels:
    """``indices[i]`` is the class of image i in the head; ``how`` says what was assumed, "" where names decided."""

    indices: list[int]
    how: str = ""


def head_labels(images: ImageSet, vit: ViT) -> Labels:
    """The class of each image in a timm model's head. Raises UserError as ``class_labels``."""
    return class_labels(images, vit.num_classes, class_names_of(vit))


def class_indices(images: ImageSet, num_classes: int, names: Sequence[str] | None = None) -> list[int]:
    """The ``indices`` of ``class_labels``; a head of 1000 classes without ``names`` has those of ImageNet."""
    return class_labels(images, num_classes, names or _imagenet_names(num_classes)).indices


def class_labels(images: ImageSet, num_classes: int, names: Sequence[str] | None) -> Labels:
    """The class of each image for a head of ``num_classes`` called ``names`` (None: unknown).

    Names decide: every folder must be called as a class of the head, and there may be fewer folders than classes.
    Numbers are compared as numbers, and folders that are numbers are ImageNet's class indices for an ImageNet head,
    unless they count from 0 or 1 without a gap: those may be anybody's. For a head without names there must be one
    folder for each class, numbers by number and others by name, where timm and torchvision agree what that is.

    Raises UserError for an unlabelled set, and for folders that fit the head in none of these ways.
    """
    if images.labels is None or images.classes is None:
        raise UserError(f"no labels in {images.path}: lay the images out as class/name.jpg to measure accuracy")
    folders = images.classes
    if names is None:
        places, how = _by_place(images, folders, num_classes)
    else:
        places, how = _by_name(images, folders, names)
    return Labels([places[label] for label in images.labels], how)


def class_names(num_classes: int) -> list[str] | None:
    """What each class is called in English, for the 1000 of ImageNet; None for any other head."""
    return [_imagenet().index_to_description(i) for i in range(IMAGENET)] if num_classes == IMAGENET else None


def places_of(folders: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """Which of ``names`` each folder is, letter by letter or number by number; None where one is none of them."""
    place = {_plain(name): i for i, name in enumerate(names)}
    if all(_plain(folder) in place for folder in folders):
        return [place[_plain(folder)] for folder in folders]
    if are_numbers(folders) and are_numbers(names):
        number = {int(name): i for i, name in enumerate(names)}
        if all(int(folder) in number for folder in folders) and len(number) == len(names):
            return [number[int(folder)] for folder in folders]
    return None


def is_imagenet(names: Sequence[str]) -> bool:
    """Whether these are the classes of ImageNet-1k, in its order."""
    return tuple(names) == _imagenet_names(IMAGENET)


def is_run(folders: Sequence[str]) -> bool:
    """Whether folders count from 0 or 1 without a gap, as anybody's classes may."""
    numbers = sorted(map(int, folders)) if are_numbers(folders) else []
    return bool(numbers) and numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def evident(folders: Sequence[str], names: Sequence[str] | None) -> bool:
    """Whether folders that fit a head called ``names`` are meant for it, and not anybody's numbers below 1000."""
    if names is None or not is_imagenet(names) or not are_numbers(folders):
        return True
    return len(folders) == len(names) or all(len(folder) == 4 for folder in folders)


def some(names: Sequence[str]) -> str:
    """A few of many names, for a message."""
    if len(names) <= SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[: SHOWN - 1])}, … {names[-1]}"


def _by_name(images: ImageSet, folders: list[str], names: Sequence[str]) -> tuple[list[int], str]:
    _one_each(images, folders)
    if (places := places_of(folders, names)) is not None:
        return places, ""
    if is_imagenet(names):
        return _by_index(images, folders)
    known = {_plain(name) for name in names}
    strange = [folder for folder in folders if _plain(folder) not in known]
    raise UserError(
        f"{len(strange)} of {len(folders)} classes in {images.path} ({some(strange)}) are none of the {len(names)} of "
        f"the model's head ({some(names)}): rename these folders, leave them out, or fine-tune a head for these classes"
    )


def _by_index(images: ImageSet, folders: list[str]) -> tuple[list[int], str]:
    """Folders that are numbers, as class indices of ImageNet-1k."""
    if not are_numbers(folders) or max(map(int, folders)) >= IMAGENET:
        raise UserError(
            f"{len(folders)} classes in {images.path}, {IMAGENET} in the model's head; folders ({some(folders)}) are "
            "named neither by ImageNet synset nor by index: fine-tune a head for these classes, or give images of the "
            f"head's; a head that is not ImageNet's says so in its config (label_names)"
        )
    if len(folders) < IMAGENET and is_run(folders):
        raise UserError(
            f"folders {some(folders)} in {images.path} may be indices of ImageNet-1k, which the model's head is for, "
            f"or {len(folders)} classes of your own: name them by synset (n01440764), or fine-tune a head for them"
        )
    how = f"folders {some(folders)} are taken for class indices of ImageNet-1k"
    return [int(folder) for folder in folders], how if len(folders) < IMAGENET else ""


def _by_place(images: ImageSet, folders: list[str], num_classes: int) -> tuple[list[int], str]:
    if (guess := _imagenet_names(num_classes)) and (places := places_of(folders, guess)) is not None:
        return places, ""
    if len(folders) != num_classes:
        raise UserError(
            f"{len(folders)} classes in {images.path}, {num_classes} in the model's head: "
            "fine-tune a head for these classes, or give images of the head's"
        )
    _one_each(images, folders)
    if not are_numbers(folders) and (natural := sorted(folders, key=natural_key)) != folders:
        at = next(i for i, pair in enumerate(zip(folders, natural, strict=True)) if pair[0] != pair[1])
        raise UserError(
            f"the head's classes have no names, and those in {images.path} have two orders: class {at} is "
            f"{folders[at]!r} in torchvision's and {natural[at]!r} in timm's: give the head's order as label_names in "
            "its config, or rename the folders so that both agree (class01, class02, …)"
        )
    order = "number" if are_numbers(folders) else "name"
    return list(range(len(folders))), f"the head's classes have no names: folders {some(folders)} in order of {order}"


def _one_each(images: ImageSet, folders: list[str]) -> None:
    """Raises UserError where two folders have one name, as 1 and 01, or one word in two encodings."""
    seen: dict[object, str] = {}
    numbers = are_numbers(folders)
    for folder in folders:
        other = seen.setdefault(int(folder) if numbers else _plain(folder), folder)
        if other != folder:
            raise UserError(f"folders {other!r} and {folder!r} in {images.path} name one class: put them together")


def _plain(name: str) -> str:
    # Archives made on a Mac spell é as two characters.
    return unicodedata.normalize("NFC", name)


@cache
def _imagenet_names(num_classes: int) -> tuple[str, ...] | None:
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return tuple(ImageNetInfo(subset).label_names()) if subset else None


@cache
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo("imagenet-1k")
