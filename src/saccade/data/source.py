"""Image sets: a folder, a zip or one file, with or without classes and splits."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path, PurePosixPath
from zipfile import is_zipfile

from PIL import Image

from saccade.data.decode import EXTENSIONS, ImageError, byte_limit, decode, unreadable
from saccade.data.splits import choose_split, kind_of
from saccade.data.store import Folder, Store, Zip
from saccade.errors import UserError

READERS = 4  # threads that read all bytes
SHOWN = 6  # kinds of files in a message
LAYOUTS = "name.jpg, class/name.jpg or split/class/name.jpg"


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order (sorted by name), read one by one.

    ``names`` are paths below ``path``; ``labels[i]`` is the place of image i's folder in ``classes``. Both ``labels``
    and ``classes`` are None for an unlabelled set; ``split`` is None where there are no splits. ``classes`` are those
    of all splits, so they agree between splits even if one lacks a class; sorted by name, or by number where all are.
    ``passed_over`` counts the files that are no images by extension, and hidden ones; ``notes`` says in a line each
    what a user may not expect.
    """

    path: Path
    split: str | None
    names: list[str]
    labels: list[int] | None
    classes: list[str] | None
    store: Store = field(repr=False, compare=False)
    passed_over: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)

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
    except Exception as error:  # zipfile alone raises six kinds
        raise ImageError(name, unreadable(error)) from error


def splits(path: str | Path) -> list[str]:
    """Splits that ``open_images`` can be asked for; none where the images are not laid out in splits.

    Raises UserError as ``open_images`` does for a path that cannot be listed.
    """
    _, names, _ = list_images(Path(path))
    return sorted({name.split("/")[0] for name in names if name.count("/") == 2})


def open_images(path: str | Path, split: str | None = None) -> ImageSet:
    """The images at ``path``: a folder or zip laid out as ``LAYOUTS`` say, or one image file.

    How deep the images lie tells the layout. Hidden files, ``__MACOSX`` and files that are no images by extension are
    passed over and counted. Where there are splits and none is asked for, the held-out one is taken, one to check on
    before one to test on (``saccade.data.splits``). Nothing is decoded here. Where nothing of that name lies in the
    working folder, ``scenes`` is the built-in image set (``saccade.data.scenes``).

    Raises UserError for a missing path, no images, images at different depths, or a split that is not there.
    """
    path = Path(path)
    store, names, others = list_images(path)
    passed_over = Counter("hidden" if hidden(name) else _extension(name) for name in others)
    depths = {name.count("/"): name for name in names}
    if not depths:
        instead = f" (there are {_counts(passed_over)})" if passed_over else ""
        raise UserError(f"no images in {path}{instead}: looked for {', '.join(EXTENSIONS)} as {LAYOUTS}")
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
    notes = []
    if depth == 2:
        known, asked = {name.split("/")[0] for name in names}, split
        split = choose_split(path, known, split)
        if split != asked and len(known) > 1:
            notes.append(f"{path}: split {split!r} of {', '.join(sorted(known))}")
    elif split is not None:
        raise UserError(f"no splits in {path}, so no {split!r}: leave the split out")
    classes = _ordered({name.split("/")[-2] for name in names}) if depth else None
    if depth == 1 and len({kind_of(name) for name in classes or ()} - {None}) > 1 and all(map(kind_of, classes or ())):
        raise UserError(
            f"folders {', '.join(classes or ())} in {path} are splits, with images right in them: give one of these "
            "folders, or lay the images out as split/class/name.jpg"
        )
    notes += passed_over_note(path, others)
    there = {name.split("/")[-2] for name in others if name.count("/") == depth > 0 and not hidden(name)}
    if empty := _ordered(there - {*(classes or ())}):
        notes.append(f"{path}: no class {', '.join(empty)}, as there is no image in it")
    chosen = [name for name in names if depth < 2 or name.startswith(f"{split}/")]
    place = {name: i for i, name in enumerate(classes or [])}
    labels = [place[name.split("/")[-2]] for name in chosen] if classes else None
    return ImageSet(path, split, chosen, labels, classes, store, passed_over, tuple(notes))


def list_images(path: Path) -> tuple[Store, list[str], list[str]]:
    """Where files lie, the names of all that are images by extension, sorted, however deep, and those of the others.

    Raises UserError.
    """
    if path == Path("scenes") and not os.path.lexists(path):
        from saccade.data.scenes import Rendered  # that file imports this one

        rendered = Rendered()
        return rendered, rendered.names(), []
    if path.is_file() and is_image(path.name):
        return Folder(path.parent), [path.name], []
    store: Store
    if path.is_dir():
        store = Folder(path)
    elif not path.exists():
        raise UserError(f"{path} does not exist: give a folder, a zip or an image")
    elif path.is_file() and is_zipfile(path):  # a pipe is not even opened
        store = Zip(path)
    else:
        raise UserError(f"{path} is neither a folder, nor a whole zip, nor an image ({', '.join(EXTENSIONS)})")
    names: list[str] = []
    others: list[str] = []
    for name in store.names():
        (names if is_image(name) and not hidden(name) else others).append(name)
    return store, sorted(names), others


def are_numbers(names: Iterable[str]) -> bool:
    """Whether all are whole numbers in ASCII digits."""
    return all(name.isascii() and name.isdigit() and len(name) < 18 for name in names)


def _ordered(classes: set[str]) -> list[str]:
    """Numbers by number; other names by name, as torchvision's ``ImageFolder`` has them."""
    return sorted(classes, key=lambda name: (int(name), name)) if are_numbers(classes) else sorted(classes)


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix.lower() or "without extension"


def _counts(passed_over: Counter[str]) -> str:
    """Like "12 .heic, 3 .txt", the most first."""
    listed = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    more = sum(count for _, count in listed[SHOWN:])
    return ", ".join([*(f"{count} {kind}" for kind, count in listed[:SHOWN]), *([f"{more} others"] if more else [])])


def passed_over_note(path: str | os.PathLike, others: Iterable[str]) -> tuple[str, ...]:
    """In a line, how many files of which kinds are no images; no line where there is none."""
    counted = Counter("hidden" if hidden(name) else _extension(name) for name in others)
    return (f"{path}: passed over {_counts(counted)}",) if counted else ()


def hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
