"""Image sets, decoding, preprocessing and loading, on files built here and, where present, on the real sets."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_helpers import bare_png, encode, picture, write_folder, write_zip
from saccade.data import (
    Failures,
    ImageError,
    ImageSet,
    Loader,
    Preprocess,
    class_indices,
    class_names,
    decode,
    open_images,
)
from saccade.errors import UserError

PNG = encode(picture())
SHARED = Path(os.environ.get("SACCADE_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
SMALL = Preprocess((16, 16), "bicubic", 0.9, "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=1)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Layouts


def layouts(root: Path, files: dict[str, bytes]) -> list[ImageSet]:
    return [open_images(write_folder(root / "folder", files)), open_images(write_zip(root / "set.zip", files))]


def test_class_folders(tmp_path: Path) -> None:
    for images in layouts(tmp_path, {"b/2.png": PNG, "a/1.JPEG": PNG, "b/10.webp": PNG}):
        assert images.names == ["a/1.JPEG", "b/10.webp", "b/2.png"]
        assert images.classes == ["a", "b"]
        assert images.labels == [0, 1, 1]
        assert images.labelled
        assert images.split is None
        assert images.read_bytes(2) == PNG
        assert np.array_equal(images.read(1), picture())


def test_unlabelled(tmp_path: Path) -> None:
    for images in layouts(tmp_path, {"2.png": PNG, "1.jpg": PNG}):
        assert images.names == ["1.jpg", "2.png"]
        assert images.labels is None
        assert images.classes is None
        assert not images.labelled


def test_single_file(tmp_path: Path) -> None:
    write_folder(tmp_path, {"photo.png": PNG, "other.png": PNG})
    images = open_images(tmp_path / "photo.png")
    assert images.names == ["photo.png"]
    assert images.read_bytes(0) == PNG
    assert not images.labelled


def test_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    clutter = ["__MACOSX/a/._1.png", ".git/a/b/c/1.png", "a/.1.png", "a/notes.txt", "README.md", "a/.cache/1.png"]
    for images in layouts(tmp_path / ".hidden_parent", {"a/1.png": PNG, **dict.fromkeys(clutter, b"")}):
        assert images.names == ["a/1.png"]


def test_a_linked_class_folder_is_followed(tmp_path: Path) -> None:
    write_folder(tmp_path, {"elsewhere/1.png": PNG, "set/b/2.png": PNG})
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere")
    assert open_images(tmp_path / "set").names == ["a/1.png", "b/2.png"]


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.png": PNG})
    for name in ("x", "y", "z"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    assert open_images(tmp_path).names == ["a/1.png"]


def test_classes_agree_between_splits(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train/a/1.png": PNG, "train/b/1.png": PNG, "val/b/1.png": PNG})
    train, val = open_images(root, "train"), open_images(root)
    assert train.classes == val.classes == ["a", "b"]
    assert val.labels == [1]
    assert train.labels == [0, 1]


@pytest.mark.parametrize(
    ("files", "split", "said"),
    [
        ({"train/a/1.png": PNG, "val/a/1.png": PNG}, "tset", "no split 'tset'.*train, val"),
        ({"train/a/1.png": PNG}, None, "no held-out split.*train"),
        ({"a/1.png": PNG}, "val", "no splits in .*'val'"),
        ({"a/notes.txt": b""}, None, "no images in"),
        ({"a/1.png": PNG, "2.png": PNG}, None, "different depths in .*2.png, a/1.png"),
        ({"x/train/a/1.png": PNG}, None, "too deep in .*x/train/a/1.png"),
    ],
)
def test_a_tree_that_cannot_be_read_as_asked(
    tmp_path: Path, files: dict[str, bytes], split: str | None, said: str
) -> None:
    for path in (write_folder(tmp_path / "folder", files), write_zip(tmp_path / "set.zip", files)):
        with pytest.raises(UserError, match=said) as error:
            open_images(path, split)
        assert path.name in one_line(error)


def test_paths_that_are_no_set(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    whole = write_zip(tmp_path / "set.zip", {"a/1.png": PNG}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    for name, said in {
        "missing": "does not exist",
        "empty": "no images",
        "notes.txt": "neither a folder",
        "cut.zip": "nor a whole zip",
    }.items():
        with pytest.raises(UserError, match=said) as error:
            open_images(tmp_path / name)
        assert name in one_line(error)


# Reading


def test_subset_and_fingerprint(tmp_path: Path) -> None:
    folder, archive = layouts(tmp_path, {"a/1.png": PNG, "b/2.png": PNG + b" ", "b/3.png": PNG})
    part = folder.subset([2, 0])
    assert (part.names, part.labels, part.classes) == (["b/3.png", "a/1.png"], [1, 0], ["a", "b"])
    assert len(part) == 2
    assert folder.fingerprint() == archive.fingerprint() == folder.subset(range(3)).fingerprint()
    prints = {folder.fingerprint(), part.fingerprint(), folder.subset([0, 2]).fingerprint()}
    (folder.path / "a/1.png").write_bytes(PNG + b"longer")
    assert len(prints | {folder.fingerprint()}) == 4


def _digests(images: ImageSet) -> list[str]:
    return [hashlib.sha256(images.read_bytes(i)).hexdigest() for i in range(len(images))]


def test_a_zip_is_read_from_threads_and_processes(tmp_path: Path) -> None:
    files = {f"a/{i:03}.png": os.urandom(20_000) for i in range(60)}
    images = open_images(write_zip(tmp_path / "set.zip", files))
    expected = [hashlib.sha256(files[name]).hexdigest() for name in images.names]
    assert _digests(images) == expected
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(_digests, [images] * 8)) == [expected] * 8
    assert _digests(pickle.loads(pickle.dumps(images))) == expected

    # Forked children inherit the handle that is open by now; side by side they would move each other's place in it.
    def child() -> None:
        sys.exit(any(_digests(images) != expected for _ in range(30)))

    children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(3)]
    for process in children:
        process.start()
    for process in children:
        process.join()
    assert [process.exitcode for process in children] == [0, 0, 0]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder, archive = layouts(tmp_path, {"a/1.png": PNG, "a/2.png": PNG})
    (folder.path / "a/1.png").unlink()
    data = archive.path.read_bytes()
    archive.path.write_bytes(data.replace(PNG, PNG[:-1] + b"!", 1))
    for images, said in ((folder, "No such file"), (archive, "Bad CRC-32")):
        with pytest.raises(ImageError, match=said) as error:
            images.read(0)
        assert one_line(error).startswith("a/1.png: ")
        assert images.read_bytes(1) == PNG


def test_a_broken_link_is_listed_and_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.png": PNG})
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    images = open_images(tmp_path)
    assert images.names == ["a/1.png", "a/2.png"]
    assert images.fingerprint()
    with pytest.raises(ImageError, match=r"a/2.png: cannot be read \(No such file"):
        images.read(1)


def test_a_file_too_long_for_any_allowed_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_MAX_PIXELS", "1200")
    for images in layouts(tmp_path, {"long.png": PNG + bytes(9600), "right.png": PNG}):
        assert images.read(1).size == (40, 30)
        with pytest.raises(ImageError, match=r"long.png: file of .* bytes, limit 9,600"):
            images.read_bytes(0)


# Decoding


def test_every_format_is_read_alike() -> None:
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        assert np.array_equal(decode(encode(picture(), kind), kind), picture()), kind
    for kind in ("JPEG", "WEBP", "GIF"):
        error = np.abs(np.asarray(decode(encode(picture(), kind), kind), int) - np.asarray(picture(), int))
        assert error.mean() < 12, kind


def test_a_path_is_read_too(tmp_path: Path) -> None:
    write_folder(tmp_path, {"1.png": PNG})
    assert np.array_equal(decode(tmp_path / "1.png", "1.png"), picture())
    with pytest.raises(ImageError, match=r"gone.png: .*No such file"):
        decode(tmp_path / "gone.png", "gone.png")


def test_formats_off_the_list_are_refused() -> None:
    for kind in ("ICO", "TGA", "EPS", "PDF"):
        with pytest.raises(ImageError, match=r"x: not a readable image \(formats: JPEG, PNG"):
            decode(encode(picture(), kind), "x")


def test_transparency_is_dropped_as_timm_drops_it() -> None:
    colours = np.asarray(picture())
    clear = np.dstack([colours, np.zeros(colours.shape[:2], np.uint8)])
    assert np.array_equal(decode(encode(Image.fromarray(clear)), "rgba"), colours)
    grey = picture().convert("L")
    grey_clear = Image.merge("LA", [grey, Image.new("L", grey.size, 0)])
    assert np.array_equal(decode(encode(grey_clear), "la"), grey.convert("RGB"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [None, 0, bytes(range(16))])
def test_palettes(transparency: int | bytes | None) -> None:
    image = picture().quantize(16)
    options = {} if transparency is None else {"transparency": transparency}
    assert np.array_equal(decode(encode(image, **options), "p"), image.convert("RGB"))


def test_one_bit_and_grey() -> None:
    for mode in ("1", "L"):
        image = picture().convert(mode)
        assert np.array_equal(decode(encode(image), mode), image.convert("RGB"))


def test_cmyk() -> None:
    data = encode(picture().convert("CMYK"), "JPEG", quality=100)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(np.asarray(decode(data, "cmyk"), int) - np.asarray(picture(), int)).mean() < 4


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for kind in ("PNG", "TIFF", "PPM"):
        grey = np.asarray(decode(encode(Image.fromarray(ramp), kind), kind))
        assert grey.dtype == np.uint8
        assert np.array_equal(grey, np.repeat((ramp // 256)[..., None], 3, axis=2)), kind


def test_pixels_without_a_range_are_refused() -> None:
    for values in (np.float32([[0.5]]), np.int32([[70_000]]), np.int32([[-1]])):
        with pytest.raises(ImageError, match=r"x: 32-bit .*save it with 8 or 16 bits"):
            decode(encode(Image.fromarray(values), "TIFF"), "x")
    assert decode(encode(Image.fromarray(np.int32([[65_535]])), "TIFF"), "x").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((40, 30) if orientation < 5 else (30, 40))
    assert np.array_equal(decode(data, "x"), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_leaves_the_pixels() -> None:
    data = encode(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(range(90)))
    assert decode(data, "x").size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encode(first, kind, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    red, _, blue = decode(data, kind).getpixel((4, 4))
    assert red > 240 > 15 > blue


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1)])
def test_odd_shapes_decode(size: tuple[int, int]) -> None:
    assert decode(encode(Image.new("RGB", size, "red")), "x").size == size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated(kind: str) -> None:
    data = encode(picture(300, 300), kind)
    for length in (0, 1, len(data) // 2):
        with pytest.raises(ImageError) as error:
            decode(data[:length], "cut.img")
        assert error.value.name == "cut.img"
        assert one_line(error) == f"cut.img: {error.value.reason}"
        assert 5 < len(error.value.reason) < 120
        assert pickle.loads(pickle.dumps(error.value)).args == error.value.args


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]),
    edits=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=4)), min_size=1, max_size=5),
)
@pytest.mark.filterwarnings("ignore")
def test_damage_gives_an_image_or_an_image_error(kind: str, edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(encode(picture(16, 12), kind))
    for place, new in edits:
        data[place : place + len(new)] = new
    try:
        image = decode(bytes(data), "x", max_pixels=100_000)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB"
        np.asarray(image)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    squeeze = zlib.compressobj(9)
    row = bytes(1 + 16_000 // 8)
    rows = b"".join(squeeze.compress(row) for _ in range(12_000)) + squeeze.flush()
    bomb = bare_png(16_000, 12_000, rows)
    assert len(bomb) < 30_000
    with pytest.raises(ImageError, match=r"bomb.png: over .* pixels"):
        decode(bomb, "bomb.png")
    # Without rows the answer can only come from the header.
    with pytest.raises(ImageError, match=r"is 9000×8000 = 72,000,000 pixels, limit 64,000,000 \(SACCADE_MAX_PIXELS"):
        decode(bare_png(9000, 8000, b""), "bomb.png")


def test_the_pixel_limit_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode(PNG, "x", max_pixels=1200).size == (40, 30)
    with pytest.raises(ImageError, match="limit 1,199"):
        decode(PNG, "x", max_pixels=1199)
    monkeypatch.setenv("SACCADE_MAX_PIXELS", "1199")
    with pytest.raises(ImageError, match="limit 1,199"):
        decode(PNG, "x")
    monkeypatch.setenv("SACCADE_MAX_PIXELS", "1200")
    assert decode(PNG, "x").size == (40, 30)
    for value in ("many", "0", "-5", "1.5", ""):
        monkeypatch.setenv("SACCADE_MAX_PIXELS", value)
        with pytest.raises(UserError, match="SACCADE_MAX_PIXELS=") as error:
            decode(PNG, "x")
        assert not isinstance(error.value, ImageError)


# Preprocessing


@pytest.mark.parametrize("size", [None, 160, (96, 192)])
@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (64, 64), (1, 1), (31, 200)])
def test_preprocess_is_timms(vit: torch.nn.Module, size: int | tuple[int, int] | None, shape: tuple[int, int]) -> None:
    config = timm.data.resolve_model_data_config(vit)
    assert config["mean"] == (0.5, 0.5, 0.5)
    if size is not None:
        config["input_size"] = (3, *((size, size) if isinstance(size, int) else size))
    image = picture(*shape)
    expected = timm.data.create_transform(**config, is_training=False)(image)
    assert torch.equal(Preprocess.of(vit, size)(image), expected)
    assert expected.shape == config["input_size"]


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["center", "squash", "border"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    crop_pct=st.floats(0.5, 1.0),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
)
def test_preprocess_is_timms_for_any_config(
    mode: str, interpolation: str, crop_pct: float, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    preprocess = Preprocess(size, interpolation, crop_pct, mode, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    theirs = timm.data.create_transform(
        (3, *size),
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=mode,
        mean=preprocess.mean,
        std=preprocess.std,
    )
    image = picture(*shape)
    try:
        expected = theirs(image)
    except ValueError:
        with pytest.raises(ImageError, match="shrinks to"):
            preprocess(image)
    else:
        assert torch.equal(preprocess(image), expected)


def test_the_size_is_the_models_own() -> None:
    built = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(64, 96))
    assert Preprocess.of(built).size == (64, 96)
    assert Preprocess.of(built, 128).size == (128, 128)
    assert Preprocess.of(timm.create_model("vit_tiny_patch16_224", depth=1)).size == (224, 224)
    with pytest.raises(UserError, match="image size 0×0"):
        Preprocess.of(built, 0)


def test_the_statistics_are_the_models_own(vit: torch.nn.Module) -> None:
    deit = Preprocess.of(timm.create_model("deit_tiny_patch16_224", depth=1))
    assert deit.mean == (0.485, 0.456, 0.406)
    assert Preprocess.of(vit).mean == (0.5, 0.5, 0.5)


def test_json_round_trip(vit: torch.nn.Module) -> None:
    preprocess = Preprocess.of(vit, (160, 224))
    again = Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict())))
    assert again == preprocess
    assert hash(again) == hash(preprocess)
    assert torch.equal(pickle.loads(pickle.dumps(again))(picture()), preprocess(picture()))
    with pytest.raises(TypeError):
        Preprocess.from_dict({**preprocess.to_dict(), "colour": "sepia"})


def test_an_extreme_shape_is_refused_before_it_is_resized(
    vit: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("it was resized"))
    with pytest.raises(ImageError, match=r"strip.png: too narrow: resized it is 4960000×248 = 1,230,080,000 pixels"):
        Preprocess.of(vit)(Image.new("RGB", (20_000, 1)), "strip.png")


def test_the_limit_on_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = Preprocess((16, 16), "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setenv("SACCADE_MAX_PIXELS", str(16 * 160))
    assert preprocess(Image.new("RGB", (100, 10))).shape == (3, 16, 16)
    with pytest.raises(ImageError, match="162×16"):
        preprocess(Image.new("RGB", (101, 10)))


# Loading


def numbered(root: Path, count: int, broken: set[int]) -> ImageSet:
    files = {f"{i:03}.png": PNG[:60] if i in broken else encode(picture(20, 30, seed=i)) for i in range(count)}
    return open_images(write_zip(root / "set.zip", files))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    broken=st.sets(st.integers(0, 11), max_size=10),
    batch_size=st.integers(1, 15),
    order=st.permutations(range(12)),
    workers=st.integers(1, 3),
    cache_images=st.sampled_from([0, 5, 100]),
)
def test_passes_keep_order_and_name_failures(
    tmp_path: Path, broken: set[int], batch_size: int, order: list[int], workers: int, cache_images: int
) -> None:
    images = numbered(tmp_path, 12, broken)
    loader = Loader(images, SMALL, workers=workers, cache_bytes=cache_images * 3 * 16 * 16)
    for _ in range(2):
        batches = list(loader.batches(batch_size, order))
        good = [i for i in order if i not in broken]
        assert [i for batch in batches for i in batch.indices] == good
        assert all(len(batch.indices) == len(batch.images) == batch_size for batch in batches[:-1])
        direct = torch.stack([SMALL(images.read(i)) for i in good])
        assert torch.equal(torch.cat([batch.images for batch in batches]), direct)
        assert [name for name, _ in loader.failures.items] == [images.names[i] for i in order if i in broken]
        assert loader.failures.total == 12


def test_a_cached_pass_reads_nothing_and_a_full_cache_reads_the_rest(tmp_path: Path) -> None:
    images = numbered(tmp_path, 6, set())
    whole = Loader(images, SMALL, cache_bytes=6 * 768)
    part = Loader(images, SMALL, cache_bytes=6 * 768 - 1)
    first = [list(loader.batches(6)) for loader in (whole, part)]
    write_zip(images.path, {})
    again = next(whole.batches(6))
    assert torch.equal(again.images, first[0][0].images)
    assert not whole.failures
    assert [batch.indices for batch in part.batches(6)] == [[0, 1, 2, 3, 4]]
    assert [name for name, _ in part.failures.items] == ["005.png"]


def test_the_caller_may_change_a_batch(tmp_path: Path) -> None:
    loader = Loader(numbered(tmp_path, 2, set()), SMALL, cache_bytes=10**6)
    (batch,) = loader.batches(2)
    expected = batch.images.clone()
    batch.images.zero_()
    assert torch.equal(next(loader.batches(2)).images, expected)


def test_no_image_at_all(tmp_path: Path) -> None:
    images = numbered(tmp_path, 5, set(range(5)))
    with pytest.raises(UserError, match=r"set.zip: 5 of 5 images could not be read: 000.png \(.* and 2 more") as error:
        list(Loader(images, SMALL).batches(2))
    one_line(error)
    with pytest.raises(UserError, match="no images were asked for"):
        list(Loader(images, SMALL).batches(2, []))
    with pytest.raises(UserError, match="batch size 0"):
        list(Loader(images, SMALL).batches(0))


def test_a_pass_may_be_left_early(tmp_path: Path) -> None:
    loader = Loader(numbered(tmp_path, 40, set()), SMALL)
    for batch in loader.batches(4):
        assert batch.indices == [0, 1, 2, 3]
        break
    assert sum(len(batch.indices) for batch in loader.batches(16)) == 40


def test_reading_ahead_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch ahead is read and no more: the next image would wait for ever."""
    images = open_images(write_folder(tmp_path, {f"{i:02}.png": PNG for i in range(40)}))
    real, ahead, beyond, done = ImageSet.read, threading.Event(), threading.Event(), []

    def read(self: ImageSet, i: int) -> Image.Image:
        if len(done) >= 8:
            beyond.set()
        found = real(self, i)
        done.append(i)
        if len(done) == 8:
            ahead.set()
        return found

    monkeypatch.setattr(ImageSet, "read", read)
    passing = Loader(images, SMALL).batches(4)
    assert next(passing).indices == [0, 1, 2, 3]
    assert ahead.wait(60) and not beyond.wait(0.2)
    assert sorted(done) == [*range(8)] and next(passing).indices == [4, 5, 6, 7]


def test_an_image_too_narrow_is_counted_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_MAX_PIXELS", "5000")
    root = write_folder(tmp_path, {"ok.png": PNG, "strip.png": encode(Image.new("RGB", (400, 1)))})
    loader = Loader(open_images(root), SMALL)
    assert [batch.indices for batch in loader.batches(2)] == [[0]]
    ((name, reason),) = loader.failures.items
    assert name == "strip.png"
    assert reason.startswith("too narrow: resized it is 6800×17 = 115,600 pixels")


def test_a_wrong_setting_is_no_failed_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(numbered(tmp_path, 2, set()), SMALL)
    monkeypatch.setenv("SACCADE_MAX_PIXELS", "lots")
    with pytest.raises(UserError, match="SACCADE_MAX_PIXELS='lots'"):
        list(loader.batches(2))


def test_failures_in_one_line() -> None:
    assert str(Failures(3)) == ""
    assert str(Failures(300, [("a.jpg", "empty file")])) == "1 of 300 images could not be read: a.jpg (empty file)"
    many = Failures(300, [(f"{i}.jpg", "cut") for i in range(5)])
    assert str(many).endswith("could not be read: 0.jpg (cut), 1.jpg (cut), 2.jpg (cut) and 2 more")


def test_importing_leaves_matplotlib_alone() -> None:
    code = "import sys, saccade.data; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The real sets


def real(name: str, split: str | None = None) -> ImageSet:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here: set SACCADE_DATA to the folder of real image sets")
    return open_images(path, split)


def test_real_splits() -> None:
    held_out, train = real("nette160.zip"), real("nette160.zip", "train")
    assert (held_out.split, len(held_out), len(train)) == ("val", 1000, 9103)
    assert class_indices(held_out, 10)[0] == 0
    assert sorted(set(class_indices(held_out, 1000))) == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    caltech = real("caltech160.zip")
    assert (caltech.split, len(caltech), len(caltech.classes or [])) == ("test", 2893, 101)
    with pytest.raises(UserError, match=r"101 classes in .*, 1000 in"):
        class_indices(caltech, 1000)


def test_real_synsets_are_named_as_their_files() -> None:
    images, names = real("photos50.zip"), class_names(1000)
    assert names is not None
    for name, index in zip(images.names, class_indices(images, 1000), strict=True):
        said = name.split("_", 1)[1].removesuffix(".JPEG").replace("_", " ")
        assert said.lower() in names[index].lower()


def test_real_images_load_as_timm_loads_them(vit: torch.nn.Module) -> None:
    images = real("inval227_dev.zip")
    assert len(images) == 300
    assert {int(name[:4]) for name in images.names} == set(class_indices(images, 1000))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(vit))
    loader = Loader(images.subset(range(0, 300, 10)), Preprocess.of(vit))
    for batch in loader.batches(8):
        for tensor, i in zip(batch.images, batch.indices, strict=True):
            picture = Image.open(io.BytesIO(images.read_bytes(10 * i))).convert("RGB")
            assert torch.equal(tensor, transform(picture))
    assert not loader.failures
