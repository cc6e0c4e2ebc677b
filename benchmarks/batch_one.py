"""One image at a time: our settings against timm's own dense forward.

    python benchmarks/batch_one.py [--models deit_small_patch16_224 deit_tiny_patch16_224] [--rounds 60] [--dtype fp32]

Every round times timm's forward and each setting once, in turn, in a new order; medians of the ratios round by round,
with their quartiles. *Asked* is what the methods' reference implementations reach, as the project's list has it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

import saccade
from saccade.runners.allocator import steady_allocator

ASKED = {  # speed-up over timm's dense forward: ViT-S, ViT-Ti
    "dense": (1.0, 1.0),
    "tome(r=13)": (1.25, 0.98),
    "evit(0.7)": (1.31, 1.23),
    "evit(0.5)": (1.56, 1.42),
    "dynamicvit(0.7)": (1.31, 1.15),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_small_patch16_224", "deit_tiny_patch16_224"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    steady_allocator()
    print(f"batch {arguments.batch}, {arguments.dtype}, {arguments.threads} threads, torch {torch.__version__}\n")
    print("| model | setting | speed-up over timm's forward (quartiles) | asked |\n|---|---|---|---|")
    for name in arguments.models:
        vit = timm.create_model(name).eval().to(torch.bfloat16 if arguments.dtype == "bf16" else torch.float32)
        model = saccade.AdaptiveViT(vit)
        ways: dict[str, nn.Module] = {"timm": vit} | {setting: model.at(setting).eval() for setting in ASKED}
        images = torch.randn(arguments.batch, 3, *model.input_size(), dtype=next(vit.parameters()).dtype)
        for setting, ratios in timed(ways, images, arguments.rounds).items():
            low, middle, high = statistics.quantiles(ratios, n=4)
            asked = ASKED[setting]["tiny" in name] if arguments.batch == 1 and arguments.dtype == "fp32" else ""
            print(f"| {name} | {setting} | {middle:.3f} ({low:.3f}–{high:.3f}) | {asked} |")


@torch.inference_mode()
def timed(ways: dict[str, nn.Module], images: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Time of "timm" ÷ time of each other way, round by round."""
    runs: dict[str, Callable] = dict(ways)
    for run in runs.values():
        for _ in range(5):
            run(images)
    ratios: dict[str, list[float]] = {name: [] for name in runs if name != "timm"}
    order, times = list(runs), dict[str, float]()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            begin = time.perf_counter()
            runs[name](images)
            times[name] = time.perf_counter() - begin
        for name, found in ratios.items():
            found.append(times["timm"] / times[name])
    return ratios


if __name__ == "__main__":
    main()
