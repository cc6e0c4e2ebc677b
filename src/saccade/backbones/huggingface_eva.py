"""Hugging Face's DINOv3 as timm's ``Eva``, whose positions are rotations that both compute alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.backbones.huggingface_config import Config
from saccade.errors import UserError

ROTARY = "dinov3_vit"
THETA, EPS = 100.0, 1e-5  # of all that timm has
RENAMED = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2", "mlp.gate": "mlp.fc1_g"}


def eva_weights(named: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights by timm's names for a ViT -> as its ``Eva`` keeps them. Raises UserError for biases of keys."""
    gated = any(".mlp.gate." in name for name in named)
    renamed = {**RENAMED, "mlp.up": "mlp.fc1_x" if gated else "mlp.fc1"}
    weights: dict[str, Tensor] = {}
    for name, value in named.items():
        block, inside = re.match(r"(blocks\.\d+\.)?(.*)", name).groups(default="")  # type: ignore[union-attr]
        part = re.fullmatch(r"attn\.([qkv])\.(weight|bias)", inside)
        if part is None:
            rule = next((old for old in renamed if inside == old or inside.startswith(f"{old}.")), None)
            weights[block + (inside if rule is None else inside.replace(rule, renamed[rule], 1))] = value
        elif part[2] == "bias":
            if part[1] == "k":
                raise UserError(f"{where} has biases of keys, which timm's Eva does not have")
            weights[f"{block}attn.{part[1]}_bias"] = value
        elif part[1] == "q":
            three = [named.get(f"{block}attn.{one}.weight") for one in "qkv"]
            if missing := [one for one, found in zip("qkv", three, strict=True) if found is None]:
                raise UserError(f"{where}: {block}attn has no {missing[0]}")
            weights[f"{block}attn.qkv.weight"] = torch.cat(three)  # type: ignore[arg-type]
    for name in ("cls_token", "reg_token"):
        if name in weights:
            weights[name] = weights[name].reshape(1, -1, weights[name].shape[-1])
    if "reg_token" in weights and not weights["reg_token"].shape[1]:
        del weights["reg_token"]
    return {name: value.contiguous() for name, value in weights.items()}


def eva_asked(config: Config, named: Mapping[str, Tensor], where: str) -> tuple[str, dict[str, Any]]:
    """timm's name of the architecture, and what it is asked for. Raises UserError for what no name of timm's has."""
    gated = any(".mlp.gate." in name for name in named)
    own = (THETA, EPS, "silu" if gated else "gelu")
    if (found := (config.rope_theta, config.layer_norm_eps, config.hidden_act)) != own:
        names = "rope_theta", "layer_norm_eps", "hidden_act"
        said = ", ".join(f"{n}={v} (timm: {w})" for n, v, w in zip(names, found, own, strict=True) if v != w)
        raise UserError(f"{where} is no DINOv3 of timm's: {said}")
    plus = "_plus" if gated else ""
    biased = "_qkvb" if any(name.endswith("attn.q.bias") for name in named) else ""
    down, registers = named["blocks.0.mlp.fc2.weight"], named.get("reg_token")
    return f"vit_small{plus}_patch16_dinov3{biased}", {
        "num_classes": 0,
        "img_size": _pair(config.image_size),
        "patch_size": _pair(config.patch_size),
        "in_chans": config.num_channels,
        "global_pool": "token",
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_reg_tokens": 0 if registers is None else registers.shape[-2],
        "mlp_ratio": (down.shape[1] + 0.5) / config.hidden_size,
        "attn_drop_rate": config.attention_dropout,
        "drop_path_rate": config.drop_path_rate,
    }


def _pair(size: int | tuple[int, int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
