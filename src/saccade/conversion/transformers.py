"""Models of Hugging Face's transformers: as Saccade's, and with Saccade inside.

``from_transformers`` gives a model of ours, ``patch_transformers`` leaves theirs what it is to the code around it and
lets a setting run its blocks. The library itself is needed for neither.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade.backbones.addresses import HUB, LOCAL, is_address, open_address
from saccade.backbones.huggingface import vit_of
from saccade.backbones.huggingface_config import TOWERS, read_config
from saccade.backbones.image_processor import preprocessing
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.setting import Setting

PATCHED = "saccade"  # the attribute of a tower that holds the model which runs in its place
REFUSED = ("attention_mask", "bool_masked_pos", "output_attentions", "output_hidden_states")  # of a forward


def from_transformers(
    model: nn.Module | str | os.PathLike,
    setting: str | Setting = "",
    *,
    processor: Any = None,
    classifier: bool = True,
) -> AdaptiveViT:
    """A Hugging Face Vision Transformer as ``AdaptiveViT``: its weights in timm's modules, by exact conversion.

    ViT, DeiT, DINOv2 (with registers, with SwiGLU), I-JEPA, and the vision towers of CLIP, SigLIP and SigLIP 2, the
    last for the square of patches that its position table is for.

    Args:
        model: a model of transformers', whose weights are copied; a folder that ``save_pretrained`` wrote; or a name on
            the hub, like ``"google/vit-base-patch16-224"``. Only safetensors are read.
        setting: for example ``"tome(r=13)"``.
        processor: the image processor beside a model that is given itself, for mean, std, resizing and cropping;
            None: what is usual for its kind. Folders and names bring theirs.
        classifier: with its classification or projection head; False: the encoder alone, which gives pooled features.

    Returns:
        In evaluation mode, with the names of the classes.

    Raises:
        UserError: a kind of model, or of head, that has no form in timm; a folder or name without usable files.
    """
    if not isinstance(model, nn.Module):
        vit = open_address(_address(model), True, **({} if classifier else {"num_classes": 0}))
        return AdaptiveViT(vit, setting).eval()
    where = type(model).__name__
    config = read_config(_values(getattr(model, "config", None), where), where)
    vit = vit_of(config, model.state_dict(), where, classifier=classifier)
    told = None if processor is None else _values(processor, where)
    vit.pretrained_cfg = {**vit.pretrained_cfg, **preprocessing(told, config.model_type, where)}
    return AdaptiveViT(vit, setting).eval()


def patch_transformers(model: nn.Module, setting: str | Setting) -> nn.Module:
    """Let a setting run the blocks of a transformers model, in place; what it takes and returns stays what it was.

    ``pipeline("image-classification", model=saccade.patch_transformers(model, "tome(r=13)"), …)``. Its own heads read
    a hidden state of the usual shape: a merged patch has its token's features, a dropped one those that it had last.
    Pooled output is of the tokens that are left. Another call changes the setting, ``unpatch_transformers`` undoes it.

    The weights of the blocks are copied when it is called: train before, or train ``from_transformers(model)``.

    Returns:
        The same model.

    Raises:
        UserError: as ``from_transformers``; a model whose vision tower is not found. A forward that asks for attention
            maps, all hidden states or masked patches, which a reduced model has not.
    """
    tower = _tower(model)
    where = type(tower).__name__
    config = read_config(_values(getattr(tower, "config", None), where), where)
    if config.model_type == TOWERS["siglip2"]:
        raise UserError(f"{where} takes patches of several sizes: convert it, by saccade.from_transformers")
    weight = next(tower.parameters())
    vit = vit_of(config, tower.state_dict(), where, classifier=False).to(weight)
    vars(tower)[PATCHED] = AdaptiveViT(vit.requires_grad_(False), setting).eval()  # no part of its state dict
    vars(tower)["forward"] = MethodType(_forward, tower)
    return model


def unpatch_transformers(model: nn.Module) -> nn.Module:
    """Undo ``patch_transformers``; a model that is not patched stays as it is. Raises UserError as that does."""
    for name in (PATCHED, "forward"):
        vars(_tower(model)).pop(name, None)
    return model


def _forward(tower: nn.Module, pixel_values: Tensor, **asked: Any) -> Any:
    """In the place of a tower's own: pixels [B, C, h, w] -> its output class, hidden state [B, N, D]."""
    for name in REFUSED:
        if asked.get(name) is not None and asked[name] is not False:
            raise UserError(f"{name} is not for a patched model: take saccade.unpatch_transformers(model)")
    ours: AdaptiveViT = vars(tower)[PATCHED]
    weight, own = next(tower.parameters()), next(ours.vit.parameters())
    if (weight.device, weight.dtype) != (own.device, own.dtype):
        ours.to(weight)
    with torch.set_grad_enabled(torch.is_grad_enabled() and pixel_values.requires_grad):
        tokens, _ = ours._forward_tokens(pixel_values.to(weight), whole=True, dense=True)
        cells = torch.cat([tokens.x[:, : tokens.num_prefix], tokens.cell_features()], dim=1)
        before = ours.vit.norm_pre is not None and hasattr(tower, "pre_layrnorm")  # CLIP's is the state before the norm
        hidden = cells if before else ours.vit.norm(cells)
        pooled = _pooled(tower, ours, hidden, tokens)
    found = _output_class()(last_hidden_state=hidden, pooler_output=pooled)
    return found.to_tuple() if asked.get("return_dict") is False else found


def _pooled(tower: nn.Module, ours: AdaptiveViT, hidden: Tensor, tokens: Any) -> Tensor | None:
    """What the kind of model calls its pooled output; None: nothing."""
    if hasattr(tower, "pooler"):  # ViT, DeiT, I-JEPA: by a layer of its own, or not at all
        return None if tower.pooler is None else cast(nn.Module, tower.pooler)(hidden)
    if hasattr(tower, "post_layernorm") and not ours.backbone.has_class_token:
        return ours.forward_head(tokens) if ours.vit.attn_pool is not None else None
    return ours.forward_head(tokens)  # the class token, normed


def _output_class() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling


def _tower(model: nn.Module) -> nn.Module:
    """The module of a transformers model that embeds patches and runs the blocks. Raises UserError where none does."""
    names = ("patch_embeddings", "patch_embedding")
    for module in model.modules():
        if any(hasattr(getattr(module, "embeddings", None), name) for name in names):
            return module
    raise UserError(f"{type(model).__name__} has no vision tower that is known: give a ViT of transformers'")


def _values(part: Any, where: str) -> Mapping[str, Any]:
    """What a config or an image processor says. Raises UserError for something else."""
    values = part.to_dict() if callable(getattr(part, "to_dict", None)) else part
    if not isinstance(values, Mapping):
        raise UserError(f"{where} has no config of transformers': give a model of theirs, a folder or a hub name")
    return values


def _address(place: str | os.PathLike) -> str:
    """A name as the library's addresses have it: a folder that is there, else one on the hub."""
    name = os.fspath(place)
    if is_address(name):
        return name
    return f"{LOCAL}{name}" if Path(name).is_dir() else f"{HUB[0]}{name}"
