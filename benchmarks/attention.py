"""Which attention path is faster here, and what reading and matching cost: the measurements behind ``Execution``.

python benchmarks/attention.py [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import cast

import timm
import torch

from saccade.core.timm_types import ViT
from saccade.evaluation.stopwatch import faster_attention
from saccade.execution.attention import attend
from saccade.execution.mixing import Asked, class_attention
from saccade.methods.common.matching import best_edges
from saccade.runners.allocator import steady_allocator


def main() -> None:
    """Print the table of paths and the table of shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    steady_allocator()
    torch.manual_seed(0)
    print("| shape (6 heads of 64) | fused | fused + bias | unfused | unfused + bias | the rule takes |")
    print("|---|---|---|---|---|---|")
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for batch, n in ((1, 197), (8, 197), (8, 64), (32, 197), (32, 64)):
                paths(dtype, batch, n)
        shares()


def paths(dtype: torch.dtype, batch: int, n: int) -> None:
    """One row: milliseconds of each path, interleaved medians."""
    q, k, v = torch.randn(3, batch, 6, n, 64).to(dtype).unbind(0)
    bias = torch.randn(batch, 1, 1, n).to(dtype)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    ways = [
        lambda: sdpa(q, k, v),
        lambda: sdpa(q, k, v, attn_mask=bias),
        lambda: (q @ k.transpose(-2, -1)).softmax(-1) @ v,
        lambda: (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v,
    ]
    cells = [f"{1e3 * t:.2f}" for t in medians(ways)]
    name = str(dtype).removeprefix("torch.")
    print(f"| {name}, B {batch}, N {n} | " + " | ".join(cells) + f" | {faster_attention(q, n, time.perf_counter)} |")


def shares(batch: int = 8, n: int = 197) -> None:
    """What a reducer's decisions cost, as a share of one DeiT-S block."""
    block = cast(ViT, timm.create_model("deit_small_patch16_224").eval()).blocks[0]
    x = torch.randn(batch, n, 384)
    q, k = torch.randn(2, batch, n, 3, 6, 64)[:, :, :, 0].permute(0, 1, 3, 2, 4).unbind(0)
    key = torch.randn(batch, n - 1, 64)
    ways = [
        lambda: block(x),
        lambda: class_attention(q[:, :, 0], k, None),
        lambda: best_edges(key[:, 1::2], key[:, ::2], 13),
        lambda: attend(block.attn, x, ask=Asked(read=frozenset({"key"}))).stats,
        lambda: attend(block.attn, x),
    ]
    whole, row, matching, keyed, plain = medians(ways, 40)
    print(f"\nof one DeiT-S block (B {batch}, N {n}, fp32): class row {row / whole:.2%}, ", end="")
    print(f"matching {matching / whole:.2%}, mean key {(keyed - plain) / whole:.2%}")


def medians(ways: list[Callable], runs: int = 15) -> list[float]:
    """Median seconds of each, interleaved."""
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(runs + 2):
        for i, way in enumerate(ways):
            start = time.perf_counter()
            way()
            if turn >= 2:
                times[i].append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


if __name__ == "__main__":
    main()
