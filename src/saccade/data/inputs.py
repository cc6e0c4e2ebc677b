"""What people have images as — paths, folders, zips, patterns, PIL images, arrays, tensors — read one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import count
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saccade.data import ImageError, ImageSet, decode, upright
from saccade.data.image_folders import list_images
from saccade.data.source import passed_over_note
from saccade.data.store import Folder
from saccade.errors import UserError

KINDS = "a path, bytes, a PIL image, an array [h, w, 3], a tensor [3, h, w], batches or an iterable of these"


@dataclass(frozen=True)
class Input:
    """One image, not read yet."""

    name: str
    read: Callable[[], Image.Image]  # upright RGB; raises ImageError


def inputs(images: Any) -> Iterator[Input]:
    """All images of what is given, in order; those without a name are called by their place: "image 0".

    A path in an iterable that is not there is one image that cannot be read. Raises UserError for a path alone that is
    not there, a folder or pattern without images, and what is no image.
    """
    place = count()
    if isinstance(images, str) and images.startswith(("http://", "https://")):
        raise UserError(f"{images} is not a file: download it first")
    if isinstance(images, (str, os.PathLike)) and not _pattern(images) and not os.path.exists(images):
        raise UserError(f"{os.fspath(images)} does not exist: give an image, a folder, a zip or a pattern like '*.jpg'")
    yield from _of(images, place)


def _of(given: Any, place: Iterator[int]) -> Iterator[Input]:
    if isinstance(given, (str, os.PathLike)):
        for one in _files(os.fspath(given)):
            next(place)
            yield one
    elif isinstance(given, ImageSet):
        for i, name in enumerate(given.names):
            next(place)
            yield Input(name, lambda i=i: given.read(i))  # type: ignore[misc]
    elif isinstance(given, Image.Image):
        i = next(place)
        name = str(getattr(given, "filename", "") or f"image {i}")
        yield Input(name, lambda: upright(given.copy(), name))
    elif isinstance(given, (bytes, bytearray)):
        name = f"image {next(place)}"
        yield Input(name, lambda: decode(bytes(given), name))
    elif isinstance(given, Tensor):
        yield from _arrays(_channels_last(given), place)
    elif isinstance(given, np.ndarray) and given.dtype != object:
        yield from _arrays(_checked(given), place)
    elif isinstance(given, Iterable) and not isinstance(given, dict):
        for one in given:
            yield from _of(one, place)
    else:
        raise UserError(f"a {type(given).__name__} is no image: give {KINDS}")


def _files(path: str) -> Iterator[Input]:
    """The images of a path: itself, all below a folder or in a zip, or those that fit a pattern."""
    if _pattern(path):
        found = sorted(glob(path, recursive=True))
        if not found:
            raise UserError(f"no file fits {path!r}")
        for one in found:
            yield from _files(one)
        return
    many = os.path.isdir(path) or (os.path.isfile(path) and is_zipfile(path))
    if many:
        store, names, _ = list_images(Path(path))
        if not names:
            raise UserError(f"no images in {path}")
        images = ImageSet(Path(path), None, names, None, None, store)
    else:
        where = Path(path)
        images = ImageSet(where.parent, None, [where.name], None, None, Folder(where.parent))
    for i, name in enumerate(images.names):
        shown = os.path.join(path, name) if many else path
        yield Input(shown, lambda i=i, shown=shown: _read(images, i, shown))  # type: ignore[misc]


def notes(paths: Iterable[str]) -> list[str]:
    """What of folders and zips is passed over, a line for each that holds such files."""
    many = [path for path in paths if os.path.isdir(path) or (os.path.isfile(path) and is_zipfile(path))]
    return [line for path in many for line in passed_over_note(path, list_images(Path(path))[2])]


def _read(images: ImageSet, i: int, name: str) -> Image.Image:
    try:
        return images.read(i)
    except ImageError as error:
        raise ImageError(name, error.reason) from error


def _pattern(path: Any) -> bool:
    return has_magic(os.fspath(path)) and not os.path.lexists(path)


def _channels_last(images: Tensor) -> np.ndarray:
    """A tensor [(n,) c, h, w] as an array [n, h, w, c]."""
    if images.ndim not in (3, 4) or images.shape[-3] not in (1, 3, 4):
        raise UserError(f"a tensor of shape {tuple(images.shape)} is no image: give [3, h, w] or [n, 3, h, w]")
    found = images.detach().cpu()
    found = found.float() if found.dtype in (torch.bfloat16, torch.float16) else found
    return _checked((found if found.ndim == 4 else found[None]).movedim(1, -1).numpy())


def _checked(images: np.ndarray) -> np.ndarray:
    """An array [(n,) h, w(, c)] as [n, h, w, c]."""
    shape = images.shape
    if images.ndim == 2:
        images = images[None, :, :, None]
    elif images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"an array of shape {shape} is no image: give [h, w, 3], [h, w] or [n, h, w, 3] (channels last; a torch "
            "tensor has them first)"
        )
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"images of type {images.dtype}: give uint8 from 0 to 255, or float from 0 to 1")
    return images


def _arrays(images: np.ndarray, place: Iterator[int]) -> Iterator[Input]:
    for pixels in images:
        name = f"image {next(place)}"
        yield Input(name, lambda pixels=pixels, name=name: _picture(pixels, name))  # type: ignore[misc]


def _picture(pixels: np.ndarray, name: str) -> Image.Image:
    """Pixels [h, w, c] as an RGB image."""
    if not pixels.size:
        raise ImageError(name, f"has no pixels: {pixels.shape}")
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0.0 and high <= 1.0):
            remedy = "the model itself takes normalised ones" if low < 0 else "divide by 255, or give uint8"
            raise ImageError(name, f"float values from {low:.3g} to {high:.3g}, expected 0 to 1: {remedy}")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    colours = pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]
    return Image.fromarray(np.ascontiguousarray(colours)).convert("RGB")
