"""A run that is stopped, killed or spread over processes gives the same weights as one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import saccade
from data_helpers import encode, picture, write_folder
from saccade.errors import UserError
from saccade.training.augmentation import isolated
from saccade.training.checkpoints import newest, read_state
from saccade.training.logging import read_table

HERE = Path(__file__).parents[1]
ARGS = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32, "patch_size": 8, "drop_path_rate": 0.2}
RUN = {"steps": 12, "batch": 8, "save_every": 4, "log_every": 2, "device": "cpu", "check_every": 1.0}


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("photos")
    names = [f"{'abc'[i % 3]}/{i:02d}.png" for i in range(48)]
    return str(write_folder(root, {name: encode(picture(40, 36, seed=i)) for i, name in enumerate(names)}))


def config(photos: str, **sections) -> dict:
    base = {
        "model": {"args": ARGS},
        "data": {"path": photos, "workers": 0, "holdout": 0.2},
        "sampling": {"settings": ["dense", "evit(0.5)", "grid(16)"], "every": ["largest"]},
        "distill": {"teacher": "self"},
        "augment": {"mixup": 0.2, "erase": 0.3, "rand_augment": "rand-m5"},
        "optim": {"ema": 0.9, "smoothing": 0.1, "lr": 1e-3},
        "run": RUN,
    }
    return {name: {**values, **sections.get(name, {})} for name, values in base.items()}


def state(folder: Path) -> dict[str, torch.Tensor]:
    return read_state(newest(folder / "checkpoints", "last"))[0]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def whole(photos, tmp_path_factory) -> tuple[saccade.training.train.Trained, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return saccade.train(config(photos), out=folder), folder


def test_a_run_leaves_what_it_promises(whole, photos):
    trained, folder = whole
    assert {p.name for p in folder.iterdir()} >= {"config.json", "metrics.csv", "checks.csv", "report.html", "model"}
    rows = read_table(folder / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert all(
        {"loss", "loss/label", "loss/teacher", "lr", "grad_norm", "images_per_s", "wait", "gmacs"} <= r.keys()
        for r in rows
    )
    assert rows[-1]["gmacs"] == pytest.approx(trained.gmacs, rel=1e-6) and trained.seconds > 0
    assert {c.setting for c in trained.checks} == {"dense", "evit(0.5)", "grid(16)"}
    opened = saccade.load(folder / "model")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(opened(images).logits, trained.model(images).logits) and opened.vit.num_classes == 3
    card = json.loads((folder / "model" / "config.json").read_text())["saccade"]
    assert card["classes"] == ["a", "b", "c"] and card["settings"] == ["dense", "evit(0.5)", "grid(16)"]
    scores, _ = saccade.eval(opened, photos, ["evit(0.5)"])
    assert scores[0].images == 48


def test_macs_spent_are_three_forwards_of_what_was_drawn(whole):
    trained, folder = whole
    shares = json.loads((newest(folder / "checkpoints", "last") / "state.json").read_text())["spent"]
    images = torch.zeros(1, 3, 32, 32)
    dense = trained.model.at("dense").eval()(images).trace.macs().item()
    assert shares[0] == pytest.approx(12 * 8 * 3 * dense / 1e9, rel=1e-9)  # the largest runs in every step
    assert 0 < sum(shares[1:]) < shares[0]


def test_resumed_equals_uninterrupted_bit_for_bit(whole, photos, tmp_path):
    out, steps = tmp_path / "run", []

    class Stop(Exception):
        pass

    import saccade.training.train as script

    real = script.TrainStep.step

    def until(limit: int):
        def step(self, number, *args):
            steps.append(number)
            if number == limit:
                raise Stop
            return real(self, number, *args)

        return step

    for limit in (6, 9):  # each dies after a checkpoint and in the middle of the steps to the next
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(script.TrainStep, "step", until(limit))
            saccade.train(config(photos), out=out, resume=True)
    trained = saccade.train(config(photos), out=out, resume=True)
    assert steps == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9]
    assert equal(state(out), state(whole[1])) and trained.gmacs == pytest.approx(whole[0].gmacs, rel=1e-12)
    kept = ("step", "loss", "loss/label", "loss/teacher", "lr", "grad_norm", "gmacs")
    tables = [[{k: row[k] for k in kept} for row in read_table(f / "metrics.csv")] for f in (out, whole[1])]
    assert tables[0] == tables[1]
    assert read_table(out / "checks.csv") == read_table(whole[1] / "checks.csv")


def test_other_seeds_and_settings_train_other_weights(whole, photos, tmp_path):
    saccade.train(config(photos, run={"seed": 1}), out=tmp_path / "run")
    assert not equal(state(tmp_path / "run"), state(whole[1]))


def test_ctrl_c_stops_after_a_checkpoint_and_goes_on(whole, photos, tmp_path):
    import saccade.training.train as script

    out, real = tmp_path / "run", script.TrainStep.step

    def step(self, number, *args):
        if number == 6:
            signal.raise_signal(signal.SIGINT)
        return real(self, number, *args)

    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script.TrainStep, "step", step)
        saccade.train(config(photos), out=out)
    assert signal.getsignal(signal.SIGINT) is before
    assert newest(out / "checkpoints", "last").name == "last-00000007"
    saccade.train(config(photos), out=out, resume=True)
    assert equal(state(out), state(whole[1]))


def test_a_folder_with_a_run_is_not_overwritten(whole, photos):
    with pytest.raises(UserError, match="--resume"):
        saccade.train(config(photos), out=whole[1])
    with pytest.raises(UserError, match=r"optim\.lr"):
        saccade.train(config(photos, optim={"lr": 2e-3}), out=whole[1], resume=True)


def test_training_leaves_the_callers_random_numbers_alone(photos, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    saccade.train(config(photos, run={"steps": 1}), out=tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)


def test_training_in_a_thread(photos, tmp_path):
    found = []
    job = threading.Thread(
        target=lambda: found.append(saccade.train(config(photos, run={"steps": 2}), out=tmp_path / "run"))
    )
    job.start()
    job.join()
    assert found[0].step == 2


def test_a_loss_that_is_not_finite_ends_the_run(photos, tmp_path):
    with pytest.raises(UserError, match=r"lower optim\.lr"):
        saccade.train(config(photos, optim={"lr": 1e30, "clip": 0.0, "warmup": 0.0, "ema": 0.0}), out=tmp_path / "run")


def test_corrupt_images_are_left_out_counted_and_named(photos, tmp_path):
    folder = tmp_path / "photos"
    for path in Path(photos).rglob("*.png"):
        target = folder / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (folder / "a" / "bad.png").write_bytes(b"not an image")
    for cache in (4.0, 0.0):
        settled = config(str(folder), data={"cache_gb": cache, "holdout": 0.0}, run={"steps": 7})
        trained = saccade.train(settled, out=tmp_path / f"run{cache}")
        assert list(trained.failures) == ["a/bad.png"] and trained.checks == []


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"accumulate": 2}},
        {"run": {"checkpointing": True}},
    ],
    ids=str,
)
def test_memory_savers_change_nothing_but_rounding(change, photos, tmp_path):
    plain = {"model": {"args": {**ARGS, "drop_path_rate": 0.0}}, "run": {"steps": 3}, "augment": {"mixup": 0.0}}
    other = {**plain, **{name: {**plain.get(name, {}), **values} for name, values in change.items()}}
    saccade.train(config(photos, **plain), out=tmp_path / "a")
    saccade.train(config(photos, **other), out=tmp_path / "b")
    losses = [[row["loss"] for row in read_table(tmp_path / n / "metrics.csv")] for n in "ab"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_bf16_learns(photos, tmp_path):
    trained = saccade.train(config(photos, run={"precision": "bf16", "steps": 4}), out=tmp_path / "run")
    assert trained.model.vit.head.weight.dtype == torch.float32
    assert all(0 < row["loss"] < 5 for row in read_table(tmp_path / "run" / "metrics.csv"))


def test_freezing_keeps_the_backbone_for_its_epochs(photos, tmp_path):
    settled = config(photos, optim={"freeze": 100.0, "ema": 0.0}, run={"steps": 4})
    trained = saccade.train(settled, out=tmp_path / "run")
    with isolated(0):  # the seed of the run makes the same start; the head is renewed for three classes
        before = saccade.create_model("vit_tiny_patch16_224", **ARGS).vit.state_dict()
    after = trained.model.vit.state_dict()
    moved = [k for k in before if before[k].shape == after[k].shape and not torch.equal(before[k], after[k])]
    assert moved == []
    assert after["head.weight"].abs().sum() > 0


def test_distilling_from_a_folder_starts_equal_to_it(whole, photos, tmp_path):
    teacher = str(whole[1] / "model")
    settled = config(
        photos,
        model={"name": "vit_tiny_patch16_224", "args": {**ARGS, "num_classes": 3}},
        distill={"teacher": teacher, "init": True, "features": 0.5, "weight": 1.0},
        run={"steps": 2},
    )
    saccade.train(settled, out=tmp_path / "run")
    notes = read_state(newest(tmp_path / "run" / "checkpoints", "last"))[1]["notes"]
    assert "KL(teacher ‖ dense)" in notes[0] and "same best class 100.0%" in notes[0]
    assert float(notes[0].split("dense) ")[1].split(",")[0]) < 1e-6
    rows = read_table(tmp_path / "run" / "metrics.csv")
    assert rows[-1]["loss/label"] == 0.0 and rows[-1]["loss/teacher"] > 0 and rows[-1]["loss/features"] > 0


def test_a_teacher_of_another_size_sees_the_same_view(photos, tmp_path):
    """Finer patches and larger inputs than the student's; its features are wider, so a linear map is learned."""
    teacher = {"embed_dim": 48, "depth": 2, "num_heads": 2, "img_size": 48, "patch_size": 6, "num_classes": 3}
    saccade.create_model("vit_tiny_patch16_224", **teacher).save(str(tmp_path / "teacher"))
    settled = config(
        photos,
        distill={"teacher": str(tmp_path / "teacher"), "features": 1.0, "kind": "hard"},
        run={"steps": 4, "save_every": 2},
    )
    saccade.train(settled, out=tmp_path / "run")
    tensors = state(tmp_path / "run")
    assert tensors["project.weight"].shape == (48, 32)
    assert json.loads((newest(tmp_path / "run" / "checkpoints", "last") / "state.json").read_text())["taught"] > 0
    assert all(row["loss/features"] > 0 for row in read_table(tmp_path / "run" / "metrics.csv"))


def test_tensorboard_is_optional(photos, tmp_path):
    pytest.importorskip("tensorboard")
    saccade.train(config(photos, run={"steps": 2, "tensorboard": True}), out=tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_teacher_of_other_classes_is_refused(whole, photos, tmp_path):
    settled = config(photos, distill={"teacher": str(whole[1] / "model")}, data={"path": photos})
    folder = tmp_path / "two"
    for path in list(Path(photos).rglob("*.png")):
        name = path.parent.name
        if name != "c":  # two classes, one of which the teacher does not know
            (folder / name.replace("b", "d")).mkdir(parents=True, exist_ok=True)
            (folder / name.replace("b", "d") / path.name).write_bytes(path.read_bytes())
    settled["data"]["path"] = str(folder)
    with pytest.raises(UserError, match="3 classes and the student 2"):
        saccade.train(settled, out=tmp_path / "run")


def _kill(tmp_path: Path, photos: str, kills: int, steps: int) -> dict:
    command = [sys.executable, str(HERE / "kills.py"), str(tmp_path), photos, str(kills), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_two_hundred_times(photos, tmp_path):
    found = _kill(tmp_path, photos, 200, 30)
    print(found)
    assert found["killed"] == 200 and found["finished_equal"] >= 1


def test_two_processes_equal_one_of_the_same_batch(photos, tmp_path):
    """Five steps; the two share each batch, so their mean loss and gradient are those of one process with all of it."""
    plain = config(
        photos,
        model={"args": {**ARGS, "drop_path_rate": 0.0}},
        augment={"mixup": 0.0, "erase": 0.0},
        run={"steps": 5, "log_every": 1, "threads": 1},
    )
    saccade.train(plain, out=tmp_path / "one")
    code = f"import saccade; saccade.train({plain!r}, out={str(tmp_path / 'two')!r})"
    (tmp_path / "job.py").write_text(code)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(tmp_path / "job.py"),
    ]
    done = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_table(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 5
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )
        assert a["gmacs"] == pytest.approx(b["gmacs"], rel=1e-9)
    assert one[0]["loss"] != one[1]["loss"]
