"""What it costs to resize a kernel, here and in timm; and to switch patch sizes between two requests.

    python benchmarks/resize.py [--width 768] [--threads 1] [--repeats 5]

Ten patch sizes from an underlying 32 x 32. Matrices: built from nothing, fastest of the repeats (timm: of one). Switch:
``model.at("grid(p)")`` and its weights, after first use, medians; what Python allocates, and the operators that torch
runs for it.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable

import torch
from timm.layers import resample_patch_embed
from torch.utils._python_dispatch import TorchDispatchMode

import saccade
from saccade.core import constant_cache as constants
from saccade.tokenizers.resize.matrices import pi_matrix
from saccade.tokenizers.resize.resampling import PRESETS, resize_kernel

SIZES = (8, 10, 12, 15, 16, 20, 24, 30, 40, 48)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    kernel = torch.randn(arguments.width, 3, 32, 32)
    spec = PRESETS["google"]

    def build() -> None:
        constants.forget()
        for size in SIZES:
            pi_matrix(32, size, spec.kernel_mode, spec.kernel_antialias)

    def ours() -> None:
        for size in SIZES:
            resize_kernel(kernel, (size, size), spec)

    def timms(kernel: torch.Tensor) -> None:
        for size in SIZES:
            resample_patch_embed(kernel, [size, size], "bilinear", antialias=False)

    print(f"torch {torch.__version__}, {arguments.threads} threads; from 32 x 32 to {', '.join(map(str, SIZES))}\n")
    print("| | all ten, ms |\n|---|---|")
    print(f"| Saccade: the matrices | {fastest(build, arguments.repeats):.1f} |")
    print(f"| Saccade: kernels of width {arguments.width}, matrices there | {fastest(ours, arguments.repeats):.1f} |")
    print(f"| timm: a kernel of width 1, which is its matrices | {fastest(lambda: timms(kernel[:1, :1]), 1):.0f} |")
    print(f"| timm: kernels of width {arguments.width} | {fastest(lambda: timms(kernel), 1):.0f} |")

    model = saccade.flexify("vit_base_patch16_224", size=240)
    print("\n| switch to | ms | Python, kB | operators |\n|---|---|---|---|")
    with torch.inference_mode():
        for size in SIZES:
            milliseconds, python, operators = switch(model, size)
            print(f"| grid({size}) | {milliseconds:.3f} | {python / 1024:.1f} | {operators} |")


def fastest(run: Callable[[], None], repeats: int) -> float:
    """Milliseconds, the best of so many."""
    walls = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        walls.append(time.perf_counter() - start)
    return 1e3 * min(walls)


class Operators(TorchDispatchMode):
    """Counts what torch is asked to run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def switch(model: saccade.AdaptiveViT, size: int) -> tuple[float, int, int]:
    """Milliseconds, bytes of Python at most, operators of torch, for a patch size that was used before."""

    def once() -> None:
        model.at(f"grid({size})").tokenizer.weights(model.vit, (240 // size, 240 // size))

    once()
    walls = []
    for _ in range(30):
        start = time.perf_counter()
        once()
        walls.append(time.perf_counter() - start)
    with Operators() as run:
        once()
    tracemalloc.start()
    held = tracemalloc.get_traced_memory()[0]
    once()
    python = tracemalloc.get_traced_memory()[1] - held
    tracemalloc.stop()
    return 1e3 * statistics.median(walls), python, run.count


if __name__ == "__main__":
    main()
