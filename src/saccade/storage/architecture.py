"""From a timm ViT to the arguments that make another like it, and the proof that they do.

What timm was asked for cannot be read off the shapes of the weights: activations, epsilons, what is pooled. It is read
off the modules, and then a twin is made of what was read and compared with the original: module by module, in type and
plain attributes, and in what both make of a few tokens, which also sees what was patched or hooked. All of this costs
little: the twin has no weights of its own, and few tokens go through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import timm
import torch
from timm import layers
from timm.layers import create_act, create_norm
from timm.models.eva import Eva
from torch import Tensor, nn

from saccade.core.timm_types import ViT
from saccade.errors import UserError
from saccade.storage.skeletons import with_buffers, without_values

Layer = Callable[..., nn.Module]
_OF_TORCH = {f"nn.{name}": getattr(nn, name) for name in nn.modules.activation.__all__ if name != "MultiheadAttention"}
ACTS: dict[str, Layer] = {
    **{name: create_act.get_act_layer(name) for name in create_act._ACT_LAYER_DEFAULT},
    **_OF_TORCH,
}
NORMS: dict[str, Layer] = {**create_norm._NORM_MAP, "nn.LayerNorm": nn.LayerNorm, "nn.RMSNorm": nn.RMSNorm}
MLPS: dict[str, Layer] = {name: getattr(layers, name) for name in ("Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked")}
DROPS = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
# Attributes in which two modules of the same function may differ.
PASSING = {
    "training",
    "fused_attn",
    "grad_checkpointing",
    "img_size",
    "strict_img_size",
    "weight_init_mode",
    "fix_init",
}
FEW = 4  # tokens that are tried


def build(name: str, args: Mapping[str, Any]) -> ViT:
    """timm's model of a name, of arguments as ``arguments`` gives them. Raises whatever timm does."""
    return cast(ViT, timm.create_model(name, **with_layers(args)))


def with_layers(args: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments as timm takes them: kinds of layers for their names."""
    given, eps = dict(args), args.get("norm_eps")
    given.pop("norm_eps", None)
    for knob, known in (("act_layer", ACTS), ("norm_layer", NORMS), ("mlp_layer", MLPS), ("embed_norm_layer", NORMS)):
        if knob in given:
            given[knob] = known[given[knob]]
    if "norm_layer" in given and eps is not None:
        given["norm_layer"] = partial(given["norm_layer"], eps=eps)
    return given


def arguments(vit: ViT, name: str) -> dict[str, Any]:
    """What ``build`` needs to make another such ViT, as plain values. Raises UserError where nothing would."""
    if isinstance(vit, Eva):
        return _like(vit, name, _sizes(vit) | _eva_sizes(vit))
    args = _sizes(vit) | {"reg_tokens": vit.num_reg_tokens}
    facts = _facts(vit)
    try:
        usual = _facts(_twin(name, args))
    except Exception:  # these alone contradict each other
        usual = {"init_values": None}
    args |= {k: v for k, v in facts.items() if v != usual.get(k, ...) and (v is not None or k == "init_values")}
    if facts["norm_eps"] != usual.get("norm_eps") and facts["norm_layer"]:
        args["norm_layer"] = facts["norm_layer"]
    return _like(vit, name, args)


def _sizes(vit: ViT) -> dict[str, Any]:
    """What every kind of ViT is asked for."""
    embed = vit.patch_embed
    return {
        "num_classes": vit.num_classes,
        "img_size": list(table_size(vit)),
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "global_pool": vit.global_pool,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": vit.blocks[0].attn.num_heads,
    }


def _eva_sizes(vit: Any) -> dict[str, Any]:
    """Sizes by its own names; all else of an ``Eva`` is what its name says, or it is refused."""
    return {
        "num_reg_tokens": 0 if vit.reg_token is None else vit.reg_token.shape[1],
        "mlp_ratio": (vit.blocks[0].mlp.fc2.in_features + 0.5) / vit.embed_dim,
        "dynamic_img_size": vit.dynamic_img_size,
    }


def _like(vit: ViT, name: str, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments, once a twin has been made by them. Raises UserError where it cannot be, or is another function."""
    try:
        twin = _twin(name, args)
    except Exception as error:
        raise UserError(
            f"this ViT cannot be rebuilt as timm's {name!r}: {str(error)[:200] or type(error).__name__}"
        ) from None
    if differ := difference(vit, twin):
        raise UserError(
            f"this ViT differs from what timm's {name!r} can be asked for: {differ}; so it cannot be rebuilt from a "
            "folder: undo what was changed after it was created, or save its state dict alone, by safetensors"
        )
    return args


def table_size(vit: ViT) -> tuple[int, ...]:
    """Input pixels from which timm derives the grid of the position table; a flexible table has a grid of its own."""
    embed = vit.patch_embed
    sides = zip(embed.img_size, embed.patch_size, embed.grid_size, strict=True)
    return tuple(size if size // patch == cells else patch * cells for size, patch, cells in sides)


def difference(vit: ViT, twin: ViT) -> str:
    """In what a ViT is another function than its twin, which takes its weights; "" where it is the same."""
    own, other = dict(vit.named_modules()), dict(twin.named_modules())
    if extra := sorted(own.keys() ^ other.keys()):
        return f"module {extra[0]!r} is {'added' if extra[0] in own else 'missing'}"
    for name, module in own.items():
        if type(module) is not type(other[name]):
            return f"{name} is a {type(module).__name__}, not a {type(other[name]).__name__}"
    mine, his = ({k: v.shape for k, v in m.state_dict().items()} for m in (vit, twin))
    if mine != his:
        odd = sorted(k for k in mine.keys() | his.keys() if mine.get(k) != his.get(k))[0]
        return f"{odd} is {_shape(mine.get(odd))}, not {_shape(his.get(odd))}"
    for name, module in own.items():
        here, there = _plain(module), _plain(other[name])
        for key in sorted(here.keys() | there.keys()):
            if here.get(key) != there.get(key):
                return f"{name or 'the model'}.{key} is {here.get(key)!r}, not {there.get(key)!r}"
    return _tried(vit, twin)


def _tried(vit: ViT, twin: ViT) -> str:
    """What a few tokens, and an image up to the first block, show; the twin borrows the weights."""
    weight = vit.patch_embed.proj.weight
    if weight.is_meta:
        return ""
    twin.load_state_dict(vit.state_dict(), strict=True, assign=True)
    with_buffers(twin)
    modes = {module: module.training for module in vit.modules()}
    try:
        for part in (vit, twin):
            part.eval()
        with torch.no_grad():
            parts = {"blocks and head": (_through(vit), _through(twin))}
            if tuple(vit.patch_embed.img_size) == table_size(vit):
                parts["patch embedding"] = (_embedded(vit), _embedded(twin))
    finally:
        for module, mode in modes.items():
            module.training = mode
    for what, (found, expected) in parts.items():
        close = torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3, equal_nan=True)
        if found.shape != expected.shape or not close:
            return f"its {what} give something else, by a hook or a method put in place of timm's"
    return ""


def _through(vit: ViT) -> Tensor:
    weight = vit.patch_embed.proj.weight
    shape = 1, vit.num_prefix_tokens + FEW, vit.embed_dim
    x = torch.linspace(-2, 2, shape[1] * shape[2], device=weight.device).sin().view(shape).to(weight.dtype)
    for block in vit.blocks:
        x = block(x)
    return vit.forward_head(vit.norm(x))


def _embedded(vit: ViT) -> Tensor:
    weight = vit.patch_embed.proj.weight
    shape = 1, weight.shape[1], *vit.patch_embed.img_size
    image = torch.linspace(-1, 1, shape[1] * shape[2] * shape[3], device=weight.device).view(shape).to(weight.dtype)
    placed: Any = vit._pos_embed(vit.patch_embed(image))
    x, *turns = placed if isinstance(placed, tuple) else (placed,)
    return torch.cat([vit.norm_pre(x).flatten(), *(t.flatten().to(x) for t in turns if t is not None)])


def _twin(name: str, args: Mapping[str, Any]) -> ViT:
    with without_values():
        return build(name, args)


def _facts(vit: ViT) -> dict[str, Any]:
    """What timm can be asked for beside sizes, read off the modules; None: not said."""
    block = vit.blocks[0]
    attn, mlp = block.attn, block.mlp
    norm = next((n for n in (block.norm1, vit.norm, vit.fc_norm) if not isinstance(n, nn.Identity)), block.norm1)
    return {
        "class_token": vit.cls_token is not None,
        "no_embed_class": vit.no_embed_class,
        "pos_embed": "none" if vit.pos_embed is None else "learn",
        "pool_include_prefix": vit.pool_include_prefix,
        "dynamic_img_size": vit.dynamic_img_size,
        "dynamic_img_pad": getattr(vit.patch_embed, "dynamic_img_pad", False),
        "pre_norm": _there(vit.norm_pre),
        "final_norm": _there(vit.norm) or _there(vit.fc_norm),
        "fc_norm": _there(vit.fc_norm),
        "qkv_bias": getattr(attn.qkv, "bias", None) is not None,
        "proj_bias": getattr(attn.proj, "bias", None) is not None,
        "qk_norm": _there(attn.q_norm),
        "scale_attn_norm": _there(getattr(attn, "norm", None)),
        "scale_mlp_norm": _there(getattr(mlp, "norm", None)),
        "init_values": float(getattr(block.ls1, "init_values", 1e-5)) if _there(block.ls1) else None,
        "mlp_ratio": _ratio(mlp, vit.embed_dim),
        "mlp_layer": _mlp(mlp),
        "act_layer": _named(ACTS, getattr(mlp, "act", None)),
        "norm_layer": _named(NORMS, norm),
        "norm_eps": getattr(norm, "eps", None),
        "embed_norm_layer": _named(NORMS, vit.patch_embed.norm) if _there(vit.patch_embed.norm) else None,
        "drop_rate": _p(vit.head_drop),
        "pos_drop_rate": _p(vit.pos_drop),
        "proj_drop_rate": _p(attn.proj_drop),
        "attn_drop_rate": _p(attn.attn_drop),
        "drop_path_rate": float(getattr(vit.blocks[-1].drop_path1, "drop_prob", 0.0) or 0.0),
    }


def _ratio(mlp: nn.Module, dim: int) -> float | None:
    """Of the MLP's width, such that timm rounds it to the same."""
    first = cast(Any, getattr(mlp, "fc1", None) or getattr(mlp, "fc1_g", None))
    hidden = getattr(first, "out_features", None)
    if hidden is None:
        return None
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim


def _mlp(mlp: nn.Module) -> str | None:
    if type(mlp) is layers.GluMlp:
        return "GluMlp" if mlp.gate_last else "SwiGLUPacked"
    return _named(MLPS, mlp)


def _named(known: Mapping[str, Layer], module: object) -> str | None:
    return next((name for name, made in known.items() if made is type(module)), None)


def _there(module: object) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _p(module: object) -> float:
    return float(getattr(module, "p", 0.0))


def _plain(module: nn.Module) -> dict[str, Any]:
    """What a module is told beside its weights, and which of its methods were replaced."""
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in PASSING}
    told = {k: v for k, v in own.items() if isinstance(v, (bool, int, float, str))}
    pairs = {k: tuple(v) for k, v in own.items() if isinstance(v, (tuple, list)) and all(map(_number, v))}
    methods = {k: "replaced" for k, v in own.items() if callable(v) and callable(getattr(type(module), k, None))}
    return told | pairs | methods


def _number(value: object) -> bool:
    return isinstance(value, (bool, int, float, str))


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))
