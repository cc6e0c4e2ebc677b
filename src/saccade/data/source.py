"""Image sets: a folder, a zip or one file, with or without classes and splits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path, PurePosixPath
from zipfile import is_zipfile

from PIL import Image

from saccade.data.decode import EXTENSIONS, ImageError, byte_limit, decode
from saccade.data.store import Folder, Store, TooLong, Zip
from saccade.errors import UserError

HELD_OUT = ("val", "validation", "test", "dev")
READERS = 4  # threads that read all bytes
LAYOUTS = "name.jpg, class/name.jpg or split/class/name.jpg"


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order (sorted by name), read one by one.

    ``names`` are paths below ``path``; ``labels[i]`` is the place of image i's folder in ``classes``. Both ``labels``
    and ``classes`` are None for an unlabelled set; ``split`` is None where there are no splits. ``classes`` are those
    of all splits, so they agree between splits even if one lacks a class; sorted by name, or by number where all are.
    """

    path: Path
    split: str | None
    names: list[str]
    labels: list[int] | None
    classes: list[str] | None
    store: Store = field(repr=False, compare=False)

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def __len__(self) -> int:
        return len(self.names)

    def read_bytes(self, i: int) -> bytes:
        """The file of image ``i`` as it is stored. Raises ImageError if it cannot be read."""
        return read_bytes(self.store, self.names[i])

    def read(self, i: int) -> Image.Image:
        """Image ``i``, upright RGB. Raises ImageError if it cannot be read or decoded."""
        return decode(self.read_bytes(i), self.names[i])

    def subset(self, indices: Iterable[int]) -> ImageSet:
        """The images at ``indices``, in that order, under the same classes."""
        chosen = list(indices)
        labels = None if self.labels is None else [self.labels[i] for i in chosen]
        return replace(self, names=[self.names[i] for i in chosen], labels=labels)

    def fingerprint(self) -> str:
        """32 hex digits of names, classes and all bytes, in order: equal for a folder and its zip. Reads every file."""
        whole = hashlib.blake2b(repr(self.classes).encode("utf-8", "surrogateescape"), digest_size=16)
        with ThreadPoolExecutor(READERS) as pool:
            digests = pool.map(self.store.digest, self.names, repeat(byte_limit()))
            for name, digest in zip(self.names, digests, strict=True):
                whole.update(name.encode("utf-8", "surrogateescape") + b"\0" + digest)
        return whole.hexdigest()


def read_bytes(store: Store, name: str) -> bytes:
    """An image file as it is stored. Raises ImageError if it cannot be read, or is too long for any allowed image."""
    limit = byte_limit()
    try:
        return store.read(name, limit)
    except TooLong as error:
        size = "unknown size" if error.size is None else f"{error.size:,} bytes"
        raise ImageError(name, f"file of {size}, limit {limit:,} (SACCADE_MAX_PIXELS raises it)") from error
    except Exception as error:  # zipfile alone raises six kinds
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ImageError(name, f"cannot be read ({reason})") from error


def splits(path: str | Path) -> list[str]:
    """Splits that ``open_images`` can be asked for; none where the images are not laid out in splits.

    Raises UserError as ``open_images`` does for a path that cannot be listed.
    """
    _, names = list_images(Path(path))
    return sorted({name.split("/")[0] for name in names if name.count("/") == 2})


def open_images(path: str | Path, split: str | None = None) -> ImageSet:
    """The images at ``path``: a folder or zip laid out as ``LAYOUTS`` say, or one image file.

    How deep the images lie tells the layout. Hidden files, ``__MACOSX`` and files that are no images by extension are
    passed over. Where there are splits and none is asked for, the first held-out one is taken: val, validation, test
    or dev. Nothing is decoded here. Where nothing of that name lies in the working folder, ``scenes`` is the built-in
    image set (``saccade.data.scenes``).

    Raises UserError for a missing path, no images, images at different depths, or a split that is not there.
    """
    path = Path(path)
    store, names = list_images(path)
    depths = {name.count("/"): name for name in names}
    if not depths:
        raise UserError(f"no images in {path}: looked for {', '.join(EXTENSIONS)} as {LAYOUTS}")
    if len(depths) > 1:
        shallow, deep = depths[min(depths)], depths[max(depths)]
        raise UserError(
            f"images at different depths in {path} ({shallow}, {deep}): lay all of them out as one of {LAYOUTS}"
        )
    (depth,) = depths
    if depth > 2:
        raise UserError(
            f"images too deep in {path} ({names[0]}): lay them out as {LAYOUTS}, or give a folder further in"
        )
    if depth == 2:
        split = _choose_split(path, {name.split("/")[0] for name in names}, split)
    elif split is not None:
        raise UserError(f"no splits in {path}, so no {split!r}: leave the split out")
    classes = _ordered({name.split("/")[-2] for name in names}) if depth else None
    chosen = [name for name in names if depth < 2 or name.startswith(f"{split}/")]
    place = {name: i for i, name in enumerate(classes or [])}
    labels = [place[name.split("/")[-2]] for name in chosen] if classes else None
    return ImageSet(path, split, chosen, labels, classes, store)


def list_images(path: Path) -> tuple[Store, list[str]]:
    """Where the images at a path lie, and the names of all of them, sorted, however deep. Raises UserError."""
    if path == Path("scenes") and not os.path.lexists(path):
        from saccade.data.scenes import Rendered  # that file imports this one

        rendered = Rendered()
        return rendered, rendered.names()
    if path.is_file() and _is_image(path.name):
        return Folder(path.parent), [path.name]
    store: Store
    if path.is_dir():
        store = Folder(path)
    elif not path.exists():
        raise UserError(f"{path} does not exist: give a folder, a zip or an image")
    elif path.is_file() and is_zipfile(path):  # a pipe is not even opened
        store = Zip(path)
    else:
        raise UserError(f"{path} is neither a folder, nor a whole zip, nor an image ({', '.join(EXTENSIONS)})")
    return store, sorted(name for name in store.names() if _is_image(name) and not _is_hidden(name))


def are_numbers(names: Iterable[str]) -> bool:
    """Whether all are whole numbers in ASCII digits."""
    return all(name.isascii() and name.isdigit() and len(name) < 18 for name in names)


def _ordered(classes: set[str]) -> list[str]:
    """Numbers by number; other names by name, as torchvision's ``ImageFolder`` has them."""
    return sorted(classes, key=lambda name: (int(name), name)) if are_numbers(classes) else sorted(classes)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _choose_split(path: Path, splits: set[str], split: str | None) -> str:
    known = ", ".join(sorted(splits))
    if split is None:
        split = next((name for name in HELD_OUT if name in splits), None)
        if split is None:
            raise UserError(f"no held-out split ({', '.join(HELD_OUT)}) in {path}: name one of {known}")
    elif split not in splits:
        raise UserError(f"no split {split!r} in {path}: name one of {known}")
    return split
