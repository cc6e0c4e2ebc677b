"""Model folders: what is saved is loaded bit by bit, whole or not at all; anything else is refused with a reason."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import saccade
from oracles import FAMILIES, make_images, make_vit, randomise
from saccade.backbones import rebuilding
from saccade.backbones.saving import check_savable, save
from saccade.checkpoint import create_model, load, load_weights, open_model
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.storage import model_folder

SETTINGS = [
    "",
    "tome(r=2)",
    "evit(0.6, fuse=True)",
    "imagepiece(merge=0.2, keep=0.8)",
    "random(0.5, seed=3)",
    "grid(32)",
]


@pytest.fixture
def model() -> AdaptiveViT:
    return AdaptiveViT(make_vit(), "evit(0.6)")


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save(model, tmp_path / "model")
    return tmp_path / "model"


def same(found: AdaptiveViT, expected: AdaptiveViT) -> bool:
    images = make_images(expected.vit)
    with torch.no_grad():
        return torch.equal(found(images).logits, expected(images).logits)


@pytest.mark.parametrize("setting", SETTINGS)
def test_round_trip_is_bit_identical_and_keeps_the_setting(setting, tmp_path):
    model = AdaptiveViT(make_vit(), setting)
    model.save(tmp_path / "a" / "b")
    found = load(tmp_path / "a" / "b")
    assert same(found, model) and found.setting == model.setting and not found.training
    assert found.state_dict().keys() == model.state_dict().keys()
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path / "a") == ["b"], "no temporary folder is left"


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_every_family(family, tmp_path):
    model = AdaptiveViT(make_vit(family), "tome(r=2)")
    save(model, tmp_path / "model")
    assert same(load(tmp_path / "model"), model)


def test_loads_under_another_setting(folder, model):
    assert same(load(folder, "tome(r=2)"), model.at("tome(r=2)"))
    assert same(load(folder, ""), model.at(""))
    assert str(load(folder, "tome(r=2)").setting) == "tome(r=2)"
    with pytest.raises(UserError, match="did you mean"):
        load(folder, "tomee")


def test_weights_open_in_plain_timm_strictly(folder, model):
    state = load_file(folder / "model.safetensors")
    assert all(name.startswith("vit.") for name in state)
    plain = make_vit(seed=1)
    plain.load_state_dict({name.removeprefix("vit."): value for name, value in state.items()}, strict=True)
    images = make_images(plain)
    with torch.no_grad():
        assert torch.equal(plain(images), model.vit(images))


def test_config_is_timms_with_ours_under_one_key(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    weights = (folder / "model.safetensors").read_bytes()
    seal = {"sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}
    assert config["saccade"] == {"format": 1, "setting": "evit(0.6)", "weights": seal}
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]


def test_extra_facts_are_kept(model, tmp_path):
    save(model, tmp_path / "m", note="x", classes=["a", "b"])
    ours = json.loads((tmp_path / "m" / "config.json").read_text())["saccade"]
    assert (ours["note"], ours["classes"]) == ("x", ["a", "b"])
    assert same(load(tmp_path / "m"), model)


def test_preprocessing_is_kept(model, tmp_path):
    model.vit.pretrained_cfg = {**model.vit.pretrained_cfg, "mean": [0.1, 0.2, 0.3], "crop_pct": 0.5}
    save(model, tmp_path / "m")
    found = load(tmp_path / "m").vit.pretrained_cfg
    assert (found["mean"], found["crop_pct"]) == ([0.1, 0.2, 0.3], 0.5)


def test_a_model_that_does_not_know_its_name_is_refused(tmp_path):
    vit = timm.models.VisionTransformer(img_size=32, depth=1, embed_dim=48, num_heads=3)
    vit.pretrained_cfg = {}
    with pytest.raises(UserError, match="create_model"):
        save(AdaptiveViT(vit), tmp_path / "m")
    assert not list(tmp_path.iterdir())


# --- whole or not at all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_in_the_middle_leaves_what_was_there(existing, model, folder, tmp_path, monkeypatch):
    target = folder if existing else tmp_path / "new"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    other = AdaptiveViT(make_vit(seed=9), "tome(r=1)")

    def half(state, file, metadata):
        Path(file).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(model_folder, "save_file", half)
    with pytest.raises(UserError, match="no space left"):
        save(other, target)
    assert sorted(os.listdir(tmp_path)) == ["model"], "nothing is left behind"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert same(load(folder), model)


def test_a_failure_between_the_two_files_is_noticed(model, folder, monkeypatch):
    """The config of one model and the weights of another must not open as if they belonged together."""
    replaced = os.replace

    def once(source, target):
        replaced(source, target)
        raise KeyboardInterrupt

    other = AdaptiveViT(make_vit(seed=9, num_heads=6), "tome(r=1)")
    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        save(other, folder)
    monkeypatch.undo()
    found = load(folder)
    assert same(found, model) or same(found, other)


def test_saving_over_a_folder_keeps_what_else_is_in_it(model, folder):
    (folder / "notes.txt").write_text("mine")
    other = AdaptiveViT(make_vit(seed=9), "tome(r=1)")
    save(other, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert same(load(folder), other)


def test_files_can_be_read_by_others_as_the_umask_says(model, tmp_path):
    old = os.umask(0o022)
    try:
        save(model, tmp_path / "m")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "m").iterdir()} == {0o644}


# --- what is refused ------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    state = {name: value.clone() for name, value in state.items()}
    change(state)
    save_file(state, folder / "model.safetensors")


def test_wrong_keys_are_listed(folder):
    def change(state):
        del state["vit.head.bias"], state["vit.cls_token"]
        state["vit.head.extra"] = torch.zeros(1)
        state["vit.norm.weight"] = torch.ones(7)

    rewrite(folder, change)
    with pytest.raises(UserError) as refused:
        load(folder)
    for part in (
        "2 missing (vit.cls_token, vit.head.bias)",
        "1 unexpected (vit.head.extra)",
        "(7,) for vit.norm.weight (96,)",
    ):
        assert part in str(refused.value)


def test_a_long_list_of_keys_is_cut(folder):
    rewrite(folder, lambda state: state.update({f"x{i}": torch.zeros(1) for i in range(50)}))
    with pytest.raises(UserError, match=r"50 unexpected \(.* and 44 more\)"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    rewrite(folder, lambda state: state["vit.head.bias"].fill_(value))
    with pytest.raises(UserError, match=r"NaN or infinity in 1 of \d+ tensors \(vit.head.bias\)"):
        load(folder)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.pt", "w.safetensors"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickle_is_refused_and_not_opened(model, tmp_path, name, writer):
    if writer == "torch":
        torch.save({"a": Bomb()}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="may run code"):
        load_weights(model.vit, tmp_path / name)


@pytest.mark.parametrize("kind", ["empty", "cut", "header", "text", "length"])
def test_damaged_weights_are_refused(folder, kind):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    damaged = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "header": data[:20] + b"\xff" * 40 + data[60:],
        "text": b"hello",
        "length": b"\xff" * 8 + data[8:],
    }
    file.write_bytes(damaged[kind])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "folder"])
def test_missing_files_are_named(folder, missing):
    if missing == "folder":
        with pytest.raises(UserError, match="is not a model folder"):
            load(folder / "nowhere")
    else:
        (folder / missing).unlink()
        with pytest.raises(UserError, match="config.json" if missing == "config.json" else "no weights file"):
            load(folder)


def with_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))


FOREIGN = {
    "a list": lambda c: [1, 2],
    "a number": lambda c: 3,
    "nothing": lambda c: {},
    "timm's own": lambda c: {k: v for k, v in c.items() if k != "saccade"},
    "no architecture": lambda c: {k: v for k, v in c.items() if k != "architecture"},
    "no arguments": lambda c: {k: v for k, v in c.items() if k != "model_args"},
    "ours is text": lambda c: {**c, "saccade": "yes"},
    "ours is a list": lambda c: {**c, "saccade": [1]},
    "no format": lambda c: {**c, "saccade": {"setting": ""}},
    "no setting": lambda c: {**c, "saccade": {"format": 1}},
    "setting is a number": lambda c: {**c, "saccade": {"format": 1, "setting": 3}},
    "setting is malformed": lambda c: {**c, "saccade": {"format": 1, "setting": "tome("}},
    "unknown architecture": lambda c: {**c, "architecture": "vit_none"},
    "architecture is a number": lambda c: {**c, "architecture": 5},
    "unsupported architecture": lambda c: {**c, "architecture": "resnet10t", "model_args": {}},
    "arguments are a list": lambda c: {**c, "model_args": [1]},
    "unknown argument": lambda c: {**c, "model_args": {**c["model_args"], "zzz": 1}},
    "bad argument": lambda c: {**c, "model_args": {**c["model_args"], "depth": "many"}},
    "preprocessing is null": lambda c: {**c, "pretrained_cfg": None},
    "preprocessing is a list": lambda c: {**c, "pretrained_cfg": [1]},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_configs_are_refused(folder, kind):
    with_config(folder, FOREIGN[kind])
    with pytest.raises(UserError) as refused:
        load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("config", [{"model_type": "vit"}, {"architecture": "vit_tiny_patch16_224"}])
def test_a_folder_of_timm_or_transformers_is_told_how_to_open(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"not saved by Saccade.*'local-dir:{folder}' with --pretrained"):
        load(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "\x00", "[" * 100_000, "\u00e9"], ids=["empty", "cut", "zero", "deep", "accent"]
)
def test_a_config_that_is_no_json_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="is not a Saccade config"):
        load(folder)


def test_a_newer_format_is_refused_with_both_numbers(folder):
    with_config(folder, lambda c: {**c, "saccade": {**c["saccade"], "format": 99}})
    with pytest.raises(UserError, match="format 99; this version reads format 1"):
        load(folder)


@pytest.mark.parametrize("argument", [{"pretrained": True}, {"checkpoint_path": "other.pth"}, {"weights": "other"}])
def test_a_config_cannot_have_other_files_opened(folder, argument, monkeypatch):
    """A folder from elsewhere says what the model is; it must not say what to download or to unpickle."""
    opened: list = []
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *a, **k: opened.append("download"))
    monkeypatch.setattr(timm.models._factory, "load_checkpoint", lambda *a, **k: opened.append("checkpoint"))
    monkeypatch.setattr(rebuilding, "read_weights", lambda file: opened.append(str(file)) or {})
    with_config(folder, lambda c: {**c, "model_args": {**c["model_args"], **argument}})
    with pytest.raises(UserError):
        load(folder)
    assert not opened


# --- creating -------------------------------------------------------------------------------------------------------


def test_create_model_from_a_weights_file(tmp_path):
    vit = make_vit()
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    kwargs = {"depth": 3, "embed_dim": 96, "num_heads": 3, "img_size": 64, "num_classes": 10}
    model = create_model("vit_tiny_patch16_224", "tome(r=2)", weights=tmp_path / "w.safetensors", **kwargs)
    assert same(model, AdaptiveViT(vit, "tome(r=2)")) and not model.training
    with pytest.raises(UserError, match="unexpected"):
        create_model("vit_tiny_patch16_224", weights=tmp_path / "w.safetensors", **{**kwargs, "depth": 2})


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("vit_tinny_patch16_224", {}, "did you mean"),
        ("", {}, r"has no model ''; timm.list_models\('vit_\*'\) lists those that it has$"),
        ("vit_tiny_patch16_224", {"zzz": 1}, "cannot create"),
        ("vit_tiny_patch16_224", {"embed_dim": 10, "num_heads": 3}, "cannot create"),
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer is not supported"),
        ("vit_tiny_patch16_224", {"weights": "/nowhere.safetensors"}, "no weights file '/nowhere.safetensors'"),
        ("vit_tiny_patch16_224", {"pretrained": True}, "cannot fetch"),
    ],
)
def test_create_model_refuses_with_a_reason(name, kwargs, says, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", offline)
    with pytest.raises(UserError, match=says):
        create_model(name, **kwargs)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_encoder_takes_the_weights_of_a_classifier_but_its_head(tmp_path, prefix):
    vit = make_vit("vit")
    state = {prefix + name: value.contiguous() for name, value in vit.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    made = {"depth": 3, "embed_dim": 96, "num_heads": 3, "img_size": 64, "weights": tmp_path / "w.safetensors"}
    encoder = saccade.create_model("vit_tiny_patch16_224", num_classes=0, **made)
    images = torch.randn(2, 3, 64, 64)
    expected = vit.forward_head(vit.forward_features(images), pre_logits=True)
    assert torch.allclose(encoder(images).logits, expected, atol=1e-5)
    with pytest.raises(UserError, match="create this model with num_classes=10"):
        saccade.create_model("vit_tiny_patch16_224", num_classes=5, **made)


def test_half_precision_weights_become_the_models_own(tmp_path):
    vit = make_vit()
    save_file({name: value.half() for name, value in vit.state_dict().items()}, tmp_path / "w.safetensors")
    found = randomise(copy.deepcopy(vit), seed=4)
    load_weights(found, tmp_path / "w.safetensors")
    assert all(w.dtype == torch.float32 for w in found.parameters())
    assert all(torch.equal(w, e.half().float()) for w, e in zip(found.parameters(), vit.parameters(), strict=True))


def test_real_weights_load(data_dir):
    file = data_dir / "vit_tiny_patch16_224.safetensors"
    if not file.is_file():
        pytest.skip(f"no {file}")
    model = create_model("vit_tiny_patch16_224", "evit(0.7)", weights=file)
    plain = timm.create_model("vit_tiny_patch16_224").eval()
    plain.load_state_dict(load_file(file), strict=True)
    images = make_images(plain, 2)
    with torch.no_grad():
        assert torch.equal(model.at("").forward_head(model.at("").forward_tokens(images)[0]), plain(images))
        found = model(images)
    assert found.trace.tokens() == [197] * 3 + [139] * 3 + [98] * 3 + [69] * 3 and found.logits.isfinite().all()


# --- number types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_folder_keeps_the_number_type(dtype, tmp_path):
    model = AdaptiveViT(make_vit(), "dynamicvit(0.5)").eval().to(dtype)
    check_savable(model)
    model.save(tmp_path / "m")
    found = load(tmp_path / "m")
    assert {p.dtype for p in found.parameters()} == {v.dtype for v in found.learned.values()} == {dtype}
    own, theirs = model.state_dict(), found.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[k], theirs[k]) for k in own)
    images = make_images(model.vit).to(dtype)
    with torch.no_grad():
        assert torch.equal(found(images).logits, model(images).logits)
        assert load(tmp_path / "m", "tome(r=2)")(images).logits.dtype == dtype
    plain = timm.create_model(
        "vit_tiny_patch16_224", **json.loads((tmp_path / "m/config.json").read_text())["model_args"]
    )
    state = {k.removeprefix("vit."): v for k, v in load_file(tmp_path / "m/model.safetensors").items()}
    assert plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("learned.")}, strict=True)


def test_a_folder_with_a_runner_runs_from_the_weights_that_it_holds(tmp_path):
    model = AdaptiveViT(make_vit()).eval()
    images = make_images(model.vit)
    model.bfloat16().deploy("bf16").save(tmp_path / "m")
    with torch.no_grad():
        assert load(tmp_path / "m")(images).logits.dtype == torch.float32
        assert load(tmp_path / "m", runner=None).vit.head.weight.dtype == torch.bfloat16


def test_weights_of_several_number_types_are_refused_before_and_by_save(tmp_path):
    model = AdaptiveViT(make_vit())
    model.vit.norm.to(torch.float64)
    for ask in (lambda: check_savable(model), lambda: model.save(tmp_path / "m")):
        with pytest.raises(
            UserError, match=r"not of one number type \(.* of float32, vit\.norm.* of float64\).*\.float\(\)"
        ):
            ask()
    assert not list(tmp_path.iterdir())


def test_what_makes_number_types_of_its_own_makes_them_of_a_copy_in_fp32():
    """Folders hold half precision too, the built-in model's among them."""
    model = AdaptiveViT(make_vit()).eval().bfloat16()
    assert saccade.bench(model, batch=[1], seconds=0)[0].runner == "fp32"
    assert next(model.parameters()).dtype == torch.bfloat16, "the model given stays what it is"


@pytest.mark.parametrize("runner", [None, "bf16"])
def test_what_commands_open_of_a_folder_in_half_precision_is_fp32(runner, tmp_path):
    """A processor computes half precision many times slower; a folder with a runner says what it is computed in."""
    model = AdaptiveViT(make_vit()).eval().half()
    (model if runner is None else model.deploy(runner)).save(tmp_path / "m")
    assert {p.dtype for p in open_model(str(tmp_path / "m")).parameters()} == {torch.float32}
    kept = torch.float32 if runner is None else torch.float16
    assert {p.dtype for p in open_model(str(tmp_path / "m"), deployed=True).parameters()} == {kept}


def test_the_built_in_model_is_timed():
    from saccade.assets import folder as built_in

    assert saccade.bench(str(built_in("scenes")), batch=[1], seconds=0)[0].finite


def test_training_goes_on_in_fp32(tmp_path):
    from saccade.training.config import Source
    from saccade.training.starting import open_source

    AdaptiveViT(make_vit()).bfloat16().save(tmp_path / "m")
    assert {p.dtype for p in open_source(Source(name=str(tmp_path / "m"))).parameters()} == {torch.float32}
