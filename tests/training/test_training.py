"""Training: configs, draws, losses, optimiser, checkpoints, and the script as a whole."""

from __future__ import annotations

import errno
import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import saccade
from data_helpers import encode, picture, write_folder
from saccade.errors import UserError
from saccade.setting import Setting
from saccade.tokenizers.resize.resampling import PRESETS
from saccade.training.checkpoints import newest, publish, read_state, write_state
from saccade.training.config import Config, Data, Knot, Optim, Ramp, Sampling, read_config, shipped
from saccade.training.image_sets import open_sets
from saccade.training.logging import Meter, Table, read_table
from saccade.training.loss import from_teacher
from saccade.training.multi_setting import MultiSettingModel
from saccade.training.optimizer import build_optimizer, rate
from saccade.training.setting_sampler import Sampler
from saccade.training.starting import resized, start_from
from saccade.training.task import open_task
from saccade.training.train import _same

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 10}


def tiny(setting: str = "", **changes) -> saccade.AdaptiveViT:
    torch.manual_seed(0)
    return saccade.create_model("vit_tiny_patch16_224", setting, **{**TINY, **changes})


# Configs


@pytest.mark.parametrize("name", shipped())
def test_shipped_configs_say_what_they_are_and_read(name):
    head = [line for line in shipped()[name].splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert all(word in text for word in ("Paper:", "Command:", "Cost", "xpected" if name != "scenes" else "result"))
    config = read_config(name)
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_changes_are_toml_or_strings():
    config = read_config(
        "finetune",
        ["optim.lr=1e-3", "data.path=a b.zip", "sampling.settings=['evit(0.5)', 'dense']", "run.compile=true"],
    )
    assert config.optim.lr == 1e-3 and config.data.path == "a b.zip" and config.run.compile is True
    assert config.sampling.settings == ("evit(0.5)", "dense")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean 'lr'"]),
        ("optim.lr=-1", ["optim.lr=-1", "greater than 0"]),
        ("optim=3", ["optim"]),
        ("nonsense", ["key=value"]),
        ("sampling.weights=[1, 2]", ["weights", "1 of them"]),
        ("sampling.every=['tome(r=3)']", ["tome(r=3)"]),
        ("sampling.random=0", ["nothing to run"]),
        ("distill.teacher=self", ["largest"]),
        ("run.accumulate=5", ["64", "5"]),
        ("augment.hflip=2", ["augment.hflip"]),
        ("run.precision=fp8", ["run.precision"]),
        ("task=clasify", ["did you mean 'classify'"]),
        ("model.size=[1, 2, 3]", ["model.size"]),
    ],
)
def test_a_wrong_config_is_one_line_that_names_the_key(change, words):
    with pytest.raises(UserError) as error:
        read_config("finetune", [change])
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_unknown_and_broken_configs(tmp_path):
    with pytest.raises(UserError, match="did you mean 'elastic'"):
        read_config("elastik")
    (tmp_path / "a.toml").write_text("a = = 3")
    with pytest.raises(UserError, match="not TOML"):
        read_config(tmp_path / "a.toml")


# Draws


def _chi2(counts: Counter, p: np.ndarray) -> float:
    total = sum(counts.values())
    return sum((counts[i] - total * p[i]) ** 2 / (total * p[i]) for i in range(len(p)) if p[i] > 0)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("uniform", [1 / 3] * 3), ((1.0, 2.0, 1.0), [0.25, 0.5, 0.25]), ("compute", [1 / 7, 2 / 7, 4 / 7])],
)
def test_draws_follow_their_weights(weights, expected):
    rule = Sampling(settings=("dense", "evit(0.5)", "grid(32)"), weights=weights)
    sampler = Sampler(rule, [4.0, 2.0, 1.0], 10_000, seed=1)
    assert np.allclose(sampler.weights(0), expected)
    counts = sampler.histogram(0, 10_000)
    assert _chi2(counts, np.array(expected)) < 9.21  # p > 0.01 at two degrees of freedom
    if weights == "compute":  # equal shares of the MACs
        spent = [counts[i] * m for i, m in enumerate([4.0, 2.0, 1.0])]
        assert max(spent) / min(spent) < 1.15


def test_a_curriculum_is_interpolated():
    knots = (Knot(at=0.0, weights=(0.0, 1.0)), Knot(at=1.0, weights=(3.0, 1.0)))
    sampler = Sampler(Sampling(settings=("dense", "grid(32)"), weights=knots), [4.0, 1.0], 101, seed=0)
    assert np.allclose(sampler.weights(0), [0, 1]) and np.allclose(sampler.weights(100), [0.75, 0.25])
    assert np.allclose(sampler.weights(50), [0.375, 0.625])


def test_a_line_of_progress_tells_no_loss_before_there_is_one():
    meter, feed = Meter(), SimpleNamespace(waited=0.0)
    meter.add({"loss": torch.tensor(2.0)}, 4)
    assert meter.text == ""
    meter.take(feed)
    assert re.fullmatch(r", loss 2\.000, \d+ images/s", meter.text)


@pytest.mark.parametrize("rungs", [2, 4, 31])
def test_keep_rates_fall_along_a_cosine(rungs):
    """The schedule of EViT from scratch: 1 for 10 epochs, to the base in 100 more, of 300."""
    base, steps = 0.7, 3001
    keeps = np.linspace(1, base, rungs)
    settings = tuple(f"evit({keep:.4f})" for keep in keeps)
    rule = Sampling(settings=settings, weights=Ramp(start=10 / 300, stop=110 / 300))
    sampler = Sampler(rule, list(keeps), steps, seed=0)

    def published(step: int) -> float:
        t = step / 10  # epochs
        if t <= 10:
            return 1.0
        return base + (1 - base) * (1 + math.cos(math.pi * (t - 10) / 100)) / 2 if t < 110 else base

    for step in range(0, steps, 25):
        assert float(sampler.weights(step) @ keeps) == pytest.approx(published(step), abs=1e-6)
        (drawn,) = sampler.draw(step)
        assert abs(keeps[drawn] - published(step)) < (1 - base) / (rungs - 1) + 1e-9, "never two rungs away"
    assert float(sampler.weights(600) @ keeps) == pytest.approx((1 + base) / 2, abs=1e-6)
    assert [sampler.draw(step)[0] for step in (0, 100, 1100, 3000)] == [0, 0, rungs - 1, rungs - 1]


def test_a_ramp_is_written_like_knots_and_has_two_ends():
    config = read_config("finetune", ["sampling.settings=['dense', 'evit(0.5)']", "sampling.weights={stop = 0.5}"])
    assert config.sampling.weights == Ramp(start=0.0, stop=0.5)
    assert Config.model_validate_json(config.model_dump_json()) == config
    sampler = Sampler(Sampling(settings=("dense", "evit(0.5)"), weights=Ramp(stop=0.0)), [2.0, 1.0], 10, seed=0)
    assert sampler.weights(0).tolist() == [0, 1], "a step, where it stops as it starts"
    with pytest.raises(UserError, match=r"cannot start at 0\.6 and stop at 0\.5"):
        read_config("finetune", ["sampling.weights={start = 0.6, stop = 0.5}"])


def test_a_draw_is_a_function_of_seed_and_step():
    rule = Sampling(settings=("a", "b", "c", "d"), every=("largest",), random=2)
    one, two = (Sampler(rule, [4, 3, 2, 1], 100, seed=3) for _ in range(2))
    backwards = [two.draw(step) for step in reversed(range(100))][::-1]
    assert [one.draw(step) for step in range(100)] == backwards
    other = Sampler(rule, [4, 3, 2, 1], 100, seed=4)
    assert [other.draw(step) for step in range(100)] != backwards
    for drawn in backwards:
        assert len(drawn) == 3 and drawn[0] == 0 and drawn == sorted(set(drawn))


def test_the_sandwich_and_its_cost():
    rule = Sampling(settings=("a", "b", "c"), every=("largest", "smallest"), random=1)
    sampler = Sampler(rule, [1.0, 4.0, 2.0], 10, seed=0)
    assert all(sampler.draw(step) == [1, 2, 0] for step in range(10))
    assert sampler.cost(0, 10) == pytest.approx(70.0)


# Loss


def test_kl_has_the_teacher_first():
    torch.manual_seed(0)  # of random logits, one in a hundred is nearly symmetric
    student, teacher, t = torch.randn(5, 7), torch.randn(5, 7), 2.0
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    oracle = sum(float(p[i, j] * (p[i, j].log() - q[i, j].log())) for i in range(5) for j in range(7)) * t * t
    rule = Config.model_validate({"distill": {"temperature": t}}).distill
    assert float(from_teacher(student, teacher, rule)) == pytest.approx(oracle, rel=1e-5)
    assert float(from_teacher(teacher, student, rule)) != pytest.approx(oracle, rel=1e-2)
    hard = rule.model_copy(update={"kind": "hard"})
    assert float(from_teacher(student, teacher, hard)) == pytest.approx(
        float(F.cross_entropy(student, teacher.argmax(1)) * 5), rel=1e-6
    )


# Optimiser


def test_decay_falls_on_matrices_alone():
    model = tiny()
    optimizer = build_optimizer(MultiSettingModel(model, ["dense"]), nn.Identity(), Optim(backbone=0.1, head=3.0))
    names = {id(p): n for n, p in model.vit.named_parameters()}
    seen = Counter()
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            seen[name] += 1
            kernel = name.endswith("weight") and p.ndim > 1
            assert group["weight_decay"] == (0.05 if kernel else 0.0), name
            assert group["scale"] == (3.0 if name.startswith("head.") else 0.1), name
    assert set(seen.values()) == {1} and len(seen) == len(names)


def test_the_head_of_a_task_learns_at_the_heads_rate():
    from saccade.tasks.segmentation.segmenter import segmenter

    model = segmenter(tiny(), ("a", "b"), "mask", layers=1)
    student = MultiSettingModel(model, ["dense", "grid(16)"])
    assert student.views[1].task_head is student.task_head is model.task_head
    project = nn.Linear(2, 3)  # of training alone
    optimizer = build_optimizer(student, project, Optim(backbone=0.1, head=3.0))
    names = {id(p): n for n, p in (*student.named_parameters(), *project.named_parameters(prefix="project"))}
    scales = {names[id(p)]: (g["scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert scales.keys() == set(names.values())
    assert all((scale == 3.0) == name.startswith(("task_head.", "project.")) for name, (scale, _) in scales.items())
    assert scales["task_head.decoder.class_tokens"][1] == 0.0 and scales["task_head.decoder.embed.weight"][1] == 0.05
    student.train()
    assert model.task_head.decoder.training
    student.eval()
    assert not any(view.training or view.task_head.training for view in student.views)


def test_rate_warms_up_and_ends_low():
    rule = Optim(lr=1.0, warmup=0.1, final=0.05)
    rates = [rate(step, 100, rule) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in pairwise(rates[10:])) and 0.05 < rates[-1] < 0.06
    oracle = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * 45 / 90))
    assert rates[55] == pytest.approx(oracle)


def test_one_step_is_big_visions_update():
    """FlexiViT's decay is not multiplied by the rate; AdamW's is, so wd / lr gives the same step."""
    torch.manual_seed(0)
    w, g, lr, wd = torch.randn(4, 4), torch.randn(4, 4), 1e-3, 1e-4
    parameter = nn.Parameter(w.clone())
    parameter.grad = g.clone()
    torch.optim.AdamW([parameter], lr=lr, weight_decay=wd / lr).step()
    m, v = 0.1 * g / (1 - 0.9), 0.001 * g * g / (1 - 0.999)
    oracle = w - (lr * m / (v.sqrt() + 1e-8) + wd * w)
    assert torch.allclose(parameter.detach(), oracle, atol=1e-7)


# Starting from a teacher


def test_a_resized_start_keeps_the_function_at_the_teachers_size():
    teacher, images = tiny().vit.eval(), torch.randn(2, 3, 32, 32)
    same = tiny().vit
    nn.init.normal_(same.head.weight)
    start_from(same, teacher)
    assert torch.equal(saccade.AdaptiveViT(same)(images).logits, saccade.AdaptiveViT(teacher)(images).logits)
    finer = tiny(patch_size=16, img_size=64).vit  # twice the kernel: larger images, the same grid
    start_from(finer, teacher)
    larger = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    assert finer.patch_embed.proj.weight.shape[-1] == 16
    assert saccade.AdaptiveViT(finer.eval())(larger).logits.shape == (2, 10)
    with pytest.raises(UserError, match="another shape"):
        start_from(tiny(embed_dim=64).vit, teacher)


def test_weights_trained_at_several_patch_sizes_belong_to_their_resize(tmp_path):
    plain = MultiSettingModel(tiny(), ["dense", "grid(8)"]).views[0]
    assert plain.backbone.resize is None
    MultiSettingModel(tiny(), ["grid(8)", "grid(16, resize='google')"])
    with pytest.raises(UserError, match="in 2 ways"):
        MultiSettingModel(tiny(), ["grid(4)", "grid(16, resize='google')"])
    trained = MultiSettingModel(tiny(), ["grid(8)", "grid(16, resize='google')"]).views[0]
    saccade.save(trained, tmp_path / "model")
    loaded = saccade.load(tmp_path / "model")
    assert loaded.at("grid(16)").tokenizer.spec == PRESETS["google"]
    with pytest.raises(UserError, match="not how these weights were trained"):
        loaded.at("grid(16, resize='timm')")


def test_another_input_size_resizes_the_positions():
    vit = resized(tiny().vit, 48)
    assert vit.pos_embed.shape == (1, 37, 32)
    assert saccade.AdaptiveViT(vit)(torch.randn(1, 3, 48, 48)).logits.shape == (1, 10)
    with pytest.raises(UserError, match="no multiple"):
        resized(tiny().vit, 50)
    wide = resized(tiny().vit, (24, 48))
    assert wide.pos_embed.shape == (1, 19, 32) and tuple(wide.patch_embed.img_size) == (24, 48)
    assert saccade.AdaptiveViT(wide)(torch.randn(1, 3, 24, 48)).logits.shape == (1, 10)


def test_views_share_one_set_of_parameters():
    student = MultiSettingModel(tiny(), ["dense", "evit(0.5)", "grid(16)"])
    assert all(view.vit is student.vit for view in student.views)
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in student.vit.parameters())
    student.train()
    assert all(view.training and view.vit.training for view in student.views)
    a, b, c = student.macs()
    assert a > b > c and student.training


# Checkpoints


def test_state_round_trip_and_only_the_newest_stays(tmp_path):
    for step in (1, 2, 3):
        publish(tmp_path, "last", step, lambda part, s=step: write_state(part, {"a": torch.full((2,), s)}, {"step": s}))
    assert [p.name for p in tmp_path.iterdir()] == ["last-00000003"]
    tensors, facts = read_state(newest(tmp_path, "last"))
    assert facts == {"step": 3} and tensors["a"].tolist() == [3, 3]


def test_a_failed_write_leaves_the_old_one(tmp_path):
    publish(tmp_path, "last", 1, lambda part: write_state(part, {"a": torch.ones(1)}, {"step": 1}))

    def fails(part: Path) -> None:
        part.mkdir()
        (part / "half").write_text("x")
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(UserError, match="disk is full"):
        publish(tmp_path, "last", 2, fails)
    assert newest(tmp_path, "last").name == "last-00000001"
    assert [p.name for p in tmp_path.iterdir()] == ["last-00000001"]


def test_a_damaged_state_is_named(tmp_path):
    path = publish(tmp_path, "last", 1, lambda part: write_state(part, {"a": torch.ones(9)}, {"step": 1}))
    data = (path / "state.safetensors").read_bytes()
    (path / "state.safetensors").write_bytes(data[:-7])
    with pytest.raises(UserError, match="last-00000001"):
        read_state(path)


# Tables


def test_a_table_survives_new_columns_torn_lines_and_steps_run_again(tmp_path):
    path = tmp_path / "metrics.csv"
    table = Table(path, 0, True)
    table.add({"step": 10, "loss": 1.5})
    table.add({"step": 20, "loss": 1.25, "loss/teacher": 0.5})
    table.add({"step": 30, "loss": math.nan, "loss/teacher": 0.25})
    with open(path, "a") as file:
        file.write("40,0.")
    rows = read_table(path)
    assert [row["step"] for row in rows] == [10, 20, 30] and "loss/teacher" not in rows[0]
    again = Table(path, 20, True)
    assert [row["step"] for row in again.rows] == [10, 20] == [row["step"] for row in read_table(path)]
    assert not Table(tmp_path / "none.csv", 0, False).rows and not (tmp_path / "none.csv").exists()


# Going on


def test_a_run_of_an_earlier_version_goes_on_where_nothing_changed(tmp_path):
    now = read_config("finetune").model_dump(mode="json")
    before = {name: {**values} for name, values in now.items() if isinstance(values, dict) and name != "segment"}
    del before["run"]["tensorboard"]  # as if it, the task and a section had not been there yet
    _same(now, before, tmp_path)
    for change in ({"task": "segment"}, {"segment": {**now["segment"], "void": 1}}, {"run": {**now["run"], "seed": 5}}):
        with pytest.raises(UserError, match="was run with"):
            _same({**now, **change}, before, tmp_path)


# The command


def run_command(capsys, *arguments: str) -> tuple[int, str, str]:
    from saccade.cli import main

    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_command_trains_and_says_what_came_out(tmp_path, capsys):
    arguments = [
        *(
            "train",
            "scenes",
            "--out",
            str(tmp_path / "run"),
            "--json",
            "model.args={embed_dim=32, depth=2, num_heads=2,",
        ),
    ]
    arguments[-1] += " patch_size=16, img_size=64, num_classes=10}"
    changes = ["sampling.settings=['dense', 'evit(0.5)']", "sampling.weights=uniform", "data.cache_gb=0", "run.steps=2"]
    code, out, _ = run_command(capsys, *arguments, *changes, "data.workers=0", "data.check_limit=20", "run.batch=4")
    assert code == 0
    found = json.loads(out)
    assert found["step"] == 2 and {row["setting"] for row in found["checks"]} == {"dense", "evit(0.5)"}
    assert saccade.load(tmp_path / "run" / "model").trained == ("dense", "evit(0.5)")


@pytest.mark.parametrize(
    ("shipped", "teacher"), [("dynamicvit", "self"), ("dynamicvit", "named"), ("dynamicvit_paper", "named")]
)
def test_a_run_learns_from_a_teachers_tokens(tmp_path, shipped, teacher):
    """Every term of DynamicViT's loss is there, weighed as published, the labels whole."""
    write_folder(tmp_path / "photos", {f"{c}/{i}.png": encode(picture(40, 40, seed=i)) for c in "ab" for i in range(4)})
    config = read_config(shipped, [f"data.path={tmp_path / 'photos'}", "data.workers=0", "data.holdout=0"])
    size = {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 16, "img_size": 64, "num_classes": 2}
    values = {**config.model_dump(), "model": {"name": "vit_tiny_patch16_224", "args": size}}
    values["run"] |= {"steps": 1, "batch": 4}
    if teacher == "named":
        tiny(**size).save(tmp_path / "teacher")
        values["distill"] |= {"teacher": str(tmp_path / "teacher")}
        values["sampling"] = {"settings": ["dynamicvit(0.7)"]}
    saccade.train(values, out=tmp_path / "run")
    row = read_table(tmp_path / "run" / "metrics.csv")[-1]
    assert {f"loss/{name}" for name in ("label", "teacher", "tokens", "ratio")} <= row.keys()
    assert float(row["loss/tokens"]) > 0
    assert saccade.load(tmp_path / "run" / "model").setting == Setting.parse(values["sampling"]["settings"][0])


def test_the_command_shows_a_config_and_refuses_in_one_line(tmp_path, capsys):
    code, out, _ = run_command(capsys, "train", "finetune", "optim.lr=3e-4", "--show")
    assert code == 0 and "# Command:" in out and '"lr": 0.0003' in out
    for arguments, words in (
        (["train", "finetun"], "did you mean 'finetune'"),
        (["train", "finetune", "--out", str(tmp_path)], "data.path"),
        (["train", "finetune", "data.path=scenes", "data.split=val", "--out", str(tmp_path)], "never trained on"),
        (["train", "finetune", "data.path=scenes", "model.name=resnet18", "--out", str(tmp_path)], "ResNet"),
    ):
        code, _, err = run_command(capsys, *arguments)
        assert code == 2 and err.count("\n") == 1 and words in err, err


def test_what_is_checked_on_is_never_trained_on(tmp_path):
    files = {f"{c}/{i:03d}.png": encode(picture(8, 8, seed=i)) for c in "ab" for i in range(60)}
    plain = write_folder(tmp_path / "plain", files)
    train, held = open_sets(Data(path=str(plain), holdout=0.25))
    assert not {*train.names} & {*held.names} and len(train) + len(held) == 120 and 15 < len(held) < 45
    more = write_folder(tmp_path / "more", {**files, "a/x.png": encode(picture(8, 8, seed=1))})
    assert {*held.names} <= {*open_sets(Data(path=str(more), holdout=0.25))[1].names}  # none changes sides
    split = write_folder(
        tmp_path / "split", {f"{s}/{n}": d for s in ("train", "val", "test") for n, d in files.items()}
    )
    train, held = open_sets(Data(path=str(split)))
    assert (train.split, held.split) == ("train", "val")
    assert open_sets(Data(path=str(split), holdout=0.0))[1] is None
    tested = write_folder(tmp_path / "tested", {f"{s}/{n}": d for s in ("train", "test") for n, d in files.items()})
    train, held = open_sets(Data(path=str(tested)))
    assert train.split == held.split == "train" and not {*train.names} & {*held.names}  # "test" stays unseen


@pytest.mark.parametrize("ends", [True, False])
def test_starting_from_another_tasks_folder_says_what_is_left_behind(tmp_path, ends):
    write_folder(tmp_path / "photos", {f"{c}/{i}.png": encode(picture(40, 40, i)) for c in "ab" for i in range(2)})
    model = tiny(head="embedding") if ends else tiny()
    model.save(tmp_path / "m")
    given = [f"model.name={tmp_path / 'm'}", f"data.path={tmp_path / 'photos'}"]
    task = open_task(read_config("finetune", given))
    assert task.model().vit.num_classes == 2
    said = [line for line in task.notes if "was trained for task 'embed': its ViT is taken" in line]
    assert len(said) == ends
