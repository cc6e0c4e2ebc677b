"""Creating, saving and loading: one folder with ``model.safetensors`` and ``config.json``; never pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from saccade.backbones.addresses import is_address
from saccade.backbones.learned_by_step import as_now, methods_by_step
from saccade.backbones.plan_builder import build as build_setting
from saccade.backbones.plan_builder import with_tokenizer
from saccade.backbones.pretrained import open_vit
from saccade.backbones.rebuilding import check_name, fill_all, rebuild_vit, require_plugins, restore_facts
from saccade.backbones.saving import LEARNED, save
from saccade.backbones.task_heads import CLASSIFY, head_kind, head_of, known_tasks
from saccade.core.head import Head
from saccade.core.hooks import copied
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.runners.artefact import Artefact, is_artefact, open_artefact
from saccade.setting import Setting
from saccade.storage.files import shortened
from saccade.storage.folder_config import CONFIG, FolderConfig, closed, parse, read_bytes
from saccade.storage.locks import owning
from saccade.storage.model_folder import WAIT, WeightsFile, seen, weights_file
from saccade.storage.weights import load_weights, read_header

if TYPE_CHECKING:
    from saccade.runners.runner import Runner

__all__ = ["check_name", "create_model", "load", "load_model", "save"]
SAVED = "saved"  # the runner that the folder names
TRIES, PATIENCE = 20, 3  # of a folder that is replaced while it is read, in all and before its writers have to wait


@torch.inference_mode(False)  # its parameters can be trained, wherever it is created
def create_model(
    name: str,
    setting: str = "",
    *,
    pretrained: bool = False,
    weights: str | os.PathLike | None = None,
    head: Head | Literal["embedding"] | None = None,
    **kwargs: Any,
) -> AdaptiveViT:
    """A timm ViT under a setting, in evaluation mode.

    Args:
        name: timm's model name, or an address as timm has them: ``"hf-hub:owner/name"``, ``"local-dir:folder"``.
        setting: for example ``"tome(r=13)"``; empty: the unreduced model.
        pretrained: timm's own weights, from the Hugging Face hub, or those at the address; a FlexiViT's with the
            kernel of its training, under timm's patch size, ``grid(16)``, where the setting names no tokenizer.
        weights: a safetensors file with timm's keys instead.
        head: in the classifier's place: "embedding", or what a ``Head`` gives, such as ``EmbeddingHead("mean")``.
        kwargs: of ``timm.create_model`` (num_classes, img_size, …); num_classes=0: an encoder, also of the weights of a
            classifier.

    Raises:
        UserError: unknown name, unsupported model, missing or wrong weights, no such head.
    """
    ending = None if head is None else head_of(head)
    vit, first = open_vit(name, pretrained, **kwargs)
    model = AdaptiveViT(vit, with_tokenizer(Setting.parse(setting), first))
    if weights is not None:
        load_weights(vit, weights)
    return (model if ending is None else model.with_head(ending)).eval()


def load(
    folder: str | os.PathLike, setting: str | None = None, *, runner: Runner | str | Mapping[str, Any] | None = SAVED
) -> AdaptiveViT | Artefact:
    """Open a folder: a model's, as ``load_model`` does, or what ``saccade export`` wrote, in its engine.

    Raises UserError for anything amiss, and for a setting or runner where a model was exported for another.
    """
    if not is_artefact(Path(folder)):
        return load_model(folder, setting, runner=runner)
    if setting is not None or runner not in (SAVED, None):
        raise UserError(f"{shortened(folder)} is exported under one setting for one engine: open it without another")
    return open_artefact(folder)


@torch.inference_mode(False)
def load_model(
    folder: str | os.PathLike, setting: str | None = None, *, runner: Runner | str | Mapping[str, Any] | None = SAVED
) -> AdaptiveViT:
    """Open a folder written by ``save``, under its own setting or another. Raises UserError for anything amiss.

    The model runs the way that the folder recommends (what ``tune`` chose: number type and compilation; printing the
    model says it), or by another ``runner``, as ``model.deploy`` takes it; None or "eager": fp32, nothing compiled.

    Its weights have the number type that they were saved in (of several, as only others write them: fp32).

    A folder that a task other than classification was trained in gives a model with that task's head.
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
    if (task := config.saccade.task) not in (known := known_tasks()):
        raise UserError(
            f"{shortened(path)} is for task {task[:50]!r}; this version knows {', '.join(known)}, and the heads of "
            "modules that are imported before"
        )
    with weights_file(path, config.saccade.weights) as weights:
        model = _filled(path, config, ours, weights, setting)
    model.trained = tuple(s for s in model.trained if _harmless(model, s, path))
    chosen = _runner(ours, path) if runner == SAVED else runner
    return model if chosen is None or not model.classifies else model.deploy(chosen)


def _filled(
    path: Path, config: FolderConfig, ours: Mapping[str, Any], weights: WeightsFile, setting: str | None
) -> AdaptiveViT:
    """The model of a config with its weights. Raises UserError where the file is not, or no longer, the config's."""
    file, task = weights.file, config.saccade.task
    header = read_header(file)
    vit = rebuild_vit(config, header, str(file))
    restore_facts(vit, config, path)
    head = None if task == CLASSIFY else head_kind(task).rebuild(vit, dict(ours))
    before = methods_by_step(name.removeprefix(LEARNED) for name in header if name.startswith(LEARNED))
    own, trained = as_now(config.saccade.setting, before), tuple(as_now(s, before) for s in config.saccade.settings)
    if setting is None:
        require_plugins(config.saccade, own, path)
    with closed("" if setting is not None else str(path)):
        model = AdaptiveViT(vit, own if setting is None else setting, trained, head=head).eval()
    with closed(str(path)):
        fill_all(model, file, own, untrained=setting is not None)
    if not weights.unchanged():
        raise UserError(
            f"{shortened(file)} is not the file that {CONFIG} was written with (its checksum is another): restore it; "
            f"if you changed it yourself, remove 'weights' from 'saccade' in {CONFIG}"
        )
    return model


def _runner(ours: Mapping[str, Any], path: Path) -> Runner | None:
    """How the folder says that it is run; None: it says nothing. Raises UserError for what is no runner."""
    from saccade.runners.runner import Runner

    try:
        return Runner.of(ours["runner"]) if ours.get("runner") is not None else None
    except UserError as error:
        raise UserError(f"{shortened(path / CONFIG)}: {error}") from None


def _harmless(model: AdaptiveViT, setting: str, path: Path) -> bool:
    """Whether a setting that the weights were trained for can be tried without opening anything else."""
    try:
        with closed(str(path)):
            build_setting(model.backbone, Setting.parse(setting), dict(model.learned))
    except UserError:
        return False
    return True


Source = str | os.PathLike | nn.Module  # a timm name, a model folder, a timm ViT, an AdaptiveViT


def open_model(
    source: Source,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | torch.device | None = None,
    *,
    num_classes: int | None = None,
    trained: bool = True,
    deployed: bool = False,
) -> AdaptiveViT:
    """The model that a source names, in evaluation mode unless it is one.

    Args:
        source: a timm name, with ``weights`` or ``pretrained``; a folder that Saccade wrote, of which half precision
            becomes fp32; a timm ViT or an AdaptiveViT, which is taken as it is, and copied where it gets other weights
            or another device.
        weights: a safetensors file with timm's keys.
        pretrained: timm's own weights, from the hub.
        device: "cpu", "cuda:1", …; "auto": a GPU where there is one. None: where a model is; for others "auto".
        num_classes: of a name's classifier, where its weights have another than timm's; 0: none, an encoder.
        trained: refuse a name without weights.
        deployed: run a folder's model as the folder recommends; else as it is, in fp32 and eager.

    Raises:
        UserError: none of these; weights that are missing, too many or do not fit; a device that is not there.
    """
    if weights is not None and pretrained:
        raise UserError("give one of --weights and --pretrained (in Python: weights=, pretrained=)")
    if num_classes is not None and (isinstance(source, nn.Module) or os.path.isdir(source)):
        raise UserError(f"num_classes={num_classes} is for a name and its weights: a folder or a module has its head")
    if isinstance(source, nn.Module):
        model = _module(source, weights, pretrained, device)
        return model if deployed or model.deployed is None else model.deploy(None)
    name = os.fspath(source)
    if not isinstance(name, str):
        raise UserError(f"a model is a timm name, a folder or a module, not {name!r:.60}")
    if os.path.isdir(name):
        if weights is not None or pretrained:
            raise UserError(f"{name!r} is a model folder and has its weights: leave out --weights and --pretrained")
        if is_artefact(Path(name)):
            raise UserError(
                f"{shortened(name)} is exported, and runs one setting in one engine: saccade.load or saccade predict; "
                "here give the model that it was made of"
            )
        model = load_model(name) if deployed else load_model(name, runner=None)
        if model.deployed is None and next(model.parameters()).dtype in (torch.float16, torch.bfloat16):
            model = model.float()  # what a folder holds in half precision a processor computes many times slower
    elif not is_address(name) and (os.sep in name or name.endswith(CONFIG) or isinstance(source, Path)):
        raise UserError(f"there is no model folder {name!r}")
    else:
        if not is_address(name):
            check_name(name)
        if trained and not (weights or pretrained):
            raise UserError(
                f"{name} would have random weights: give --weights FILE or --pretrained "
                "(in Python: weights=, pretrained=True)"
            )
        head: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        model = create_model(name, weights=weights, pretrained=pretrained, **head)
    return model.to(open_device("auto" if device is None else device))


def open_dense(
    source: Source, weights: str | os.PathLike | None = None, pretrained: bool = False, device: str | None = None
) -> AdaptiveViT:
    """A source's model without reductions, to make another of: random weights will do, and a CPU does for a name.

    Raises UserError as ``open_model``, and for a model of another task, whose end would be lost.
    """
    device = device if isinstance(source, nn.Module) else device or "cpu"
    model = open_model(source, weights, pretrained, device, trained=False).deploy(None).at("dense")
    if (task := task_of(model)) != "classify":
        raise UserError(
            f"this model is for task {task!r}, and what that learned would not be in the new one: give the ViT alone, "
            "saccade.load(folder).vit"
        )
    return model


def open_task(source: Source, head: type[Head], device: str | torch.device | None = None) -> AdaptiveViT:
    """The model of a source, with a head of that kind. Raises UserError, naming the way to train one, for another."""
    model = open_model(source, device=device)
    head.of(model, repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "this model")
    return model


def task_of(model: AdaptiveViT) -> str:
    """The task that a model is for: "classify" unless it has a head for another."""
    return CLASSIFY if model.task_head is None else model.task_head.task


def open_device(name: str | torch.device) -> torch.device:
    """A device that works here; ``auto`` is a GPU where there is one. Raises UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {str(name)!r} is not usable here ({str(error).splitlines()[0]}); try cpu") from None
    return device


def _module(
    module: nn.Module, weights: str | os.PathLike | None, pretrained: bool, device: str | torch.device | None
) -> AdaptiveViT:
    if pretrained:
        raise UserError("pretrained weights are for a name: give one, or a ViT that has its weights")
    if weights is not None:
        module = copied(module)
        load_weights(module.vit if isinstance(module, AdaptiveViT) else module, weights)
    model = module if isinstance(module, AdaptiveViT) else AdaptiveViT(module)
    if device is None or (there := open_device(device)) == (here := next(model.parameters()).device):
        return model
    if there.type == here.type and there.index is None:  # "cuda", and it is on one
        return model
    return (model if weights is not None else copied(model)).to(there)
