"""What rotations cost: conversion of settings on DINOv3-S shapes beside ViT-S's, at two input sizes.

    python benchmarks/rotary.py --seconds 20 --batch 1 8

Random weights; dense, settings and their MACs in one interleaved run for each model, size and batch.
"""

from __future__ import annotations

import argparse

import torch

import saccade

MODELS = ("vit_small_patch16_224", "vit_small_patch16_dinov3")
SETTINGS = {
    224: ("tome(r=13)", "evit(0.7)", "grid(16, size=160)"),
    512: ("tome(speed=2.0)", "evit(speed=2.0)", "grid(16, size=368)"),
}


def main() -> None:
    """Print a table of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for each model, size and batch")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, nargs="+", default=[*SETTINGS])
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print("| model | pixels | batch | setting | MAC ratio | speed-up | conversion |\n|---|---|---|---|---|---|---|")
    for name in MODELS:
        for size in asked.size:
            torch.manual_seed(0)
            model = saccade.create_model(name, img_size=size, global_pool="token")
            for batch in asked.batch:
                for row in saccade.bench(model, list(SETTINGS[size]), batch=[batch], seconds=asked.seconds).rows:
                    told = f"{row.mac_ratio:.2f} | {row.speedup:.2f} | {row.conversion:.2f}"
                    print(f"| {name} | {size} | {batch} | `{row.setting}` | {told} |", flush=True)


if __name__ == "__main__":
    main()
