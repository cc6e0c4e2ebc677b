"""Data is known by its content: fingerprints, what is measured again, what a run refuses to go on with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import saccade
from data_helpers import encode, picture, write_folder, write_zip
from saccade.data import open_images
from saccade.data.corrupt import corruption
from saccade.data.decoded import Decoded
from saccade.errors import UserError
from saccade.evaluation.accuracy import evaluate
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.prediction_cache import Cache
from saccade.model import AdaptiveViT
from saccade.storage.files import part_beside
from saccade.tasks.detection.detection_data import read_coco
from saccade.tasks.image_text.image_text_data import open_pairs
from saccade.tasks.segmentation.segmentation_data import open_pixels

ARGS = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 2, "num_heads": 1}


def ppm(seed: int) -> bytes:
    """Always of the same length."""
    return encode(picture(20, 16, seed=seed), "PPM")


def photos(root: Path, classes: str = "abc", per: int = 6) -> Path:
    return write_folder(root, {f"{c}/{i}.ppm": ppm(10 * ord(c) + i) for c in classes for i in range(per)})


def tiny(classes: int = 3) -> AdaptiveViT:
    torch.manual_seed(0)
    return saccade.create_model("vit_tiny_patch16_224", num_classes=classes, **ARGS)


# Fingerprints


def test_a_folder_and_its_zip_are_the_same(tmp_path: Path) -> None:
    folder = photos(tmp_path / "f")
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.ppm")}
    known = open_images(folder).fingerprint()
    assert known == open_images(write_zip(tmp_path / "s.zip", files)).fingerprint()
    assert len(known) == 32


@pytest.mark.parametrize("archive", [False, True])
def test_other_pixels_of_the_same_size_are_noticed(tmp_path: Path, archive: bool) -> None:
    files = {f"a/{i}.ppm": ppm(i) for i in range(3)}
    write: Callable[[], Path] = lambda: (  # noqa: E731
        write_zip(tmp_path / "s.zip", files) if archive else write_folder(tmp_path / "s", files)
    )
    images = open_images(write())
    before = images.fingerprint()
    assert images.fingerprint() == before
    stat = os.stat(images.path / "a/1.ppm" if not archive else images.path)
    files["a/1.ppm"] = ppm(99)
    path = write() if not archive else images.path
    if archive:
        images.path.write_bytes(write_zip(tmp_path / "other.zip", files).read_bytes())
    os.utime(path / "a/1.ppm" if not archive else path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync -t does
    assert images.fingerprint() != before, "also of a set that was open"
    assert open_images(path).fingerprint() != before


def test_settled_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(photos(tmp_path))
    monkeypatch.setattr("saccade.data.store.SETTLED", -(10**12))
    before, reads = images.fingerprint(), []
    monkeypatch.setattr("saccade.data.store.read_regular", lambda path, limit: reads.append(path) or b"")
    assert images.fingerprint() == before and not reads
    assert images.subset([2, 1]).fingerprint() not in (before, images.subset([1, 2]).fingerprint())
    assert not reads


def test_a_renamed_class_and_a_new_one_are_noticed(tmp_path: Path) -> None:
    known = {open_images(photos(tmp_path / "s")).fingerprint()}
    (tmp_path / "s/a").rename(tmp_path / "s/d")
    known.add(open_images(tmp_path / "s").fingerprint())
    photos(tmp_path / "s", "e")
    part = [i for i, name in enumerate(open_images(tmp_path / "s").names) if not name.startswith("e/")]
    known.add(open_images(tmp_path / "s").subset(part).fingerprint())
    assert len(known) == 3


def test_labels_of_other_tasks_count_by_content(tmp_path: Path) -> None:
    files = {"images/1.ppm": ppm(1), "labels/1.png": encode(picture(20, 16, seed=1).convert("L"), "BMP")}
    scenes = write_folder(tmp_path / "pixels", files)
    same = [open_pixels(scenes, None, names, 255).fingerprint() for names in ("ab", "ab", "ba")]
    assert same[0] == same[1] != same[2]
    (scenes / "labels/1.png").write_bytes(encode(picture(20, 16, seed=2).convert("L"), "BMP"))
    assert open_pixels(scenes, None, "ab", 255).fingerprint() != same[0]

    write_folder(tmp_path / "texts", {"1.ppm": ppm(1), "1.txt": b"a cat"})
    said = open_pairs(tmp_path / "texts").fingerprint()
    write_folder(tmp_path / "texts", {"1.txt": b"a dog"})
    assert open_pairs(tmp_path / "texts").fingerprint() != said

    coco = {
        "images": [{"id": i, "file_name": "1.ppm", "width": 20, "height": 16} for i in range(2)],
        "annotations": [{"image_id": 0, "category_id": 1, "bbox": [0, 0, 5, 5]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    write_folder(tmp_path / "texts", {"c.json": json.dumps(coco).encode()})
    boxes = read_coco(tmp_path / "texts/c.json")
    coco["annotations"][0]["bbox"] = [0, 0, 5, 6]  # type: ignore[index]
    write_folder(tmp_path / "texts", {"c.json": json.dumps(coco).encode()})
    moved = read_coco(tmp_path / "texts/c.json")
    assert moved.fingerprint() != boxes.fingerprint()
    assert moved.subset([0]).fingerprint() != boxes.subset([0]).fingerprint()


# What is decoded once


def test_decoded_images_are_of_these_pixels_and_leave_nothing_behind(tmp_path: Path) -> None:
    data, cache = photos(tmp_path / "s"), tmp_path / "c"
    before = Decoded.make(open_images(data), 16, cache)
    dead = subprocess.Popen(["true"])
    dead.wait()
    alive, orphan = part_beside(before.file), part_beside(before.file)
    orphan = orphan.with_name(orphan.name.replace(f".{os.getpid()}.", f".{dead.pid}."))
    for part in (alive, orphan):
        part.write_bytes(bytes(100))
    (data / "a/1.ppm").write_bytes(ppm(99))
    after = Decoded.make(open_images(data), 16, cache)
    assert not np.array_equal(after.array(1), before.array(1))
    assert np.array_equal(after.array(2), before.array(2))
    assert not orphan.exists(), "of a process that is dead"
    assert alive.exists(), "of one that may still write"


# What is measured again


def test_what_is_kept_is_of_these_pixels(tmp_path: Path) -> None:
    data, model = photos(tmp_path / "s"), tiny()
    before = evaluate(model, str(data), ["evit(0.5)"], cache=tmp_path / "c")[0]
    for i in range(6):
        (data / f"a/{i}.ppm").write_bytes(ppm(500 + i))
    kept, fresh = (evaluate(model, str(data), ["evit(0.5)"], cache=tmp_path / c)[0] for c in ("c", "d"))
    assert kept == fresh != before


def test_all_that_decides_a_prediction_is_in_its_name(tmp_path: Path) -> None:
    model, images = tiny(), open_images(photos(tmp_path / "s"))
    renamed = tiny()
    saccade.backbones.vit.set_class_names(renamed.vit, ["c", "b", "a"])
    judges = [
        Evaluator(model, images),
        Evaluator(model, images, batch=4),
        Evaluator(model, images, corrupt=corruption("masks:5")),
        Evaluator(tiny().double(), images),
        Evaluator(renamed, images),
    ]
    names = [Cache.of(tmp_path, judge).folder for judge in judges]
    assert len(set(names)) == len(names)
    assert Cache.of(tmp_path, Evaluator(tiny(), images)).folder == names[0]


# What a run goes on with


def run(data: Path, out: Path, resume: bool = False, steps: int = 2) -> None:
    config = {
        "model": {"args": ARGS},
        "data": {"path": str(data), "workers": 0, "holdout": 0.3},
        "run": {"steps": steps, "batch": 4, "device": "cpu"},
    }
    saccade.train(config, out=out, resume=resume)


def rename(data: Path) -> None:
    (data / "a").rename(data / "z")


def add(data: Path) -> None:
    shutil.copytree(data / "a", data / "d")


def take(data: Path) -> None:
    shutil.rmtree(data / "c")


def redraw(data: Path) -> None:
    (data / "b/1.ppm").write_bytes(ppm(77))


def more(data: Path) -> None:
    (data / "b/9.ppm").write_bytes(ppm(78))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("done")
    run(photos(root / "data"), root / "out")
    return root


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename, "class a is gone and z is new"),
        (add, "d is new"),
        (take, "class c is gone"),
        (redraw, "the content of some is not what it was"),
        (more, "then, 1"),
    ],
)
def test_a_run_is_not_resumed_on_other_data(done: Path, tmp_path: Path, change: Callable, said: str) -> None:
    root = shutil.copytree(done, tmp_path / "r")
    files = {path: path.read_bytes() for path in (root / "out").rglob("*") if path.is_file()}
    config = json.loads((root / "out/config.json").read_text())
    assert config["data"]["path"] == str(done / "data")
    change(root / "data")
    (done / "data").rename(done / "away")  # the config names the path: change what lies there
    try:
        shutil.copytree(root / "data", done / "data")
        with pytest.raises(UserError, match=said) as error:
            run(done / "data", root / "out", resume=True)
        assert "\n" not in str(error.value)
    finally:
        shutil.rmtree(done / "data")
        (done / "away").rename(done / "data")
    assert {path: path.read_bytes() for path in (root / "out").rglob("*") if path.is_file()} == files


def test_a_finished_run_is_resumed_to_the_same_model(done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done / "out", tmp_path / "out")
    config, weights = ((done / "out/model" / name).read_bytes() for name in ("config.json", "model.safetensors"))
    run(done / "data", out, resume=True)
    assert (out / "model/model.safetensors").read_bytes() == weights
    assert (out / "model/config.json").read_bytes() == config
    assert saccade.load(out / "model").class_names == ("a", "b", "c")


def test_a_run_that_noted_no_data_is_not_resumed(done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done / "out", tmp_path / "out")
    (file,) = out.glob("checkpoints/last-*/state.json")
    facts = json.loads(file.read_text())
    del facts["data"], facts["seal"]  # an earlier version wrote neither
    file.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="begun by an earlier version"):
        run(done / "data", out, resume=True)


# Teachers


def taught(tmp_path: Path, names: list[str], **rule: object) -> Path:
    teacher = tiny(len(names))
    saccade.backbones.vit.set_class_names(teacher.vit, names)
    teacher.save(tmp_path / "teacher")
    config = {
        "model": {"args": ARGS},
        "data": {"path": str(photos(tmp_path / "s")), "workers": 0, "holdout": 0.3},
        "distill": {"teacher": str(tmp_path / "teacher"), **rule},
        "run": {"steps": 1, "batch": 4, "device": "cpu"},
    }
    saccade.train(config, out=tmp_path / "out")
    return tmp_path / "out"


def test_a_teacher_is_asked_by_name(tmp_path: Path) -> None:
    from saccade.data import Preprocess
    from saccade.training.loss import Teacher

    module = tiny().vit
    plain, ordered = (Teacher(module, Preprocess.of(module), order) for order in (None, [2, 0]))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ordered(images).logits, plain(images).logits[:, [2, 0]])
    assert taught(tmp_path, ["x", "c", "b", "a"]).exists(), "more classes than the student's, in another order"


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not all of the student's \(a, b, c\) are among the teacher's \(a, b, d\)"):
        taught(tmp_path, ["a", "b", "d"])
    with pytest.raises(UserError, match=r"distill.init: .* in the same order"):
        taught(tmp_path, ["c", "b", "a"], init=True)
