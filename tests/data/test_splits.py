"""Which split is looked at, what is held out where there is none, and that nothing is passed over without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import saccade
from data_helpers import encode, picture, write_folder, write_zip
from saccade.cli import main
from saccade.data import Loaders, Preprocess, open_images
from saccade.data.splits import choose_split, divide, held_out
from saccade.errors import UserError
from saccade.storage.image_names import CHECK, TEST, TRAIN, kind_of
from saccade.tasks.segmentation.segmentation_data import open_pixels
from saccade.training.config import Data
from saccade.training.image_sets import open_sets

PNG = encode(picture())


# Names of splits


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (TRAIN, ["train", "Training", "TRAIN", "train2017", "train_set"]),
        (CHECK, ["val", "valid", "Valid", "validation", "VAL", "val2017", "dev", "eval", "held-out", "Hold Out"]),
        (TEST, ["test", "Testing", "TEST", "test-2012", "test set"]),
        (None, ["images", "cats", "trained", "testament", "valley", "a", "2017", ""]),
    ],
)  # fmt: skip
def test_kinds_of_splits(kind: str | None, names: list[str]) -> None:
    assert {name: kind_of(name) for name in names} == dict.fromkeys(names, kind)


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        (["test", "train", "valid"], "valid"),
        (["test", "Train", "Validation"], "Validation"),
        (["dev", "test", "train"], "dev"),
        (["train", "val", "valid"], "val"),
        (["Testing", "Training"], "Testing"),
        (["extra", "held_out", "train"], "held_out"),
    ],
)
@pytest.mark.parametrize("archive", [False, True])
def test_one_to_check_on_before_one_to_test_on(tmp_path: Path, known: list[str], chosen: str, archive: bool) -> None:
    files = {f"{split}/a/1.png": PNG for split in known}
    images = open_images(write_zip(tmp_path / "s.zip", files) if archive else write_folder(tmp_path / "s", files))
    assert images.split == chosen
    assert any(f"split {chosen!r} of {', '.join(sorted(known))}" in line for line in images.notes)
    assert not open_images(images.path, chosen).notes, "what is asked for need not be said"


def test_a_split_is_found_under_its_other_names(tmp_path: Path) -> None:
    assert choose_split(tmp_path, ["Training", "valid"], "train") == "Training"
    assert choose_split(tmp_path, ["test", "train", "valid"], "val") == "valid"
    for known, asked in ((["dev", "train", "valid"], "val"), (["test", "train"], "val"), (["cats", "dogs"], "dog")):
        with pytest.raises(UserError, match=f"no split '{asked}' in .*: name one of {', '.join(known)}"):
            choose_split(tmp_path, known, asked)
    assert held_out(["train", "x"]) is None


def test_training_checks_on_what_is_there_to_check_on(tmp_path: Path) -> None:
    files = {f"{split}/{c}/{i}.png": PNG for split in ("Train", "Valid", "Test") for c in "ab" for i in range(3)}
    train, held = open_sets(Data(path=str(write_folder(tmp_path / "s", files))))
    assert held is not None
    assert (train.split, len(train), held.split, len(held)) == ("Train", 6, "Valid", 6)
    for split in ("Valid", "testing", "val2017"):
        with pytest.raises(UserError, match="held-out split and never trained on"):
            open_sets(Data(path=str(tmp_path / "s"), split=split))


def test_labels_of_pixels_have_the_same_splits(tmp_path: Path) -> None:
    label = encode(picture().convert("L"))
    files = {f"{split}/{kind}/1.png": PNG if kind == "images" else label
             for split in ("train", "Valid", "test") for kind in ("images", "labels")}  # fmt: skip
    assert open_pixels(write_folder(tmp_path, files), None, "ab").images.split == "Valid"


def test_splits_of_unlabelled_images_are_no_classes(tmp_path: Path) -> None:
    for i, names in enumerate((["train", "val"], ["Test", "training"])):
        with pytest.raises(UserError, match="are splits, with images right in them"):
            open_images(write_folder(tmp_path / str(i), {f"{name}/1.png": PNG for name in names}))
    vehicles = write_folder(tmp_path / "v", {f"{name}/1.png": PNG for name in ("train", "bus")})
    assert open_images(vehicles).classes == ["bus", "train"]


# A share that is held out


def test_every_class_is_trained_and_checked_on() -> None:
    names = [f"{c}/{i}.png" for c, count in enumerate([1, 2, 3, 40, 400]) for i in range(count)]
    labels = [int(name.split("/")[0]) for name in names]
    for share in (0.001, 0.1, 0.5, 0.99):
        train, held = divide(names, share, labels)
        assert sorted(train + held) == list(range(len(names)))
        assert {labels[i] for i in train} == {0, 1, 2, 3, 4}
        assert {labels[i] for i in held} == {1, 2, 3, 4}
    assert 20 < sum(labels[i] == 4 for i in divide(names, 0.1, labels)[1]) < 60


def test_more_images_move_few() -> None:
    def held(count: int) -> set[str]:
        names = [f"{c}/{i}.png" for c in range(20) for i in range(count)]
        return {names[i] for i in divide(names, 0.2, [int(name.split("/")[0]) for name in names])[1]}

    before, after = held(20), held(25)
    of_before = {name for name in after if int(name.split("/")[1].split(".")[0]) < 20}
    assert len(before ^ of_before) <= 2, "but for classes of which none, or all, would have been held out"


def test_images_without_classes_are_divided_too() -> None:
    assert divide(["a", "b"], 0.01) in (([0], [1]), ([1], [0]))
    assert divide(["a"], 0.5) == ([0], [])
    assert divide([], 0.5) == ([], [])


def test_one_image_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 images in .* are too few for data.holdout=0.1: set it to 0"):
        open_sets(Data(path=str(write_folder(tmp_path, {"a/1.png": PNG}))))


# What is passed over


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    others = ["a/2.heic", "a/3.HEIC", "a/4.avif", "a/notes.txt", "a/.DS_Store", "b/1.svg", "README", "a/.x/1.png"]
    files = {"a/1.png": PNG, **dict.fromkeys(others, b"x")}
    archive, folder = (
        open_images(write_zip(tmp_path / "s.zip", files)),
        open_images(write_folder(tmp_path / "s", files)),
    )
    assert archive.passed_over == {".heic": 2, ".avif": 1, ".txt": 1, "hidden": 2, ".svg": 1, "without extension": 1}
    assert folder.passed_over == {**archive.passed_over, "hidden": 1}, "hidden folders are not gone into"
    for images in (archive, folder):
        assert any("passed over" in line and "2 .heic" in line for line in images.notes)
        assert any("no class b, as there is no image in it" in line for line in images.notes)
    assert not open_images(write_folder(tmp_path / "clean", {"a/1.png": PNG})).notes


def test_only_unknown_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no images in .* \(there are 2 .jp2, 1 .heic\): looked for"):
        open_images(write_folder(tmp_path, {"a/1.jp2": b"", "a/2.jp2": b"", "a/3.heic": b""}))


def test_the_command_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {f"{split}/{c}/1.png": PNG for split in ("train", "valid", "test") for c in "ab"} | {"valid/a/x.heic": b""}
    write_folder(tmp_path / "s", files)
    args = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 1, "num_heads": 1}
    saccade.create_model("vit_tiny_patch16_224", num_classes=2, **args).save("m")
    with pytest.raises(SystemExit) as stop:
        main(["eval", "m", "s", "--json", "--threads", "1"])
    assert not stop.value.code
    said = " ".join(capsys.readouterr().err.split())
    for words in ("split 'valid' of test, train, valid", "passed over 1 .heic", "have no names: folders a, b"):
        assert said.count(words) == 1


# Memory


def test_decoded_images_are_bounded_in_bytes_over_all_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(write_folder(tmp_path, {f"{i}.png": PNG for i in range(4)}))
    monkeypatch.setattr("saccade.data.loader.CACHE_BYTES", 8000)
    loaders = Loaders(images)
    sizes = [8, 12, 16, 10, 9, 11, 7, 13, 14, 15, 6, 5]
    for size in sizes * 2:
        loader = loaders.of(Preprocess((size, size), "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3))
        assert len(torch.cat([batch.images for batch in loader.batches(3)])) == 4
    kept = {made.preprocess.size: sum(crop.nbytes for crop in made._cache.values()) for made in loaders._made.values()}
    assert len(kept) == len(sizes)
    assert max(kept.values()) <= 1000, "no size takes more than its share"
    assert 4000 < sum(kept.values()) <= 8000
