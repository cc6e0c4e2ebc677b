"""Hugging Face's Vision Transformers as timm's: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, SigLIP 2 and I-JEPA.

All that is needed stands in their ``config.json`` and in the names of their weights, as transformers 4 and 5 write
them: the conversion is exact, and the transformers library need not be there. What has no form in timm is refused by
name. Position tables are for one input size, ``image_size`` of the config; timm resizes them to others its own way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from saccade.backbones.huggingface_config import ACTIVATIONS, TOWERS, Config
from saccade.backbones.huggingface_eva import ROTARY, eva_asked, eva_weights
from saccade.backbones.vit import backbone_of, set_class_names
from saccade.core.timm_types import ViT
from saccade.errors import UserError
from saccade.storage.architecture import build
from saccade.storage.skeletons import emptied, without_values
from saccade.storage.weights import check, fill, shapes

TIMM = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large"}  # and the usual patch of 16 pixels
IMAGENET = 1000
TWO = "class token and mean together"
READS = {"dinov2": TWO, "dinov2_with_registers": TWO, TOWERS["clip"]: "the mean before the last norm"}  # classifiers
# Names in the files, after what stands before them, and timm's.
BEFORE = re.compile(
    r"^((vit|deit|ijepa|dinov3_vit|dinov2(_with_registers)?|vision_model|(clip|siglip2?)\.vision_model)\.)"
)
BLOCK = re.compile(r"^(encoder\.|model\.)?layers?\.(\d+)\.")
INSIDE = {
    r"(layernorm_before|norm1|layer_norm1)": "norm1",
    r"(layernorm_after|norm2|layer_norm2)": "norm2",
    r"(attention(\.attention)?|self_attn)\.(q_proj|query)": "attn.q",
    r"(attention(\.attention)?|self_attn)\.(k_proj|key)": "attn.k",
    r"(attention(\.attention)?|self_attn)\.(v_proj|value)": "attn.v",
    r"(attention|self_attn)\.(o_proj|out_proj|output\.dense)": "attn.proj",
    r"(mlp\.fc1|mlp\.weights_in|intermediate\.dense)": "mlp.fc1",
    r"(mlp\.fc2|mlp\.weights_out|mlp\.down_proj|output\.dense)": "mlp.fc2",
    r"mlp\.gate_proj": "mlp.gate",
    r"mlp\.up_proj": "mlp.up",
    r"layer_scale1\.lambda1": "ls1.gamma",
    r"layer_scale2\.lambda1": "ls2.gamma",
}
PACKED = {"attn.qkv": ("q", "k", "v"), "mlp.fc1": ("gate", "up")}  # in timm one matrix, of several there
OUTSIDE = {
    r"embeddings\.(cls_token|class_embedding)": "cls_token",
    r"embeddings\.distillation_token": "dist_token",
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.(position_embeddings|position_embedding\.weight)": "pos_embed",
    r"embeddings\.(patch_embeddings(\.projection)?|patch_embedding)": "patch_embed.proj",
    r"pre_layrnorm": "norm_pre",
    r"(layernorm|post_layernorm|norm)": "norm",
    r"(classifier|cls_classifier|visual_projection)": "head",
    r"distillation_classifier": "head_dist",
    r"head\.probe": "attn_pool.latent",
    r"head\.attention\.in_proj_(weight|bias)": r"attn_pool.in.\1",
    r"head\.attention\.out_proj": "attn_pool.proj",
    r"head\.layernorm": "attn_pool.norm",
    r"head\.mlp\.(fc1|fc2)": r"attn_pool.mlp.\1",
}
UNUSED = re.compile(
    r"embeddings\.(mask_token|position_ids)$|pooler\.dense\.|logit_(scale|bias)$|text_(model|projection)\."
)


def vit_of(config: Config, state: Mapping[str, Tensor], where: str, *, classifier: bool = True) -> ViT:
    """The timm ViT of a transformers config and its weights, fp32, in evaluation mode.

    Args:
        where: what messages call it.
        classifier: with the head that the weights have; False: none.

    Raises:
        UserError: names that are not known, tensors that do not fit the config, and heads without a form in timm:
            DINOv2's, of class token and mean, and CLIP's, of the mean before the last norm.
    """
    named = _renamed(state, where)
    if odd := [k for k, v in named.items() if not v.is_floating_point()]:
        raise UserError(f"{where} holds whole numbers as {odd[0]}: dequantise it first")
    if not classifier:
        named = {k: v for k, v in named.items() if k.partition(".")[0] not in ("head", "head_dist")}
    projects = any("visual_projection" in name for name in state)
    if "head.weight" in named and not projects and config.model_type in READS:
        reads = READS[config.model_type]
        raise UserError(f"{where} has a classifier that reads {reads}, which timm does not have: take classifier=False")
    try:
        if config.model_type == ROTARY:
            weights, (name, args) = eva_weights(named, where), eva_asked(config, named, where)
        else:
            weights = _joined(config, named, where)
            name, args = _asked(config, weights)
        with without_values():
            vit = build(name, args)
    except UserError:
        raise
    except Exception as error:  # tensors of shapes that no such model has
        raise UserError(f"timm cannot make {where}: {str(error)[:200] or type(error).__name__}") from None
    backbone_of(vit)
    check(shapes(vit.state_dict()), shapes(weights), type(vit).__name__, where)
    emptied(vit)
    fill(vit, weights, where)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "num_classes": 0}  # that of the name would claim ImageNet's classes
    _name_classes(vit, config)
    return vit.eval()


def _renamed(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The same tensors by timm's names, where queries, keys and values are apart yet."""
    found, unknown = {}, []
    for name, value in state.items():
        short = BEFORE.sub("", name)
        block = BLOCK.match(short)
        rules, rest = (INSIDE, short[block.end() :]) if block else (OUTSIDE, short)
        rule = next((r for r in rules if re.fullmatch(rf"{r}(\.weight|\.bias)?", rest)), None)
        if rule is not None:
            found[(f"blocks.{block[2]}." if block else "") + re.sub(f"^{rule}", rules[rule], rest)] = value
        elif not UNUSED.match(rest):
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{where} holds {len(unknown)} tensors that no ViT of timm has ({', '.join(sorted(unknown)[:3])}): give "
            "the model without what stands on top of it"
        )
    return found


def _joined(config: Config, named: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """As timm keeps them: one matrix for what reads the same, and tables and tokens of its shapes."""
    weights = dict(named)
    for packed, parts in PACKED.items():
        first = f".{packed.rpartition('.')[0]}.{parts[0]}."
        for name in [k for k in named if first in k]:
            names = [name.replace(first, first[: -len(parts[0]) - 1] + part + ".") for part in parts]
            if missing := [k for k in names if k not in named]:
                raise UserError(f"{where} has {name} and no {missing[0]}")
            joined = torch.cat([weights.pop(k) for k in names])
            weights[name.replace(first, f".{packed}.")] = joined
    for end in ("weight", "bias"):
        if (name := f"attn_pool.in.{end}") in weights:
            joined = weights.pop(name)
            dim = len(joined) // 3
            weights[f"attn_pool.q.{end}"], weights[f"attn_pool.kv.{end}"] = joined[:dim], joined[dim:]
    kernel = weights.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 2:  # SigLIP 2: of patches laid out as pixels, their channels last
        patch = _pair(config.patch_size)
        if kernel.shape[1] != patch[0] * patch[1] * config.num_channels:
            raise UserError(f"{where}: a kernel of {kernel.shape[1]} values is not of {patch[0]}×{patch[1]} pixels")
        weights["patch_embed.proj.weight"] = kernel.unflatten(1, (*patch, -1)).permute(0, 3, 1, 2)
    for name in {"cls_token", "pos_embed", "reg_token", "dist_token"} & weights.keys():
        value = weights[name]
        weights[name] = value.reshape(1, -1, value.shape[-1])
    if "reg_token" in weights and not weights["reg_token"].shape[1]:
        del weights["reg_token"]
    if config.num_register_tokens and "pos_embed" in weights and "cls_token" in weights:
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]  # registers have no positions
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    if "dist_token" in weights and "head_dist.weight" not in weights:  # read by no head: a register to timm
        weights["reg_token"] = weights.pop("dist_token")
    if "head.weight" in weights and "head.bias" not in weights:
        weights["head.bias"] = torch.zeros(len(weights["head.weight"]))
    return {name: value.contiguous() for name, value in weights.items()}


def _asked(config: Config, weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """timm's name of the architecture, and what it is asked for."""
    kind, dim = config.model_type, config.hidden_size
    fc1, fc2 = (weights.get(f"blocks.0.mlp.{name}.weight", torch.empty(1, 1)) for name in ("fc1", "fc2"))
    patch = _pair(config.patch_size)
    cells = round(config.num_patches**0.5)
    size = _pair(config.image_size) if kind != TOWERS["siglip2"] else (patch[0] * cells, patch[1] * cells)
    gated = fc1.shape[0] == 2 * fc2.shape[1]
    pool = "token" if "cls_token" in weights else "map" if "attn_pool.latent" in weights else "avg"
    args: dict[str, Any] = {
        "num_classes": len(weights.get("head.weight", ())),
        "img_size": list(size),
        "patch_size": list(patch),
        "in_chans": config.num_channels,
        "embed_dim": dim,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (fc1.shape[0] + 0.5) / dim,
        "act_layer": "silu" if gated else ACTIVATIONS[config.hidden_act],
        "norm_layer": "layernorm",
        "norm_eps": config.layer_norm_eps,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "init_values": config.layerscale_value,
        "pos_drop_rate": config.hidden_dropout_prob,
        "proj_drop_rate": config.hidden_dropout_prob,
        "attn_drop_rate": max(config.attention_probs_dropout_prob, config.attention_dropout),
        "drop_path_rate": config.drop_path_rate,
    }
    if gated:
        args["mlp_layer"] = "SwiGLUPacked"
    if "dist_token" in weights:
        return "deit_base_distilled_patch16_224", args
    args |= {"global_pool": pool, "class_token": pool == "token", "fc_norm": False}
    args["reg_tokens"] = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    args["no_embed_class"] = bool(config.num_register_tokens)
    args["pre_norm"] = "norm_pre.weight" in weights
    return f"{TIMM.get(dim, 'vit_base')}_patch16_224", args


def _name_classes(vit: ViT, config: Config) -> None:
    """The names of the classes, unless they are placeholders; ImageNet's where they are ImageNet's descriptions."""
    names = [*(config.id2label or {}).values()]
    if len(names) != vit.num_classes or any(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return
    names = [name for _, name in sorted((config.id2label or {}).items(), key=lambda pair: (len(pair[0]), pair[0]))]
    if len(names) == IMAGENET:
        info = ImageNetInfo()
        alike = sum(info.index_to_description(i) == name for i, name in enumerate(names))
        if alike > 0.9 * IMAGENET:
            vit.pretrained_cfg = {**vit.pretrained_cfg, "num_classes": IMAGENET}
            return
    if len({*names}) == len(names):
        set_class_names(vit, names)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
