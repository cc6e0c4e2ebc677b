"""What was already measured, so that an interrupted ``tune`` or ``eval`` goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor

import saccade
from saccade.evaluation.answers import Predictions
from saccade.storage.files import replacing
from saccade.storage.weights import READ_ERRORS

if TYPE_CHECKING:
    from saccade.evaluation.evaluator import Evaluator
    from saccade.model import AdaptiveViT

SEAL = "sha256"  # of what a file holds, in its header
NEAR = 1e-3  # nats: how far the same model's answers may lie apart in two processes


class Cache:
    """Predictions by setting and images, below a folder, for one model on one image set.

    The name of the folder is a digest of all that a number follows from: weights and modules, what methods have
    learned, the images and their labels, preprocessing and corruption, batch, device, threads, versions, this code.
    """

    def __init__(self, folder: Path, model: AdaptiveViT, *facts: object) -> None:
        self.folder = folder / _digest(model, (*facts, *_circumstances(model)))

    @classmethod
    def of(cls, folder: Path, evaluator: Evaluator) -> Cache:
        """For all that an evaluator may ask."""
        labels = None if evaluator.labels is None else evaluator.labels.tolist()
        facts = (
            evaluator.images.fingerprint(),
            evaluator.images.names,
            labels,
            repr(evaluator.preprocess()),
            evaluator.metric.name,
            evaluator.batch,
        )
        return cls(folder, evaluator.dense, *facts)

    def get(self, name: str, indices: Sequence[int], compute: Callable[[], Predictions]) -> Predictions:
        """The predictions of a setting (and runner) on these images: read, or computed and written."""
        file = self._file(name, indices)
        if (stored := _read(file)) is not None:
            return stored
        found = compute()
        tensors = {f.name: getattr(found, f.name).contiguous() for f in fields(found)}
        with replacing(file) as part:
            safetensors.torch.save_file(tensors, part, metadata={SEAL: _sum(tensors, file)})
        return found

    def check(self, name: str, now: Predictions) -> None:
        """Forget everything here unless these predictions are those that were written, or there are none yet.

        To be asked with what the dense model says now: rows that were kept are compared with it.
        """
        stored = self.get(f"{name}, to compare", now.indices.tolist(), lambda: now)
        same = torch.equal(stored.indices, now.indices) and torch.equal(stored.top[:, 0], now.top[:, 0])
        if not (same and (stored.nll - now.nll).abs().max() <= NEAR if len(now.indices) else same):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str, indices: Sequence[int]) -> Path:
        key = hashlib.sha256(json.dumps([name, list(indices)]).encode()).hexdigest()[:24]
        return self.folder / f"{key}.safetensors"


def _read(file: Path) -> Predictions | None:
    """What a file holds; None where it is not there, or unreadable: then it is measured again."""
    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, "pt") as opened:
            tensors = {f.name: opened.get_tensor(f.name) for f in fields(Predictions)}
            seal = (opened.metadata() or {}).get(SEAL)
    except (KeyError, *READ_ERRORS):
        return None
    return Predictions(**tensors) if seal == _sum(tensors, file) else None


def _sum(tensors: Mapping[str, Tensor], file: Path) -> str:
    """Of values, types and shapes: a flipped bit is another accuracy, and shows in nothing else. Of the names too that
    stand for model, images and setting: a file that was put in the place of another is none."""
    seal = hashlib.sha256(f"{file.parent.name}/{file.stem}\0".encode())
    for name, value in sorted(tensors.items()):
        seal.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        seal.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seal.hexdigest()


def _circumstances(model: AdaptiveViT) -> tuple:
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    pinned = sorted((k, v) for k, v in os.environ.items() if k.startswith("SACCADE_"))
    versions = saccade.__version__, _code(), torch.__version__, timm.__version__
    execution = getattr(model, "execution", None)
    table = execution and sorted(execution.measured.items())
    return name, torch.get_num_threads(), pinned, execution, table, versions


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of this package: another version of it may compute other numbers."""
    seal = hashlib.sha256()
    root = Path(saccade.__file__).parent
    for file in sorted(root.rglob("*.py")):
        seal.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return seal.hexdigest()


def _digest(model: AdaptiveViT, facts: tuple[object, ...]) -> str:
    """A name for a model and facts."""
    vit, learned = getattr(model, "vit", model), getattr(model, "learned", {})
    traits = [repr(vit), *(getattr(vit, name, None) for name in ("global_pool", "pool_include_prefix", "num_classes"))]
    traits.append(repr(getattr(model, "task_head", None)))
    seal = hashlib.sha256(repr((facts, traits, getattr(model, "backbone", None))).encode("utf-8", "surrogateescape"))
    for name, weight in sorted({**model.state_dict(), **learned}.items()):
        seal.update(f"{name} {weight.dtype}\0".encode())
        seal.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seal.hexdigest()[:24]
