"""Counts that are learned for a budget from a folder of photos: within it, repeatable, taken up where it stopped."""

from __future__ import annotations

import pytest

from data_helpers import encode, picture, write_folder
from oracles import make_images, make_vit
from saccade.errors import UserError
from saccade.evaluation.calibrate import calibrate
from saccade.evaluation.knob_search import KnobSearch, learnable
from saccade.model import AdaptiveViT


@pytest.fixture
def photos(tmp_path):
    return str(write_folder(tmp_path / "photos", {f"{i}.png": encode(picture(seed=i)) for i in range(6)}))


def test_counts_are_learned_from_photos_without_labels(photos, tmp_path):
    vit = make_vit("vit", depth=4)
    model = AdaptiveViT(vit)
    weights = {name: value.clone() for name, value in vit.state_dict().items()}
    budget = 0.8 * float(model(make_images(vit, 1)).trace.macs()) / 1e9
    ask = {"setting": "diffrate(score='received')", "gmacs": budget}
    found = calibrate(model, photos, **ask, search=KnobSearch(6, 4))
    assert 0.9 * budget <= found.gmacs <= budget and found.images == 6 and found.threshold is None
    assert (
        found.setting.startswith("diffrate(") and "score='received'" in found.setting and "gmacs" not in found.setting
    )
    assert not vit.training and all((weights[name] == value).all() for name, value in vit.state_dict().items())
    assert calibrate(model, photos, **ask, search=KnobSearch(6, 4)) == found, "a function of the seed"
    calibrate(model, photos, **ask, search=KnobSearch(3, 4), cache=tmp_path / "cache")
    assert calibrate(model, photos, **ask, search=KnobSearch(6, 4), cache=tmp_path / "cache") == found, "went on"


def test_only_a_method_alone_is_learned():
    assert learnable("diffrate()") and learnable("diffrate((1, 2), 3, metric='key')")
    assert not any(map(learnable, ("dense", "evit(0.5)", "grid(32) | diffrate()", "diffrate() | tome(r=2)")))


@pytest.mark.parametrize("given", [{"steps": -1}, {"batch": 0}, {"seed": True}, {"steps": 2.5}])
def test_numbers_out_of_range_are_named(given):
    with pytest.raises(UserError, match=f"{next(iter(given))}={next(iter(given.values()))}"):
        KnobSearch(**given)
