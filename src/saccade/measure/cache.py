"""What was already measured, so that an interrupted ``tune`` goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

import saccade
from saccade.files import replacing
from saccade.measure.accuracy import Predictions
from saccade.model import AdaptiveViT


class Cache:
    """Predictions by setting and images, below a folder, for one model on one image set."""

    def __init__(self, folder: Path, model: AdaptiveViT, *facts: object) -> None:
        self.folder = folder / _digest(model, facts)

    def get(self, name: str, indices: Sequence[int], compute: Callable[[], Predictions]) -> Predictions:
        """The predictions of a setting (and runner) on these images: read, or computed and written."""
        key = hashlib.sha256(json.dumps([name, list(indices)]).encode()).hexdigest()[:24]
        file = self.folder / f"{key}.safetensors"
        names = [f.name for f in fields(Predictions)]
        if file.is_file():
            try:
                tensors = safetensors.torch.load_file(file)
                return Predictions(*(tensors[n] for n in names))
            except (SafetensorError, KeyError, OSError):
                pass  # unreadable: measure again
        found = compute()
        with replacing(file) as part:
            safetensors.torch.save_file({n: getattr(found, n).contiguous() for n in names}, part)
        return found


def _digest(model: AdaptiveViT, facts: tuple[object, ...]) -> str:
    """A name for these weights and facts."""
    seal = hashlib.sha256(repr((facts, torch.__version__, saccade.__version__)).encode())
    for name, weight in sorted(model.state_dict().items()):
        seal.update(name.encode())
        seal.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seal.hexdigest()[:24]
