"""From the folders of an image set to the classes of a model's head."""

from __future__ import annotations

from functools import cache

from timm.data import ImageNetInfo

from saccade.data.source import ImageSet
from saccade.errors import UserError

IMAGENET = 1000


def class_indices(images: ImageSet, num_classes: int) -> list[int]:
    """The model's class of each image, in order, for a head of ``num_classes``.

    For 1000 classes, folders named by ImageNet-1k synsets (``n01440764``) or by class indices (``0344``) are taken at
    their name, and may be few. Otherwise there must be one folder for each class, sorted by name as in torchvision's
    ``ImageFolder``.

    Raises UserError for an unlabelled set and for folders that fit the head in none of these ways.
    """
    if images.labels is None or images.classes is None:
        raise UserError(f"no labels in {images.path}: lay the images out as class/name.jpg to measure accuracy")
    by_name = _imagenet_indices(images.classes) if num_classes == IMAGENET else None
    if by_name is None and len(images.classes) != num_classes:
        named = "; folders are named neither by ImageNet synset nor by index" if num_classes == IMAGENET else ""
        raise UserError(
            f"{len(images.classes)} classes in {images.path}, {num_classes} in the model's head{named}: "
            "fine-tune a head for these classes, or give images of the head's"
        )
    return images.labels if by_name is None else [by_name[label] for label in images.labels]


def class_names(num_classes: int) -> list[str] | None:
    """What each class is called in English, for the 1000 of ImageNet; None for any other head."""
    return [_imagenet().index_to_description(i) for i in range(IMAGENET)] if num_classes == IMAGENET else None


def _imagenet_indices(classes: list[str]) -> list[int] | None:
    places = {synset: i for i, synset in enumerate(_imagenet().label_names())}
    if all(name in places for name in classes):
        return [places[name] for name in classes]
    if all(name.isascii() and name.isdigit() and int(name) < IMAGENET for name in classes):
        return [int(name) for name in classes]
    return None


@cache
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo("imagenet-1k")
