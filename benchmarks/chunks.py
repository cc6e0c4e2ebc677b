"""Does a large batch run faster in chunks? Batches of 32 at once and in chunks, in turn, by runner.

    python benchmarks/chunks.py --model deit_small_patch16_224 --runner fp32 openvino

Random weights; medians of interleaved runs. A cell is the time at once ÷ the time in chunks of so many images,
each by a program for just so many.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch
from torch import Tensor

import saccade
from saccade.evaluation.interleaved import Way, in_turn
from saccade.model import AdaptiveViT
from saccade.runners.allocator import steady_allocator
from saccade.runners.runner import Runner

SETTINGS = ("dense", "tome(r=13)")
SIZES = (32, 16, 8, 4)


def main() -> None:
    """Print a row for each runner and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--runner", nargs="+", default=["fp32"])
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of chunks; the first is all at once")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    steady_allocator()
    model = saccade.create_model(asked.model).eval()
    images = torch.randn(asked.sizes[0], 3, *model.input_size())
    print(f"| model | runner | setting | {' | '.join(map(str, asked.sizes))} |\n|{'---|' * (3 + len(asked.sizes))}")
    for runner in asked.runner:
        for setting in asked.settings:
            ways = {size: (way(model, setting, Runner.of(runner), size), images) for size in asked.sizes}
            with torch.inference_mode():
                for run, seen in ways.values():
                    run(seen)
            found = in_turn({str(size): ways[size] for size in ways}, lambda runs: runs < asked.runs)
            times = {size: median(found[str(size)]) for size in asked.sizes}
            ratios = " | ".join(f"{times[asked.sizes[0]] / ms:.2f}" for ms in times.values())
            print(f"| {asked.model} | {runner} | `{setting}` | {ratios} |", flush=True)


def way(model: AdaptiveViT, setting: str, runner: Runner, size: int) -> Way:
    """Images -> answers, so many at once."""
    view = model.deploy(Runner(runner.dtype, runner.engine, size)).at(setting).eval()

    def run(images: Tensor) -> list[Tensor]:
        return [view(part).logits for part in images.split(size)]

    return run


if __name__ == "__main__":
    main()
