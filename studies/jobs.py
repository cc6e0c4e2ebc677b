"""Several training runs, some at a time, each in a process of its own; finished ones are not run again.

They train and test in bf16, or in what the environment variable STUDY_PRECISION says: fp32 is three times as fast on a
processor without bf16 instructions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import saccade
from saccade.data import CACHE_BYTES, ImageSet, Loader, Preprocess, class_indices

PRECISION = os.environ.get("STUDY_PRECISION", "bf16")


def autocast() -> torch.autocast:
    """The precision that is trained in."""
    return torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bf16")


def train_all(runs: Mapping[str, Sequence[str]], out: Path, at_once: int) -> None:
    """``saccade train`` for each name and its arguments, into ``out / name``; what was interrupted goes on."""

    def one(name: str, arguments: Sequence[str]) -> None:
        if (out / name / "model").is_dir():
            return
        began = time.perf_counter()
        (out / name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "saccade", "train", *arguments, "--out", str(out / name), "--resume", "--json"]
        with open(out / name / "log.txt", "a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        print(f"{name}: {(time.perf_counter() - began) / 60:.1f} minutes", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        for job in [pool.submit(one, name, arguments) for name, arguments in runs.items()]:
            job.result()


def hits(model: saccade.AdaptiveViT, setting: str, images: ImageSet, batch: int = 50) -> torch.Tensor:
    """Whether each image is classified rightly, [n] float64, in the precision of training; all must be readable."""
    labels = torch.tensor(class_indices(images, model.vit.num_classes))
    return (logits(model, setting, images, range(len(images)), batch).argmax(-1) == labels).double()


def logits(
    model: saccade.AdaptiveViT, setting: str, images: ImageSet, places: Sequence[int], batch: int = 50
) -> torch.Tensor:
    """Logits of the images at these places, [n, K] float32, in the precision of training; all must be readable."""
    view = model.at(setting).eval()
    loader = _loader(images, Preprocess.of(model.vit, view.input_size()))
    found = []
    for seen in loader.batches(batch, places):
        with torch.inference_mode(), autocast():
            found.append(view(seen.images).logits.float())
    together = torch.cat(found)
    assert len(together) == len(places)
    return together


_LOADERS: dict[tuple[str, Preprocess], Loader] = {}


def _loader(images: ImageSet, preprocess: Preprocess) -> Loader:
    """Images are decoded once, however many models look at them."""
    key = str(images.path), preprocess
    if key not in _LOADERS:
        _LOADERS[key] = Loader(images, preprocess, cache_bytes=CACHE_BYTES)
    return _LOADERS[key]
