"""What the studies share: arguments, training runs, what models answer, and tables and verdicts.

Several training runs, some at a time, each in a process of its own; finished ones are not run again. They train and
test on a GPU where there is one, in bf16, or in what the environment variable STUDY_PRECISION says: fp32 is three times
as fast on a processor without bf16 instructions. STUDY_BATCH is the batch that is trained with, and STUDY_WORKERS how
many processes read for each run, where a GPU would wait for images.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saccade
from saccade.data import CACHE_BYTES, ImageSet, Loader, Preprocess, head_labels
from saccade.data.corrupt import corrupted, corruption
from saccade.evaluation.candidates import price
from saccade.evaluation.speed import bench
from saccade.evaluation.stats import Interval, bootstrap, proportion

PRECISION = os.environ.get("STUDY_PRECISION", "bf16")
BATCH = int(os.environ.get("STUDY_BATCH", "32"))
RATE = (BATCH / 32) ** 0.5  # of learning, for Adam: by the square root of the batch
TRAINED = [  # what training runs share; all training images are trained on: the test images are the last word
    "data.holdout=0",
    f"data.workers={os.environ.get('STUDY_WORKERS', '0')}",
    f"run.batch={BATCH}",
    "run.threads=1",
    f"run.precision={PRECISION}",
]
Value = TypeVar("Value")
Row = dict[str, Any]


def parser_of(doc: str, out: str | Path, *positional: str) -> argparse.ArgumentParser:
    """The arguments of a study: some by place, ``--out``, and ``--help`` that shows its docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in positional:
        parser.add_argument(name)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


# --- training ---------------------------------------------------------------------------------------------------------


def autocast() -> torch.autocast:
    """The precision that is trained in."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=PRECISION == "bf16")


def train_all(runs: Mapping[str, Sequence[str]], out: Path, at_once: int) -> None:
    """``saccade train`` for each name and its arguments, into ``out / name``; what was interrupted goes on."""

    def one(name: str, arguments: Sequence[str]) -> None:
        if (out / name / "model").is_dir():
            return
        began = time.perf_counter()
        (out / name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "saccade", "train", *arguments, "--out", str(out / name), "--resume", "--json"]
        with open(out / name / "run.log", "a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        print(f"{name}: {(time.perf_counter() - began) / 60:.1f} minutes", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        for job in [pool.submit(one, name, arguments) for name, arguments in runs.items()]:
            job.result()


# --- what models answer -----------------------------------------------------------------------------------------------


class Memory:
    """Tensors by name in a file, each computed once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seen: dict[str, Tensor] = load_file(file) if file.exists() else {}

    def __call__(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of a name, made and written where it is not there."""
        return self.all({name: name}, lambda: {name: make()})[name]

    def all(self, names: Mapping[str, str], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Several tensors that are made together, by what they are; ``names`` are theirs in the file."""
        if not all(name in self.seen for name in names.values()):
            made = make()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.seen |= {names[what]: tensor for what, tensor in made.items()}
            write(self.seen, self.file)
        return {what: self.seen[name] for what, name in names.items()}


def write(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A safetensors file, whole or not at all."""
    part = file.with_suffix(".part")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part)
    os.replace(part, file)


def hits(model: saccade.AdaptiveViT, setting: str, images: ImageSet, batch: int = 50) -> Tensor:
    """Whether each image is classified rightly, [n] float64, in the precision of training; all must be readable."""
    return right(logits(model, setting, images, range(len(images)), batch), labels(model, images))


def labels(model: saccade.AdaptiveViT, images: ImageSet, places: Sequence[int] | None = None) -> Tensor:
    """The model's class of each image at these places, [n] int64."""
    found = torch.tensor(head_labels(images, model.vit).indices)
    return found if places is None else found[list(places)]


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the highest of the logits [n, K] is the label's, [n] float64."""
    return (logits.argmax(-1) == labels).double()


def logits(
    model: saccade.AdaptiveViT, setting: str, images: ImageSet, places: Sequence[int], batch: int = 50
) -> Tensor:
    """Logits of the images at these places, [n, K] float32, in the precision of training; all must be readable."""
    return answers(model.at(setting).eval(), images, places, batch=batch)[0]


def answers(
    view: saccade.AdaptiveViT,
    images: ImageSet,
    places: Sequence[int],
    preprocess: Preprocess | None = None,
    spoil: str = "",
    batch: int = 50,
) -> tuple[Tensor, Tensor]:
    """Logits [n, K] float32 of the images at these places, and their MACs [n]; ``spoil`` corrupts them.

    Without ``preprocess`` they have the size that the view's setting names.
    """
    loader = loader_of(images, preprocess or Preprocess.of(view.vit, view.input_size()), spoil)
    found, macs, device = [], [], next(view.parameters()).device
    for seen in loader.batches(batch, places):
        with torch.inference_mode(), autocast():
            out = view(seen.images.to(device))
        found.append(out.logits.float().cpu())
        macs.append(out.trace.macs().double().cpu())
    together = torch.cat(found)
    assert len(together) == len(places)
    return together, torch.cat(macs)


_LOADERS: dict[tuple[object, ...], Loader] = {}


def loader_of(images: ImageSet, preprocess: Preprocess, spoil: str = "") -> Loader:
    """Images are decoded once, however many models look at them."""
    key = str(images.path), images.split, len(images), preprocess, spoil
    if key not in _LOADERS:
        given = corrupted(preprocess, corruption(spoil) if spoil else None)
        _LOADERS[key] = Loader(images, given, cache_bytes=CACHE_BYTES)
    return _LOADERS[key]


def nearest(
    model: saccade.AdaptiveViT, make: Callable[[float], str], goal: float, low: float = 0.0, steps: int = 11
) -> str:
    """The setting whose MACs come nearest to a goal, by bisection from ``low`` to 1: more of k is more MACs."""
    high = 1.0
    tried: dict[str, float] = {}
    for _ in range(steps):
        middle = (low + high) / 2
        setting = make(max(middle, 0.001))
        tried[setting] = tried[setting] if setting in tried else price(model, setting)
        low, high = (low, middle) if tried[setting] > goal else (middle, high)
    return min(tried, key=lambda s: abs(tried[s] - goal))


def timed(model: saccade.AdaptiveViT, settings: list[str], seconds: float, batch: int = 32) -> dict[str, float]:
    """Measured speed-up over dense of median times, fp32, two threads, all interleaved."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    rows = bench(model, list(dict.fromkeys(settings)), batch=[batch], seconds=seconds)
    speed = {row.setting: row.images_per_s / rows[0].images_per_s for row in rows}
    print(f"{rows[0].runs} runs; " + ", ".join(f"{s}: {v:.3f}" for s, v in speed.items()))
    return speed


# --- tables and verdicts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What is said, the runs that it takes, and the paired difference [n], positive where the claim is right."""

    text: str
    runs: tuple[str, ...]
    difference: Callable[[], Tensor]
    slack: float = 0.0  # how far below zero it may be

    def row(self, there: Callable[[str], object]) -> list[str]:
        """Claim, difference in points with its 95 % interval, verdict; ``there``: whether a run is finished."""
        if not all(there(run) for run in self.runs):
            return [self.text, "", "not run"]
        found = bootstrap(self.difference())
        return [self.text, points(found), verdict(found, self.slack)]


def verdict(found: Interval, slack: float = 0.0) -> str:
    """Of a claim that a difference is above zero, or not further below it than ``slack``."""
    return "holds" if found.low > -slack else "does not hold" if found.high < -slack else "not decided"


def points(found: Interval) -> str:
    """A difference, as ``−1.2 [−2.5, +0.1]`` points."""
    return found.points().replace("-", "−")


def level(hits: Tensor) -> str:
    """An accuracy, as ``81.2% [80.1%, 82.3%]``."""
    return proportion(hits.bool()).percent()


def between(marks: Sequence[tuple[float, Value]], goal: float) -> list[tuple[float, Value]]:
    """Shares of the two marks (place, value) next to a goal, as on a line; beyond the ends, all of the end."""
    marks = sorted(marks, key=lambda mark: mark[0])
    for (a, left), (b, right) in pairwise(marks):
        if goal <= b:
            share = min(max((goal - a) / (b - a), 0.0), 1.0) if a < b else 1.0
            return [(1 - share, left), (share, right)]
    return [(1.0, marks[-1][1])]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(title: str, rows: Sequence[Row]) -> None:
    """Print a Markdown table below its title."""
    print(f"\n{title}\n\n{table([*rows[0]], [[str(row.get(name, '')) for name in rows[0]] for row in rows])}")
