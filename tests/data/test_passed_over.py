"""What a verb passes over in a folder of images is counted and said once, whichever verb it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_helpers import encode, picture, write_folder
from oracles import make_vit
from saccade.cli import main
from saccade.model import AdaptiveViT
from saccade.tasks.segmentation.segmentation_data import open_pixels
from saccade.tasks.segmentation.segmentation_task import Segment
from saccade.training.config import read_config

ODD = {"a/x.heic": b"odd", "a/y.heic": b"odd", "b/z.txt": b"text"}
SAID = "passed over 2 .heic, 1 .txt"


@pytest.fixture
def model(tmp_path) -> Path:
    AdaptiveViT(make_vit(depth=1, embed_dim=16, num_heads=2, num_classes=2)).save(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("verb", ["predict", "view", "stem", "eval"])
def test_a_verb_says_it_once(verb, model, tmp_path, capsys):
    images = write_folder(
        tmp_path / "in", {f"{c}/{i}.png": encode(picture(seed=i)) for c in "ab" for i in range(3)} | ODD
    )
    out = {"predict": "out", "view": "out.png", "stem": "out", "eval": "out"}[verb]
    with pytest.raises(SystemExit) as ended:
        main([verb, str(model), str(images), "--out", str(tmp_path / out)])
    assert ended.value.code == 0
    assert capsys.readouterr().err.count(SAID) == 1


def test_pairs_of_images_and_labels_do_so_too(tmp_path):
    pairs = {f"{kind}/{i}.png": encode(picture(seed=i).convert("L")) for kind in ("images", "labels") for i in range(9)}
    folder = write_folder(tmp_path / "in", {**pairs, "images/x.heic": b"odd", "labels/z.txt": b"text"})
    (note,) = open_pixels(folder, None, ["sky", "road"]).images.notes
    assert note == f"{folder}: passed over 1 .heic, 1 .txt"
    config = read_config("segment", [f"data.path={folder}", "segment.classes=['sky','road']", "data.holdout=0.3"])
    assert Segment(config).notes == [note]
