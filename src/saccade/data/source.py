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

from PIL import Image

from saccade.data.decode import ImageError, byte_limit, decode, unreadable
from saccade.data.store import Store

READERS = 4  # threads that read all bytes
SHOWN = 6  # kinds of files in a message


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
        """Whether each image has a class."""
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


def are_numbers(names: Iterable[str]) -> bool:
    """Whether all are whole numbers in ASCII digits."""
    return all(name.isascii() and name.isdigit() and len(name) < 18 for name in names)


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
    """Whether a path is one that file managers hide."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
