"""What deciding costs, and whether what a method saves in MACs it saves in time.

    python benchmarks/merging.py [--what shares conversion falling] [--model deit_small_patch16_224] [--batch 8] …

Prints, for every method: deciding and moving tokens once, and reading attention for it, as shares of one block; then
all methods at the same MAC ratio against dense (interleaved, medians); then throughput as the keep rate falls.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

import saccade
from saccade.core.plan import Reducer
from saccade.core.reduction import reduce
from saccade.core.registry import registry
from saccade.core.tokens import Tokens
from saccade.evaluation.speed import Runner, bench
from saccade.execution.attention import attend
from saccade.execution.mixing import Asked
from saccade.runners.allocator import steady_allocator

# setting -> (speed-up, speed-up ÷ MAC ratio) asked for at batch 8 and more, on DeiT-S (the project's acceptance list)
TARGETS = {
    "tome(r=13)": (1.45, 0.9),
    "evit(0.7)": (1.30, 0.85),
    "imagepiece(keep=0.8)": (1.33, 0.9),
    "imagepiece()": (None, 0.9),
    "stem() | imagepiece(keep=0.8)": (1.33, 0.85),
    "token_pooling(speed=1.5)": (None, 0.7),
}
AT_A_SPEED = ("tome", "tofu", "pitome", "mctf", "imagepiece", "dpc_knn")
SHARES = (0.04, 0.005)  # of a block, at most: deciding of bipartite matching; reading the class row
KEEP = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=["shares", "conversion", "falling"])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--speed", type=float, default=1.5, help="ratio at which all mergers are timed; 0: they are not"
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steady_allocator()
    torch.manual_seed(0)
    model = saccade.create_model(arguments.model)
    print(f"{arguments.model}, batch {arguments.batch}, {arguments.threads} threads, torch {torch.__version__}\n")
    if "shares" in arguments.what:
        with torch.inference_mode():
            shares(model, arguments.batch, arguments.runs)
    if "conversion" in arguments.what:
        mergers = [f"{name}(speed={arguments.speed})" for name in AT_A_SPEED if arguments.speed]
        conversion(model, [*TARGETS, *mergers], arguments)
    if "falling" in arguments.what:
        falling(model, arguments)


def shares(model: saccade.AdaptiveViT, batch: int, runs: int) -> None:
    """Deciding, moving and reading of each method's first reducer that has anything to do, on random features."""
    backbone, block = model.backbone, model.vit.blocks[0]
    n, grid = backbone.num_patches, model.vit.patch_embed.grid_size
    x = torch.randn(batch, backbone.num_prefix + n, backbone.dim)
    stats = {name: torch.rand(batch, n) / n for name in ("cls_attn", "attn_received", "value_norm")}
    tokens = Tokens(x, torch.arange(n).expand(batch, -1), tuple(grid), backbone.num_prefix, torch.ones(batch, n))
    tokens = tokens.with_stats(key=torch.randn(batch, n, backbone.head_dim), **stats)
    print("| method, first step | decides | and moves | reads | in all |\n|---|---|---|---|---|")
    for name, entry in registry().items():
        steps = entry(backbone, (), {}).steps if entry.kind == "method" else []
        todo = [s for s in steps if isinstance(s, Reducer) and s.count(n) != n]
        if not todo:
            continue
        step = todo[0].eval()
        decision = step(tokens)
        ways: list[Callable] = [
            lambda: block(x),
            lambda step=step: step(tokens),
            lambda decision=decision: reduce(tokens, decision),
            lambda: attend(block.attn, x),
            lambda step=step: attend(block.attn, x, ask=Asked(read=step.read)),
        ]
        whole, decide, move, plain, reading = medians(ways, runs)
        parts = (decide, move, reading - plain)
        cells = " | ".join(f"{part / whole:.2%}" for part in (*parts, sum(parts)))
        print(f"| `{name}`, {', '.join(sorted(step.read)) or 'features'} | {cells} |")
    decides, reads = SHARES
    print(
        f"\nasked: tome and imagepiece decide within {decides:.1%} of a block, the class row is read within {reads:.1%}"
    )


def conversion(model: saccade.AdaptiveViT, settings: list[str], arguments: argparse.Namespace) -> None:
    """Speed-up against MAC ratio."""
    rows = bench(model, settings, batch=[arguments.batch], runner=Runner("fp32"), seconds=arguments.seconds)
    print("\n| setting | speed-up (quartiles) | MAC ratio | conversion | asked | runs |\n|---|---|---|---|---|---|")
    for row in rows:
        quartiles = f"{row.speedup:.3f} ({row.speedup_low:.3f}–{row.speedup_high:.3f})"
        speedup, converted = TARGETS.get(row.setting, (None, None))
        goals = [f"{speedup}×"] if speedup else []
        asked = ", ".join([*goals, *([f"{converted} of the ratio"] if converted else [])])
        name = row.setting.replace("|", "\\|")
        print(f"| `{name}` | {quartiles} | {row.mac_ratio:.3f} | {row.conversion:.3f} | {asked} | {row.runs} |")


def falling(model: saccade.AdaptiveViT, arguments: argparse.Namespace) -> None:
    """Throughput of imagepiece as less is kept; it should never fall (tolerance 3 %)."""
    settings = [f"imagepiece(keep={keep})" for keep in KEEP]
    rows = bench(model, settings, batch=[arguments.batch], runner=Runner("fp32"), seconds=arguments.seconds / 2)
    speeds = [row.images_per_s for row in rows if row.setting != "dense"]
    steady = all(b >= 0.97 * a for a, b in pairwise(speeds))
    print("\nimagepiece, images/s as keep falls: ", end="")
    print(", ".join(f"{k}: {s:.1f}" for k, s in zip(KEEP, speeds, strict=True)), end="")
    print(f" — {'never falling' if steady else 'FALLING'}")


def medians(ways: list[Callable], runs: int) -> list[float]:
    """Median seconds of each, interleaved."""
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(runs + 2):
        for way, taken in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            if turn >= 2:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
