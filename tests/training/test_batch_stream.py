"""Training batches: pure in (seed, step) for any ranks, workers and start; decoded files; augmentation; bad images."""

from __future__ import annotations

import multiprocessing
import pickle
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from data_helpers import encode, picture, write_folder, write_zip
from saccade.data import ImageSet, open_images
from saccade.data.decoded import Decoded, estimated_bytes
from saccade.errors import UserError
from saccade.tasks.classification.classification_task import Labelled
from saccade.terminal.progress import Progress
from saccade.training.augmentation import Augment, isolated
from saccade.training.batch_stream import BatchStream, Views, throughput

SIZE = (24, 32)
MEAN = (0.5, 0.4, 0.3)
SMALL = Augment(rand_augment="rand-m9-mstd0.5-inc1", vflip=0.3)  # draws from all three generators


def files(count: int, **extra: bytes) -> dict[str, bytes]:
    """``count`` images of changing sizes in three classes, and ``extra`` ones by letter."""
    made = {f"{i % 3}/{i:02}.png": encode(picture(40 + i, 60 - i, seed=i)) for i in range(count)}
    return made | {f"0/{name}.png": data for name, data in extra.items()}


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return open_images(write_folder(tmp_path / "set", files(12)))


def feed(images: ImageSet, batch: int = 4, seed: int = 3, workers: int = 0, **options) -> BatchStream:
    assert images.labels is not None
    view = options.pop("augment", SMALL).view(SIZE, "bilinear", MEAN)
    examples = Labelled(images, images.labels, view, options.pop("decoded", None))
    return BatchStream(examples, batch=batch, seed=seed, workers=workers, **options)


def same(left: Sequence[Views], right: Sequence[Views]) -> bool:
    return len(left) == len(right) and all(
        a.indices == b.indices and torch.equal(a.labels, b.labels) and torch.equal(a.images, b.images)
        for a, b in zip(left, right, strict=True)
    )


def states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# --- order and purity -------------------------------------------------------------------------------------------------


def test_shapes_and_labels(images):
    for views in feed(images).run(0, 3):
        assert views.images.shape == (4, 3, *SIZE) and views.images.dtype == torch.uint8
        assert views.labels.dtype == torch.int64
        assert views.labels.tolist() == [images.labels[i] for i in views.indices]


def test_two_feeds_agree_and_seeds_and_steps_differ(images):
    first = list(feed(images).run(0, 7))
    assert same(first, list(feed(images).run(0, 7)))
    other = list(feed(images, seed=4).run(0, 7))
    assert not any(same([a], [b]) for a, b in zip(first, other, strict=True))
    assert [v.indices for v in first] != [v.indices for v in other]
    assert len({v.images.numpy().tobytes() for v in first}) == 7


def test_the_views_of_one_image_differ_between_epochs_and_neighbours(tmp_path):
    one = encode(picture(50, 40))
    images = open_images(write_folder(tmp_path / "set", {f"a/{i}.png": one for i in range(4)}))
    views = torch.cat([v.images for v in feed(images, batch=2, augment=Augment()).run(0, 4)])
    assert len({view.numpy().tobytes() for view in views}) == 8


def test_every_image_once_an_epoch_in_another_order(images):
    it = feed(images)
    assert it.steps == 3
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in it.places(step)] for e in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_places_are_those_of_run(images):
    it = feed(images, batch=5)
    assert it.steps == 2
    assert [v.indices for v in it.run(0, 5)] == [it.places(step) for step in range(5)]
    assert it.places(1) == feed(images, batch=5).places(1)  # not only in a row


def test_labels_can_be_others_than_the_folders(images):
    examples = Labelled(images, list(range(100, 112)), SMALL.view(SIZE, "bilinear", MEAN))
    it = BatchStream(examples, batch=4, seed=0, workers=0)
    views = next(it.run(0, 1))
    assert views.labels.tolist() == [100 + i for i in views.indices]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_global_batch(images, world):
    whole = list(feed(images).run(0, 5))
    ranks = [list(feed(images, rank=r, world=world).run(0, 5)) for r in range(world)]
    joined = [
        Views(
            torch.cat([v.images for v in parts]),
            torch.cat([v.labels for v in parts]),
            [i for v in parts for i in v.indices],
        )
        for parts in zip(*ranks, strict=True)
    ]
    assert same(joined, whole)
    assert all(len(v.indices) == 4 // world for v in ranks[0])


@pytest.mark.parametrize("start", [1, 4, 5, 11])
def test_a_resumed_run_goes_on_as_if_never_stopped(images, start):
    whole = list(feed(images).run(0, 12))  # epochs of 3 steps
    assert same(list(feed(images).run(start, 12)), whole[start:])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(images, workers):
    whole = list(feed(images).run(0, 8))
    assert same(list(feed(images, workers=workers).run(0, 8)), whole)
    assert same(list(feed(images, workers=workers, rank=1, world=2).run(2, 8)), halves(whole[2:]))


def halves(batches: Sequence[Views]) -> list[Views]:
    return [Views(v.images[2:], v.labels[2:], v.indices[2:]) for v in batches]


def test_a_set_smaller_than_a_batch_is_gone_round(images):
    few = images.subset([1, 5, 7])
    it = feed(few, batch=8)
    assert it.steps == 1
    views = next(it.run(0, 1))
    assert views.indices == it.places(0) and sorted(set(views.indices)) == [0, 1, 2]
    assert sorted(np.bincount(views.indices).tolist()) == [2, 3, 3]
    assert len({view.numpy().tobytes() for view in views.images}) == 8  # seen anew each time


def test_run_leaves_the_callers_generators_alone(images):
    before = states()
    it = feed(images)
    assert states() == before
    inside = []
    for _ in it.run(0, 3):
        inside.append(states() == before)
    list(feed(images, workers=1).run(0, 2))
    assert inside == [True] * 3 and states() == before


def test_the_callers_generators_leave_run_alone(images):
    whole = list(feed(images).run(0, 3))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert same(list(feed(images).run(0, 3)), whole)


@pytest.mark.parametrize("how", ["close", "raise"])
def test_workers_are_gone_when_the_run_is(images, how):
    before = set(multiprocessing.active_children())
    run = feed(images, workers=2).run(0, 100)
    next(run)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 2
    if how == "close":
        run.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            run.throw(KeyboardInterrupt)
    assert not set(multiprocessing.active_children()) - before


def test_an_error_of_the_view_comes_through(images):
    it = BatchStream(Labelled(images, images.labels, Fragile()), batch=4, seed=0, workers=1)
    before = set(multiprocessing.active_children())
    with pytest.raises(ZeroDivisionError):
        list(it.run(0, 3))
    assert not set(multiprocessing.active_children()) - before


class Fragile:
    def __call__(self, image: Image.Image) -> torch.Tensor:
        if image.width != 64:
            raise ZeroDivisionError("broken view")
        return torch.zeros(3, 2, 2, dtype=torch.uint8)


def test_waiting_is_counted(images):
    it = feed(images)
    assert it.waited == 0
    list(it.run(0, 2))
    once = it.waited
    assert once > 0
    it.waited = 0.0
    assert throughput(it, 2) > 0 and it.waited == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 5, "world": 2}, ["5", "2"]),
        ({"batch": 0}, ["0"]),
        ({"rank": 2, "world": 2}, ["rank 2"]),
        ({"rank": -1}, ["rank -1"]),
        ({"workers": -1}, ["-1 workers"]),
    ],
)
def test_bad_options_are_named(images, options, words):
    with pytest.raises(UserError) as error:
        feed(images, **options)
    assert all(word in str(error.value) for word in words)


def test_labels_of_another_length_are_refused(images):
    with pytest.raises(ValueError, match="2 labels"):
        Labelled(images, [0, 1], SMALL.view(SIZE, "bilinear", MEAN))


# --- bad images -------------------------------------------------------------------------------------------------------

WHOLE = encode(picture(60, 50, seed=99), "JPEG")
BROKEN = {"cut": WHOLE[: len(WHOLE) // 2], "empty": b"", "text": b"not an image"}


@pytest.fixture
def mixed(tmp_path: Path) -> ImageSet:
    return open_images(write_folder(tmp_path / "mixed", files(9, **BROKEN)))


def bad_places(images: ImageSet) -> set[int]:
    return {i for i, name in enumerate(images.names) if name[2:-4] in BROKEN}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_of_their_batch_and_named_once(mixed, workers):
    it = feed(mixed, workers=workers)
    assert len(it.failures) == 0
    bad = bad_places(mixed)
    assert len(bad) == 3
    for step, views in enumerate(it.run(0, 6)):  # two epochs
        assert views.indices == [i for i in it.places(step) if i not in bad]
        assert views.images.shape == (len(views.indices), 3, *SIZE) and len(views.labels) == len(views.indices)
    assert {name for name, _ in it.failures.items} == {mixed.names[i] for i in bad}
    assert len(it.failures) == 3 and "3 of 12" in str(it.failures) and "empty file" in str(it.failures)


def test_failures_do_not_move_the_other_views(tmp_path):
    names = {f"a/{i}.png": encode(picture(50, 40, seed=i)) for i in range(4)}
    whole = next(feed(open_images(write_folder(tmp_path / "whole", names)), augment=Augment()).run(0, 1))
    holed = open_images(write_folder(tmp_path / "holed", names | {"a/2.png": b""}))
    views = next(feed(holed, augment=Augment()).run(0, 1))
    keep = [row for row, place in enumerate(whole.indices) if place != 2]
    assert len(keep) == 3 and torch.equal(views.images, whole.images[keep])


def test_a_batch_can_be_empty(mixed):
    it = feed(mixed, batch=1)
    bad = bad_places(mixed)
    for step, views in enumerate(it.run(0, 12)):
        if it.places(step)[0] in bad:
            assert views.images.shape == (0, 3, *SIZE) and views.images.dtype == torch.uint8
            assert views.labels.shape == (0,) and views.labels.dtype == torch.int64 and views.indices == []
        else:
            assert len(views.indices) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_an_error_that_says_why(tmp_path, workers):
    images = open_images(write_folder(tmp_path / "bad", {f"a/{i}.png": b"" for i in range(4)}))
    it = feed(images, batch=2, workers=workers)
    seen = []
    with pytest.raises(UserError, match=r"4 of 4 images could not be read: a/0.png \(empty file\)"):
        seen.extend(it.run(0, 10))
    assert len(seen) == 2  # an epoch


def test_one_rank_without_an_image_does_not_stop(tmp_path):
    images = open_images(write_folder(tmp_path / "half", {"a/0.png": b"", "a/1.png": encode(picture())}))
    ranks = [[v.indices for v in feed(images, batch=2, rank=r, world=2).run(0, 6)] for r in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == [[1]] * 6
    assert [] in ranks[0] and [] in ranks[1]


def test_images_that_failed_in_decoding_are_in_no_batch(mixed, tmp_path):
    decoded = Decoded.make(mixed, 80, tmp_path / "cache", workers=2)
    it = feed(mixed, batch=3, decoded=decoded)
    good = sorted(set(range(12)) - bad_places(mixed))
    assert it.steps == 3 and sorted(i for step in range(3) for i in it.places(step)) == good
    assert len(it.failures) == 3
    batches = list(it.run(0, 6))
    assert all(len(v.indices) == 3 for v in batches) and len(it.failures) == 3
    assert same(list(feed(mixed, batch=3, decoded=decoded, workers=2).run(0, 6)), batches)


def test_nothing_decoded_is_an_error_that_says_why(tmp_path):
    images = open_images(write_folder(tmp_path / "bad", {f"a/{i}.png": b"" for i in range(4)}))
    decoded = Decoded.make(images, 80, tmp_path / "cache", workers=1)
    with pytest.raises(UserError, match=r"4 of 4 images could not be read: a/0.png \(empty file\)"):
        feed(images, decoded=decoded)


# --- decoded once -----------------------------------------------------------------------------------------------------


def test_decoded_is_direct_decoding_up_to_the_side(images, tmp_path):
    decoded = Decoded.make(images, 60, tmp_path / "cache", workers=2)
    assert len(decoded) == 12 and not decoded.failures
    for i in range(12):
        assert np.array_equal(decoded.array(i), np.asarray(images.read(i)))
    assert same(list(feed(images, decoded=decoded).run(0, 3)), list(feed(images).run(0, 3)))


def test_larger_images_are_scaled_down_and_none_up(tmp_path):
    made = {"a.png": encode(picture(100, 50)), "b.png": encode(picture(50, 101)), "c.png": encode(picture(20, 10))}
    images = open_images(write_folder(tmp_path / "set", made))
    decoded = Decoded.make(images, 25, tmp_path / "cache", workers=2)
    assert decoded.sizes.tolist() == [[25, 50], [50, 25], [10, 20]]
    direct = np.asarray(images.read(0)).reshape(25, 2, 50, 2, 3).mean((1, 3))
    assert np.abs(decoded.array(0) - direct).mean() < 3
    assert np.abs(decoded.array(0)[::-1] - direct).mean() > 10  # the picture is not alike upside down


def test_decoded_travels_and_is_not_copied(images, tmp_path):
    decoded = Decoded.make(images, 60, tmp_path / "cache", workers=2)
    array = decoded.array(3)
    assert not array.flags.writeable and not array.flags.owndata
    data = pickle.dumps(decoded)
    assert len(data) < 3000 < decoded.file.stat().st_size
    assert np.array_equal(pickle.loads(data).array(3), array)


def test_decoding_is_done_once(images, tmp_path):
    first = Decoded.make(images, 20, tmp_path / "cache", workers=1)
    stamp = first.file.stat()
    again = Decoded.make(images, 20, tmp_path / "cache", workers=1)
    assert (again.file.stat().st_mtime_ns, again.file.stat().st_ino) == (stamp.st_mtime_ns, stamp.st_ino)
    packed = open_images(write_zip(tmp_path / "set.zip", files(12)))
    assert Decoded.make(packed, 20, tmp_path / "cache", workers=1).file == first.file


def test_other_sets_and_sides_are_other_files(images, tmp_path):
    sets = [(images, 20), (images, 21), (images.subset(range(6)), 20), (images.subset(range(11, -1, -1)), 20)]
    made = [Decoded.make(subset, side, tmp_path / "cache", workers=1) for subset, side in sets]
    assert len({decoded.file for decoded in made}) == 4
    assert made[3].sizes.tolist() == made[0].sizes.tolist()[::-1]


@pytest.mark.parametrize("cut", [1, 100, 5000, 10**9])
def test_a_truncated_file_is_made_anew(images, tmp_path, cut):
    file = Decoded.make(images, 20, tmp_path / "cache", workers=1).file
    whole = file.read_bytes()
    file.write_bytes(whole[: max(0, len(whole) - cut)])
    again = Decoded.make(images, 20, tmp_path / "cache", workers=1)
    assert again.file == file and file.read_bytes() == whole


def test_a_file_of_something_else_is_made_anew(images, tmp_path):
    right = Decoded.make(images, 20, tmp_path / "cache", workers=1)
    wanted = right.file.read_bytes()
    other = Decoded.make(images.subset([0]), 20, tmp_path / "other", workers=1)
    right.file.write_bytes(other.file.read_bytes())
    assert len(Decoded.make(images, 20, tmp_path / "cache", workers=1)) == 12
    assert right.file.read_bytes() == wanted


def test_failed_images_are_tried_again(tmp_path):
    root = write_folder(tmp_path / "set", files(3))
    images = open_images(root)
    good = (root / images.names[1]).read_bytes()
    (root / images.names[1]).write_bytes(bytes(len(good)))
    first = Decoded.make(images, 80, tmp_path / "cache", workers=1)
    assert list(first.failures) == [images.names[1]]
    with pytest.raises(KeyError):
        first.array(1)
    (root / images.names[1]).write_bytes(good)
    second = Decoded.make(images, 80, tmp_path / "cache", workers=1)
    assert not second.failures and np.array_equal(second.array(1), np.asarray(images.read(1)))


def test_an_interrupted_build_leaves_nothing(images, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    read, count = ImageSet.read, iter(range(100))

    def interrupt(self, i):
        if next(count) == 5:
            assert len(list(folder.iterdir())) == 1  # it had begun
            raise KeyboardInterrupt
        return read(self, i)

    monkeypatch.setattr(ImageSet, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Decoded.make(images, 20, folder, workers=1, progress=Progress())
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    assert len(Decoded.make(images, 20, folder, workers=1)) == 12


def test_two_processes_may_build_the_same(images, tmp_path):
    folder = tmp_path / "cache"
    with multiprocessing.get_context("fork").Pool(2) as pool:
        made = pool.starmap(build, [(images, folder)] * 2, chunksize=1)
    assert made[0] == made[1] == [np.asarray(images.read(i)).tobytes() for i in range(12)]
    assert len(list(folder.iterdir())) == 1


def build(images: ImageSet, folder: Path) -> list[bytes]:
    torch.set_num_threads(1)
    decoded = Decoded.make(images, 60, folder, workers=2)
    return [decoded.array(i).tobytes() for i in range(len(decoded))]


def test_a_folder_that_is_none_and_a_side_that_is_none(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        Decoded.make(images, 20, tmp_path / "file", workers=1)
    with pytest.raises(UserError, match="side 0"):
        Decoded.make(images, 0, tmp_path / "cache", workers=1)
    assert estimated_bytes(images, 20) == 12 * 20 * 20 * 4


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_isolated_restores_the_generators_also_after_an_error():
    random.gauss(0, 1)  # keeps a second value in its state
    before = states()
    with isolated(1, 2):
        random.random(), np.random.rand(), torch.rand(1), np.random.normal()
    assert states() == before
    with pytest.raises(ZeroDivisionError), isolated(1):
        raise ZeroDivisionError
    assert states() == before


def test_isolated_depends_on_the_whole_key_alone():
    def draw(*key: int) -> tuple:
        with isolated(*key):
            return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(1, 2) == draw(1, 2)
    draws = [draw(*key) for key in [(), (0,), (1,), (1, 0), (0, 1), (1, 2), (2**32,), (0, 0, 1), (-1,)]]
    assert all(len(set(column)) == len(draws) for column in zip(*draws, strict=True))


def batch(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 20, generator=generator), torch.arange(count) % 5


MIXES = [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("mixes", MIXES)
def test_mixing_is_pure_and_its_targets_sum_to_one(mixes, count):
    images, labels = batch(count)
    kept, before = images.clone(), states()
    augment = Augment(**mixes)
    mixed, targets = augment.batch(images, labels, 5, 0.1, (3, 4))
    assert mixed.shape == images.shape and targets.shape == (count, 5) and targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(count))
    again = augment.batch(images, labels, 5, 0.1, (3, 4))
    assert torch.equal(again[0], mixed) and torch.equal(again[1], targets)
    assert torch.equal(images, kept) and states() == before
    if count > 1:
        assert not torch.equal(augment.batch(images, labels, 5, 0.1, (3, 5))[1], targets)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_mixup_mixes_pixels_as_it_mixes_targets(count):
    # Image i is the constant i with label i, so that the targets' mean label must be the mixed pixel.
    images = torch.arange(count).float().reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    mixed, targets = Augment(mixup=1.0).batch(images, torch.arange(count), count, 0.0, (1,))
    assert torch.allclose(mixed[:, 0, 0, 0], targets @ torch.arange(count).float(), atol=1e-5)
    assert (targets > 0).sum(1).tolist() == [2] * count  # also the middle and the last of an odd batch


@pytest.mark.parametrize("count", [2, 5])
def test_cutmix_mixes_areas_as_it_mixes_targets(count):
    images = torch.arange(count).float().reshape(-1, 1, 1, 1).expand(-1, 3, 10, 10)
    cut, targets = Augment(cutmix=1.0).batch(images, torch.arange(count), count, 0.0, (2,))
    areas = torch.stack([(cut[:, 0] == label).float().mean((1, 2)) for label in range(count)], 1)
    assert torch.allclose(areas, targets, atol=1e-6) and 0 < float(areas.max()) < 1


def test_erasing_is_pure_and_leaves_targets():
    images, labels = batch(8)
    kept, before = images.clone(), states()
    augment = Augment(erase=0.5)
    erased, targets = augment.batch(images, labels, 5, 0.0, (7,))
    touched = (erased != images).flatten(1).any(1)
    assert 0 < int(touched.sum()) < 8
    assert torch.equal(targets, torch.eye(5)[labels])
    assert torch.equal(augment.batch(images, labels, 5, 0.0, (7,))[0], erased)
    assert not torch.equal(augment.batch(images, labels, 5, 0.0, (8,))[0], erased)
    assert torch.equal(images, kept) and states() == before


@pytest.mark.parametrize("off", [{}, {"mixup": 0.8, "mix_prob": 0.0}])
def test_all_off_is_the_same_images_and_smoothed_labels(off):
    images, labels = batch(4)
    same_images, targets = Augment(**off).batch(images, labels, 5, 0.1, (0,))
    assert same_images is images
    assert torch.allclose(targets, torch.eye(5)[labels] * 0.9 + 0.02)


def test_an_empty_batch_stays_empty():
    images, targets = Augment(mixup=1.0, erase=1.0).batch(torch.empty(0, 3, 4, 4), torch.empty(0).long(), 5, 0.1, (0,))
    assert images.shape == (0, 3, 4, 4) and targets.shape == (0, 5)


def test_views_of_the_plainest_settings_show_the_image():
    image = picture(32, 24)
    plain = Augment(scale=(1, 1), ratio=(4 / 3, 4 / 3), hflip=0.0).view(SIZE, "bilinear", MEAN)
    direct = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    with isolated(0):
        assert torch.equal(plain(image), direct)
    flipped = Augment(scale=(1, 1), ratio=(4 / 3, 4 / 3), hflip=1.0, vflip=1.0).view(SIZE, "bilinear", MEAN)
    assert torch.equal(flipped(image), direct.flip(1, 2))


@pytest.mark.parametrize("text", ["rand-m10", "rand-m10-inc1", "rand-m0", "rand-m30-mmax40-inc1", "rand-m9-mstd101"])
def test_rand_augment_works_at_any_strength(text):
    view = Augment(rand_augment=text).view(SIZE, "bilinear", MEAN)
    for i in range(150):  # each of 15 operations, 20 times and for half of them
        with isolated(i):
            assert pickle.loads(pickle.dumps(view))(picture(seed=i)).shape == (3, *SIZE)


@pytest.mark.parametrize(
    "settings",
    [
        *({name: value} for name in ("hflip", "vflip", "erase", "mix_prob") for value in (-0.1, 1.1, float("nan"))),
        *({name: value} for name in ("mixup", "cutmix") for value in (-1, float("inf"), float("nan"))),
        {"scale": (0, 1)},
        {"scale": (0.5, 1.5)},
        {"scale": (0.9, 0.5)},
        {"ratio": (-1, 1)},
        {"ratio": (1, float("inf"))},
        {"color_jitter": -0.5},
        {"rand_augment": "rand-x9"},
        {"rand_augment": "augmix-m3"},
        {"rand_augment": "rand-m9", "color_jitter": 0.4},
    ],
)
def test_bad_settings_are_named_with_a_remedy(settings):
    with pytest.raises(ValidationError) as error:
        Augment(**settings)
    (only,) = error.value.errors()
    values = [part for value in settings.values() for part in (value if isinstance(value, tuple) else [value])]
    assert all(str(value) in only["msg"] for value in values) and ("give" in only["msg"] or "set" in only["msg"])


def test_settings_are_frozen_and_known():
    with pytest.raises(ValidationError):
        Augment(flip=1.0)
    with pytest.raises(ValidationError):
        Augment().hflip = 1.0
    assert Augment.model_validate_json(SMALL.model_dump_json()) == SMALL
