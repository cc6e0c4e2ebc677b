"""Label files of segmentation and detection, tables of pairs, mosaics: refused by name, or within their classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attack import attempt, damaged, listening, outcomes, reached, refusals, twisted
from data_helpers import encode, picture, write_folder
from saccade.errors import UserError
from saccade.tasks.detection.detection_data import read_coco
from saccade.tasks.image_text.image_text_data import open_pairs
from saccade.tasks.image_text.text_tower import read_table, save_table
from saccade.tasks.segmentation.coco_panoptic import open_panoptic
from saccade.tasks.segmentation.segmentation_data import VOID, decode_ids, open_pixels
from saccade.tokenizers.mosaic.geometry import Geometry, Mosaic
from saccade.tokenizers.mosaic.mosaic_files import load_mosaic, save_mosaic

MAP = np.array([[0, 1, 2, 255], [1, 1, 0, 0], [2, 2, 1, 1]], dtype=np.uint8).repeat(4, 0).repeat(4, 1)
CLASSES = ("road", "car", "sky")
PHOTO = encode(picture(16, 12))
MAPS = {
    "grey": encode(Image.fromarray(MAP)),
    "palette": encode(Image.fromarray(MAP).convert("P")),
    "16 bits": encode(Image.fromarray(MAP.astype(np.uint16))),
    "tiff": encode(Image.fromarray(MAP), "TIFF"),
    "bmp": encode(Image.fromarray(MAP), "BMP"),
    "ppm": encode(Image.fromarray(MAP), "PPM"),
}


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MAPS)
def test_maps(tmp_path, kind, count):
    """Classes and void come out, and nothing else, in the size of the photo."""
    write_folder(tmp_path, {"images/a.png": PHOTO, "labels/a.png": MAPS[kind]})
    pixels = open_pixels(tmp_path, None, CLASSES)
    for name, data in damaged(MAPS[kind], 0, count):
        (tmp_path / "labels/a.png").write_bytes(data)
        found = attempt(lambda: pixels.read(0))
        if not isinstance(found, UserError):
            image, values = found
            assert values.shape == (image.height, image.width) == (12, 16), name
            assert set(np.unique(values).tolist()) <= {0, 1, 2, VOID}, name


@pytest.mark.parametrize(
    "values",
    [
        np.full((12, 16), 3, np.uint8),
        np.full((12, 16), 65_535, np.uint16),
        np.full((12, 16), -1, np.int32),
        np.full((12, 16), 2**31 - 1, np.int32),
        np.full((12, 16), 2**16, np.int32),
        np.zeros((12, 15), np.uint8),
        np.zeros((16, 12), np.uint8),
        np.zeros((12, 16, 3), np.uint8),
        np.zeros((12, 16), np.float32),
    ],
    ids=str,
)
def test_maps_of_other_values(tmp_path, values):
    """Values beyond the classes are no class: none wraps around to one."""
    write_folder(tmp_path, {"images/a.png": PHOTO, "labels/a.tiff": encode(Image.fromarray(values), "TIFF")})
    pixels = open_pixels(tmp_path, None, CLASSES)
    assert isinstance(attempt(lambda: pixels.read(0)), UserError)


def test_decode_ids_takes_numbers_only():
    for data in (b"", b"P2\n1 1\n300\n299\n", b"P5 #c\n1 1\n15\n\x07", b"not an image", PHOTO):
        assert isinstance(attempt(lambda data=data: decode_ids(data, "x")), UserError), data
    for most in (255, 65535):  # other ranges would be stretched, and 299 of 300 be 65317
        assert decode_ids(f"P2\n#c\n1 1\n{most}\n200\n".encode(), "x").tolist() == [[200]]


COCO: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.png", "width": 16, "height": 12}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 5, 6], "iscrowd": 0, "area": 30},
        {"id": 2, "image_id": 1, "category_id": 9, "bbox": [0, 0, 16, 12], "iscrowd": 1},
    ],
    "categories": [{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}],
}


def boxes(folder: Path, value: Any) -> object:
    """What is read of a file of boxes, or the refusal."""
    file = folder / "boxes.json"
    file.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode("utf-8", "surrogatepass"))
    with listening() as heard:
        found = attempt(lambda: read_coco(file))
    assert not reached(heard, folder)
    if isinstance(found, UserError):
        return found
    assert len(found.objects) == len(found) and len(set(found.classes)) == len(found.classes)
    for objects in found.objects:
        assert torch.isfinite(objects.boxes).all() and ((objects.boxes >= 0) & (objects.boxes <= 1)).all()
        assert (objects.boxes[:, 2:] > objects.boxes[:, :2]).all()
        assert ((objects.labels >= 0) & (objects.labels < len(found.classes))).all()
    attempt(lambda: found.images.read(0))
    return found


@pytest.mark.parametrize("count", [300, pytest.param(None, marks=pytest.mark.slow)])
def test_coco(tmp_path, count):
    write_folder(tmp_path, {"a.png": PHOTO})
    cases = [*twisted(COCO, 0, count), *damaged(json.dumps(COCO).encode(), 1, count or 5000, header=10**6)]
    found = outcomes(cases, lambda value: boxes(tmp_path, value))
    assert 0 < refusals(found) < len(found)


PANOPTIC: dict[str, Any] = {
    "annotations": [
        {
            "file_name": "a.png",
            "segments_info": [{"id": 1, "category_id": 7}, {"id": 2, "category_id": 9, "iscrowd": 1}],
        }
    ],
    "categories": [{"id": 7, "name": "car"}, {"id": 9, "name": "road"}],
}


@pytest.mark.parametrize("count", [250, pytest.param(None, marks=pytest.mark.slow)])
def test_panoptic(tmp_path, count):
    ids = np.stack([MAP.clip(0, 2), 0 * MAP, 0 * MAP], axis=-1)
    write_folder(tmp_path, {"images/a.png": PHOTO, "panoptic/a.png": encode(Image.fromarray(ids))})
    for name, value in twisted(PANOPTIC, 0, count):
        (tmp_path / "panoptic.json").write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
        try:
            found = attempt(lambda: open_panoptic(tmp_path, None, CLASSES, VOID).read(0))
        except Exception as error:
            raise AssertionError(name) from error
        if not isinstance(found, UserError):
            assert set(np.unique(found[1][..., 0]).tolist()) <= {0, 1, 2, VOID}, name


TABLES = {
    "csv": b"image,text\na.png,a cat\n",
    "tsv": b"file\tcaption\na.png\ta cat\n",
    "jsonl": b'{"image": "a.png", "text": ["a cat", "one cat"]}\n{"image": "a.png", "text": "it"}\n',
}


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_pairs(tmp_path, kind, count):
    write_folder(tmp_path, {"a.png": PHOTO})
    file = tmp_path / f"x.{kind}"
    cases = [*damaged(TABLES[kind], 0, count), *damaged(TABLES[kind] * 20, 1, count, header=10**6)]
    cases += [("a field of 1 MB", TABLES[kind][:-2] + b"x" * 2**20), ("zero bytes", b"\0" * 99)]
    found = outcomes(cases, lambda data: pairs(file, data))
    assert 0 < refusals(found) < len(found)


def pairs(file: Path, data: bytes) -> object:
    """What is read of a table of images and texts, or the refusal."""
    file.write_bytes(data)
    with listening() as heard:
        found = attempt(lambda: open_pairs(file))
        if not isinstance(found, UserError):
            assert all(texts and all(t.strip() for t in texts) for texts in found.texts)
            attempt(lambda: found.images.read(0))
    assert not reached(heard, file.parent)
    return found


@pytest.mark.parametrize("count", [120, pytest.param(5000, marks=pytest.mark.slow)])
def test_tables_of_embeddings(tmp_path, count):
    save_table(tmp_path / "good", ["a cat", "a dog"], torch.randn(2, 4))
    good = (tmp_path / "good").read_bytes()
    for name, data in damaged(good, 0, count, header=len(good)):
        (tmp_path / "bad").write_bytes(data)
        found = attempt(lambda: read_table(tmp_path / "bad"))
        if not isinstance(found, UserError):
            assert len(found[0]) == len(found[1]) and torch.isfinite(found[1]).all(), name


@pytest.mark.parametrize("count", [120, pytest.param(5000, marks=pytest.mark.slow)])
def test_mosaics(tmp_path, count):
    geometry = Geometry((4, 4), 8, 2)
    level = torch.zeros(1, 16, dtype=torch.int64)
    save_mosaic(tmp_path / "good", Mosaic.of_levels(geometry, level), ["a"])
    good = (tmp_path / "good").read_bytes()
    for name, data in damaged(good, 0, count, header=len(good)):
        (tmp_path / "bad").write_bytes(data)
        found = attempt(lambda: load_mosaic(tmp_path / "bad"))
        if not isinstance(found, UserError):
            assert (found[0].level < found[0].geometry.levels).all(), name
