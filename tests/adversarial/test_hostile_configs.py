"""Damaged ``config.json``: a folder is refused, or opens as a model that runs; it never reaches outside itself."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import saccade
from attack import attempt, damaged, listening, outcomes, reached, refusals, twisted
from oracles import make_vit
from saccade.errors import UserError
from saccade.model import AdaptiveViT

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "num_classes": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder that says all that one can say."""
    vit = make_vit(**SMALL)
    vit.pretrained_cfg = {
        **vit.pretrained_cfg,
        "label_names": ["cat", "dog", "fox"],
        "label_descriptions": {"cat": "a cat", "fox": "a fox"},
    }
    model = AdaptiveViT(vit, "grid(16) | tome(r=1)")
    model.trained = ("tome(r=1)", "dense")
    root = tmp_path_factory.mktemp("config") / "model"
    saccade.save(model, root)
    return root


@pytest.fixture
def place(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def opens(place: Path, config: str | bytes) -> AdaptiveViT | UserError:
    """Load the folder with this config and run what it gives; nothing outside of it is opened meanwhile."""
    data = config if isinstance(config, bytes) else config.encode("utf-8", "surrogatepass")
    (place / "config.json").write_bytes(data)
    with listening() as heard:
        found = attempt(lambda: saccade.load(place), seconds=10, megabytes=500)
    assert not reached(heard, place)
    if isinstance(found, AdaptiveViT):
        embed = found.vit.patch_embed
        size = [min(int(s), 64) for s in embed.img_size]
        images = torch.zeros(1, embed.proj.in_channels, *size)
        ran = attempt(lambda: found(images).logits) if size == list(embed.img_size) else None
        if isinstance(ran, torch.Tensor):
            assert torch.isfinite(ran).all()
        repr(found), str(found.setting)
    return found


def dump(value: Any) -> str:
    return json.dumps(value)


@pytest.mark.parametrize("count", [400, pytest.param(None, marks=pytest.mark.slow)])
def test_every_key_changed(folder, place, count):
    config = json.loads((folder / "config.json").read_text())
    found = outcomes(twisted(config, 0, count), lambda value: opens(place, dump(value)))
    assert 0 < refusals(found) < len(found)


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_bytes(folder, place, count):
    good = (folder / "config.json").read_bytes()
    found = outcomes(damaged(good, 0, count, header=len(good)), lambda data: opens(place, data))
    assert 0 < refusals(found) < len(found) == count


TEXTS: dict[str, str | bytes] = {
    "nothing": "",
    "null": "null",
    "a list": "[]",
    "a number": "1e999",
    "a number of 5000 digits": "9" * 5000,
    "10^5 lists": "[" * 100_000,
    "10^5 objects": '{"saccade":' * 100_000,
    "UTF-16": '{"saccade": {}}'.encode("utf-16"),
    "Latin-1": '{"saccade": "\xe9"}'.encode("latin-1"),
    "with a byte order mark": b"\xef\xbb\xbf{}",
    "zero bytes": b"\0" * 1000,
    "NaN": "NaN",
    "YAML": "saccade: {format: 1}",
}


@pytest.mark.parametrize("what", TEXTS)
def test_no_config_at_all(place, what):
    assert isinstance(opens(place, TEXTS[what]), UserError)


def changed(folder: Path, **changes: Any) -> str:
    """The config with values at ``section.key``, written with two underscores."""
    config = copy.deepcopy(json.loads((folder / "config.json").read_text()))
    for key, value in changes.items():
        *sections, last = key.split("__")
        holder = config
        for section in sections:
            holder = holder[section]
        holder[last] = value
    return dump(config)


REFUSED: dict[str, dict[str, Any]] = {
    "a million blocks": {"model_args__depth": 10**6},
    "half as many blocks": {"model_args__depth": 1},
    "width of 2^20": {"model_args__embed_dim": 2**20},
    "2^16 classes": {"model_args__num_classes": 2**16, "num_classes": 2**16},
    "input of 10^5 pixels": {"model_args__img_size": [10**5, 10**5]},
    "input of no pixels": {"model_args__img_size": [0, 0]},
    "no heads": {"model_args__num_heads": 0},
    "heads that do not divide": {"model_args__num_heads": 5},
    "a file to read": {"model_args__pretrained_cfg": {"file": "/etc/passwd"}},
    "weights from the network": {"saccade__setting": "quadtree(4, scorer=\"feature(weights='pretrained')\")"},
    "weights from elsewhere": {"saccade__setting": "quadtree(4, scorer=\"feature(weights='/etc/passwd')\")"},
    "a model of the hub": {"architecture": "hf-hub:someone/something"},
    "a model of another folder": {"architecture": "local-dir:/tmp"},
    "no ViT": {"architecture": "resnet18"},
    "an unknown method": {"saccade__setting": "telepathy(0.5)"},
    "code": {"saccade__setting": "__import__('os').system('true')"},
    "a range": {"saccade__setting": "evit(0.1..0.9..0.1)"},
    "another task": {"saccade__task": "os:system"},
    "a format of the future": {"saccade__format": 99},
    "a format as text": {"saccade__format": "1"},
    "one name too few": {"label_names": ["cat", "dog"]},
    "a name twice": {"label_names": ["cat", "cat", "fox"]},
    "names that are numbers": {"label_names": [1, 2, 3]},
    "mean of no channels": {"pretrained_cfg__mean": []},
    "standard deviation of zero": {"pretrained_cfg__std": [0.0, 0.0, 0.0]},
    "a mean that is no number": {"pretrained_cfg__mean": [float("nan")] * 3},
    "a crop of nothing": {"pretrained_cfg__crop_pct": 0},
    "a crop below nothing": {"pretrained_cfg__crop_pct": -1},
    "a crop of a million": {"pretrained_cfg__crop_pct": 1e-6},
    "an unknown interpolation": {"pretrained_cfg__interpolation": "psychic"},
    "an unknown crop": {"pretrained_cfg__crop_mode": "everything"},
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(folder, place, what):
    assert isinstance(opens(place, changed(folder, **REFUSED[what])), UserError)
