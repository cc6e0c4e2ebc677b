"""What users name as a model — a timm name, a folder, a module — opened as a model, in one place for all verbs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from saccade.checkpoint import CONFIG, check_name, create_model, load, load_weights
from saccade.errors import UserError
from saccade.hooks import copied
from saccade.model import AdaptiveViT

Source = str | os.PathLike | nn.Module  # a timm name, a model folder, a timm ViT, an AdaptiveViT
M = TypeVar("M", bound=AdaptiveViT)
ADDRESSES = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's, for which ``check_name`` says what to do


def open_model(
    source: Source,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | torch.device | None = None,
    *,
    trained: bool = True,
    deployed: bool = False,
) -> AdaptiveViT:
    """The model that a source names, in evaluation mode unless it is one.

    Args:
        source: a timm name, with ``weights`` or ``pretrained``; a folder that Saccade wrote; a timm ViT or an
            AdaptiveViT, which is taken as it is, and copied where it gets other weights or another device.
        weights: a safetensors file with timm's keys.
        pretrained: timm's own weights, from the hub.
        device: "cpu", "cuda:1", …; "auto": a GPU where there is one. None: where a model is; for others "auto".
        trained: refuse a name without weights.
        deployed: run a folder's model as the folder recommends; else as it is, in fp32 and eager.

    Raises:
        UserError: none of these; weights that are missing, too many or do not fit; a device that is not there.
    """
    if weights is not None and pretrained:
        raise UserError("give one of --weights and --pretrained (in Python: weights=, pretrained=)")
    if isinstance(source, nn.Module):
        model = _module(source, weights, pretrained, device)
        return model if deployed or model.runner is None else model.deploy(None)
    name = os.fspath(source)
    if not isinstance(name, str):
        raise UserError(f"a model is a timm name, a folder or a module, not {name!r:.60}")
    if os.path.isdir(name):
        if weights is not None or pretrained:
            raise UserError(f"{name!r} is a model folder and has its weights: leave out --weights and --pretrained")
        model = load(name) if deployed else load(name, runner=None)
    elif not name.startswith(ADDRESSES) and (os.sep in name or name.endswith(CONFIG) or isinstance(source, Path)):
        raise UserError(f"there is no model folder {name!r}")
    else:
        check_name(name)
        if trained and not (weights or pretrained):
            raise UserError(
                f"{name} would have random weights: give --weights FILE or --pretrained "
                "(in Python: weights=, pretrained=True)"
            )
        model = create_model(name, weights=weights, pretrained=pretrained)
    return model.to(open_device("auto" if device is None else device))


def open_dense(
    source: Source, weights: str | os.PathLike | None = None, pretrained: bool = False, device: str | None = None
) -> AdaptiveViT:
    """A source's model without reductions, to make another of: random weights will do, and a CPU does for a name."""
    device = device if isinstance(source, nn.Module) else device or "cpu"
    return open_model(source, weights, pretrained, device, trained=False).deploy(None).at("dense")


def open_task(source: Source, kind: type[M], what: str, train: str, device: str | torch.device | None = None) -> M:
    """The model of a task. Raises UserError, naming the way to train one, where the source is another model."""
    model = open_model(source, device=device)
    if not isinstance(model, kind):
        named = repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else f"this {type(source).__name__}"
        raise UserError(f"{named} holds no {what}: train one with `saccade train {train}`")
    return model


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
