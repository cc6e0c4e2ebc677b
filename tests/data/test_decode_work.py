"""Small files that ask a decoder for minutes or gigabytes are refused; honest ones are not."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from data_helpers import encode, picture
from saccade.data import ImageError, decode
from saccade.data.work import MOST_READS
from saccade.tasks.segmentation.segmentation_data import decode_ids

PNG, JPEG, GIF = (encode(picture(), kind) for kind in ("PNG", "JPEG", "GIF"))


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def progressive(width: int, height: int, scans: int) -> bytes:
    """A grey JPEG of that many refinements in which nothing changes: a few bytes each, and a walk over all blocks."""
    blocks = width * height // 64
    made = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64)
    made += segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0")
    made += segment(0xC4, b"\x00" + bytes([1] + [0] * 15) + b"\x00")
    made += segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")
    made += segment(0xDA, b"\1\1\0\0\0\0") + bytes(blocks // 8)
    bits = ("0" + "1" * 14) * (blocks // 2**15 + 1)
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return made + (segment(0xDA, b"\1\1\0\1\x3f\0") + scan) * scans + b"\xff\xd9"


def refusal(data: bytes, **options: int) -> str:
    with pytest.raises(ImageError) as error:
        decode(data, "x", **options)
    assert "\n" not in str(error.value)
    return error.value.reason


def exif_block(tags: int, size: int) -> bytes:
    """Tags that all point to the same bytes."""
    rows = b"".join(struct.pack("<HHII", 1000 + i, 7, size, 8) for i in range(tags))
    return b"II*\0" + struct.pack("<I", 8 + size) + bytes(size) + struct.pack("<H", tags) + rows + bytes(4)


def test_scans_over_all_pixels_are_bounded() -> None:
    assert decode(progressive(512, 512, 100), "x").size == (512, 512)
    assert decode(progressive(800, 800, 20), "x", max_pixels=640_000).size == (800, 800)
    said = refusal(progressive(800, 800, 40), max_pixels=640_000)
    assert said == "JPEG of 41 scans of 640,000 pixels, limit 20,480,000 in all: save it anew"
    assert "scans" in refusal(progressive(8000, 8000, 60))


def test_what_encoders_write_is_within_bounds() -> None:
    image = picture(300, 200)
    for options in ({"progressive": True}, {"progressive": True, "quality": 100}, {"optimize": True}):
        data = encode(image, "JPEG", **options)
        assert decode(data, "x", max_pixels=300 * 200).size == (300, 200)
    several = encode(image, "MPO", save_all=True, append_images=[image] * 3)
    assert decode(several, "x", max_pixels=300 * 200).size == (300, 200)
    for kind in ("PNG", "TIFF", "BMP", "PPM", "GIF", "WEBP"):
        assert decode(encode(image, kind), "x", max_pixels=300 * 200).size == (300, 200)
    strips = encode(image, "TIFF", tiffinfo={278: 1})
    assert np.array_equal(decode(strips, "x", max_pixels=300 * 200), image)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encode(image, "JPEG", exif=exif), "x").size == (200, 300)


@pytest.mark.parametrize("made", ["segments", "fill", "chunks", "runs"])
def test_parts_of_a_file_are_bounded(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 3_000
    monkeypatch.setattr("saccade.data.work.MOST_READS", count)
    width = count
    header = struct.pack("<IiiHHIIiiII", 40, width, 1, 1, 8, 1, 2 * width + 4, 0, 0, 256, 0)
    start = 14 + len(header) + 1024
    data = {
        "segments": JPEG[:2] + segment(0xFE, b"") * count + JPEG[2:],
        "fill": JPEG[:2] + b"\xff" * count + JPEG[2:],
        "chunks": PNG[:33] + chunk(b"abCd", b"") * count + PNG[33:],
        "runs": b"BM" + struct.pack("<IHHI", 0, 0, 0, start) + header + bytes(1024) + b"\1\5" * width + b"\0\0\0\1",
    }[made]
    assert refusal(data) == "made of too many parts: save it anew in an image editor"
    for honest in (PNG, JPEG, GIF):
        assert decode(honest, "x").size == (40, 30)
    assert 100 * count < MOST_READS


def test_animations_cost_their_first_frame() -> None:
    frames = [picture(64, 64, seed=i) for i in range(40)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode(data, "x", max_pixels=64 * 64).size == (64, 64)


def test_tags_that_point_to_the_same_bytes_stay_small() -> None:
    turned = exif_block(3000, 100_000)
    data = PNG[:33] + chunk(b"eXIf", turned) + PNG[33:]
    tracemalloc.start()
    try:
        assert decode(data, "x").size == (40, 30)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_compressed_texts_are_bounded() -> None:
    text = zlib.compress(bytes(1_000_000))
    data = PNG[:33] + b"".join(chunk(b"zTXt", b"%d\0\0" % i + text) for i in range(100)) + PNG[33:]
    assert len(data) < 200_000
    assert "text" in refusal(data)


def test_pixels_written_out_in_digits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = b"P3\n20 20\n255\n" + b"7 " * 1200
    assert decode(plain, "x").getpixel((3, 3)) == (7, 7, 7)
    monkeypatch.setattr("saccade.data.work.PLAIN", 1000)
    assert "plain PPM of 2,413 bytes, limit 1,000" in refusal(plain)


def test_labels_are_decoded_within_the_same_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = encode(picture().convert("L"))
    assert decode_ids(grey, "x").shape == (30, 40)
    monkeypatch.setattr("saccade.data.work.MOST_READS", 500)
    with pytest.raises(ImageError, match="too many parts"):
        decode_ids(grey[:33] + chunk(b"abCd", b"") * 500 + grey[33:], "x")


def test_odd_tags_are_not_told_on_standard_error(capfd: pytest.CaptureFixture) -> None:
    stream = io.BytesIO(exif_block(50, 10))
    with pytest.raises(ImageError):
        decode(stream.getvalue(), "x")
    assert capfd.readouterr().err == ""
