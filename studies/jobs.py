"""Several training runs, some at a time, each in a process of its own; finished ones are not run again."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import saccade
from saccade.data import ImageSet, Loader, Preprocess, class_indices


def train_all(runs: dict[str, Sequence[str]], out: Path, at_once: int) -> None:
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
    """Whether each image is classified rightly, [n] float64; every image must be readable."""
    view = model.at(setting).eval()
    labels = torch.tensor(class_indices(images, model.vit.num_classes))
    found = []
    loader = Loader(images, Preprocess.of(model.vit, view.input_size()))
    for seen in loader.batches(batch):
        with torch.inference_mode():
            found.append(view(seen.images).logits.argmax(-1) == labels[seen.indices])
    assert not loader.failures, loader.failures
    return torch.cat(found).double()
