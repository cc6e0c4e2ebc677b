"""Creating, saving and loading: one folder with ``model.safetensors`` and ``config.json``; never pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saccade.backbone import class_names_of, resize_of, set_class_names, set_resize
from saccade.errors import UserError, nearest
from saccade.model import AdaptiveViT
from saccade.plan import ViT
from saccade.tokenizers.embed import ResizeSpec

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
LEARNED = "learned."  # before the names of what methods learn
# A folder from elsewhere may say what the model is, never what else to open or to download.
ARGS = {
    "num_classes",
    "img_size",
    "patch_size",
    "in_chans",
    "global_pool",
    "embed_dim",
    "depth",
    "num_heads",
    "reg_tokens",
}
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
            raise UserError(f"timm cannot create {name!r}: {_line(error)}") from None
        raise UserError(f"cannot fetch timm's weights of {name!r} ({_line(error)}); give a file by weights=") from None
    model = AdaptiveViT(vit, setting)
    if weights is not None:
        load_weights(vit, weights)
    return model.eval()


def check_name(name: str) -> None:
    """Raises UserError unless timm has a model of this name."""
    if name.split(".")[0] not in timm.list_models():
        raise UserError(f"timm {timm.__version__} has no model {name!r}{_close(name)}")


def load_weights(module: nn.Module, file: str | os.PathLike) -> None:
    """Load a safetensors file strictly, in the module's own dtype. Raises UserError that lists what does not fit."""
    fill(module, read_weights(file), str(file))


def fill(module: nn.Module, state: Mapping[str, Tensor], file: str) -> None:
    """Load tensors that came from ``file``, in the same way."""
    check(module.state_dict(), state, type(module).__name__, file)
    module.load_state_dict(state, strict=True)


def check(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str, file: str) -> None:
    """Raises UserError unless names and shapes are the same; it lists what is missing, unexpected, of another shape."""
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or unknown or shapes:
        wrong = [f"{tuple(state[k].shape)} for {k} {tuple(own[k].shape)}" for k in sorted(shapes)]
        listed = {"missing": missing, "unexpected": unknown, "of another shape": wrong}
        text = "; ".join(f"{len(v)} {k} ({_some(v)})" for k, v in listed.items() if v)
        raise UserError(f"{file} does not fit {what}: {text}; the keys must be the model's own")


def read_weights(file: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises UserError: missing, another format, damaged, not finite."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"there is no weights file {str(path)!r}")
    try:
        state = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(
            f"{str(path)!r} is not a readable safetensors file ({_line(error)}); other formats may run code and are "
            "refused: convert it with safetensors.torch.save_file"
        ) from None
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise UserError(f"{str(path)!r} holds NaN or infinity in {len(bad)} of {len(state)} tensors ({_some(bad)})")
    return state


def save(model: AdaptiveViT, folder: str | os.PathLike, **extra: Any) -> None:
    """Write a model folder, whole or not at all; ``extra`` is kept under its name in the config.

    ``vit.*`` without its prefix opens in plain timm, strictly. ``config.json`` is timm's, with ours under one key.
    """
    ours: dict[str, Any] = {"format": FORMAT, "setting": str(model.setting), **model.describe()}
    if model.trained:
        ours["settings"] = list(model.trained)
    config = {**_timm_config(model.vit), "saccade": {**ours, **_flexible(model.vit), **extra}}
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in _state(model).items()}
    fresh = target.parent / f".{target.name}.{uuid4().hex}"
    fresh.mkdir()  # not mkdtemp, whose folders nobody else may read
    try:
        save_file(state, fresh / WEIGHTS, metadata={"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        shutil.copymode(fresh / CONFIG, fresh / WEIGHTS)  # safetensors writes for the owner alone
        if not target.exists():
            os.replace(fresh, target)
        else:  # the folder may hold other things of the user's: replace our two files, the weights last
            for name in (CONFIG, WEIGHTS):
                os.replace(fresh / name, target / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@torch.inference_mode(False)
def load(folder: str | os.PathLike, setting: str | None = None) -> AdaptiveViT:
    """Open a folder written by ``save``, under its own setting or another. Raises UserError for anything amiss.

    A folder that a task other than classification was trained in gives that task's model, such as a ``Segmenter``.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise UserError(f"{str(path)!r} is not a model folder: it has no {CONFIG}")
    try:
        config = json.loads((path / CONFIG).read_text())
        ours, name, args = config["saccade"], config["architecture"], config["model_args"]
        preprocessing = {**config.get("pretrained_cfg", {})}
        if not (isinstance(ours, dict) and isinstance(name, str) and args.keys() <= ARGS):
            raise ValueError("a part has the wrong type, or model_args holds others than " + ", ".join(sorted(ARGS)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{str(path / CONFIG)!r} is not a Saccade config ({_line(error)})") from None
    if ours.get("format") != FORMAT:
        raise UserError(f"{str(path)!r} has format {ours.get('format')!r}; this version reads format {FORMAT}")
    if not isinstance(ours.get("setting"), str):
        raise UserError(f"{str(path / CONFIG)!r} names no setting")
    task = ours.get("task", "classify")
    if not isinstance(task, str) or task not in MODELS:
        raise UserError(f"{str(path)!r} is for task {task!r}; this version knows {', '.join(MODELS)}")
    module, _, kind = MODELS[task].partition(":")
    vit = create_model(name, **args).vit
    preprocessing.pop("resize", None)  # its place is among ours
    vit.pretrained_cfg = {**vit.pretrained_cfg, **preprocessing}
    _make_flexible(vit, ours, path)
    _name_classes(vit, config, path)
    model = getattr(import_module(module), kind).rebuild(AdaptiveViT(vit, ours["setting"]), ours).eval()
    _fill_all(model, path / WEIGHTS)
    model.trained = tuple(s for s in ours.get("settings", ()) if isinstance(s, str))
    return model if setting is None else model.at(setting)


def _state(model: AdaptiveViT) -> dict[str, Tensor]:
    """All weights by their names in a folder: what methods learn is there once, whichever settings name them."""
    views = ("tokenizer.", "plan.")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(views)}
    return state | {LEARNED + k: v for k, v in model.learned.items()}


def _fill_all(model: AdaptiveViT, file: Path) -> None:
    """The inverse of ``_state``. What methods have learned that this setting does not name is kept for others."""
    state = read_weights(file)
    others = {k: v for k, v in state.items() if k.startswith(LEARNED) and k[len(LEARNED) :] not in model.learned}
    parts: dict[str, Tensor] = _state(model)
    check(parts, {k: v for k, v in state.items() if k not in others}, type(model).__name__, str(file))
    with torch.no_grad():
        for name, own in parts.items():
            own.copy_(state[name])
    model.learned.update({k.removeprefix(LEARNED): v for k, v in others.items()})


def _timm_config(vit: ViT) -> dict[str, Any]:
    """What rebuilds the timm module: its architecture name and the arguments in which it may differ from it."""
    cfg = dict(vit.pretrained_cfg)
    name = cfg.get("architecture")
    if not name:
        raise UserError("this ViT does not know its timm name (pretrained_cfg['architecture']): use create_model")
    embed, attn = vit.patch_embed, vit.blocks[0].attn
    args = {
        "num_classes": vit.num_classes,
        "img_size": list(_table_size(vit)),
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "global_pool": vit.global_pool,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": attn.num_heads,
        "reg_tokens": vit.num_reg_tokens,
    }
    with torch.device("meta"):
        twin = timm.create_model(name, **args)
    if {k: v.shape for k, v in twin.state_dict().items()} != {k: v.shape for k, v in vit.state_dict().items()}:
        raise UserError(f"this ViT differs from timm's {name!r} in more than {', '.join(args)}: it cannot be rebuilt")
    kept = ("interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes", "tag", "license")
    size = [embed.proj.in_channels, *embed.img_size]
    return {
        "architecture": name,
        "num_classes": vit.num_classes,
        **_class_names(vit),
        "model_args": args,
        "pretrained_cfg": {"input_size": size, **{k: cfg[k] for k in kept if k in cfg}},
    }


def _class_names(vit: ViT) -> dict[str, Any]:
    """What the head's classes are called, under the names at which timm writes them on its hub."""
    names = class_names_of(vit)
    if names is None:
        return {}
    known = vit.pretrained_cfg.get("label_descriptions") or {}
    described = {name: known[name] for name in names if name in known}
    return {"label_names": list(names), **({"label_descriptions": described} if described else {})}


def _name_classes(vit: ViT, config: dict[str, Any], path: Path) -> None:
    """Inverse of ``_class_names``. Folders of before have the names that they were trained on, as ``classes``."""
    names, described = config.get("label_names"), config.get("label_descriptions")
    if names is None:
        before = config["saccade"].get("classes")
        fits = isinstance(before, list) and len(before) == vit.num_classes and all(isinstance(n, str) for n in before)
        names = before if fits and config["saccade"].get("task", "classify") == "classify" else None
    elif not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(names) != vit.num_classes:
        raise UserError(f"{str(path / CONFIG)!r}: label_names are not one text for each of {vit.num_classes} classes")
    if described is not None and not (isinstance(described, dict) and all(map(_is_text, described.values()))):
        raise UserError(f"{str(path / CONFIG)!r}: label_descriptions are not texts by class name")
    if names is not None:
        set_class_names(vit, names, described)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _table_size(vit: ViT) -> tuple[int, ...]:
    """Input pixels from which timm derives the grid of the position table; a flexible table has a grid of its own."""
    embed = vit.patch_embed
    sides = zip(embed.img_size, embed.patch_size, embed.grid_size, strict=True)
    return tuple(size if size // patch == cells else patch * cells for size, patch, cells in sides)


def _flexible(vit: ViT) -> dict[str, Any]:
    """How kernel and positions were resized in training, and the input size where the table does not tell it."""
    spec, size = resize_of(vit), vit.patch_embed.img_size
    facts = {} if spec is None else {"resize": spec.to_dict()}
    return facts if _table_size(vit) == tuple(size) else {**facts, "input_size": list(size)}


def _make_flexible(vit: ViT, ours: dict[str, Any], path: Path) -> None:
    """Inverse of ``_flexible``. A folder without these facts is of an ordinary ViT. Raises UserError for bad ones."""
    if "resize" in ours:
        try:
            set_resize(vit, ResizeSpec.from_dict(ours["resize"]))
        except UserError as error:
            raise UserError(f"{str(path / CONFIG)!r} has a malformed resize spec: {error}") from None
    size = ours.get("input_size", list(vit.patch_embed.img_size))
    if not isinstance(size, list) or len(size) != 2 or not all(type(s) is int and 1 <= s <= 8192 for s in size):
        raise UserError(f"{str(path / CONFIG)!r}: input_size={str(size)[:50]} is not two whole numbers in [1, 8192]")
    vit.patch_embed.img_size = tuple(size)


def _close(name: str) -> str:
    return nearest(name, timm.list_models("*vit*") + timm.list_models("deit*"))[:200]


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
