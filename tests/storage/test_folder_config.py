"""A folder from elsewhere says what the model is: within bounds, and nothing that it says opens anything else."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saccade.tokenizers.scorers.networks as networks
from oracles import make_images, make_vit
from saccade.backbones.saving import save
from saccade.checkpoint import load
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.training.checkpoints import publish, read_last, write_state


@pytest.fixture
def folder(tmp_path) -> Path:
    save(AdaptiveViT(make_vit(), "evit(0.6)"), tmp_path / "m")
    return tmp_path / "m"


def rewrite(folder: Path, **changes) -> None:
    """``section__key=value`` in config.json."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *way, last = name.split("__")
        place = config
        for step in way:
            place = place.setdefault(step, {})
        place[last] = value
    (folder / "config.json").write_text(json.dumps(config))


OPENING = [
    "quadtree(7, scorer=\"feature(weights='pretrained')\")",
    "quadtree(7, scorer='feature')",  # by default
    "quadtree(7, scorer=\"feature('shufflenet_v2_x0_5', 32, 1.0, 'mse', '{file}')\")",
    "quadtree(7, scorer=\"feature(weights='{file}')\")",
    "quadtree(7, scorer=\"gradcam('resnet18')\")",
    "quadtree(7, scorer=\"gradcam('resnet18', '{file}')\") | tome(r=1)",
]


@pytest.mark.parametrize("setting", OPENING)
@pytest.mark.parametrize("where", ["setting", "settings"])
def test_a_folders_setting_opens_nothing(setting, where, folder, tmp_path, monkeypatch):
    asked: list = []

    def ask(*args, **kwargs):
        asked.append(args)
        raise OSError("blocked")

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(networks, "_opened", ask)
    setting = setting.format(file=tmp_path / "secret.safetensors")
    rewrite(folder, **{f"saccade__{where}": setting if where == "setting" else [setting, "tome(r=1)"]})
    if where == "setting":
        with pytest.raises(UserError, match=r"would open .*pass the setting yourself"):
            load(folder)
        assert str(load(folder, "tome(r=2)").setting) == "tome(r=2)", "the caller's own takes its place"
    else:
        assert load(folder).trained == ("tome(r=1)",), "not even tried by tune"
    assert not asked
    with pytest.raises((UserError, OSError)):
        load(folder, setting)  # by the caller's own wish
    assert asked


HUGE = {
    "model_args__depth": [1_000_000, 200, -1, 0, 2.5, True, "12", None],
    "model_args__img_size": [10**9, [10**9, 10**9], [8000, 8000], 0, [64], [64, 64, 64], "64"],
    "model_args__embed_dim": [10**9, 16000, 0],
    "model_args__num_classes": [10**12, 10**7, -1],
    "model_args__num_heads": [0, 7, 10**9],
    "model_args__patch_size": [0, 1, 10**6, [16]],
    "model_args__in_chans": [0, 1000, 10**9],
    "model_args__reg_tokens": [1000, 10**9],
    "model_args__mlp_ratio": [1e300, 90, -1],
    "model_args__act_layer": ["eval", "os.system", 3, ["relu"]],
    "model_args__norm_layer": ["batchnorm", "nn.Module", {}],
    "model_args__mlp_layer": ["Linear", "../Mlp"],
    "model_args__init_values": [1e9, "1"],
    "model_args__drop_rate": [1.0, -0.1, 5],
    "model_args__checkpoint_path": ["other.pth"],
    "model_args__pretrained": [True],
    "model_args__pretrained_cfg": [{"file": "x"}],
    "pretrained_cfg__mean": [[], [1e400], ["a"], "abc", [[0.5] * 3]],
    "pretrained_cfg__std": [[0, 0, 0], [-1.0]],
    "pretrained_cfg__crop_pct": [0, 1e9, -1, "1"],
    "pretrained_cfg__interpolation": ["magic", 3],
    "pretrained_cfg__input_size": [[3, 10**9, 1], [224, 224], 5],
    "saccade__weights": [5, {}, {"sha256": "x", "bytes": 9}, {"sha256": "0" * 64, "bytes": -1}],
    "saccade__settings": ["tome(r=1)", [1], ["x" * 10_000]],
    "saccade__setting": ["x" * 10_000, "grid(" * 400, None],
    "saccade__runner": [{"dtype": "int4"}, {"compiled": 1}, {"batch": 10**12}, {"command": "rm"}, [1]],
    "saccade__task": ["x" * 10_000, "os:system", 3],
    "architecture": ["x" * 10_000, "hf-hub:someone/else", "local-dir:/etc", "vit_none", 5],
}


@pytest.mark.parametrize(("place", "value"), [(p, v) for p, values in HUGE.items() for v in values], ids=str)
def test_values_out_of_bounds_are_refused_before_memory_is_taken(place, value, folder):
    rewrite(folder, **{place: value})
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as refused:
            load(folder)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1500


def test_nothing_is_allocated_for_shapes_that_the_weights_have_not(folder, monkeypatch):
    def allocate(self, **kwargs):
        pytest.fail("memory was taken")

    monkeypatch.setattr(torch.nn.Module, "to_empty", allocate)
    rewrite(folder, model_args__depth=100, model_args__embed_dim=9600)
    with pytest.raises(UserError, match="does not fit"):
        load(folder)


def test_a_config_longer_than_any_of_ours_is_not_read(folder):
    with open(folder / "config.json", "r+b") as file:
        file.truncate(2**30)  # sparse
    with pytest.raises(UserError, match="over 64 MiB"):
        load(folder)


def test_other_weights_under_this_config_are_refused(folder):
    """Same names, same shapes, finite: only the checksum tells."""
    state = load_file(folder / "model.safetensors")
    save_file({k: v.clone() + 0.01 for k, v in state.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="its checksum is another"):
        load(folder)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.99])
def test_one_bit_is_enough(place, folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[int(len(data) * place)] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError):
        load(folder)


def test_folders_of_before_are_opened(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["saccade"]["weights"]
    (folder / "config.json").write_text(json.dumps(config))
    vit = make_vit()
    with torch.no_grad():
        assert torch.equal(load(folder).vit(make_images(vit)), vit(make_images(vit)))


def test_a_pipe_for_a_config_does_not_hang(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(UserError, match="is not a model folder"):
        load(folder)


# --- checkpoints of a run -------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> Path:
    for step in (1, 2, 3):
        facts = {"step": step, "config": {}}
        tensors = {"x": torch.full((4,), float(step))}
        publish(tmp_path, "last", step, lambda part, t=tensors, f=facts: write_state(part, t, f), keep=2)
    return tmp_path


def test_the_checkpoint_before_is_kept(run):
    assert sorted(p.name for p in run.iterdir()) == ["last-00000002", "last-00000003"]
    assert read_last(run, print)[2]["step"] == 3


DAMAGE = {
    "a bit": lambda p: p.joinpath("state.safetensors").write_bytes(
        p.joinpath("state.safetensors").read_bytes()[:-1] + b"\x01"
    ),
    "cut": lambda p: os.truncate(p / "state.safetensors", 20),
    "no tensors": lambda p: (p / "state.safetensors").unlink(),
    "no facts": lambda p: (p / "state.json").unlink(),
    "facts are a list": lambda p: (p / "state.json").write_text("[]"),
    "facts without a step": lambda p: (p / "state.json").write_text("{}"),
    "deep facts": lambda p: (p / "state.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_said(kind, run):
    DAMAGE[kind](run / "last-00000003")
    said: list[str] = []
    path, tensors, facts = read_last(run, said.append)
    assert (path.name, facts["step"], tensors["x"][0]) == ("last-00000002", 2, 2)
    assert len(said) == 1 and "last-00000003" in said[0] and "going on from last-00000002" in said[0]
    DAMAGE[kind](run / "last-00000002")
    with pytest.raises(UserError, match="cannot be read"):
        read_last(run, said.append)
