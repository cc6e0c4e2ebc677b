"""The picture of where an answer comes from: the relevance of the analysis, for one photo."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import saccade
from data_helpers import picture
from saccade.analysis.relevance import over_cells, rollout
from saccade.data import Preprocess
from saccade.errors import UserError
from small_runs import tiny


@pytest.fixture(scope="module")
def model() -> saccade.AdaptiveViT:
    return tiny().eval()


@pytest.mark.parametrize("setting", [None, "tome(r=2)", "evit(0.5)", "grid(8)"])
def test_it_is_the_analysis_relevance_of_the_answered_class(model, setting):
    photo = picture(80, 64, seed=3)
    found = saccade.relevance_map(model, photo, setting)
    view = model.at(setting or "dense").eval()
    prepare = Preprocess.of(view.vit, view.input_size())
    images = prepare.normalise(prepare.crop(photo, "photo")).unsqueeze(0)
    target = int(view(images).logits[0].argmax())
    expected = over_cells(*rollout(view, images, target))
    assert found.target == target
    assert np.allclose(found.cells.ravel(), expected.numpy())
    assert found.rows[0]["share"] == found.cells.max() and len(found.to_dicts()) == found.cells.size
    assert found._repr_html_().startswith("<img ") and isinstance(found.picture, Image.Image)


def test_another_class_has_another_map(model):
    photo = picture(80, 64, seed=3)
    maps = [saccade.relevance_map(model, photo, target=k).cells for k in range(3)]
    assert not np.allclose(maps[0], maps[1]) or not np.allclose(maps[1], maps[2])
    assert all(m.sum() == pytest.approx(1, abs=1e-5) for m in maps)


def test_what_has_no_answer_is_refused_by_name(model):
    photo = picture(80, 64)
    for target in (3, -1, True):
        with pytest.raises(UserError, match=f"target={target} is no class of this model: give .* from 0 to 2"):
            saccade.relevance_map(model, photo, target=target)
    with pytest.raises(UserError, match="classes"):
        saccade.relevance_map(tiny(num_classes=0), photo)
    assert torch.is_grad_enabled()
