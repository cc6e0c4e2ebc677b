"""The built-in image set: the same everywhere, told by shape and place only, and read like any other set."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from data_helpers import encode, picture, write_folder
from saccade.data import ImageSet, Preprocess, open_images, splits
from saccade.data.scenes import ACROSS, CLASSES, SIZE, SPLITS, Rendered, render, scenes
from saccade.errors import UserError

module = import_module("saccade.data.scenes")
SOME = range(3, 300, 7)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[np.ndarray, int, tuple[int, int, int, int]]]:
    return [render("test", index) for index in range(500)]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digest(indices: range) -> str:
    images = scenes("val")
    return hashlib.sha256(b"".join(images.read_bytes(i) for i in indices)).hexdigest()


def test_another_process_draws_the_same_in_another_order() -> None:
    code = (
        "import hashlib; from saccade.data.scenes import scenes; images = scenes('val');"
        f"parts = {{i: images.read_bytes(i) for i in reversed({SOME})}};"
        f"print(hashlib.sha256(b''.join(parts[i] for i in {SOME})).hexdigest())"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert other.stdout.strip() == digest(SOME)


def test_threads_draw_the_same() -> None:
    images = pickle.loads(pickle.dumps(scenes("val")))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(images.read_bytes, SOME))
    assert together == [scenes("val").read_bytes(i) for i in SOME]


def test_index_split_and_seed_all_matter() -> None:
    different = [render("val", 7), render("val", 17), render("test", 7), render("val", 7, seed=1)]
    assert {label for _, label, _ in different} == {7}
    assert len({pixels.tobytes() for pixels, _, _ in different}) == len(different)


@pytest.mark.parametrize("size", [64, 97, 140, 224])
def test_box_is_inside_and_of_the_stated_size(size: int) -> None:
    places = []
    for index in range(60):
        pixels, label, (top, left, bottom, right) = render("train", index, size=size)
        assert (pixels.shape, pixels.dtype, label) == ((size, size, 3), np.uint8, index % 10)
        assert 0 <= top < bottom <= size and 0 <= left < right <= size
        longer = max(bottom - top, right - left)
        assert ACROSS[0] * size / SIZE - 3 <= longer <= ACROSS[1] * size / SIZE + 2
        assert 2 * min(bottom - top, right - left) > longer
        places.append(((top + bottom) / 2 / size, (left + right) / 2 / size))
    assert np.ptp(places, axis=0).min() > 0.6


def test_the_object_is_in_its_box_and_nothing_else_tells_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [render("train", index) for index in range(40)]
    monkeypatch.setattr(module, "SHAPES", dict.fromkeys(CLASSES, module.SHAPES["disc"]))
    for index, (pixels, label, box) in enumerate(before):
        disc, _, disc_box = render("train", index)
        differs = (disc != pixels).any(2)
        inside = np.zeros_like(differs)
        for top, left, bottom, right in (box, disc_box):
            inside[max(top - 3, 0) : bottom + 3, max(left - 3, 0) : right + 3] = True
        assert not differs[~inside].any()
        assert differs[inside].mean() > 0.1 or CLASSES[label] == "disc"


def test_objects_stand_out_from_what_is_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [render("train", index) for index in range(100)]
    monkeypatch.setattr(module, "_paint", lambda *_: None)
    changes = []
    for index, (pixels, _, (top, left, bottom, right)) in enumerate(drawn):
        bare, _, _ = render("train", index)
        change = np.abs(pixels.astype(int) - bare)[top:bottom, left:right].max(2)
        changes.append(np.sort(change.ravel())[-change.size // 5 :].mean())
    assert np.mean(np.array(changes) > 40) > 0.95


def test_a_small_part_of_the_image_matters(drawn: list) -> None:
    areas = [(bottom - top) * (right - left) / SIZE**2 for _, _, (top, left, bottom, right) in drawn]
    assert 0.04 < np.mean(areas) < 0.12
    assert max(areas) < 0.22


def test_power_falls_with_frequency_as_in_photographs(drawn: list) -> None:
    window = np.hanning(SIZE)[:, None] * np.hanning(SIZE)
    frequency = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)) * SIZE
    ring = np.round(frequency).astype(int).ravel()
    slopes = []
    for channels in ((0.3, 0.59, 0.11), (1, -1, 0)):
        planes = [pixels @ np.array(channels) for pixels, _, _ in drawn[:100]]
        power = np.mean([np.abs(np.fft.fft2((p - p.mean()) * window)) ** 2 for p in planes], axis=0).ravel()
        radial = np.bincount(ring, power)[3:50] / np.bincount(ring)[3:50]
        slopes.append(np.polyfit(np.log(np.arange(3, 50)), np.log(radial), 1)[0])
    assert -3 < slopes[0] < -1.6
    assert -3.5 < slopes[1] < -1.6


def test_colour_says_nothing_about_the_class(drawn: list) -> None:
    """Of the object's own pixels, the brightest in its box: how many of those there are is shape, their hue is not."""
    features, labels = [], []
    for pixels, label, (top, left, bottom, right) in drawn:
        boxed = pixels[top:bottom, left:right].reshape(-1, 3).astype(float)
        bright = boxed[boxed.sum(1) >= np.quantile(boxed.sum(1), 0.9)].mean(0)
        features.append([1, *(255 * bright / bright.sum())])
        labels.append(label)
    x, y = np.array(features) / 255, np.eye(len(CLASSES))[labels]
    train, test = slice(0, 300), slice(300, None)
    probe = np.linalg.solve(x[train].T @ x[train] + 1e-3 * np.eye(x.shape[1]), x[train].T @ y[train])
    accuracy = ((x[test] @ probe).argmax(1) == np.array(labels)[test]).mean()
    assert accuracy < 0.1 + 4 * (0.1 * 0.9 / 200) ** 0.5


# As an image set


def test_open_images_knows_the_word(elsewhere: Path) -> None:
    images = open_images("scenes")
    assert images == scenes() == scenes("val")
    assert (images.split, images.classes, len(images)) == ("val", list(CLASSES), SPLITS["val"])
    assert images.names == sorted(images.names)
    assert images.names[17] == "val/arrow/00017.ppm"
    assert images.fingerprint() == scenes().fingerprint()
    assert splits("scenes") == sorted(SPLITS)
    for split, count in SPLITS.items():
        chosen = open_images("scenes", split)
        assert Counter(chosen.labels) == dict.fromkeys(range(10), count // 10)
        assert all(name.startswith(f"{split}/") for name in chosen.names)


def test_what_is_read_is_what_was_rendered() -> None:
    images = scenes("val")
    assert images.labels is not None
    for i in range(5, len(images), 199):
        pixels, label, _ = render("val", i % 200 * 10 + i // 200)
        assert images.labels[i] == label
        assert np.array_equal(images.read(i), pixels)
        assert images.store.size(images.names[i]) == len(images.read_bytes(i))


def test_crops_reach_a_model(elsewhere: Path) -> None:
    preprocess = Preprocess((SIZE, SIZE), "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3)
    crop = preprocess.crop(open_images("scenes").read(3))
    assert np.array_equal(crop.permute(1, 2, 0), render("val", 30)[0])


def test_a_folder_of_that_name_wins(elsewhere: Path) -> None:
    write_folder(elsewhere / "scenes", {"a/1.png": encode(picture())})
    images = open_images("scenes")
    assert images.names == ["a/1.png"]
    assert np.array_equal(images.read(0), picture())


def test_counts_and_seed_make_another_set() -> None:
    few = scenes("train", seed=3, counts={"train": 25, "val": 5})
    assert Counter(few.labels) == {label: 3 if label < 5 else 2 for label in range(10)}
    assert scenes(seed=3, counts={"train": 25, "val": 5}).labels == [0, 1, 2, 3, 4]
    assert few.names == [name for name in few.store.names() if name.startswith("train/")]
    place = few.names.index("train/disc/00002.ppm")
    assert np.array_equal(few.read(place), render("train", 23, seed=3)[0])


def test_the_fingerprint_follows_seed_and_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(images: ImageSet) -> str:
        return images.subset(range(9)).fingerprint()

    first, other = fingerprint(scenes()), fingerprint(scenes(seed=1))
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    assert len({first, other, fingerprint(scenes())}) == 3


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: open_images("scenes", "tset"), "no split 'tset' in scenes: name one of test, train, val"),
        (lambda: scenes("tset"), "no split 'tset' in scenes: name one of test, train, val"),
        (lambda: scenes(counts={"tset": 3}), "no split 'tset' in scenes.*'test'"),
        (lambda: scenes(counts={"val": 0}), "0 scenes in split 'val' is below 1: give"),
        (lambda: scenes(seed=-1), "seed -1 is below 0: give"),
        (lambda: render("tset", 0), "no split 'tset' in scenes.*'test'"),
        (lambda: render("val", -1), "index -1 .* is below 0: give"),
        (lambda: render("val", 0, size=63), "63 pixels is below 64: give"),
    ],
)
def test_what_is_not_there_is_said(elsewhere: Path, call, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["val/disc/00200.ppm", "val/disc/0.ppm", "val/dish/00000.ppm", "dev/disc/00000.ppm", "val/disc/00000.png", "disc"],
)
def test_no_file_but_the_listed_ones(name: str) -> None:
    with pytest.raises(FileNotFoundError):
        Rendered().read(name)
