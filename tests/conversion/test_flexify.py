"""Flexible models, frozen ones and converted ones; the spec that travels with weights; Google's own files.

The resizes' numbers are in ``test_resampling.py``.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import saccade
from oracles import FAMILIES, make_images, make_vit, relative
from saccade.backbones.freeze import freeze
from saccade.backbones.saving import save
from saccade.backbones.vit import set_resize
from saccade.checkpoint import load
from saccade.cli import main
from saccade.conversion.bigvision import read_npz
from saccade.conversion.flexify import convert, flexify
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.tokenizers.resize.resampling import PRESETS, ResizeSpec, resize_kernel, resize_positions
from saccade.training.multi_setting import MultiSettingModel
from saccade.training.starting import start_from

SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 10}
PATCHES = (8, 10, 12, 15, 16, 20, 24, 30, 40, 48)


def flexible(family: str = "flexivit", **kwargs) -> AdaptiveViT:
    return flexify(make_vit(family, depth=2, img_size=240), size=240, **kwargs)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    mine, yours = a.state_dict(), b.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


# --- flexify --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", ["own", "named"])
def test_13_with_its_own_sizes_a_vit_stays_what_it_is(family, sizes):
    """Bit for bit, in its own forward and here; the source is neither changed nor shared."""
    vit = make_vit(family)
    embed, images = vit.patch_embed, make_images(vit)
    own = (None, None) if sizes == "own" else (tuple(embed.patch_size), tuple(embed.grid_size))
    model = flexify(vit, *own)
    assert same_weights(model.vit, vit) and model.vit is not vit and not model.training
    assert torch.equal(model.vit(images), vit(images))
    assert torch.equal(model.forward_head(model.forward_tokens(images)[0]), vit(images))
    assert torch.equal(model(images).logits, AdaptiveViT(vit)(images).logits)
    before = vit(images)
    for weight in model.vit.parameters():
        weight.add_(1)
    assert torch.equal(vit(images), before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit3", "distilled", "dinov2", "dinov2-registers", "siglip", "clip"])
def test_13_at_the_underlying_size_it_is_a_plain_timm_vit(family):
    """The paper's layout: kernel 32, positions 7, 240 px. timm leaves 16 px out there; so does the unreduced model."""
    name, shape = FAMILIES[family]
    model = flexible(family)
    plain = timm.create_model(name, **{**SMALL, **shape, "patch_size": 32, "img_size": 240}).eval()
    plain.load_state_dict(model.vit.state_dict(), strict=True)
    images = make_images(model.vit)
    assert images.shape[-2:] == (240, 240) and model.input_size() == (240, 240)
    assert torch.equal(model.vit(images), plain(images))
    for setting in ("", "grid(32)"):
        view = model.at(setting)
        assert torch.equal(view.forward_head(view.forward_tokens(images)[0]), plain(images))
    assert model.forward_tokens(images)[0].grid == (7, 7)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "underlying", "grid", "size"),
    [
        ("vit", 32, 7, 240),
        ("vit", 16, 7, 240),  # published configs: the kernel small, the table 7 x 7
        ("dinov2-registers", 8, 7, 240),
        ("distilled", (24, 40), (9, 4), (240, 360)),
        ("oblong", (20, 12), 5, 120),
        ("no-positions", 24, 6, 48),
        ("siglip", None, 3, None),
        ("deit3", 20, None, None),
    ],
)
def test_kernel_and_positions_are_those_of_the_source_resized(family, underlying, grid, size):
    vit = make_vit(family)
    model = flexify(vit, underlying, grid, size=size)
    embed, old = model.vit.patch_embed, vit.patch_embed
    patch = tuple(old.patch_size) if underlying is None else np.broadcast_to(underlying, 2).tolist()
    cells = tuple(old.grid_size) if grid is None else tuple(np.broadcast_to(grid, 2).tolist())
    assert torch.equal(embed.proj.weight, resize_kernel(old.proj.weight, patch, PRESETS["default"]))
    if vit.pos_embed is not None:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        want = resize_positions(vit.pos_embed, tuple(old.grid_size), cells, prefix, PRESETS["default"])
        assert torch.equal(model.vit.pos_embed, want)
    pixels = tuple(old.img_size) if size is None else tuple(np.broadcast_to(size, 2).tolist())
    assert model.input_size() == pixels == model.backbone.input_size and embed.grid_size == cells
    for p in (10, 12, (8, 24)):
        view = model.at(f"grid({p})")
        out = view(make_images(vit, 1, pixels))
        assert out.logits.isfinite().all()
        kernel, positions = view.tokenizer.weights(model.vit, out.trace.grid)
        assert kernel.shape[-2:] == (p if isinstance(p, tuple) else (p, p))
        assert positions is None or positions.shape[1] == prefix + out.trace.grid[0] * out.trace.grid[1]


@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels(channels):
    model = flexible("vit", underlying=32)
    vit = make_vit(img_size=96, in_chans=channels)
    model = flexify(vit, 32, 3)
    assert model(make_images(vit)).logits.shape == (2, 10)
    assert model.vit.patch_embed.proj.weight.shape[1] == channels


def test_15_token_counts_and_gradients_at_every_patch_size():
    """Kernel, positions and class token learn, whatever is drawn; and they are the only form in which they are held."""
    model = flexible()
    assert {tuple(p.shape) for name, p in model.named_parameters() if "patch_embed" in name or "pos_embed" in name} == {
        (96, 3, 32, 32),
        (96,),
        (1, 49, 96),
    }
    images = make_images(model.vit, 1)
    for patch, side in zip(PATCHES, (30, 24, 20, 16, 15, 12, 10, 8, 6, 5), strict=True):
        model.vit.zero_grad()
        out = model.at(f"grid({patch})")(images)
        assert out.trace.grid == (side, side)
        out.logits.square().sum().backward()
        for name in ("patch_embed.proj.weight", "pos_embed", "cls_token"):
            grad = model.vit.get_parameter(name).grad
            assert grad is not None and grad.isfinite().all() and grad.abs().sum() > 0, (name, patch)
    student = MultiSettingModel(model, [f"grid({patch})" for patch in PATCHES])
    assert {name.split(".")[0] for name, _ in student.named_parameters()} == {"vit"}


def test_16_a_student_that_starts_from_its_teacher():
    """With the teacher's own sizes nothing is lost; with an underlying 32 x 32, and antialiased, little of a smooth
    kernel is."""
    teacher = make_vit(depth=2, img_size=112)
    with torch.no_grad():
        smooth = F.interpolate(torch.randn(96, 3, 4, 4), size=(16, 16), mode="bicubic")
        teacher.patch_embed.proj.weight.copy_(smooth * 0.1)
    student = flexify(make_vit(depth=2, img_size=112, seed=1), None, None)
    start_from(student.vit, teacher)
    images = make_images(teacher, 4)

    def divergence(model: AdaptiveViT) -> float:
        with torch.no_grad():
            found, want = model(images).logits.log_softmax(-1), teacher(images).log_softmax(-1)
        return F.kl_div(found, want, reduction="batchmean", log_target=True).item()

    assert divergence(student.at("grid(16)")) < 1e-6
    gaps = {spec: divergence(flexify(teacher, 32, 7, resize=spec).at("grid(16)")) for spec in ("default", "google")}
    other = divergence(AdaptiveViT(make_vit(depth=2, img_size=112, seed=1)))
    assert all(1e-6 < gap < other / 10 for gap in gaps.values()), (gaps, other)


def test_a_source_may_be_a_name_a_folder_a_model_and_a_file(tmp_path):
    vit = make_vit(depth=2, img_size=64)
    save(AdaptiveViT(vit, "tome(r=2)"), tmp_path / "model")
    wants = flexify(vit, 32, 2)
    for source in (AdaptiveViT(vit), str(tmp_path / "model"), tmp_path / "model"):
        assert same_weights(flexify(source, 32, 2), wants)
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    other = make_vit(depth=2, img_size=64, seed=1)
    assert same_weights(flexify(other, 32, 2, weights=tmp_path / "w.safetensors"), wants)
    assert not same_weights(other, vit)
    named = flexify("vit_tiny_patch16_224")
    assert named.vit.patch_embed.proj.weight.shape == (192, 3, 32, 32) and named.vit.pos_embed.shape == (1, 50, 192)
    assert named.input_size() == (224, 224) and not named.training


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: flexify(make_vit(), 0), r"underlying=0 .*\[1, 256\]"),
        (lambda: flexify(make_vit(), 300), r"underlying=300 .*\[1, 256\]"),
        (lambda: flexify(make_vit(), (32, 32, 32)), r"underlying=\(32, 32, 32\)"),
        (lambda: flexify(make_vit(), grid=0), r"grid=0 .*\[1, 256\]"),
        (lambda: flexify(make_vit(), grid=(7, 2.5)), r"grid=\(7, 2.5\)"),
        (lambda: flexify(make_vit(), size=9000), r"size=9000 .*\[1, 8192\]"),
        (
            lambda: flexify(make_vit(), resize="bicubic"),
            "flexify: resize='bicubic' is not one of default, google, timm",
        ),
        (lambda: flexify("vit_tinny_patch16_224"), "did you mean"),
        (lambda: flexify("resnet18"), "ResNet is not supported"),
        (lambda: flexify(make_vit(), pretrained=True), "are for a name"),
        (lambda: flexify("vit_tiny_patch16_224", weights="none.safetensors"), "no weights file 'none.safetensors'"),
        (lambda: flexify("vit_tiny_patch16_224", weights="none.npz"), "no weights file 'none.npz'"),
    ],
)
def test_what_flexify_refuses(call, says):
    with pytest.raises(UserError, match=says) as refused:
        call()
    assert "\n" not in str(refused.value)


# --- freeze ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit3", "distilled", "dinov2-registers", "siglip", "class-average", "clip"])
@pytest.mark.parametrize("setting", ["grid(12)", "grid((8, 24))", "grid(30, size=120)", "grid(16, how='vanilla')"])
def test_a_frozen_model_is_a_plain_timm_vit_that_gives_the_same(family, setting):
    model = flexible(family)
    view = model.at(setting)
    vit = model.freeze(setting)
    patch, size = view.tokenizer.patch, view.input_size()
    assert type(vit) is type(model.vit) and not isinstance(vit, AdaptiveViT)
    images = make_images(vit)
    assert images.shape[-2:] == size
    expected = view(images).logits
    assert relative(vit(images), expected) <= 1e-5
    name, shape = FAMILIES[family]
    plain = timm.create_model(name, **{**SMALL, **shape, "patch_size": patch, "img_size": size}).eval()
    plain.load_state_dict(vit.state_dict(), strict=True)
    assert relative(plain(images), expected) <= 1e-5
    assert relative(AdaptiveViT(vit)(images).logits, expected) <= 1e-5
    assert AdaptiveViT(vit).backbone.resize is None, "it may be resized again as one likes"


@torch.no_grad()
def test_freezing_takes_the_models_own_setting_and_leaves_it_alone(tmp_path):
    model = flexible()
    before, images = copy.deepcopy(model.state_dict()), make_images(model.vit)
    assert relative(model.at("grid(20)").freeze()(images), model.at("grid(20)")(images).logits) <= 1e-5
    assert torch.equal(model.freeze()(images), model.vit(images)), "the unreduced model"
    first = model.freeze("grid(16)")
    first.patch_embed.proj.weight.zero_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert relative(model.freeze("grid(16)")(images), model.at("grid(16)")(images).logits) <= 1e-5
    save(AdaptiveViT(model.freeze("grid(16)")), tmp_path / "fixed")
    found = load(tmp_path / "fixed")
    assert relative(found(images).logits, model.at("grid(16)")(images).logits) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("setting", "size"), [("grid(17)", (238, 238)), ("grid(32)", (240, 240)), ("", (240, 240))])
def test_what_does_not_divide_is_frozen_at_what_is_used(setting, size):
    model = flexible()
    vit = model.freeze(setting)
    assert tuple(vit.patch_embed.img_size) == size
    images = make_images(vit)
    assert relative(vit(images), model.at(setting)(images).logits) <= 1e-5
    cropped = AdaptiveViT(make_vit(), "grid(24, size=64, fit='crop')")
    assert tuple(cropped.freeze().patch_embed.img_size) == (64, 64)
    images = make_images(cropped.vit)
    assert relative(cropped.freeze()(images), cropped(images).logits) <= 1e-5


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("tome(r=3)", r"'tome\(r=3\)' cannot be frozen: it decides anew"),
        ("grid(16) | evit(0.5)", r"'grid\(16\) \| evit\(0.5\)' cannot be frozen"),
        ("grid(16, stride=8)", "timm's patches do not overlap"),
        ("grid(17, fit='pad')", "it pads images of 240x240"),
        ("grid(17, fit='error')", "do not divide 240x240"),
        ("gird(17)", "did you mean 'grid'"),
    ],
)
def test_what_cannot_be_frozen_names_what_can(setting, says):
    with pytest.raises(UserError, match=says) as refused:
        flexible().freeze(setting)
    if "cannot be frozen" in str(refused.value):
        assert "'grid(16)'" in str(refused.value)


def test_a_frozen_model_knows_its_size_in_timm():
    model = flexible()
    vit = model.freeze("grid(20, size=160)")
    assert timm.data.resolve_model_data_config(vit)["input_size"] == (3, 160, 160)
    assert {info["reduction"] for info in vit.feature_info} == {20}
    assert vit.patch_embed.num_patches == 64 and vit.patch_embed.grid_size == (8, 8)
    vit.set_input_size(img_size=200)
    assert vit(torch.zeros(1, 3, 200, 200)).shape == (1, 10)


# --- the spec travels ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("spec", PRESETS)
@pytest.mark.parametrize(("underlying", "size"), [(32, 240), (16, 240), ((12, 20), (240, 180))])
def test_spec_and_sizes_are_saved_and_read(tmp_path, spec, underlying, size):
    model = flexify(make_vit(img_size=64, depth=2), underlying, 7, size=size, resize=spec).at("grid(24)")
    save(model, tmp_path / "model")
    ours = json.loads((tmp_path / "model" / "config.json").read_text())["saccade"]
    assert ours["resize"] == PRESETS[spec].to_dict() and ours["format"] == 1
    assert ("input_size" in ours) == (underlying != 32)
    images = make_images(model.vit)
    for found in (load(tmp_path / "model"), load(tmp_path / "model", "dense").at("grid(24)"), copy.deepcopy(model)):
        assert torch.equal(found(images).logits, model(images).logits)
        assert found.backbone == model.backbone and found.input_size() == tuple(np.broadcast_to(size, 2).tolist())
    other = next(name for name in PRESETS if name != spec)
    with pytest.raises(UserError, match=rf"resize='{other}' is not how these weights were trained \({spec}\)"):
        load(tmp_path / "model", f"grid(24, resize='{other}')")
    with pytest.raises(UserError, match=rf"flexify: resize='{other}' is not how"):
        flexify(str(tmp_path / "model"), resize=other)
    again = flexify(str(tmp_path / "model"), None, None)
    assert same_weights(again, model) and again.backbone == model.backbone
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin.at("grid(20)")(images).logits, model.at("grid(20)")(images).logits)


def test_training_and_copies_keep_the_spec(tmp_path):
    model = flexify(make_vit(img_size=64, depth=2), 32, 2, resize="google")
    student = MultiSettingModel(AdaptiveViT(model.vit), ["grid(16)", "grid(8)"])
    assert all(view.backbone.resize == PRESETS["google"] for view in student.views)
    assert student.views[0].tokenizer.spec == PRESETS["google"]
    save(AdaptiveViT(copy.deepcopy(student.vit)), tmp_path / "model")
    assert load(tmp_path / "model").backbone.resize == PRESETS["google"]


@torch.no_grad()
def test_a_folder_without_a_spec_is_free(tmp_path):
    save(AdaptiveViT(make_vit()), tmp_path / "model")
    ours = json.loads((tmp_path / "model" / "config.json").read_text())["saccade"]
    assert set(ours) == {"format", "setting", "weights"}
    for spec in PRESETS:
        assert load(tmp_path / "model", f"grid(8, resize='{spec}')").tokenizer.spec == PRESETS[spec]


@pytest.mark.parametrize(
    "spec",
    [
        None,
        "google",
        [],
        {},
        {"kernel_mode": "bilinear"},
        {**ResizeSpec().to_dict(), "more": 1},
        {**ResizeSpec().to_dict(), "kernel_mode": "lanczos"},
        {**ResizeSpec().to_dict(), "kernel_mode": ["bilinear"]},
        {**ResizeSpec().to_dict(), "pos_antialias": "yes"},
        {**ResizeSpec().to_dict(), "pos_antialias": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("setting", [None, "dense"])
def test_a_malformed_spec_is_refused(tmp_path, spec, setting):
    save(AdaptiveViT(make_vit(), "grid(8)"), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["saccade"]["resize"] = spec
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json' has a malformed resize spec: ") as refused:
        load(tmp_path / "model", setting)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "size", [None, 240, [240], [240, 0], [240, 240, 3], ["a", "b"], [1e3, 240], [True, 240]], ids=str
)
def test_a_malformed_input_size_is_refused(tmp_path, size):
    save(flexify(make_vit(), 16, 7, size=240), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["saccade"]["input_size"] = size
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"input_size=.* is not two whole numbers"):
        load(tmp_path / "model")


def test_a_spec_hidden_among_timms_facts_is_not_taken(tmp_path):
    save(AdaptiveViT(make_vit()), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"]["resize"] = "nonsense"
    file.write_text(json.dumps(config))
    assert load(tmp_path / "model").backbone.resize is None


# --- Google's files --------------------------------------------------------------------------------------------------


def google_file(path: Path, vit: nn.Module, prefix: str = "", stacked: bool = False) -> None:
    """Weights of a timm ViT in big_vision's layout, turned back piece by piece (timm's ``_load_weights`` inverted)."""
    w = {name: value.double().numpy() for name, value in vit.state_dict().items()}
    heads, width = vit.blocks[0].attn.num_heads, vit.embed_dim
    arrays = {
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"],
        "cls": w["cls_token"],
        "pos_embedding": w["pos_embed"],
        "Transformer/encoder_norm/scale": w["norm.weight"],
        "Transformer/encoder_norm/bias": w["norm.bias"],
        "head/kernel": w["head.weight"].T,
        "head/bias": w["head.bias"],
    }
    blocks = []
    for i in range(len(vit.blocks)):
        b = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items() if name.startswith(f"blocks.{i}.")}
        mha = "MultiHeadDotProductAttention_0"
        block = {
            f"LayerNorm_{j}/{to}": b[f"norm{j + 1}.{of}"]
            for j in (0, 1)
            for to, of in (("scale", "weight"), ("bias", "bias"))
        }
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * width, (j + 1) * width)
            block[f"{mha}/{part}/kernel"] = b["attn.qkv.weight"][rows].T.reshape(width, heads, -1)
            block[f"{mha}/{part}/bias"] = b["attn.qkv.bias"][rows].reshape(heads, -1)
        block[f"{mha}/out/kernel"] = b["attn.proj.weight"].T.reshape(heads, -1, width)
        block[f"{mha}/out/bias"] = b["attn.proj.bias"]
        for j in (0, 1):
            block[f"MlpBlock_0/Dense_{j}/kernel"] = b[f"mlp.fc{j + 1}.weight"].T
            block[f"MlpBlock_0/Dense_{j}/bias"] = b[f"mlp.fc{j + 1}.bias"]
        blocks.append(block)
    for name in blocks[0]:
        if stacked:
            arrays[f"Transformer/encoderblock/{name}"] = np.stack([block[name] for block in blocks])
        else:
            arrays.update({f"Transformer/encoderblock_{i}/{name}": block[name] for i, block in enumerate(blocks)})
    np.savez(path, **{prefix + name: value.astype(np.float32) for name, value in arrays.items()})


SHAPE = {"depth": 2, "embed_dim": 96, "num_heads": 3}


@pytest.fixture(scope="module")
def google(tmp_path_factory) -> Path:
    """A FlexiViT as it is published: kernel 32 x 32, positions 7 x 7, no position for the class token."""
    file = tmp_path_factory.mktemp("google") / "flexivit.npz"
    google_file(file, make_vit("flexivit", depth=2, patch_size=32, img_size=224))
    return file


@torch.no_grad()
@pytest.mark.parametrize("patch", PATCHES)
def test_14_googles_file_agrees_with_timms_own_reader(google, patch):
    """timm resizes when it reads, at one patch size and without antialiasing the positions: for 40 and 48, where that
    shows, it is told to; at the others its reading stands as it is."""
    other = timm.create_model("flexivit_small", patch_size=patch, img_size=240, num_classes=10, **SHAPE).eval()
    other.load_pretrained(str(google))
    model = flexify(make_vit("flexivit", depth=2, seed=3), weights=google)
    assert model.backbone.resize == PRESETS["google"] and model.input_size() == (240, 240)
    assert model.vit.patch_embed.proj.weight.shape[-2:] == (32, 32) and model.vit.pos_embed.shape == (1, 49, 96)
    images = make_images(model.vit)
    found = model.at(f"grid({patch})")(images).logits
    if patch >= 40:
        assert relative(found, other(images)) > 1e-3, "positions shrink, antialiased by Google"
        set_resize(model.vit, None)
        set_resize(model.vit, ResizeSpec(kernel_antialias=False, pos_antialias=False))
        found = AdaptiveViT(model.vit, f"grid({patch})")(images).logits
    assert relative(found, other(images)) <= 1e-4
    assert relative(model.vit.eval()(images), AdaptiveViT(model.vit)(images).logits) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["params/", "params/img/", "img/", "opt/target/"])
@pytest.mark.parametrize("stacked", [False, True])
def test_googles_names_with_prefixes_and_stacked_blocks(google, tmp_path, prefix, stacked):
    google_file(tmp_path / "f.npz", make_vit("flexivit", depth=2, patch_size=32, img_size=224), prefix, stacked)
    want, found = read_npz(google), read_npz(tmp_path / "f.npz")
    assert want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit"])
def test_a_vit_with_a_position_for_its_class_token_reads_it_too(google, family):
    """That position is zero: the function is the same, and what is frozen loads into timm under the model's name."""
    model = flexify(make_vit(family, depth=2, seed=5), weights=google)
    assert model.vit.pos_embed.shape == (1, 50, 96) and (model.vit.pos_embed[:, 0] == 0).all()
    want = flexify(make_vit("flexivit", depth=2), weights=google)
    images = make_images(want.vit)
    assert relative(model.at("grid(20)")(images).logits, want.at("grid(20)")(images).logits) <= 1e-5
    assert timm.data.resolve_model_data_config(model.vit)["mean"] == (0.5, 0.5, 0.5)


def test_a_name_takes_its_classes_from_the_file(tmp_path, monkeypatch):
    vit = timm.create_model("flexivit_small", patch_size=32, img_size=224, num_classes=7, depth=12)
    google_file(tmp_path / "flexivit_s.npz", vit)
    model = flexify("vit_small_patch16_224", weights=str(tmp_path / "flexivit_s.npz"))
    assert model.vit.num_classes == 7 and model.input_size() == (240, 240)
    fixed = model.freeze("grid(16)")
    plain = timm.create_model("vit_small_patch16_224", patch_size=16, img_size=240, num_classes=7)
    plain.load_state_dict(fixed.state_dict(), strict=True)
    save(model, tmp_path / "model")
    assert load(tmp_path / "model").backbone == model.backbone


def test_underlying_sizes_other_than_the_files(google):
    model = flexify(make_vit("flexivit", depth=2), 16, 14, weights=google)
    state = read_npz(google)
    want = resize_kernel(state["patch_embed.proj.weight"], (16, 16), PRESETS["google"])
    assert torch.equal(model.vit.patch_embed.proj.weight, want) and model.vit.pos_embed.shape == (1, 196, 96)


def test_googles_weights_have_one_spec(google):
    assert flexify(make_vit("flexivit", depth=2), weights=google, resize="google").backbone.resize == PRESETS["google"]
    with pytest.raises(UserError, match=r"flexify: resize='default' is not how these weights were trained \(google\)"):
        flexify(make_vit("flexivit", depth=2), weights=google, resize="default")


def rewritten(google: Path, path: Path, change) -> Path:
    arrays = dict(np.load(google))
    change(arrays)
    np.savez(path, **arrays)
    return path


BROKEN = {
    "no kernel": (lambda a: a.pop("embedding/kernel"), "no array 'embedding/kernel'"),
    "no norm": (lambda a: a.pop("Transformer/encoderblock_1/LayerNorm_0/scale"), "1 missing .blocks.1.norm1.weight"),
    "no key": (lambda a: a.pop("Transformer/encoderblock_1/MultiHeadDotProductAttention_0/key/bias"), "lacks a part"),
    "no positions": (lambda a: a.pop("pos_embedding"), "no square position table"),
    "odd positions": (lambda a: a.update(pos_embedding=np.zeros((1, 50, 96), np.float32)), "no square position table"),
    "another width": (lambda a: a.update(cls=np.zeros((1, 1, 95), np.float32)), r"\(1, 1, 95\) for cls_token"),
    "an array more": (lambda a: a.update(extra=np.zeros(3, np.float32)), r"holds 1 arrays .*extra"),
    "NaN": (lambda a: a["head/bias"].fill(np.nan), "head/bias is not an array of finite real numbers"),
    "integers": (lambda a: a.update(cls=np.zeros((1, 1, 96), np.int64)), "cls is not an array of finite real"),
    "objects": (lambda a: a.update(cls=np.array([{}], dtype=object)), "not a readable .npz"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_of_googles_are_refused(google, tmp_path, kind):
    change, says = BROKEN[kind]
    file = rewritten(google, tmp_path / "broken.npz", change)
    with pytest.raises(UserError, match=says) as refused:
        flexify(make_vit("flexivit", depth=2), weights=file)
    assert "\n" not in str(refused.value)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize("kind", ["pickle", "objects", "cut", "text", "empty", "zip"])
def test_a_file_that_is_no_npz_is_not_unpickled(google, tmp_path, kind):
    file = tmp_path / "file.npz"
    if kind == "objects":
        np.savez(file, **{"embedding/kernel": np.array([Bomb()], dtype=object)})
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("embedding/kernel", "text")
    else:
        data = {"pickle": pickle.dumps(Bomb()), "cut": google.read_bytes()[:5000], "text": b"hello", "empty": b""}
        file.write_bytes(data[kind])
    with pytest.raises(UserError, match=r"not a readable .npz|has no array|finite"):
        flexify(make_vit("flexivit", depth=2), weights=file)


def hostile(kind: str) -> dict[str, bytes]:
    """Members of an .npz that would take more than they hold."""

    def header(shape: tuple[int, ...]) -> bytes:
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return stream.getvalue()

    kernel = header((1, 1, 3, 1)) + bytes(12)
    return {
        "larger than it is": {"embedding/kernel": header((10**6, 10**6, 3, 96)) + bytes(64)},
        "zeros without end": {"embedding/kernel": kernel, "head/bias": header((2 * 10**7,)) + bytes(8 * 10**7)},
        "blocks without end": {
            "embedding/kernel": kernel,
            "Transformer/encoderblock/LayerNorm_0/bias": header((10**6, 1)) + bytes(4 * 10**6),
        },
        "no array at all": {"embedding/kernel": kernel, "cls": b"text"},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("larger than it is", "not a readable .npz.* bytes and has"),
        ("zeros without end", "20,000,003 numbers, limit"),
        ("blocks without end", r"not of 1 to 1000 blocks"),
        ("no array at all", "not a readable .npz"),
    ],
)
def test_an_npz_is_examined_before_anything_is_allocated(tmp_path, monkeypatch, kind, says):
    file = tmp_path / "hostile.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in hostile(kind).items():
            archive.writestr(f"{name}.npy", data)
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("arrays were read"))
    with pytest.raises(UserError, match=says) as refused:
        read_npz(file)
    assert "\n" not in str(refused.value)


# --- convert ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["dinov2", "dinov2-registers", "dinov2-swiglu", "vit", "distilled", "siglip"])
def test_a_converted_model_sees_the_same_tokens_of_a_larger_image(family):
    """14 → 16, enlarging image and kernel: patches of the image are enlarged apart here, so that tokens are equal."""
    vit = make_vit(family)
    old, side = vit.patch_embed.patch_size[0], vit.patch_embed.grid_size[0]
    new = old + 2
    model = convert(vit, f"{old}:{new}")
    assert model.backbone.patch_size == (new, new) and model.input_size() == (side * new, side * new)
    assert torch.equal(model.vit.pos_embed, vit.pos_embed)
    images = make_images(vit)
    patches = F.unfold(images, old, stride=old).mT.reshape(-1, 3, old, old)
    bigger = F.interpolate(patches, (new, new), mode="bilinear", antialias=True).reshape(2, side * side, -1).mT
    larger = F.fold(bigger, (side * new, side * new), new, stride=new)
    assert relative(model.vit(larger), vit(images)) <= 1e-4
    whole = F.interpolate(images, (side * new, side * new), mode="bilinear", antialias=True)
    assert relative(model.vit(whole), vit(images)) > 1e-3, "pixels mix over the borders of patches"


@torch.no_grad()
def test_converted_models_are_plain_folders(tmp_path):
    vit = make_vit("dinov2-registers")
    model = convert(vit, "14:16", tmp_path / "m", size=96, resize="timm")
    assert model.input_size() == (96, 96) and model.vit.patch_embed.grid_size == (6, 6)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["saccade"]["converted"] == {
        "from": "vit_small_patch14_reg4_dinov2",
        "patch": [14, 14],
        "size": [56, 56],
        "resize": PRESETS["timm"].to_dict(),
    }
    found = load(tmp_path / "m")
    images = make_images(model.vit)
    assert torch.equal(found(images).logits, model(images).logits)
    plain = make_vit("dinov2-registers", img_size=96, patch_size=16)
    state = load_file(tmp_path / "m" / "model.safetensors")
    plain.load_state_dict({name.removeprefix("vit."): value for name, value in state.items()}, strict=True)
    assert torch.equal(plain(images), model.vit(images))
    want = timm.layers.resample_patch_embed(vit.patch_embed.proj.weight, [16, 16])
    assert relative(model.vit.patch_embed.proj.weight, want) <= 2e-5


def test_a_flexible_model_is_converted_by_its_own_spec_at_its_own_size():
    model = flexify(make_vit(img_size=64), 32, 7, size=240, resize="google")
    found = convert(model, 20)
    images = make_images(found.vit)
    with torch.no_grad():
        assert images.shape[-1] == 240 and relative(found(images).logits, model.at("grid(20)")(images).logits) <= 1e-5
    with pytest.raises(UserError, match="grid: resize='timm' is not how these weights were trained"):
        convert(model, 20, resize="timm")


@pytest.mark.parametrize(
    ("patch", "options", "says"),
    [
        ("16:14", {}, r"the source has patches of 14 pixels, not of 16: say '14'"),
        ("14x16:14", {}, r"patches of 14 pixels, not of 14x16"),
        ("14->16", {}, "cannot read the patch sizes '14->16': write them like"),
        ("", {}, "cannot read the patch sizes ''"),
        ("0", {}, r"patch=\(0, 0\) .*\[1, 256\]"),
        ("14:999", {}, r"patch=\(999, 999\) .*\[1, 256\]"),
        (16, {"size": 100}, r"16x16 do not divide 100x100"),
        (16, {"resize": "cubic"}, "resize='cubic' is not one of"),
        (16, {"pretrained": True}, "are for a name"),
    ],
)
def test_what_convert_refuses(patch, options, says, tmp_path):
    with pytest.raises(UserError, match=says):
        convert(make_vit("dinov2"), patch, tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())


def test_oblong_patches():
    model = convert(make_vit("oblong"), "12x20:16x10")
    assert model.backbone.patch_size == (16, 10) and model.input_size() == (64, 40)


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return ended.value.code or 0, *capsys.readouterr()


def test_the_command_converts(tmp_path, capsys):
    save(AdaptiveViT(make_vit("dinov2")), tmp_path / "source")
    out = tmp_path / "out"
    code, said, _ = run(capsys, "convert", tmp_path / "source", "--patch", "14:16", "--out", out)
    assert code == 0 and "14" in said and "16" in said and str(out) in said
    assert load(out).backbone.patch_size == (16, 16)
    code, said, _ = run(
        capsys, "convert", tmp_path / "source", "--patch", "7", "--size", 70, "--resize", "timm", "--out", out, "--json"
    )
    facts = json.loads(said)
    assert code == 0 and facts == {
        "folder": str(out),
        "patch": [7, 7],
        "size": [70, 70],
        "tokens": 100,
        "scale": pytest.approx(0.25),
    }
    for arguments, words in (
        (["convert", tmp_path / "source", "--patch", "16:14", "--out", tmp_path / "no"], "patches of 14 pixels"),
        (["convert", tmp_path / "none" / "x", "--patch", "14:16", "--out", tmp_path / "no"], "no model folder"),
        (["convert", "vit_small_patch14_dinov2", "--patch", "14:16", "--out", tmp_path / "no"], "random weights"),
        (["convert", tmp_path / "source", "--out", tmp_path / "no"], "--patch"),
        (
            ["convert", tmp_path / "source", "--patch", "16", "--resize", "x", "--out", tmp_path / "no"],
            "default, google",
        ),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "no").exists()


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_worked_example_of_the_page_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "convert.md").read_text()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, flags=re.S)
    assert len(blocks) == 2
    for code, said in blocks:
        capsys.readouterr()
        space: dict = {}
        exec(compile(code, "docs/convert.md", "exec"), space)
        assert capsys.readouterr().out == said
    assert space["model"].backbone.patch_size == (16, 16)


def test_freeze_is_a_function_too():
    model = flexible()
    assert same_weights(freeze(model, "grid(30)"), model.freeze("grid(30)"))


def test_types_of_the_public_names():
    assert saccade.flexify is flexify and saccade.convert is convert and isinstance(flexible().vit.pos_embed, Tensor)


# timm's own weights


def published_file(path: Path, patch: int = 32, grid: int = 7):
    """A file as timm's hub has it: the names of timm, kernel and positions as they were trained."""
    vit = make_vit("flexivit", depth=2, patch_size=patch, img_size=patch * grid)
    save_file({name: value.contiguous() for name, value in vit.state_dict().items()}, path)
    return vit, {"pretrained_cfg_overlay": {"file": str(path), "num_classes": 10}, "num_classes": 10, **SHAPE}


@torch.no_grad()
def test_a_pretrained_flexivit_keeps_the_kernel_that_it_was_trained_with(tmp_path):
    """At every patch size it is what timm makes of the file for that size alone; from 16 pixels it is far from it."""
    trained, how = published_file(tmp_path / "w.safetensors")
    model = saccade.create_model("flexivit_small", pretrained=True, **how)
    assert torch.equal(model.vit.patch_embed.proj.weight, trained.patch_embed.proj.weight)
    assert torch.equal(model.vit.pos_embed, trained.pos_embed) and model.backbone.resize == PRESETS["google"]
    assert str(model.setting) == "grid(16)" and model.input_size() == (240, 240), "timm's own patch size"
    assert str(saccade.create_model("flexivit_small", "tome(r=8)", pretrained=True, **how).setting) == (
        "grid(16) | tome(r=8)"
    )
    assert str(saccade.create_model("flexivit_small", "grid(30)", pretrained=True, **how).setting) == "grid(30)"
    images = make_images(model.vit)
    lost = AdaptiveViT(timm.create_model("flexivit_small", pretrained=True, **how).eval())
    for patch in (8, 12, 16, 30):
        wanted = timm.create_model("flexivit_small", pretrained=True, patch_size=patch, img_size=240, **how).eval()
        kernel = wanted.patch_embed.proj.weight
        assert relative(model.at(f"grid({patch})").tokenizer.kernel(model.vit), kernel) <= 1e-4
        assert relative(model.at(f"grid({patch})")(images).logits, wanted(images)) <= 1e-4
        if patch in (8, 12):
            assert relative(lost.at(f"grid({patch})").tokenizer.kernel(lost.vit), kernel) > 0.5, "why this is done"
    save(model, tmp_path / "model")
    assert load(tmp_path / "model").backbone == model.backbone


@torch.no_grad()
def test_a_pretrained_flexivit_of_other_channels_sizes_and_patches(tmp_path):
    _, how = published_file(tmp_path / "w.safetensors")
    grey = saccade.create_model("flexivit_small", pretrained=True, in_chans=1, img_size=208, **how)
    assert tuple(grey.vit.patch_embed.proj.weight.shape[1:]) == (1, 32, 32) and grey.input_size() == (208, 208)
    assert grey(torch.randn(1, 1, 208, 208)).logits.shape == (1, 10)
    asked = saccade.create_model("flexivit_small", pretrained=True, patch_size=20, **how)
    assert asked.backbone.patch_size == (20, 20) and asked.backbone.resize == PRESETS["google"]
    assert str(asked.setting) == "dense"
    plain = flexify("flexivit_small", grid=None, underlying=None, size=240)
    assert plain.backbone.patch_size == (16, 16), "without weights it is timm's"


def test_a_file_that_has_lost_the_kernel_is_said_to(tmp_path):
    _, how = published_file(tmp_path / "w.safetensors", patch=16, grid=15)
    with pytest.warns(UserWarning, match=r"no kernel but one that was resized to 16 pixels.*flexify\('flexivit_small'"):
        model = saccade.create_model("flexivit_small", pretrained=True, **how)
    assert model.backbone.patch_size == (16, 16) and model.backbone.resize == PRESETS["google"]
