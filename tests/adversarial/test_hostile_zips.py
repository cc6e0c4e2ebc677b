"""Zips whose directory lies: each opens as images whose bytes are those that were packed, or is refused in one line."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from attack import attempt, damaged, listening, outcomes, reached
from data_helpers import encode, picture
from saccade.data import ImageError, open_images
from saccade.errors import UserError
from saccade.tasks.detection.detection_data import read_coco
from saccade.tasks.image_text.image_text_data import open_pairs
from saccade.tasks.segmentation.segmentation_data import open_pixels

NAMES = [f"{c}/{i}.png" for c in "ab" for i in range(2)]
FILES = {name: encode(picture(20, 16, seed=k)) for k, name in enumerate(NAMES)}


def pack(files: Iterable[tuple[str | zipfile.ZipInfo, bytes]], how: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return stream.getvalue()


GOOD = pack(FILES.items())
DEFLATED = pack(FILES.items(), zipfile.ZIP_DEFLATED)


def look(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]] | UserError:
    """All that can be read of a zip of images, and why the rest cannot; nothing beside it is opened."""

    def act() -> tuple[dict[str, np.ndarray], dict[str, str]]:
        images = open_images(path)
        images.fingerprint()
        read, failed = {}, {}
        for i, name in enumerate(images.names):
            try:
                read[name] = np.asarray(images.read(i))
            except ImageError as error:
                failed[name] = str(error)
        return read, failed

    with listening() as heard:
        found = attempt(act, megabytes=700)
    assert not reached(heard, path)
    return found


def strangers(path: Path, data: bytes) -> list[str]:
    """Names of images read from a damaged zip that are none of those that were packed: damage may hide and spoil."""
    path.write_bytes(data)
    found = look(path)
    known = {picked.tobytes() for picked in PIXELS}
    return (
        [] if isinstance(found, UserError) else [n for n, pixels in found[0].items() if pixels.tobytes() not in known]
    )


PIXELS = [np.asarray(picture(20, 16, seed=k)) for k in range(len(NAMES))]


@pytest.mark.parametrize("count", [250, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["stored", "deflated"])
def test_bytes_of_the_directory(tmp_path, kind, count):
    """The checksums of the directory cover the files; a file whose own was changed with it is another file."""
    good = {"stored": GOOD, "deflated": DEFLATED}[kind]
    start = good.index(b"PK\x01\x02")
    cases = damaged(good[start:], 0, count, header=len(good) - start)
    found = outcomes(cases, lambda tail: strangers(tmp_path / "x.zip", good[:start] + tail))
    assert found == [[]] * count


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_bytes_of_files(tmp_path, count):
    start = GOOD.index(b"PK\x01\x02")
    cases = damaged(GOOD[:start], 1, count)
    found = outcomes(cases, lambda head: strangers(tmp_path / "x.zip", head + GOOD[start:]))
    assert found == [[]] * count


def entry(name: str, mode: int = stat.S_IFREG | 0o644, flags: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.flag_bits |= flags
    return info


def with_name(data: bytes, old: str, new: str) -> bytes:
    """Another name of the same length, in both directories."""
    assert len(old) == len(new)
    return data.replace(old.encode(), new.encode())


def patched(data: bytes, offset: int, form: str, value: int, record: bytes = b"PK\x01\x02", which: int = 0) -> bytes:
    """A number of one record of the directory changed."""
    at = -1
    for _ in range(which + 1):
        at = data.index(record, at + 1)
    out = bytearray(data)
    struct.pack_into(form, out, at + offset, value)
    return bytes(out)


@cache
def bomb(size: int) -> bytes:
    """A file of zeros that calls itself an image; deflate makes a thousandth of it."""
    return pack([*FILES.items(), ("a/bomb.png", b"\x89PNG\r\n\x1a\n" + bytes(size))], zipfile.ZIP_DEFLATED)


MADE: dict[str, Callable[[], bytes]] = {
    "a way up": lambda: pack([*FILES.items(), ("a/../../outside.png", FILES["a/0.png"])]),
    "a way up from Windows": lambda: pack([*FILES.items(), ("a/..\\..\\outside.png", FILES["a/0.png"])]),
    "an absolute path": lambda: pack([*FILES.items(), ("/etc/outside.png", FILES["a/0.png"])]),
    "a drive": lambda: pack([*FILES.items(), ("C:/outside.png", FILES["a/0.png"])]),
    "a link": lambda: pack([*FILES.items(), (entry("a/link.png", stat.S_IFLNK | 0o777), b"/etc/passwd")]),
    "a pipe": lambda: pack([*FILES.items(), (entry("a/pipe.png", stat.S_IFIFO | 0o644), b"")]),
    "an encrypted file": lambda: patched(GOOD, 8, "<H", 1),
    "strong encryption": lambda: patched(GOOD, 8, "<H", 65),
    "an unknown compression": lambda: patched(GOOD, 10, "<H", 99),
    "a size of 4 GB": lambda: patched(patched(GOOD, 24, "<I", 2**32 - 2), 20, "<I", 2**32 - 2),
    "a size of 0": lambda: patched(patched(GOOD, 24, "<I", 0), 20, "<I", 0),
    "zip64 promised and absent": lambda: patched(GOOD, 24, "<I", 2**32 - 1),
    "an offset past the end": lambda: patched(GOOD, 42, "<I", 2**31),
    "an offset into another file": lambda: patched(GOOD, 42, "<I", 200),
    "two entries at one offset": lambda: patched(GOOD, 42, "<I", 0, which=1),
    "a name of 60,000 bytes": lambda: patched(GOOD, 28, "<H", 60_000),
    "more entries than there are": lambda: patched(GOOD, 10, "<H", 60_000, b"PK\x05\x06"),
    "a directory of 4 GB": lambda: patched(GOOD, 12, "<I", 2**32 - 2, b"PK\x05\x06"),
    "a directory past the end": lambda: patched(GOOD, 16, "<I", 2**32 - 2, b"PK\x05\x06"),
    "another checksum": lambda: patched(GOOD, 16, "<I", 0),
    "no name": lambda: patched(patched(pack([*FILES.items(), ("x", b"")]), 28, "<H", 0, which=4), 30, "<H", 1, which=4),
    "names of strange letters": lambda: pack([*FILES.items(), ("a/\u202egnp.exe.png", FILES["a/1.png"])]),
    "a name with lines": lambda: pack([*FILES.items(), ("a/1\n\x1b[2J.png", b"no image")]),
    "a class with lines": lambda: pack([*FILES.items(), ("c\n\x1b[2J/1.png", b"no image")]),
    "names that differ in case": lambda: pack([*FILES.items(), ("A/0.PNG", FILES["a/1.png"])]),
    "a zip in a zip": lambda: pack([*FILES.items(), ("a/inside.png", GOOD)]),
    "a bomb": lambda: bomb(50 * 2**20),
    "a bomb that says it is small": lambda: patched(bomb(50 * 2**20), 24, "<I", 1000, which=4),
    "3,000 empty files": lambda: pack([*FILES.items(), *((f"a/{i:05}.png", b"") for i in range(3000))]),
    "3,000 classes": lambda: pack([(f"{i:05}/x.png", b"") for i in range(3000)]),
    "deep folders": lambda: pack([("a/" * 5000 + "x.png", b"")]),
    "a script before it": lambda: b"#!/bin/sh\n" * 100 + GOOD,
    "a comment after it": lambda: GOOD + bytes(70_000),
    "the first half": lambda: GOOD[: len(GOOD) // 2],
    "an end alone": lambda: b"PK\x05\x06" + bytes(18),
    "only folders": lambda: pack([("a/", b""), ("b/", b"")]),
}  # fmt: skip


@pytest.mark.parametrize("what", MADE)
def test_made(tmp_path, what):
    assert strangers(tmp_path / "x.zip", MADE[what]()) == []


def test_a_name_twice_is_one_file_or_refused(tmp_path):
    """Readers differ in which of the two they take: it is said, or it is refused."""
    with pytest.warns(UserWarning):
        data = pack([*FILES.items(), ("a/0.png", FILES["b/1.png"])])
    (tmp_path / "x.zip").write_bytes(data)
    found = look(tmp_path / "x.zip")
    assert isinstance(found, UserError) or sorted(found[0]) == NAMES


@pytest.mark.parametrize("what", MADE)
def test_made_for_other_readers(tmp_path, what):
    """Labels and texts are read from zips by code of their own."""
    path = tmp_path / "x.zip"
    path.write_bytes(MADE[what]())
    attempt(lambda: open_pixels(path, None, ("x", "y")))
    attempt(lambda: open_pairs(path))
    (tmp_path / "c.json").write_text(
        '{"images": [{"id": 1, "file_name": "a/0.png", "width": 20, "height": 16}], "annotations": [], '
        '"categories": [{"id": 1, "name": "x"}]}'
    )
    found = attempt(lambda: read_coco(tmp_path / "c.json", path))
    if not isinstance(found, UserError):
        assert len(found.images) == 1
        attempt(lambda: found.images.read(0), megabytes=700)
