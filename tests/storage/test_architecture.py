"""What timm was asked for is kept with a model, whether shapes show it or not; else the model is not saved."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import LayerNorm, RmsNorm, SwiGLU, SwiGLUPacked
from torch import nn
from torch.nn.utils import parametrizations, prune

from oracles import make_images, make_vit, randomise
from saccade.backbones.saving import check_savable, save
from saccade.checkpoint import create_model, load
from saccade.errors import UserError
from saccade.model import AdaptiveViT

ASKED = {
    "relu": {"act_layer": "relu"},
    "quick gelu": {"act_layer": "quick_gelu"},
    "gelu, tanh": {"act_layer": "gelu_tanh"},
    "a class of torch's": {"act_layer": nn.SELU},
    "eps": {"norm_layer": partial(LayerNorm, eps=0.1)},
    "eps of torch's": {"norm_layer": partial(nn.LayerNorm, eps=0.1)},
    "rms": {"norm_layer": "rmsnorm"},
    "rms, eps": {"norm_layer": partial(RmsNorm, eps=0.3)},
    "embedding norm": {"embed_norm_layer": "layernorm"},
    "average over all": {"global_pool": "avg", "pool_include_prefix": True},
    "average, norm before": {"global_pool": "avg", "fc_norm": False},
    "token, norm after": {"fc_norm": True},
    "no norm at the end": {"final_norm": False},
    "map": {"global_pool": "map"},
    "map over all": {"global_pool": "map", "pool_include_prefix": True},
    "no position for the class": {"no_embed_class": True},
    "no positions": {"pos_embed": "none"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 3},
    "layer scale": {"init_values": 0.1},
    "norm before": {"pre_norm": True},
    "norms of queries": {"qk_norm": True},
    "inner norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "odd width": {"mlp_ratio": 1.7},
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU},
    "swiglu, packed": {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2.66667 * 2},
    "any size": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "dropout": {"drop_rate": 0.1, "pos_drop_rate": 0.2, "proj_drop_rate": 0.3, "attn_drop_rate": 0.4},
    "stochastic depth": {"drop_path_rate": 0.25},
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_timm_was_asked_for_is_given_back(asked, tmp_path):
    model = AdaptiveViT(make_vit(**ASKED[asked]))
    save(model, tmp_path / "m")
    found = load(tmp_path / "m")
    images = make_images(model.vit)
    with torch.no_grad():
        assert torch.equal(found(images).logits, model(images).logits)
        assert torch.equal(found.vit(images), model.vit(images))
        if model.vit.dynamic_img_size:
            odd = make_images(model.vit, size=(50, 70))
            assert torch.equal(found.vit(odd), model.vit(odd))
        for one in (found, model):  # a model that is trained on drops as often
            torch.manual_seed(0)
            one.vit.train()
            one.said = one.vit(images)
        assert torch.equal(found.said, model.said)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"


def test_the_recipe_of_a_published_giant(tmp_path):
    asked = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2.66667 * 2, "init_values": 1e-5}
    small = {"img_size": 56, "depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 0}
    vit = timm.create_model("vit_giant_patch14_224", no_embed_class=True, reg_tokens=8, **asked, **small)
    model = AdaptiveViT(randomise(vit).eval(), "tome(r=2)")
    save(model, tmp_path / "m")
    images = make_images(model.vit)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "m")(images).logits, model(images).logits)


def test_less_than_a_name_has(tmp_path):
    model = AdaptiveViT(make_vit("dinov2", init_values=None))
    save(model, tmp_path / "m")
    images = make_images(model.vit)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "m")(images).logits, model(images).logits)


def test_a_usual_model_is_described_by_its_sizes_alone(tmp_path):
    save(AdaptiveViT(make_vit()), tmp_path / "m")
    args = json.loads((tmp_path / "m" / "config.json").read_text())["model_args"]
    sizes = "num_classes img_size patch_size in_chans global_pool embed_dim depth num_heads reg_tokens"
    assert list(args) == sizes.split()


class Softer(nn.Module):
    def forward(self, x):
        return x.tanh()


def _one_activation(vit):
    vit.blocks[1].mlp.act = nn.ReLU()


def _own_activation(vit):
    for block in vit.blocks:
        block.mlp.act = Softer()


def _one_eps(vit):
    vit.blocks[2].norm2.eps = 0.5


def _tanh_in_an_argument(vit):
    for block in vit.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")


def _pruned(vit):
    prune.l1_unstructured(vit.blocks[0].attn.qkv, "weight", 0.5)


def _parametrised(vit):
    parametrizations.weight_norm(vit.head)


def _hooked_block(vit):
    vit.blocks[1].register_forward_hook(lambda module, args, out: out * 2)


def _hooked_embedding(vit):
    vit.patch_embed.register_forward_hook(lambda module, args, out: out + 1)


def _method_replaced(vit):
    before = vit.blocks[0].mlp.forward
    vit.blocks[0].mlp.forward = lambda x: 2 * before(x)


def _scale(vit):
    vit.blocks[0].attn.scale = 0.5


def _head_of_two(vit):
    vit.head = nn.Sequential(nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 10))


def _wide_block(vit):
    vit.blocks[1].mlp.fc1, vit.blocks[1].mlp.fc2 = nn.Linear(96, 50), nn.Linear(50, 96)


CHANGED = [
    _one_activation,
    _own_activation,
    _one_eps,
    _tanh_in_an_argument,
    _pruned,
    _parametrised,
    _hooked_block,
    _hooked_embedding,
    _method_replaced,
    _scale,
    _head_of_two,
    _wide_block,
]


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change.__name__.strip("_"))
def test_what_timm_cannot_be_asked_for_is_refused_by_name(change, tmp_path):
    """These would load as another function, or not at all."""
    vit = make_vit()
    model = AdaptiveViT(vit)
    check_savable(model)
    change(vit)
    with pytest.raises(UserError, match="cannot be rebuilt") as refused:
        check_savable(model)
    with pytest.raises(UserError, match="cannot be rebuilt"):
        save(model, tmp_path / "m")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_hook_that_only_looks_is_no_obstacle(tmp_path):
    vit, seen = make_vit(), []
    vit.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    save(AdaptiveViT(vit), tmp_path / "m")
    assert load(tmp_path / "m") and vit.blocks[0].training is False


def test_trying_leaves_the_modes_alone(tmp_path):
    vit = make_vit()
    vit.train()
    vit.blocks[1].eval()
    save(AdaptiveViT(vit), tmp_path / "m")
    assert vit.training and vit.blocks[0].mlp.training and not vit.blocks[1].mlp.training


def test_weights_that_no_folder_would_give_back_are_not_saved(tmp_path):
    model = AdaptiveViT(make_vit())
    with torch.no_grad():
        model.vit.head.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"NaN or infinity \(vit.head.bias\)"):
        save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


# --- weights under other names --------------------------------------------------------------------------------------

TINY = {"img_size": 64, "embed_dim": 96, "depth": 3, "num_heads": 3, "num_classes": 10}


def open_file(file: Path, **changes) -> AdaptiveViT:
    return create_model("vit_tiny_patch16_224", weights=file, **{**TINY, **changes})


def write(file: Path, state: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    save_file({k: v.clone() for k, v in state.items()}, file)
    return file


PREFIXES = [
    "module.",
    "_orig_mod.",
    "backbone.",
    "model.",
    "encoder.",
    "vit.",
    "module._orig_mod.",
    "student.backbone.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_all_keys_have_is_taken_off(prefix, tmp_path):
    vit = make_vit()
    file = write(tmp_path / "w.safetensors", {prefix + k: v for k, v in vit.state_dict().items()})
    assert torch.equal(open_file(file).vit.pos_embed, vit.pos_embed)


def test_a_prefix_that_some_keys_have_is_named(tmp_path):
    state = {f"encoder.{k}": v for k, v in make_vit().state_dict().items()}
    file = write(tmp_path / "w.safetensors", {**state, "decoder.weight": torch.zeros(3)})
    with pytest.raises(UserError, match=r"begin with 'encoder\.' there, among others: keep those, strip 'encoder\.'"):
        open_file(file)


OTHERS = {
    "fc_norm": ({"global_pool": "avg"}, {}, "global_pool='avg'"),
    "norm": ({}, {"global_pool": "avg"}, "global_pool='token'"),
    "head": ({"num_classes": 7}, {}, "its head has 7 classes: create this model with num_classes="),
    "no head": ({"num_classes": 0}, {}, "num_classes=0"),
    "layer scale": ({"init_values": 0.1}, {}, "init_values=1e-5"),
    "size": ({"img_size": 96}, {}, "6x6 patches"),
    "patches": ({"patch_size": 8, "img_size": 32}, {}, r"patch_size=\(8, 8\)"),
    "registers": ({"reg_tokens": 4}, {}, "reg_tokens="),
    "queries": ({"qk_norm": True}, {}, "qk_norm=True"),
    "pool": ({"global_pool": "map"}, {}, "global_pool='map'"),
    "before": ({"pre_norm": True}, {}, "pre_norm=True"),
    "no positions": ({"pos_embed": "none"}, {}, "pos_embed='none'"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_model_says_how_to_create_it(kind, tmp_path):
    theirs, ours, says = OTHERS[kind]
    file = write(tmp_path / "w.safetensors", make_vit(**theirs).state_dict())
    with pytest.raises(UserError, match=says) as refused:
        open_file(file, **ours)
    assert "\n" not in str(refused.value)
    open_file(file, **theirs)  # and so it is
