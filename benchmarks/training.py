"""Training throughput of settings against the dense model, in ratios: forward, backward and an AdamW step.

    python benchmarks/training.py [--model vit_tiny_patch16_224] [--size 160] [--batch 32] [--dtype fp32]

Steps are interleaved, so that whatever else the machine does falls on all alike; medians of so many rounds.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from torch.nn import functional as F

import saccade
from saccade.training.config import Source
from saccade.training.multi_setting import MultiSettingModel
from saccade.training.starting import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("-s", "--setting", action="append")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = ["dense", *(arguments.setting or ["evit(0.5)", "tome(r=6)", "imagepiece()", "grid(16, size=112)"])]

    student = MultiSettingModel(open_source(Source(name=arguments.model, size=arguments.size)), settings).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    labels = torch.randint(0, student.vit.num_classes, (arguments.batch,))
    times: list[list[float]] = [[] for _ in settings]
    for _ in range(arguments.rounds + 2):
        for taken, view in zip(times, student.views, strict=True):
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.dtype == "bf16"):
                loss = F.cross_entropy(view(images).logits.float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            taken.append(time.perf_counter() - began)
    macs = student.macs()
    print(f"{arguments.model} at {arguments.size} px, batch {arguments.batch}, {arguments.dtype}, ", end="")
    print(f"{torch.get_num_threads()} threads, saccade {saccade.__version__}, torch {torch.__version__}")
    print("| setting | images/s | against dense | MAC ratio | conversion |\n|---|---|---|---|---|")
    for name, taken, cost in zip(settings, times, macs, strict=True):
        seconds = median(taken[2:])
        faster, ratio = median(a / b for a, b in zip(times[0][2:], taken[2:], strict=True)), macs[0] / cost
        print(f"| `{name}` | {arguments.batch / seconds:.1f} | {faster:.2f}× | {ratio:.2f}× | {faster / ratio:.2f} |")


if __name__ == "__main__":
    main()
