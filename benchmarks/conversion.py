"""Do saved MACs become saved time? DeiT-S shapes, this machine.

    python benchmarks/conversion.py [--batch 1 8 32] [--dtype fp32] [--seconds 60] [--threads 2]

Prints speed-up, executed MAC ratio and conversion of each setting against dense (interleaved, medians), then the dense
model against timm's own forward, where the shortened last block should show, and on models where it does not apply.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch

import saccade
from saccade.evaluation.speed import Runner, bench
from saccade.runners.allocator import steady_allocator

SETTINGS = ("evit(0.7)", "tome(r=13)", "imagepiece() | evit(0.8)", "grid(32)", "random(0.7)")
FLOORS = {  # at batch 8 and 32, from the project's acceptance list
    "evit(0.7)": (0.95, 0.97),
    "tome(r=13)": (0.92, 0.96),
    "imagepiece() | evit(0.8)": (0.90, 0.94),
    "grid(32)": (0.95, 0.97),
}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    model = saccade.create_model(arguments.model)
    rows = bench(model, SETTINGS, batch=arguments.batch, runner=Runner(arguments.dtype), seconds=arguments.seconds)
    print(f"{arguments.model}, {arguments.dtype}, {arguments.threads} threads, torch {torch.__version__}\n")
    print("| setting | batch | speed-up (quartiles) | MAC ratio | conversion | asked | runs | attention |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        floor = FLOORS.get(row.setting, (None, None))[row.batch >= 32] if row.batch >= 8 else None
        quartiles = f"{row.speedup:.3f} ({row.speedup_low:.3f}–{row.speedup_high:.3f})"
        cells = [row.setting, row.batch, quartiles, f"{row.mac_ratio:.3f}", f"{row.conversion:.3f}"]
        cells += [floor or "", row.runs, row.kernels]
        print("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")

    print("\n| model | batch | dense here ÷ timm's forward (quartiles) | runs |\n|---|---|---|---|")
    for name, batch in ((arguments.model, 1), (arguments.model, 8), ("vit_base_patch16_siglip_gap_224", 8)):
        ratios = against_timm(name, batch, arguments.seconds / 3)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {batch} | {middle:.3f} ({low:.3f}–{high:.3f}) | {len(ratios)} |")


def against_timm(name: str, batch: int, seconds: float) -> list[float]:
    """Time of timm's forward ÷ time of ours, run by run."""
    steady_allocator()
    vit = timm.create_model(name, depth=6 if "base" in name else 12).eval()
    model = saccade.AdaptiveViT(vit)
    images = torch.randn(batch, 3, *model.input_size())
    ratios: list[float] = []
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(3):
            model(images), vit(images)
        while len(ratios) < 7 or time.perf_counter() - start < seconds:
            times = {}
            for way in (vit, model) if len(ratios) % 2 else (model, vit):
                begin = time.perf_counter()
                way(images)
                times[way] = time.perf_counter() - begin
            ratios.append(times[vit] / times[model])
    return ratios


if __name__ == "__main__":
    main()
