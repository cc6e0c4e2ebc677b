"""Damaged images: each decodes to upright RGB within the limits, or is refused by its name."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from attack import attempt, damaged, outcomes
from data_helpers import encode, picture
from saccade.data import ImageError
from saccade.data.decode import FORMATS, decode

LIMIT = 4_000_000


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def samples() -> Iterator[tuple[str, bytes]]:
    """Every format that is read, in the ways it is often stored."""
    image = picture(61, 47)
    grey, palette = image.convert("L"), image.convert("P", palette=Image.Palette.ADAPTIVE)
    yield "jpeg", encode(image, "JPEG", quality=85, exif=exif(6))
    yield "jpeg-progressive", encode(image, "JPEG", progressive=True)
    yield "jpeg-cmyk", encode(image.convert("CMYK"), "JPEG")
    yield "png", encode(image, "PNG")
    yield "png-palette", encode(palette, "PNG", transparency=0)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    yield "png-16", encode(deep, "PNG")
    yield "webp", encode(image, "WEBP", exif=exif(3))
    yield "webp-lossless", encode(image.convert("RGBA"), "WEBP", lossless=True)
    yield "gif", encode(palette, "GIF", save_all=True, append_images=[palette] * 3)
    yield "bmp", encode(image, "BMP")
    yield "bmp-palette", encode(palette, "BMP")
    yield "tiff", encode(image, "TIFF")
    yield "tiff-lzw", encode(image, "TIFF", compression="tiff_lzw")
    yield "tiff-jpeg", encode(image, "TIFF", compression="jpeg")
    yield (
        "tiff-deflate-16",
        encode(deep, "TIFF", compression="tiff_deflate"),
    )
    yield "ppm", encode(image, "PPM")
    yield "pgm-text", b"P2\n3 2\n255\n0 10 20 30 40 255\n"
    yield "pbm", encode(image.convert("1"), "PPM")


SAMPLES = dict(samples())


def check(data: bytes, name: str) -> bool:
    """Whether it was decoded; all else that may happen is a refusal that names it."""
    found = attempt(lambda: decode(data, name, max_pixels=LIMIT))
    if isinstance(found, Image.Image):
        assert found.mode == "RGB" and 0 < found.width * found.height <= LIMIT
        assert np.asarray(found).shape == (found.height, found.width, 3)
        return True
    assert isinstance(found, ImageError) and found.name == name and found.reason
    return False


def attack(kind: str, seed: int, count: int) -> list[bool]:
    """Of so many damaged copies, which were decoded."""
    cases = ((f"{kind}, seed {seed}, {name}", data) for name, data in damaged(SAMPLES[kind], seed, count))
    return outcomes(cases, lambda data: check(data, kind))


def test_all_formats_are_attacked():
    assert {Image.open(io.BytesIO(data)).format for data in SAMPLES.values()} >= set(FORMATS)
    assert all(check(data, name) for name, data in SAMPLES.items())


@pytest.mark.parametrize("kind", SAMPLES)
def test_damaged(kind):
    found = attack(kind, 0, 500)
    assert len(found) == 500 and not all(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLES)
def test_damaged_at_length(kind):
    found = attack(kind, 1, 5000)
    assert len(found) == 5000 and not all(found)


def test_one_format_under_the_name_of_another():
    """What a file is called says nothing: its first bytes do."""
    pairs = [(kind, data, other) for kind, data in SAMPLES.items() for other in SAMPLES.values()]
    before = [check(other[:16] + data[16:], kind) for kind, data, other in pairs]
    assert not all(before)
    behind = [(kind, check(data + other, kind)) for kind, data, other in pairs]
    assert {kind for kind, taken in behind if not taken} <= {"pgm-text"}
