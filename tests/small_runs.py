"""A small model whose answers differ, pictures for it, and a short menu of settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import saccade
from data_helpers import encode, picture
from saccade.core.registry import registry

TINY = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 64, "num_classes": 3}


def tiny(seed: int = 0, **kwargs: int) -> saccade.AdaptiveViT:
    """A small ViT whose answers differ between images and between settings."""
    torch.manual_seed(seed)
    model = saccade.create_model("vit_tiny_patch16_224", **{**TINY, **kwargs})
    with torch.no_grad():
        for name, weight in model.vit.named_parameters():
            if name.endswith("weight") and weight.ndim == 2:
                weight.mul_(5)
        for name in ("pos_embed", "cls_token"):  # the class token listens to the patches
            getattr(model.vit, name).mul_(0.1)
    return model


def files(classes: str = "abc", each: int = 14) -> dict[str, bytes]:
    """Pictures, ``class/name``; those of the empty class lie at the top."""
    names = [f"{c}/{i:02}.png" for c in classes for i in range(each)]
    return {name: encode(picture(70 + k % 5, 64 + k % 7, seed=k)) for k, name in enumerate(names)}


QUICK = {"compiled": False, "seconds": 0.0, "batch": 2, "schedules": 0}


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter menu, for tests that are not about the menu."""
    names, known = {"evit": 2, "tome": 2, "random": 1, "grid": 2}, registry()
    short = {n: replace(known[n], menu=lambda b, n=n, k=k: known[n].menu(b)[-k:]) for n, k in names.items()}
    monkeypatch.setattr("saccade.evaluation.candidates.registry", lambda: short)
    monkeypatch.setattr("saccade.evaluation.report.SAMPLES", 1)  # photos in a report: each is drawn six times
