"""Arguments of ``train`` as the other verbs have them — model, data, settings, device — put into its config."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from saccade.backbones.saving import save
from saccade.checkpoint import Source, open_model
from saccade.errors import UserError
from saccade.storage.files import check_folder
from saccade.storage.foreign import check_not_foreign
from saccade.training.checkpoints import newest
from saccade.training.config import Config

SOURCE = "source"  # the folder, in the run's, of a model that was given as one


def with_arguments(
    config: Config,
    out: Path,
    model: Source | None,
    data: str | os.PathLike | None,
    settings: Sequence[str] | None,
    weights: str | os.PathLike | None,
    pretrained: bool,
    device: str | None,
) -> Config:
    """The config with what is given. A module is saved as ``out/source`` first, so that the run can be resumed.

    Raises UserError for values that a config refuses.
    """
    if isinstance(model, nn.Module):
        model = _saved(model, out, weights)
        weights = None
    texts = {"model.name": model, "model.weights": weights, "data.path": data}
    given: dict[str, Any] = {key: os.fspath(value) for key, value in texts.items() if value is not None}
    given |= {} if settings is None else {"sampling.settings": list(settings)}
    given |= {} if device is None else {"run.device": device}
    given |= {"model.pretrained": True} if pretrained else {}
    if not given:
        return config
    values = config.model_dump()
    for key, value in given.items():
        section, _, name = key.partition(".")
        values[section] = {**values[section], name: value}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_words(problem) for problem in error.errors()[:3])) from None


def _saved(module: nn.Module, out: Path, weights: str | os.PathLike | None) -> Path:
    folder = out / SOURCE
    if newest(out / "checkpoints", "last") is None:  # else it is there, or the run is another
        check_folder(out)
        check_not_foreign(out)
        save(open_model(module, weights), folder)
    return folder


def _words(problem: Mapping[str, Any]) -> str:
    place = ".".join(map(str, problem["loc"]))
    return f"{place}={problem['input']!r}: {problem['msg']}" if place else str(problem["msg"])
