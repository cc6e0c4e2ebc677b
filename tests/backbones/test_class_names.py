"""What the classes are called, and how images are prepared, stay with the weights wherever they go."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from timm.data import ImageNetInfo

import saccade
from oracles import make_vit
from saccade.backbones.saving import save
from saccade.backbones.vit import set_class_names
from saccade.checkpoint import load
from saccade.data import Preprocess
from saccade.errors import UserError
from saccade.model import AdaptiveViT

NAMES = [f"class {i}" for i in range(10)]
WORDS = {"class 3": "a third thing"}
SEEN = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.75, "crop_mode": "squash"}


@pytest.fixture
def model() -> AdaptiveViT:
    vit = make_vit()
    vit.pretrained_cfg = {**vit.pretrained_cfg, **SEEN, "interpolation": "bilinear"}
    set_class_names(vit, NAMES, WORDS)
    return AdaptiveViT(vit, "tome(r=2)")


def again(model: AdaptiveViT, folder: Path) -> AdaptiveViT:
    save(model, folder)
    return load(folder)


WAYS = {
    "view": lambda model, folder: model.at("evit(0.5)"),
    "copy": lambda model, folder: copy.deepcopy(model),
    "folder": again,
    "two folders": lambda model, folder: again(again(model, folder / "a"), folder / "b"),
    "convert": lambda model, folder: saccade.convert(model, 8, folder) and load(folder),
    "convert a folder": lambda model, folder: saccade.convert(again(model, folder / "a"), 8, folder / "b"),
    "freeze": lambda model, folder: AdaptiveViT(model.freeze("grid(8)")),
    "flexify": lambda model, folder: again(saccade.flexify(model, 8, 4), folder),
}


@pytest.mark.parametrize("way", WAYS)
def test_names_and_preprocessing_go_where_the_weights_go(way, model, tmp_path):
    found = WAYS[way](model, tmp_path / "m")
    assert found.class_names == tuple(NAMES)
    assert found.vit.pretrained_cfg["label_descriptions"] == WORDS
    was, now = Preprocess.of(model.vit, 64), Preprocess.of(found.vit, 64)
    assert now == was and now.mean == tuple(SEEN["mean"]) and now.interpolation == "bilinear"


def test_they_are_written_where_timm_writes_them(model, tmp_path):
    save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["label_names"], config["label_descriptions"]) == (NAMES, WORDS)
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64], "as built, not as the name's own weights"


def test_imagenets_names_are_known(tmp_path):
    vit = make_vit(num_classes=1000)
    synsets = tuple(ImageNetInfo("imagenet-1k").label_names())
    assert AdaptiveViT(vit).class_names == synsets
    assert again(AdaptiveViT(vit), tmp_path / "m").class_names == synsets


def test_a_head_of_other_classes_has_none(tmp_path, model):
    assert AdaptiveViT(make_vit()).class_names is None, "ten classes of who knows what"
    model.vit.reset_classifier(7)
    assert model.class_names is None and again(model, tmp_path / "m").class_names is None
    wide = make_vit(num_classes=1000)
    wide.pretrained_cfg = {**wide.pretrained_cfg, "num_classes": 21843}  # weights whose thousand is not ImageNet's
    assert AdaptiveViT(wide).class_names is None and again(AdaptiveViT(wide), tmp_path / "w").class_names is None


def rewrite(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_folders_of_before_are_read(tmp_path):
    plain = AdaptiveViT(make_vit())
    save(plain, tmp_path / "m", classes=NAMES)
    assert load(tmp_path / "m").class_names == tuple(NAMES)
    save(plain, tmp_path / "few", classes=NAMES[:3])  # some of ImageNet's classes were trained on
    assert load(tmp_path / "few").class_names is None


BAD = {
    "too few": {"label_names": NAMES[:9]},
    "too many": {"label_names": [*NAMES, "x"]},
    "twice": {"label_names": [*NAMES[:9], NAMES[0]]},
    "numbers": {"label_names": list(range(10))},
    "text": {"label_names": "abcdefghij"},
    "words are numbers": {"label_names": NAMES, "label_descriptions": {"class 1": 5}},
    "words are a list": {"label_names": NAMES, "label_descriptions": NAMES},
}


@pytest.mark.parametrize("kind", BAD)
def test_names_that_do_not_fit_are_refused(kind, tmp_path, model):
    save(model, tmp_path / "m")
    rewrite(tmp_path / "m", **BAD[kind])
    with pytest.raises(UserError):
        load(tmp_path / "m")


def test_names_are_one_for_each_class(model):
    with pytest.raises(UserError, match="9 different class names for a head of 10"):
        set_class_names(model.vit, [*NAMES[:9], NAMES[0]])
    set_class_names(model.vit, None)
    assert model.class_names is None
