"""What a quadtree of patches costs: selecting, tokenizing, and the whole against the MAC ratio.

    python benchmarks/quadtree.py [--model vit_small_patch16_224] [--size 256] [--tokens 100] [--batch 32] [--threads 1]

Runs are interleaved, so that whatever else the machine does falls on all alike; medians of so many rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

import saccade
from saccade.measure.speed import steady_allocator
from saccade.tokenizers.mosaic import Geometry
from saccade.tokenizers.selection import split_most

SCORERS = ("pixel", "pixel(blur='bilinear')", "entropy", "laplacian", "attention", "feature(weights='random')")


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steady_allocator()
    torch.manual_seed(0)
    print(f"{arguments.model}, {arguments.size} px, {arguments.tokens} tokens, batch {arguments.batch}, fp32, ", end="")
    print(f"{arguments.threads} threads, saccade {saccade.__version__}, torch {torch.__version__}\n")
    with torch.inference_mode():
        selection(arguments.size, arguments.tokens, arguments.batch, arguments.rounds)
        whole(arguments)


def selection(size: int, tokens: int, batch: int, rounds: int) -> None:
    """The sort against the loop that it replaces."""
    g = Geometry.of((size // 16, size // 16), (16, 32, 64))
    scores = [torch.rand(batch, *g.grid(level)) for level in g.splittable]
    splits = g.splits_for(tokens)
    assert torch.equal(split_most(scores, splits), in_steps(scores, splits))
    sort, loop = medians([lambda: split_most(scores, splits), lambda: in_steps(scores, splits)], 3 * rounds)
    print(f"selection: sort {1e3 * sort:.3f} ms, {splits} steps {1e3 * loop:.3f} ms, {loop / sort:.1f} times faster\n")


def in_steps(scores: list[Tensor], count: int) -> Tensor:
    """The published loop, over the batch at once: split the best node on the frontier, then look at its children."""
    flat = torch.cat([s.flatten(1) for s in scores], dim=1)
    images, nodes = flat.shape
    coarse, w = scores[0][0].numel(), scores[0].shape[-1]
    where = torch.arange(coarse)
    first = coarse + (where // w) * 4 * w + (where % w) * 2  # upper left child of each coarse node
    children = torch.stack([first, first + 1, first + 2 * w, first + 2 * w + 1], dim=1)
    # Fine nodes have none: they point at a place that is thrown away.
    children = torch.cat([children, torch.full((nodes - coarse, 4), nodes)])
    frontier = torch.cat([flat[:, :coarse], torch.full((images, nodes - coarse + 1), -torch.inf)], dim=1)
    values = torch.cat([flat, torch.full((images, 1), -torch.inf)], dim=1)
    split = torch.zeros(images, nodes + 1, dtype=torch.bool)
    for _ in range(count):
        best = frontier.argmax(1, keepdim=True)
        split.scatter_(1, best, True)
        frontier.scatter_(1, best, -torch.inf)
        below = children[best.squeeze(1)]
        frontier.scatter_(1, below, values.gather(1, below))
    return split[:, :nodes]


def whole(arguments: argparse.Namespace) -> None:
    """Tokenizing with each scorer, and the whole forward pass, against the dense model."""
    model = saccade.create_model(arguments.model, img_size=arguments.size)
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    tokens, side = arguments.tokens, 16 * round(arguments.tokens**0.5)
    views = {name: model.at(f'quadtree({tokens}, scorer="{name}")') for name in SCORERS}
    plain = model.at(f"grid(16, size={side})")
    small = torch.randn(arguments.batch, 3, side, side)
    ways: list[Callable[[], object]] = [lambda: model(images), lambda: plain(small)]
    ways += [lambda v=view: v.tokenizer(v.vit, images) for view in views.values()]  # type: ignore[misc]
    ways += [lambda v=view: v(images) for view in views.values()]  # type: ignore[misc]
    dense, smaller, *rest = medians(ways, arguments.rounds)
    macs = [float(m(x).trace.macs()[0]) for m, x in [(model, images[:1]), (plain, small[:1])]]
    print(f"dense: {1e3 * dense / arguments.batch:.2f} ms an image, {macs[0] / 1e9:.2f} GMACs")
    print(f"grid of {side} px: {1e3 * smaller / arguments.batch:.2f} ms an image, {dense / smaller:.2f}×, ", end="")
    print(f"conversion {dense / smaller / (macs[0] / macs[1]):.2f}\n")
    print("| scorer | tokenizer, ms an image | share of dense | whole against dense | MAC ratio | conversion |")
    print("|---|---|---|---|---|---|")
    for (name, view), tokenizer, all_of_it in zip(views.items(), rest, rest[len(views) :], strict=False):
        ratio = macs[0] / float(view(images[:1]).trace.macs()[0])
        faster = dense / all_of_it
        print(f"| `{name}` | {1e3 * tokenizer / arguments.batch:.2f} | {tokenizer / dense:.1%} | ", end="")
        print(f"{faster:.2f}× | {ratio:.2f}× | {faster / ratio:.2f} |")


def medians(ways: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each, interleaved."""
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 2):
        for taken, way in zip(times, ways, strict=True):
            start = time.perf_counter()
            way()
            if turn >= 2:
                taken.append(time.perf_counter() - start)
    return [median(t) for t in times]


if __name__ == "__main__":
    main()
