"""The timm ViT that a folder's config describes, timm's names, and the weights of the whole model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch

from saccade.backbones.learned import require_learned
from saccade.backbones.learned_by_step import by_block
from saccade.backbones.saving import LEARNED, folder_state
from saccade.backbones.vit import backbone_of, set_class_names, set_resize
from saccade.core.registry import registry
from saccade.core.timm_types import ViT
from saccade.errors import UserError, near_miss
from saccade.setting import Setting
from saccade.storage.architecture import build
from saccade.storage.files import shortened
from saccade.storage.folder_config import CONFIG, FolderConfig, Ours
from saccade.storage.skeletons import emptied, without_values
from saccade.storage.weights import check, check_tensors, line, number_type, read_weights, shapes
from saccade.tokenizers.resize.resampling import ResizeSpec

if TYPE_CHECKING:
    from saccade.model import AdaptiveViT


def check_name(name: str) -> None:
    """Raises UserError unless timm has a model of this name."""
    if ":" in name:  # "hf-hub:owner/name", "local-dir:folder"
        raise UserError(f"{name!r} is an address and not the name of an architecture")
    if name.split(".")[0] not in timm.list_models():
        if os.path.isdir(name):
            raise UserError(
                f"{shortened(name)} is a folder: saccade.load opens what Saccade saved, 'local-dir:…' others"
            )
        raise UserError(f"timm {timm.__version__} has no model {name!r}{_close(name)}")


def rebuild_vit(config: FolderConfig, header: Mapping[str, torch.Size], file: str) -> ViT:
    """The timm module, without values; its shapes have been compared with the header before memory is taken."""
    check_name(config.architecture)
    args = config.args.model_dump(exclude_unset=True)
    try:
        with without_values():
            vit = build(config.architecture, args)
    except Exception as error:
        raise UserError(f"timm cannot create {config.architecture!r}: {line(error)}") from None
    backbone_of(vit)
    own = {f"vit.{k}": v for k, v in vit.state_dict().items()}
    check(shapes(own), {k: v for k, v in header.items() if k.startswith("vit.")}, type(vit).__name__, file)
    emptied(vit)
    told = config.pretrained_cfg.model_dump(exclude_unset=True, exclude_none=True)
    vit.pretrained_cfg = {**vit.pretrained_cfg, **told}
    return vit.eval()


def restore_facts(vit: ViT, config: FolderConfig, path: Path) -> None:
    """What a folder says of a ViT beside its weights: how it was resized in training, its classes. Raises UserError."""
    restore_flexible(vit, config.saccade, path)
    restore_class_names(vit, config)


def require_plugins(ours: Ours, setting: str, path: Path) -> None:
    """Raises UserError where a folder's setting names what only a plugin has; a folder never loads one itself."""
    known = registry()
    for call in Setting.parse(setting).calls:
        if call.name in ours.plugins and call.name not in known:
            raise UserError(
                f"{shortened(path)}: its setting names {call.name!r}, which {ours.plugins[call.name]!r} brings: load "
                "that before, by --plugin FILE or saccade.load_plugin(file), or install it"
            )


def restore_class_names(vit: ViT, config: FolderConfig) -> None:
    """Inverse of ``_class_names``. Earlier folders have the names that they were trained on, as ``classes``."""
    names = config.label_names
    if names is None and config.saccade.task == "classify":
        before = (config.saccade.__pydantic_extra__ or {}).get("classes")
        if isinstance(before, list) and all(isinstance(name, str) for name in before):
            names = before if len(before) == len({*before}) == vit.num_classes else None
    if names:
        set_class_names(vit, names, config.label_descriptions)


def restore_flexible(vit: ViT, ours: Ours, path: Path) -> None:
    """Inverse of ``_flexible``. A folder without these facts is of an ordinary ViT. Raises UserError for bad ones."""
    vit.pretrained_cfg.pop("resize", None)  # its place is among ours
    if "resize" in ours.model_fields_set:
        try:
            set_resize(vit, ResizeSpec.from_dict(ours.resize))
        except UserError as error:
            raise UserError(f"{str(path / CONFIG)!r} has a malformed resize spec: {error}") from None
    vit.patch_embed.img_size = ours.input_size or tuple(vit.patch_embed.img_size)


def fill_all(model: AdaptiveViT, file: Path, own: str, untrained: bool) -> None:
    """The inverse of ``folder_state``. What methods have learned that this setting does not name is kept for others.

    own: the folder's setting. untrained: what the model's setting learns may be missing (it is another); then it starts
    as it always does, unless its method has learned elsewhere.
    """
    state = read_weights(file)
    learned = {k.removeprefix(LEARNED): v for k, v in state.items() if k.startswith(LEARNED)}
    learned = by_block(learned, model.trained, own, model.backbone)
    require_learned(model.learned, learned)
    state = {k: v for k, v in state.items() if not k.startswith(LEARNED)} | {LEARNED + k: v for k, v in learned.items()}
    others = {k: v for k, v in learned.items() if k not in model.learned}
    if (kind := number_type({k: v for k, v in state.items() if k.startswith("vit.")})) is not None:
        model.to(kind)
    parts = {k: v for k, v in folder_state(model).items() if k in state or not (untrained and k.startswith(LEARNED))}
    what = type(model).__name__ if model.task_head is None else f"this {model.task_head.noun}"
    fitting = {k: v for k, v in state.items() if k.removeprefix(LEARNED) not in others}
    check_tensors(parts, fitting, what, str(file))
    with torch.no_grad():
        for name, place in parts.items():
            place.copy_(state[name])
    model.learned.update(others)


def _close(name: str) -> str:
    """What name is meant, or where to find those that there are."""
    known = timm.list_models(["vit_*", "deit*", "eva*"])
    return near_miss(name, known) or "; timm.list_models('vit_*') lists those that it has"
