"""Creating, saving and loading: one folder with ``model.safetensors`` and ``config.json``; never pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor

from saccade.architecture import arguments, build, table_size
from saccade.backbone import backbone_of, class_names_of, resize_of, set_class_names, set_resize
from saccade.errors import UserError, nearest
from saccade.files import check_folder, shortened
from saccade.folder_config import CONFIG, FORMAT, FolderConfig, Ours, closed, parse, read_bytes
from saccade.locks import owning
from saccade.model import AdaptiveViT
from saccade.model import build as build_setting
from saccade.model_folder import WAIT, WeightsFile, seen, weights_file, write
from saccade.plan import ViT
from saccade.setting import Setting
from saccade.tokenizers.embed import ResizeSpec
from saccade.weights import (
    check,
    check_tensors,
    line,
    load_weights,
    number_type,
    read_header,
    read_weights,
    require_keepable,
    shapes,
)

if TYPE_CHECKING:
    from saccade.runner import Runner

SAVED = "saved"  # the runner that the folder names
LEARNED = "learned."  # before the names of what methods learn
TRIES, PATIENCE = 20, 3  # of a folder that is replaced while it is read, in all and before its writers have to wait
# What a folder may hold beside a classifier: a subclass of AdaptiveViT for each task.
MODELS = {
    "classify": "saccade.model:AdaptiveViT",
    "segment": "saccade.tasks.segment:Segmenter",
    "detect": "saccade.tasks.detector:Detector",
    "textimage": "saccade.tasks.space:TextImage",
}


@torch.inference_mode(False)  # its parameters can be trained, wherever it is created
def create_model(
    name: str, setting: str = "", *, pretrained: bool = False, weights: str | os.PathLike | None = None, **kwargs: Any
) -> AdaptiveViT:
    """A timm ViT under a setting, in evaluation mode.

    Args:
        name: timm's model name.
        setting: for example ``"tome(r=13)"``; empty: the unreduced model.
        pretrained: timm's own weights, from the Hugging Face hub.
        weights: a safetensors file with timm's keys instead.
        kwargs: of ``timm.create_model`` (num_classes, img_size, …).

    Raises:
        UserError: unknown name, unsupported model, missing or wrong weights.
    """
    check_name(name)
    try:
        vit = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:
        if not pretrained:
            raise UserError(f"timm cannot create {name!r}: {line(error)}") from None
        raise UserError(f"cannot fetch timm's weights of {name!r} ({line(error)}); give a file by weights=") from None
    model = AdaptiveViT(vit, setting)
    if weights is not None:
        load_weights(vit, weights)
    return model.eval()


def check_name(name: str) -> None:
    """Raises UserError unless timm has a model of this name."""
    if ":" in name:  # "hf-hub:owner/name", "local-dir:folder"
        raise UserError(
            f"{name!r} is an address and not a name: download it, then give the architecture that its config.json "
            "names, with weights='model.safetensors' and that config's model_args"
        )
    if name.split(".")[0] not in timm.list_models():
        raise UserError(f"timm {timm.__version__} has no model {name!r}{_close(name)}")


def check_savable(model: AdaptiveViT) -> None:
    """Raises UserError where ``save`` would, for the model's sake: what no folder can hold. Before the work is done."""
    require_keepable(_state(model))
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
    state = {k: v.detach().cpu().contiguous() for k, v in _state(model).items()}
    require_keepable(state)
    config = _config(model, extra)
    write(target, state, config)


@torch.inference_mode(False)
def load(
    folder: str | os.PathLike, setting: str | None = None, *, runner: Runner | str | Mapping[str, Any] | None = SAVED
) -> AdaptiveViT:
    """Open a folder written by ``save``, under its own setting or another. Raises UserError for anything amiss.

    The model runs the way that the folder recommends (what ``tune`` chose: number type and compilation; printing the
    model says it), or by another ``runner``, as ``model.deploy`` takes it; None or "eager": fp32, nothing compiled.

    Its weights have the number type that they were saved in (of several, as only others write them: fp32).

    A folder that a task other than classification was trained in gives that task's model, such as a ``Segmenter``.
    While another process saves into it, it is the old or the new model. Nothing but these two files is opened, unless
    by a ``setting`` that the caller gives.
    """
    path = Path(folder)
    for i in range(TRIES):
        # Writers that never pause would change it in every try: then they wait for the reader, where it may say so.
        alone = i >= PATIENCE and os.access(path, os.W_OK)
        with owning(path, wait=WAIT) if alone else nullcontext():
            before = seen(path)
            try:
                return _load(path, setting, runner)
            except UserError:
                if seen(path) == before:
                    raise
    raise UserError(f"{shortened(folder)} changed {TRIES} times while it was read: wait until nothing writes in it")


def _load(path: Path, setting: str | None, runner: Runner | str | Mapping[str, Any] | None) -> AdaptiveViT:
    config = parse(read_bytes(path / CONFIG), path / CONFIG)
    ours = {**(config.saccade.__pydantic_extra__ or {}), **config.saccade.model_dump(exclude_unset=True)}
    if (task := config.saccade.task) not in MODELS:
        raise UserError(f"{shortened(path)} is for task {task[:50]!r}; this version knows {', '.join(MODELS)}")
    with weights_file(path, config.saccade.weights) as weights:
        model = _filled(path, config, ours, weights, setting)
    model.trained = tuple(s for s in config.saccade.settings if _harmless(model, s, path))
    chosen = _runner(ours, path) if runner == SAVED else runner
    return model if chosen is None or task != "classify" else model.deploy(chosen)


def _filled(
    path: Path, config: FolderConfig, ours: Mapping[str, Any], weights: WeightsFile, setting: str | None
) -> AdaptiveViT:
    """The model of a config with its weights. Raises UserError where the file is not, or no longer, the config's."""
    file, task = weights.file, config.saccade.task
    header = read_header(file)
    vit = _vit(config, header, str(file))
    _make_flexible(vit, config.saccade, path)
    _name_classes(vit, config)
    module, _, kind = MODELS[task].partition(":")
    with closed("" if setting is not None else str(path)):
        model = AdaptiveViT(vit, config.saccade.setting if setting is None else setting)
    model = getattr(import_module(module), kind).rebuild(model, ours).eval()
    _fill_all(model, file, untrained=setting is not None)
    if not weights.unchanged():
        raise UserError(
            f"{shortened(file)} is not the file that {CONFIG} was written with (its checksum is another): restore it; "
            f"if you changed it yourself, remove 'weights' from 'saccade' in {CONFIG}"
        )
    return model


def _runner(ours: Mapping[str, Any], path: Path) -> Runner | None:
    """How the folder says that it is run; None: it says nothing. Raises UserError for what is no runner."""
    from saccade.runner import Runner

    try:
        return Runner.of(ours["runner"]) if ours.get("runner") is not None else None
    except UserError as error:
        raise UserError(f"{shortened(path / CONFIG)}: {error}") from None


def _vit(config: FolderConfig, header: Mapping[str, torch.Size], file: str) -> ViT:
    """The timm module, without values; its shapes have been compared with the header before memory is taken."""
    check_name(config.architecture)
    args = config.args.model_dump(exclude_unset=True)
    try:
        with torch.device("meta"):
            vit = build(config.architecture, args)
    except Exception as error:
        raise UserError(f"timm cannot create {config.architecture!r}: {line(error)}") from None
    backbone_of(vit)
    own = {f"vit.{k}": v for k, v in vit.state_dict().items()}
    check(shapes(own), {k: v for k, v in header.items() if k.startswith("vit.")}, type(vit).__name__, file)
    vit.to_empty(device="cpu")
    told = config.pretrained_cfg.model_dump(exclude_unset=True, exclude_none=True)
    vit.pretrained_cfg = {**vit.pretrained_cfg, **told}
    return vit.eval()


def _harmless(model: AdaptiveViT, setting: str, path: Path) -> bool:
    """Whether a setting that the weights were trained for can be tried without opening anything else."""
    try:
        with closed(str(path)):
            build_setting(model.backbone, Setting.parse(setting), dict(model.learned))
    except UserError:
        return False
    return True


def _state(model: AdaptiveViT) -> dict[str, Tensor]:
    """All weights by their names in a folder: what methods learn is there once, whichever settings name them."""
    views = ("tokenizer.", "plan.")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(views)}
    return state | {LEARNED + k: v for k, v in model.learned.items()}


def _fill_all(model: AdaptiveViT, file: Path, untrained: bool) -> None:
    """The inverse of ``_state``. What methods have learned that this setting does not name is kept for others.

    untrained: what the setting learns may be missing (it is not the folder's own); then it starts as it always does.
    """
    state = read_weights(file)
    others = {k: v for k, v in state.items() if k.startswith(LEARNED) and k[len(LEARNED) :] not in model.learned}
    if (kind := number_type({k: v for k, v in state.items() if k.startswith("vit.")})) is not None:
        model.to(kind)
    parts = {k: v for k, v in _state(model).items() if k in state or not (untrained and k.startswith(LEARNED))}
    check_tensors(parts, {k: v for k, v in state.items() if k not in others}, type(model).__name__, str(file))
    with torch.no_grad():
        for name, own in parts.items():
            own.copy_(state[name])
    model.learned.update({k.removeprefix(LEARNED): v for k, v in others.items()})


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
    if model.runner is not None:
        ours["runner"] = model.runner.to_dict()
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


def _class_names(vit: ViT) -> dict[str, Any]:
    """What the head's classes are called, under the names at which timm writes them on its hub."""
    names = class_names_of(vit)
    if names is None:
        return {}
    known = vit.pretrained_cfg.get("label_descriptions") or {}
    described = {name: known[name] for name in names if name in known}
    return {"label_names": list(names), **({"label_descriptions": described} if described else {})}


def _name_classes(vit: ViT, config: FolderConfig) -> None:
    """Inverse of ``_class_names``. Folders of before have the names that they were trained on, as ``classes``."""
    names = config.label_names
    if names is None and config.saccade.task == "classify":
        before = (config.saccade.__pydantic_extra__ or {}).get("classes")
        if isinstance(before, list) and all(isinstance(name, str) for name in before):
            names = before if len(before) == len({*before}) == vit.num_classes else None
    if names:
        set_class_names(vit, names, config.label_descriptions)


def _flexible(vit: ViT) -> dict[str, Any]:
    """How kernel and positions were resized in training, and the input size where the table does not tell it."""
    spec, size = resize_of(vit), vit.patch_embed.img_size
    facts = {} if spec is None else {"resize": spec.to_dict()}
    return facts if table_size(vit) == tuple(size) else {**facts, "input_size": list(size)}


def _make_flexible(vit: ViT, ours: Ours, path: Path) -> None:
    """Inverse of ``_flexible``. A folder without these facts is of an ordinary ViT. Raises UserError for bad ones."""
    vit.pretrained_cfg.pop("resize", None)  # its place is among ours
    if "resize" in ours.model_fields_set:
        try:
            set_resize(vit, ResizeSpec.from_dict(ours.resize))
        except UserError as error:
            raise UserError(f"{str(path / CONFIG)!r} has a malformed resize spec: {error}") from None
    vit.patch_embed.img_size = ours.input_size or tuple(vit.patch_embed.img_size)


def _close(name: str) -> str:
    return nearest(name, timm.list_models("*vit*") + timm.list_models("deit*"))[:200]
