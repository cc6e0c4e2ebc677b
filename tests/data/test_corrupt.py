"""Corruptions: the same for an image whatever is around it, as strong as they say, and refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_helpers import encode, picture, write_folder
from oracles import make_vit
from saccade.data import Loader, Preprocess, open_images
from saccade.data.corrupt import COMMON, Corrupted, corrupted, corruption
from saccade.errors import UserError
from saccade.evaluation.accuracy import evaluate
from saccade.model import AdaptiveViT

EVERY = ["masks:20", *(f"{name}:3" for name in COMMON)]


def smooth(size: int = 56, seed: int = 0) -> torch.Tensor:
    """A crop, uint8 [3, size, size]."""
    rough = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(rough, size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)[0]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    pictures = {f"{c}/{i}.png": encode(picture(80, 70, seed=10 * i + (c == "b"))) for c in "ab" for i in range(4)}
    return write_folder(tmp_path / "photos", pictures)


@pytest.mark.parametrize("spec", EVERY)
def test_an_image_is_corrupted_by_its_name_and_the_seed_alone(spec):
    corrupt, crop = corruption(spec), smooth()
    before = crop.clone()
    torch.manual_seed(1)
    found = corrupt(crop, "a.png")
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(1).get_state()), "nobody's random numbers are taken"
    torch.manual_seed(2)
    assert torch.equal(corruption(spec)(crop, "a.png"), found) and torch.equal(crop, before)
    assert found.shape == crop.shape and found.dtype == torch.uint8 and not torch.equal(found, crop)
    if "masks" in spec or "noise" in spec:
        assert not torch.equal(corrupt(crop, "b.png"), found)
        assert not torch.equal(corruption(spec, seed=1)(crop, "a.png"), found)
    assert str(corrupt) == spec


@pytest.mark.parametrize("name", COMMON)
def test_more_severe_is_farther_from_the_image(name):
    apart = []
    for severity in range(1, 6):
        crops = [smooth(seed=i) for i in range(8)]
        found = [corruption(f"{name}:{severity}")(crop, str(i)) for i, crop in enumerate(crops)]
        apart.append(sum(float((a.float() - b.float()).square().mean()) for a, b in zip(found, crops, strict=True)))
    assert apart == sorted(apart) and apart[0] < apart[-1]


# --- masks -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 1000))
@settings(max_examples=30)
def test_more_masks_cover_what_fewer_cover(few, more, seed):
    few, more = sorted((few, more))
    crop = torch.full((3, 56, 56), 9, dtype=torch.uint8)
    less, covered = (corruption(f"masks:{n}", seed)(crop, "x")[0] != 9 for n in (few, more))
    assert (covered >= less).all() and less.any() == (few > 0)


@pytest.mark.parametrize("size", [56, 112, 224, 240])
def test_a_mask_is_a_square_of_a_fourteenth_of_the_side(size):
    side = round(size / 14)
    places = set()
    for key in range(40):
        found = corruption("masks:1")(torch.zeros(3, size, size, dtype=torch.uint8), str(key))
        rows, columns = found[0].amax(1).nonzero().flatten(), found[0].amax(0).nonzero().flatten()
        assert len(rows) == len(columns) == side and int((found[0] > 0).sum()) == side * side
        places.add((int(rows[0]), int(columns[0])))
    assert len(places) > 30 and any(top % side or left % side for top, left in places), "not aligned with patches"


def test_masks_lie_at_the_same_places_of_any_size():
    small, large = (corruption("masks:5")(torch.zeros(3, s, s, dtype=torch.uint8), "x")[0] > 0 for s in (112, 224))
    grown = small.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert float((grown != large).float().mean()) < 0.02


def test_fifty_masks_cover_a_fifth_of_the_pixels_and_most_patches():
    crop = torch.zeros(3, 224, 224, dtype=torch.uint8)
    covered = torch.stack([corruption("masks:50")(crop, str(i))[0] > 0 for i in range(50)]).float()
    touched = torch.nn.functional.max_pool2d(covered[:, None], 16).mean()
    assert 0.19 < float(covered.mean()) < 0.25 and 0.55 < float(touched) < 0.69


def test_masks_are_zero_for_the_model():
    vit = make_vit()
    plain = Preprocess.of(vit)
    found = corrupted(plain, corruption("masks:1000"))
    assert isinstance(found, Corrupted) and corrupted(plain, None) is plain
    inputs = found(picture(80, 70), "x")
    assert float(inputs.abs().median()) < 0.01 < float(plain(picture(80, 70), "x").abs().median())


# --- where it is used ------------------------------------------------------------------------------------------------


def test_neither_batch_nor_order_nor_cache_matters(photos):
    images, preprocess = open_images(photos), corrupted(Preprocess.of(make_vit()), corruption("gaussian_noise:2"))

    def inputs(batch: int, order: list[int], cache: int) -> dict[int, torch.Tensor]:
        loader = Loader(images, preprocess, cache_bytes=cache)
        for _ in range(2):
            found = {i: x for b in loader.batches(batch, order) for i, x in zip(b.indices, b.images, strict=True)}
        return found

    one, other = inputs(3, list(range(8)), 0), inputs(1, [7, 2, 5], 10**9)
    assert all(torch.equal(other[i], one[i]) for i in (7, 2, 5))
    names = open_images(photos).subset([5]).names
    assert torch.equal(preprocess(images.read(5), names[0]), one[5]), "nor which others there are"


@torch.no_grad()
def test_evaluate_shows_all_settings_the_same_corrupted_images(photos, tmp_path):
    model = AdaptiveViT(make_vit(num_classes=2))
    plain, _ = evaluate(model, str(photos), ["tome(r=2)"], cache=tmp_path)
    masked, _ = evaluate(model, str(photos), ["tome(r=2)", "evit(1)"], cache=tmp_path, corrupt="masks:50")
    again, _ = evaluate(model, str(photos), ["tome(r=2)", "evit(1)"], cache=tmp_path, corrupt="masks:50")
    assert masked == again
    assert masked[0].nll.mean != plain[0].nll.mean and masked[1].nll.mean != plain[1].nll.mean, "not from the cache"
    assert masked[2].kl.high <= 1e-6, "off is dense, on the same images"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mask:5", r"there is no corruption 'mask' \(did you mean 'masks'\?\)"),
        ("fog", "there is no corruption 'fog'"),
        ("masks", r"'masks' needs a whole number in \[0, 1000\]: write it like masks:50"),
        ("masks:-1", "masks:-1"),
        ("masks:1001", "masks:1001"),
        ("masks:" + "9" * 30, "needs a whole number"),
        ("jpeg:0", r"\[1, 5\]: write it like jpeg:3"),
        ("jpeg:6", r"jpeg:6"),
        ("jpeg:2.5", r"jpeg:2.5"),
        ("jpeg:²", r"jpeg"),
        ("", "there is no corruption ''"),
    ],
)
def test_what_is_refused(spec, says):
    with pytest.raises(UserError, match=says):
        corruption(spec)
