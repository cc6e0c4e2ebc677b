"""What images use of each block: shares, costs, and the pictures of both."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_helpers import encode, picture, write_folder
from oracles import make_images, make_vit
from saccade.analysis.usage import usage
from saccade.model import AdaptiveViT
from saccade.reports import view


def test_usage_is_what_the_gates_let_run(tmp_path):
    images = write_folder(tmp_path / "photos", {f"{i}.png": encode(picture(seed=i)) for i in range(5)})
    model = AdaptiveViT(make_vit("vit", depth=4))
    setting = "random_plus(0.5, at=[1, 2])"
    found = usage(model, str(images), setting, batch=2)
    assert found.share.shape == (5, 4, 6) and found.units == [
        "patches",
        "attention",
        "MLP",
        "head 0",
        "head 1",
        "head 2",
    ]
    assert (found.share[:, [0, 3]] == 1).all(), "these blocks leave nothing out"
    for shares in found.share[:, 1:3].flatten(0, 1):
        assert float(shares[0]) == 0.5 and float(shares[3:].sum()) == (2 if shares[1] else 0)
    branches = found.share[:, 1:3, 1:3].flatten(1)
    assert (branches.sum(1) == 2).all() and len(branches.unique(dim=0)) > 1, "each image has its own draw"
    setting = "random_plus(0.5, axes='patch', at=[1, 2])"
    found = usage(model, str(images), setting, out=tmp_path / "usage.png", batch=2)
    cost = float(model.at(setting)(make_images(model.vit, 1)).trace.macs()) / 1e9
    assert found.gmacs.tolist() == pytest.approx([cost] * 5) and found.correlation() == 0.0
    assert Image.open(tmp_path / "usage.png").width > 800
    dropped = usage(model, str(images), "evit(0.5, at=1)")
    assert dropped.share[:, :, 0].unique(dim=0).tolist() == [[1.0, 0.5, 0.5, 0.5]]


def test_a_view_shows_which_patches_a_block_computes():
    model = AdaptiveViT(make_vit("vit", depth=4))
    _, counts = view(model, Image.fromarray(np.zeros((64, 64, 3), np.uint8)), "topk(0.5, at=[1, 2])")
    assert counts == [16, 8, 8, 16]


def test_an_encoder_is_held_against_how_far_it_is_from_dense(tmp_path):
    images = write_folder(tmp_path / "photos", {f"a/{i}.png": encode(picture(70, 64, seed=i)) for i in range(4)})
    vit = make_vit("vit", num_classes=0)
    found = usage(AdaptiveViT(vit), str(images), "evit(0.5, at=1)", out=tmp_path / "usage.png", batch=2)
    assert "cosine" in found.against and (found.loss > 0).all()
    same = usage(AdaptiveViT(vit), str(images), "dense", batch=3)
    assert same.loss.tolist() == pytest.approx([0.0] * 4, abs=1e-6)
