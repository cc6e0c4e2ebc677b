"""Saving a model: its weights, and what its folder says of it so that ``load`` can rebuild it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saccade.backbones.vit import class_names_of, resize_of
from saccade.core.head import PREFIX
from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.setting import Setting
from saccade.storage.architecture import arguments, table_size
from saccade.storage.files import check_folder
from saccade.storage.folder_config import FORMAT
from saccade.storage.model_folder import write
from saccade.storage.weights import require_keepable

if TYPE_CHECKING:
    from saccade.core.timm_types import ViT
    from saccade.model import AdaptiveViT


LEARNED = "learned."  # before the names of what methods learn


def check_savable(model: AdaptiveViT) -> None:
    """Raises UserError where ``save`` would, for the model's sake: what no folder can hold. Before the work is done."""
    require_keepable(folder_state(model))
    _config(model, {})


def save(model: AdaptiveViT, folder: str | os.PathLike, **extra: Any) -> None:
    """Write a model folder, whole or not at all; ``extra`` is kept under its name in the config.

    ``vit.*`` without its prefix opens in plain timm, strictly. ``config.json`` is timm's, with ours under one key; it
    names the weights by their checksum, and its arrival is the moment at which a folder that was there changes. Weights
    keep their number type: what was saved after ``.half()`` or ``.bfloat16()`` loads so.

    Raises:
        UserError: a model that no folder can hold, a folder that holds something else or that another process writes
            in, a disk that is full, and whatever else the system objects to. What was there is there still.
    """
    target = Path(folder)
    check_folder(target)
    state = {k: v.detach().cpu().contiguous() for k, v in folder_state(model).items()}
    require_keepable(state)
    config = _config(model, extra)
    write(target, state, config)


def folder_state(model: AdaptiveViT) -> dict[str, Tensor]:
    """All weights by their names in a folder: what methods learn is there once, whichever settings name them."""
    views = ("tokenizer.", "plan.")
    state = {k.removeprefix(PREFIX): v for k, v in model.state_dict().items() if not k.startswith(views)}
    return state | {LEARNED + k: v for k, v in model.learned.items()}


def _name(vit: ViT) -> str:
    """timm's name of the architecture."""
    if not (name := vit.pretrained_cfg.get("architecture")):
        raise UserError("this ViT does not know its timm name (pretrained_cfg['architecture']): use create_model")
    return name


def _config(model: AdaptiveViT, extra: Mapping[str, Any]) -> dict[str, Any]:
    """All of ``config.json`` but the seal: timm's part, which rebuilds the timm module, and ours."""
    vit = model.vit
    ours: dict[str, Any] = {"format": FORMAT, "setting": str(model.setting), **model.describe()}
    if model.trained:
        ours["settings"] = list(model.trained)
    if model.deployed is not None:
        ours["runner"] = model.deployed.to_dict()
    if brought := _plugins(model):
        ours["plugins"] = brought
    name, cfg = _name(vit), dict(vit.pretrained_cfg)
    kept = ("interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes", "tag", "license")
    size = [vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size]
    return {
        "architecture": name,
        "num_classes": vit.num_classes,
        **_class_names(vit),
        "model_args": arguments(vit, name),
        "pretrained_cfg": {"input_size": size, **{k: cfg[k] for k in kept if cfg.get(k) is not None}},
        "saccade": {**ours, **_flexible(vit), **extra},
    }


def _plugins(model: AdaptiveViT) -> dict[str, str]:
    """Methods that the model's settings name and plugins bring, and what brings them."""
    known, settings = registry(), (model.setting, *map(Setting.parse, model.trained))
    used = (known[call.name] for setting in settings for call in setting.calls if call.name in known)
    return {entry.name: entry.origin for entry in used if entry.origin}


def _class_names(vit: ViT) -> dict[str, Any]:
    """What the head's classes are called, under the names at which timm writes them on its hub."""
    names = class_names_of(vit)
    if names is None:
        return {}
    known = vit.pretrained_cfg.get("label_descriptions") or {}
    described = {name: known[name] for name in names if name in known}
    return {"label_names": list(names), **({"label_descriptions": described} if described else {})}


def _flexible(vit: ViT) -> dict[str, Any]:
    """How kernel and positions were resized in training, and the input size where the table does not tell it."""
    spec, size = resize_of(vit), vit.patch_embed.img_size
    facts = {} if spec is None else {"resize": spec.to_dict()}
    return facts if table_size(vit) == tuple(size) else {**facts, "input_size": list(size)}
