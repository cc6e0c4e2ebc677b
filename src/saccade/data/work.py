"""How much work a file may make a decoder do: files of a few kilobytes can ask for minutes, or for gigabytes."""

from __future__ import annotations

import io
import struct

from PIL import Image

MOST_READS = 1_000_000  # parts of a file, each a step of Pillow's parsers: about a second
ROUNDS = 8  # times that a file is read on the whole
SCANS = 32  # of a progressive JPEG of the most pixels; encoders write about ten
LAYERS = 8  # times that all pixels are decoded: planes of a TIFF are up to four
PLAIN = 16 * 2**20  # bytes of a PPM in decimal digits, which are read by Python
MOST_EXIF = 64 * 2**20  # bytes that all tags of an EXIF block could point to


class TooMuchWork(Exception):
    """A file that would take longer to decode than any honest one."""


class Stream(io.BytesIO):
    """The bytes of a file, which can only be read so often. Raises TooMuchWork."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads, self._bytes = MOST_READS, ROUNDS * len(data) + 2**20

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self._reads -= 1
        self._bytes -= len(found)
        if self._reads < 0 or self._bytes < 0:
            raise TooMuchWork("made of too many parts: save it anew in an image editor")
        return found


def check_work(image: Image.Image, data: bytes, limit: int) -> None:
    """Raises TooMuchWork where decoding an opened image would cost out of proportion to ``limit`` pixels."""
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        scans = data.count(b"\xff\xda")  # the marker of a scan; encoded pixels cannot hold it
        if scans * max(pixels, 2**12) > SCANS * max(limit, 2**12):
            raise TooMuchWork(
                f"JPEG of {scans} scans of {pixels:,} pixels, limit {SCANS * limit:,} in all: save it anew"
            )
    if image.format == "PPM" and data[:2] in (b"P1", b"P2", b"P3") and len(data) > PLAIN:
        raise TooMuchWork(f"plain PPM of {len(data):,} bytes, limit {PLAIN:,}: save it as binary, or as PNG")
    area = sum((right - left) * (low - top) for _, (left, top, right, low), *_ in getattr(image, "tile", None) or ())
    if area > LAYERS * pixels:
        raise TooMuchWork(f"its parts hold {area:,} pixels, of which it shows {pixels:,}: save it anew")


def sparing_exif(image: Image.Image) -> bool:
    """Whether reading all tags of an image's EXIF block stays small: each may point to the whole of it."""
    exif = image.info.get("exif")
    if not isinstance(exif, bytes):
        return True
    exif = exif.removeprefix(b"Exif\0\0")
    order = "<" if exif[:2] == b"II" else ">"
    try:
        (first,) = struct.unpack_from(f"{order}I", exif, 4)
        (tags,) = struct.unpack_from(f"{order}H", exif, first)
    except struct.error:
        return True  # nothing that could be read
    return tags * len(exif) <= MOST_EXIF
