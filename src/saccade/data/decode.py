"""From the bytes of one image file to RGB pixels, or to one line that says why not."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from saccade.data.store import TooLong, read_regular
from saccade.data.work import Stream, TooMuchWork, check_work, sparing_exif
from saccade.errors import UserError, one_line

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 64_000_000
BYTES_PER_PIXEL = 8

# Pillow warns on stderr from half its own limit on, and of every odd tag of a TIFF; what matters is said here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(UserError):
    """An image that cannot be used: its ``name`` and a one-line ``reason``."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return one_line(f"{self.name}: {self.reason}")


def pixel_limit() -> int:
    """Most pixels in one image: ``SACCADE_MAX_PIXELS``, else 64 million. Raises UserError if that is no count."""
    value = os.environ.get("SACCADE_MAX_PIXELS", str(MAX_PIXELS))
    if not value.isdecimal() or int(value) == 0:
        raise UserError(
            f"SACCADE_MAX_PIXELS={value!r} is not a number of pixels: give a whole number such as {MAX_PIXELS}"
        )
    return int(value)


def byte_limit() -> int:
    """Most bytes of one image file."""
    return BYTES_PER_PIXEL * pixel_limit()


def check_pixels(name: str, what: str, width: int, height: int, limit: int) -> None:
    """Raises ImageError if ``width`` × ``height`` pixels are over ``limit``; ``what`` names them in the message."""
    if width * height > limit:
        size = f"{width}×{height} = {width * height:,} pixels"
        raise ImageError(name, f"{what} {size}, limit {limit:,} (SACCADE_MAX_PIXELS raises it)")


def decode(data: bytes | Path, name: str, *, max_pixels: int | None = None) -> Image.Image:
    """The first frame of an image file as an upright 8-bit RGB image.

    The size in the header is held against ``max_pixels`` (default: ``pixel_limit()``) before any pixel is decoded;
    above it Pillow's own limit of 179 megapixels stays in force. Alpha and palette transparency are dropped, not
    composited, because that is what timm's and torchvision's readers do and published accuracies rest on it. Unlike
    theirs, EXIF orientation is applied, and 16-bit grey is scaled to 8 bits where they clip it to white.

    Raises ImageError for a file that is truncated, corrupt, too large or of another format.
    """
    limit = pixel_limit() if max_pixels is None else max_pixels
    image = open_image(data if isinstance(data, bytes) else _read(data, name), name, FORMATS, limit)
    return upright(image, name)


def upright(image: Image.Image, name: str) -> Image.Image:
    """An opened image, which is changed, as ``decode`` gives it. Raises ImageError."""
    try:
        image.load()
        with contextlib.suppress(Exception):  # broken EXIF leaves the pixels good and the orientation unknown
            if sparing_exif(image):
                ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except Exception as error:
        raise ImageError(name, _reason(error)) from error


def open_image(data: bytes, name: str, formats: tuple[str, ...], limit: int) -> Image.Image:
    """An image file of one of Pillow's ``formats``, of which the header is read and no pixel yet.

    Raises ImageError for a file that is broken, has more pixels than ``limit``, or would be too much work to decode.
    """
    # Pillow's plugins answer broken bytes with nearly every exception there is.
    try:
        if not data:
            raise ValueError("empty file")
        image = Image.open(Stream(data), formats=formats)
    except Exception as error:
        raise ImageError(name, _reason(error, formats)) from error
    check_pixels(name, "is", *image.size, limit)
    try:
        check_work(image, data, limit)
    except TooMuchWork as error:
        raise ImageError(name, _reason(error)) from error
    return image


def _read(path: Path, name: str) -> bytes:
    try:
        return read_regular(path, byte_limit())
    except (OSError, ValueError, TooLong) as error:
        raise ImageError(name, unreadable(error)) from error


def unreadable(error: Exception) -> str:
    """Why a file cannot be read, in one line."""
    if isinstance(error, TooLong):
        size = "unknown size" if error.size is None else f"{error.size:,} bytes"
        return f"file of {size}, limit {byte_limit():,} (SACCADE_MAX_PIXELS raises it)"
    said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return f"cannot be read ({said})"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit integer pixels outside 0..65535; save it with 8 or 16 bits")
        # Pillow takes the high byte of 16-bit colour too.
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    # Pillow warns when a palette's transparency is lost, which is what is wanted here.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _reason(error: Exception, formats: tuple[str, ...] = FORMATS) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not a readable image (formats: {', '.join(formats)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"over {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, the most Pillow opens: scale it down first"
    return " ".join(str(error).split()) or type(error).__name__
