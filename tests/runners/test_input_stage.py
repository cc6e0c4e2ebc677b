"""The input stage of a graph gives what the Python preprocessing gives, within one step of a byte."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from saccade.data import Preprocess
from saccade.errors import UserError
from saccade.runners.input_stage import FILTERS, MODES, InputStage

PILLOW = int(PIL.__version__.split(".")[0])
STD = (0.229, 0.224, 0.225)
PHOTOS = ((363, 270), (270, 363), (64, 64), (63, 211), (500, 71), (40, 52))


def prepare(size=(64, 64), interpolation="bicubic", crop_pct=0.9, crop_mode="center") -> Preprocess:
    return Preprocess(size, interpolation, crop_pct, crop_mode, (0.485, 0.456, 0.406), STD)


def photo(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("size", "crop"), [((64, 64), 0.9), ((48, 64), 0.9), ((64, 64), 1.0)])
def test_it_is_the_python_preprocessing(size, crop, interpolation, mode):
    python = prepare(size, interpolation, crop, mode)
    stage = InputStage(python.to_dict())
    for width, height in PHOTOS:
        image = photo(width, height)
        found = stage(torch.from_numpy(np.asarray(image).copy()).unsqueeze(0))[0]
        steps = ((found - python(image)) * torch.tensor(STD)[:, None, None] * 255).abs()
        assert found.shape == (3, *size)
        if mode == "center" or PILLOW >= 13:
            assert steps.max() <= 1 + 1e-3 and steps.mean() < 0.02  # hardly ever one


def test_what_filters_do_not_do_is_refused():
    with pytest.raises(UserError, match="interpolation 'nearest' is not done in a graph, only bilinear"):
        InputStage(prepare(interpolation="nearest").to_dict())
    with pytest.raises(UserError, match="crop_mode 'border' is not done in a graph"):
        InputStage(prepare(crop_mode="border").to_dict())
