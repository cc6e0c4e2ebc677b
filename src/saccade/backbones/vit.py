"""Which timm models are supported, and what the library reads off them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import NoneType
from typing import Any, cast

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.layers import PatchEmbed, RotaryEmbeddingDinoV3
from timm.layers.pos_embed_sincos import RotaryEmbeddingMRope
from timm.models import deit, eva, vision_transformer
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations as kind_of

from saccade.core.costs import block_cost
from saccade.core.hooks import ATTENTIONS, BLOCKS, layer_in
from saccade.core.plan import Backbone
from saccade.core.timm_types import ViT
from saccade.errors import UserError
from saccade.tokenizers.resize.resampling import ResizeSpec

KINDS = (vision_transformer.VisionTransformer, deit.VisionTransformerDistilled, eva.Eva)
POOLS = ("token", "avg", "map")


def backbone_of(vit: ViT) -> Backbone:
    """Facts of a supported ViT; UserError names the part that is not supported."""
    name = type(vit).__name__
    if hasattr(vit, "_orig_mod"):
        raise UserError("this model is compiled already: give the one before, and take model.deploy('fp32 compiled')")
    if kind_of(vit) not in KINDS:
        raise UserError(f"{name} is not supported: give a timm {' or '.join(kind.__name__ for kind in KINDS)}")
    for i, block in enumerate(vit.blocks):
        if hasattr(block, "_orig_mod"):
            raise UserError(
                f"{name}.blocks[{i}] is compiled already: put block._orig_mod there, or compile it in place "
                "(block.compile())"
            )
        if type(block) not in BLOCKS:
            raise UserError(
                f"{name}.blocks[{i}] is a {type(block).__name__}; only timm's {_names(BLOCKS)} are supported"
            )
        if type(block.attn) not in ATTENTIONS:
            what = f"{name}.blocks[{i}].attn is a {type(block.attn).__name__}"
            raise UserError(f"{what}; only timm's {_names(ATTENTIONS)} are supported")
        if getattr(block.attn, "num_kv_groups", 1) > 1:
            raise UserError(f"{name}.blocks[{i}].attn shares keys among queries (num_kv_heads): not supported")
    if type(vit.patch_embed) is not PatchEmbed:
        raise UserError(f"{name}.patch_embed is a {type(vit.patch_embed).__name__}; only PatchEmbed is supported")
    if vit.patch_embed.grid_size is None:
        raise UserError(f"{name}.patch_embed has no image size; create the model with img_size=")
    if vit.global_pool not in POOLS:
        raise UserError(f"global_pool={vit.global_pool!r} is not supported; use one of {', '.join(POOLS)}")
    if isinstance(getattr(vit, "rope", None), RotaryEmbeddingMRope):
        raise UserError(f"{name}.rope is a RotaryEmbeddingMRope, which is not supported")
    if not isinstance(vit.patch_drop, (nn.Identity, NoneType)):
        raise UserError("patch_drop_rate > 0 is not supported; drop patches by the setting 'random(keep)' instead")
    attn = vit.blocks[0].attn
    return Backbone(
        depth=len(vit.blocks),
        dim=vit.embed_dim,
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        num_prefix=vit.num_prefix_tokens,
        has_class_token=vit.cls_token is not None,
        patch_size=tuple(vit.patch_embed.patch_size),
        input_size=tuple(vit.patch_embed.img_size),
        channels=layer_in(vit.patch_embed.proj, nn.Conv2d, "in_channels").in_channels,
        pool=vit.global_pool,
        cost=block_cost(vit.blocks[0]),
        head=(head_macs(vit, 0), head_macs(vit, 1) - head_macs(vit, 0)),
        resize=resize_of(vit),
        num_classes=vit.num_classes,
        attention=type(attn).__name__,
        rotary=_rotary(vit),
    )


def _rotary(vit: ViT) -> str | None:
    """What rotary positions count: "grid", shares of the whole grid, or "cells"; None: there are none."""
    rope: Any = getattr(vit, "rope", None)
    if rope is None:
        return None
    scaled = isinstance(rope, RotaryEmbeddingDinoV3) or getattr(rope, "ref_feat_shape", None) is not None
    return "grid" if scaled else "cells"


def _names(kinds: tuple[type, ...]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)


def pools_prefix(vit: ViT) -> bool:
    """Whether an average, or attention, pools class token and registers too."""
    return getattr(vit, "pool_include_prefix", isinstance(vit, eva.Eva) and vit.attn_pool is not None)


def resize_of(vit: ViT) -> ResizeSpec | None:
    """How kernel and positions of a ViT were resized in training; None: not recorded."""
    spec = (getattr(vit, "pretrained_cfg", None) or {}).get("resize")
    return None if spec is None else ResizeSpec.from_dict(spec)


def set_resize(vit: ViT, spec: ResizeSpec | None) -> None:
    """Note how they are resized, beside what else has to be known to use the weights (mean, std, …): it stays with them
    through copies and training."""
    facts = {k: v for k, v in vit.pretrained_cfg.items() if k != "resize"}
    vit.pretrained_cfg = facts if spec is None else {**facts, "resize": spec.to_dict()}


def class_names_of(vit: nn.Module) -> tuple[str, ...] | None:
    """What folders call each class of the head, in its order; None where that is not known, or there is no head.

    From ``pretrained_cfg["label_names"]``, timm's own field, where it is as long as the head; else ImageNet's synsets,
    where timm says that the weights are ImageNet's and the head still has as many classes.
    """
    cfg, count = getattr(vit, "pretrained_cfg", None) or {}, cast(ViT, vit).num_classes
    names = cfg.get("label_names")
    if count and isinstance(names, (list, tuple)) and len(names) == count:
        return tuple(map(str, names))
    return _imagenet(count) if count and cfg.get("num_classes") == count else None


def set_class_names(vit: ViT, names: Sequence[str] | None, descriptions: Mapping[str, str] | None = None) -> None:
    """Note what the classes of the head are called, in its order, and in words: it stays with the weights through
    copies, training and folders. None forgets what was known. Raises UserError unless there is one name for each class,
    and each is text, which a folder of that name need not be.
    """
    if names is not None and (len(names) != vit.num_classes or len({*names}) < len(names)):
        raise UserError(f"{len({*names})} different class names for a head of {vit.num_classes}: give one each")
    if odd := [name for name in names or () if any("\ud800" <= letter <= "\udfff" for letter in name)]:
        raise UserError(f"the class name {odd[0]!r} is not UTF-8, and nothing that is saved can hold it: rename it")
    facts = {k: v for k, v in vit.pretrained_cfg.items() if k not in ("label_names", "label_descriptions")}
    if names is not None:
        facts["label_names"] = list(names)
    if descriptions:
        facts["label_descriptions"] = dict(descriptions)
    vit.pretrained_cfg = facts


@cache
def _imagenet(count: int) -> tuple[str, ...] | None:
    subset = infer_imagenet_subset({"num_classes": count})
    return None if subset is None else tuple(ImageNetInfo(subset).label_names())


def head_macs(vit: ViT, tokens: int) -> int:
    """MACs of pooling and classifier for one image whose last block gives so many tokens."""
    linears = [m for m in (vit.head, getattr(vit, "head_dist", None)) if isinstance(m, nn.Linear)]
    macs = sum(m.in_features * m.out_features for m in linears)
    pool = vit.attn_pool
    if pool is not None:
        patches = tokens if pools_prefix(vit) else tokens - vit.num_prefix_tokens
        once = [m for name, m in pool.named_modules() if isinstance(m, nn.Linear) and name != "kv"]
        macs += pool.latent_len * sum(m.in_features * m.out_features for m in once)
        macs += patches * pool.kv.in_features * pool.kv.out_features
        macs += 2 * pool.latent_len * patches * pool.num_heads * pool.head_dim
    return macs
