"""Counts that are learned for a budget from a folder of photos: within it, repeatable, taken up where it stopped."""

from __future__ import annotations

import pytest

from data_helpers import encode, picture, write_folder
from oracles import make_images, make_vit
from saccade.data import open_images
from saccade.errors import UserError
from saccade.evaluation.calibrate import calibrate
from saccade.evaluation.evaluator import Evaluator
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
    whole, half = KnobSearch(6, 4, moves=2), KnobSearch(3, 4, moves=2)
    found = calibrate(model, photos, **ask, search=whole)
    assert 0.9 * budget <= found.gmacs <= budget and found.images == 6 and found.threshold is None
    assert (
        found.setting.startswith("diffrate(") and "score='received'" in found.setting and "gmacs" not in found.setting
    )
    assert not vit.training and all((weights[name] == value).all() for name, value in vit.state_dict().items())
    assert calibrate(model, photos, **ask, search=whole) == found, "a function of the seed"
    calibrate(model, photos, **ask, search=half, cache=tmp_path / "cache")
    assert calibrate(model, photos, **ask, search=whole, cache=tmp_path / "cache") == found, "went on"


def test_moves_come_nearer_to_the_dense_model(photos, tmp_path):
    """On the images that they are judged on, never further away; within the budget; taken up where they stopped."""
    model = AdaptiveViT(make_vit("vit", depth=4))
    budget = 0.7 * float(model(make_images(model.vit, 1)).trace.macs()) / 1e9
    ask = {"setting": "diffrate(score='received')", "gmacs": budget}
    evaluator = Evaluator(model, open_images(photos))

    def divergence(moves: int) -> float:
        found = calibrate(model, photos, **ask, search=KnobSearch(moves=moves), cache=tmp_path / "cache")
        assert 0.85 * budget <= found.gmacs <= budget
        return evaluator.predict(model.at(found.setting).eval(), range(6)).kl.sum().item()

    start, few, many = divergence(0), divergence(4), divergence(30)
    assert many < start and many <= few <= start
    again = calibrate(model, photos, **ask, search=KnobSearch(moves=30))
    assert again == calibrate(model, photos, **ask, search=KnobSearch(moves=30), cache=tmp_path / "cache")
    for file in (tmp_path / "cache").glob("**/*.json"):
        file.write_text('{"moves": "x"', encoding="utf-8")  # damaged: it starts anew
    assert calibrate(model, photos, **ask, search=KnobSearch(moves=30), cache=tmp_path / "cache") == again


def test_only_a_method_alone_is_learned():
    assert learnable("diffrate()") and learnable("diffrate((1, 2), 3, metric='key')")
    assert not any(map(learnable, ("dense", "evit(0.5)", "grid(32) | diffrate()", "diffrate() | tome(r=2)")))


@pytest.mark.parametrize("given", [{"steps": -1}, {"batch": 0}, {"seed": True}, {"steps": 2.5}, {"moves": -1}])
def test_numbers_out_of_range_are_named(given):
    with pytest.raises(UserError, match=f"{next(iter(given))}={next(iter(given.values()))}"):
        KnobSearch(**given)
