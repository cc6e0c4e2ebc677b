"""Rivals: other, mostly smaller models that a budget might be better spent on, measured on the same images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from saccade.checkpoint import Source, open_model
from saccade.core.hooks import copied
from saccade.errors import UserError
from saccade.evaluation.circumstances import model_name
from saccade.evaluation.evaluator import Evaluator, check_head
from saccade.model import AdaptiveViT
from saccade.runners.runner import FP32

IN_ITS_OWN_SPACE = ("reindexed@k", "knn")  # what encoders are compared by whose embeddings have nothing in common


PREFIX = "rival "  # of their names in tables


@dataclass(frozen=True)
class Rival:
    """A model under its own setting, with its own preprocessing."""

    name: str  # as tables have it: "rival vit_tiny_patch16_224"
    model: AdaptiveViT

    def check(self, evaluator: Evaluator) -> None:
        """Raises UserError where the evaluator's metric cannot compare the two models."""
        metric, own, vit = evaluator.metric, self.model.vit, evaluator.dense.vit
        if not evaluator.encodes and own.num_classes != vit.num_classes:
            has = f"{own.num_classes} classes" if own.num_classes else "no classifier"
            raise UserError(f"{self.name} has {has} and the model {vit.num_classes}: their answers are not of one kind")
        ours, theirs = evaluator.dense.class_names, self.model.class_names
        if not evaluator.encodes and ours and theirs and ours != theirs:
            first = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
            raise UserError(f"{self.name} has other classes than the model, such as {first[1]!r} for {first[0]!r}")
        if metric.kind == "cells" or (evaluator.encodes and metric.kind not in IN_ITS_OWN_SPACE):
            fit = f"reindexed@{metric.k or 10} or, with classes, knn" if evaluator.encodes else "top-1, agreement or kl"
            what = "cells of a feature map" if metric.kind == "cells" else "embeddings"
            raise UserError(
                f"{self.name} has a space of its own, and {metric.name} compares {what} with the model's: {fit} fits"
            )


def listed(given: Source | Sequence[Source]) -> list[Source]:
    """One or several sources of models, as a list."""
    return [given] if isinstance(given, (str, os.PathLike, nn.Module)) else list(given)


def open_rivals(given: Source | Sequence[Source], dense: AdaptiveViT) -> list[Rival]:
    """The models that these name, on the dense model's device; of a classifier beside an encoder the encoder.

    Args:
        given: one or several: a timm name or address (with its pretrained weights), ``"NAME=weights.safetensors"``, a
            folder, a module.

    Raises:
        UserError: as ``saccade.checkpoint.open_model``, a model of another task, or two of one name.
    """
    found: dict[str, Rival] = {}
    device = next(dense.parameters()).device
    for source in listed(given):
        name, model = _opened(source, device)
        if name in found:
            raise UserError(f"two rivals are called {name.removeprefix(PREFIX)!r}: give each once")
        check_head(model, encoders=True)
        if not dense.vit.num_classes and model.vit.num_classes:
            model = copied(model)
            model.vit.reset_classifier(0)
            model = AdaptiveViT(model.vit, model.setting, learned=model.learned)
        found[name] = Rival(name, FP32.model(model).eval())
    return list(found.values())


def _opened(source: Source, device: torch.device) -> tuple[str, AdaptiveViT]:
    if isinstance(source, nn.Module):
        model = open_model(source, device=device)
        return f"{PREFIX}{model_name(model)}", model
    text = os.fspath(source)
    if Path(text).is_dir():
        return f"{PREFIX}{text}", open_model(text, device=device)
    name, _, weights = text.partition("=")
    if weights:
        return f"{PREFIX}{name}", open_model(name, weights, device=device)
    named = os.sep not in name or ":" in name  # no path, but a name or an address
    return f"{PREFIX}{name}", open_model(name, pretrained=named, device=device)


def is_rival(name: str) -> bool:
    """Whether a row of this name is another model's."""
    return name.startswith(PREFIX)
