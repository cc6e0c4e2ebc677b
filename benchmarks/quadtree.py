"""What a quadtree of patches costs: selecting, tokenizing, the whole against the MAC ratio, ragged batches.

    python benchmarks/quadtree.py selection tokenizer whole same [--model vit_small_patch16_224] [--threads 2]
    python benchmarks/quadtree.py ragged --photos photos50.zip

Runs are interleaved, so that whatever else the machine does falls on all alike, and of so many rounds the lower
quartile is shown, which what else it does can least disturb. Scorers' networks have random weights, which cost what
real ones do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import quantiles

import torch
from torch import Tensor

import saccade
import saccade.core.packing
from saccade.data import Loader, Preprocess, open_images
from saccade.model import AdaptiveViT
from saccade.runners.allocator import steady_allocator
from saccade.tokenizers.mosaic.geometry import Geometry
from saccade.tokenizers.mosaic.selection import split_most

SCORERS = (
    "random",
    "pixel",
    "pixel(blur='bilinear')",
    "entropy",
    "laplacian",
    "attention",
    "feature(weights='random')",
    "feature(scale=0.5, stride=16, weights='random')",
)
# Settings of APT: photos of many lengths, fewer and more of them large.
RAGGED = (
    (224, "quadtree(threshold=(6.5, 5.5), sizes=(16, 32, 64))"),
    (224, "quadtree(threshold=5.5, sizes=(16, 32))"),
)


def main() -> None:
    """Print the tables that were asked for."""
    parts = {"selection": selection, "tokenizer": tokenizer, "whole": whole, "same": same, "ragged": ragged}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scorers", nargs="+", default=SCORERS)
    parser.add_argument("--photos", help="for ragged batches")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steady_allocator()
    torch.manual_seed(0)
    print(f"{arguments.model}, {arguments.size} px, {arguments.tokens} tokens, batch {arguments.batch}, fp32, ", end="")
    print(f"{arguments.threads} threads, saccade {saccade.__version__}, torch {torch.__version__}\n")
    with torch.inference_mode():
        for part in arguments.parts:
            parts[part](arguments)


def selection(given: argparse.Namespace) -> None:
    """The sort against the loop that it replaces."""
    g = Geometry.of_pixels((given.size, given.size), (16, 32, 64))
    scores = [torch.rand(given.batch, *g.grid(level)) for level in g.splittable]
    splits = g.splits_for(given.tokens)
    assert torch.equal(split_most(scores, splits), in_steps(scores, splits))
    assert torch.equal(split_most(scores, splits), masked_steps(scores, splits))
    ways = [lambda f=f: [f(scores, splits) for _ in range(10)] for f in (split_most, in_steps, masked_steps)]
    sort, loop, masked = (seconds / 10 for seconds in quartiles(ways, 4 * given.rounds))
    print(f"selection: sort {1e3 * sort:.3f} ms; {splits} steps as published {1e3 * masked:.3f} ms, ", end="")
    print(
        f"{masked / sort:.1f} times as long; as few operators as will do {1e3 * loop:.3f} ms, {loop / sort:.1f} times\n"
    )


def masked_steps(scores: list[Tensor], count: int) -> Tensor:
    """The published loop, over the batch at once: of what is active the best is split and its children are active.

    Its table has the finest patches too, which are never chosen.
    """
    flat, children = torch.cat([s.flatten(1) for s in scores], dim=1), _children(scores)
    images, nodes = flat.shape
    finest = 4 * scores[-1][0].numel()
    table = torch.cat([-flat, torch.full((images, finest + 1), 1e6)], dim=1)
    active = torch.zeros(table.shape, dtype=torch.bool)
    active[:, : scores[0][0].numel()] = True
    split = torch.zeros(images, nodes, dtype=torch.bool)
    for _ in range(count):
        best = torch.where(active, table, torch.inf).argmin(1, keepdim=True)
        active.scatter_(1, best, False)
        active.scatter_(1, children[best.squeeze(1)], True)
        split.scatter_(1, best, True)
    return split


def _children(scores: list[Tensor]) -> Tensor:
    """Places of the children of every node of two levels, [S, 4]; of fine ones the unused place S."""
    coarse, w = scores[0][0].numel(), scores[0].shape[-1]
    where, nodes = torch.arange(coarse), sum(s[0].numel() for s in scores)
    first = coarse + (where // w) * 4 * w + (where % w) * 2  # upper left child of each coarse node
    children = torch.stack([first, first + 1, first + 2 * w, first + 2 * w + 1], dim=1)
    return torch.cat([children, torch.full((nodes - coarse, 4), nodes)])


def in_steps(scores: list[Tensor], count: int) -> Tensor:
    """The same with as few operators as will do: a frontier of scores, where what was taken is -inf."""
    flat, children = torch.cat([s.flatten(1) for s in scores], dim=1), _children(scores)
    images, nodes = flat.shape
    coarse = scores[0][0].numel()
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


def tokenizer(given: argparse.Namespace) -> None:
    """Scoring, selecting and embedding, against the dense model at its own input size."""
    model = saccade.create_model(given.model)
    images = torch.randn(given.batch, 3, given.size, given.size)
    own = torch.randn(given.batch, 3, *model.input_size())
    views = [model.at(f'quadtree({given.tokens}, scorer="{scorer}")') for scorer in given.scorers]
    ways: list[Callable[[], object]] = [lambda v=view: v.tokenizer(v.vit, images) for view in views]  # type: ignore[misc]
    *taken, dense = quartiles([*ways, lambda: model(own)], given.rounds)
    print(f"dense, {own.shape[-1]} px: {1e3 * dense / given.batch:.2f} ms an image\n")
    print("| scorer | tokenizer, ms an image | share of dense |\n|---|---|---|")
    for scorer, seconds in zip(given.scorers, taken, strict=True):
        print(f"| `{scorer}` | {1e3 * seconds / given.batch:.2f} | {seconds / dense:.1%} |")
    print()


def whole(given: argparse.Namespace) -> None:
    """The forward pass, scorer included, against the dense model on the same images."""
    model = saccade.create_model(given.model, img_size=given.size)
    side = 16 * round(given.tokens**0.5)
    images, small = (torch.randn(given.batch, 3, s, s) for s in (given.size, side))
    entries = [("dense", model, images), (f"grid(16, size={side})", model.at(f"grid(16, size={side})"), small)]
    for scorer in given.scorers:
        entries.append((scorer, model.at(f'quadtree({given.tokens}, scorer="{scorer}")'), images))
    against(entries, given.rounds)


def same(given: argparse.Namespace) -> None:
    """Nothing merged: what it costs to have looked."""
    model = saccade.create_model(given.model)
    images = torch.randn(given.batch, 3, *model.input_size())
    names = ["quadtree(threshold=-1.0, scorer='pixel')", "quadtree(threshold=-1.0)"]
    against([("dense", model, images), *((name, model.at(name), images) for name in names)], given.rounds)


def ragged(given: argparse.Namespace) -> None:
    """Batches of photos at APT's thresholds: packed, and padded to the longest with a mask."""
    for size, setting in RAGGED:
        model = saccade.create_model(given.model, img_size=size)
        seen = next(Loader(open_images(given.photos), Preprocess.of(model.vit)).batches(given.batch))
        view = model.at(setting)
        counts = view.tokenizer.mosaic(view.vit, seen.images).valid.sum(1)  # type: ignore[attr-defined]
        print(f"{setting}: {int(counts.min())} to {int(counts.max())} tokens, mean {float(counts.float().mean()):.0f}")
        against([("dense", model, seen.images), ("packed", view, seen.images)], given.rounds, padded=True)


Entry = tuple[str, AdaptiveViT, Tensor]


def against(entries: list[Entry], rounds: int, padded: bool = False) -> None:
    """A table of forward passes against the first; ``padded``: the last one once more, without packing."""
    ways: list[Callable[[], object]] = [lambda m=model, x=images: m(x) for _, model, images in entries]  # type: ignore[misc]
    names = [name for name, _, _ in entries]
    macs = [float(model(images).trace.macs().mean()) for _, model, images in entries]
    if padded:
        ways.append(lambda: _without_packing(ways[len(entries) - 1]))
        names, macs = [*names, "padded to the longest"], [*macs, macs[-1]]
    taken = quartiles(ways, rounds)
    print("| setting | ms an image | GMACs | against the first | MAC ratio | conversion |\n|---|---|---|---|---|---|")
    for name, seconds, cost in zip(names, taken, macs, strict=True):
        faster, ratio = taken[0] / seconds, macs[0] / cost
        print(f"| `{name}` | {1e3 * seconds / len(entries[0][2]):.2f} | {cost / 1e9:.3f} | ", end="")
        print(f"{faster:.2f}× | {ratio:.2f}× | {faster / ratio:.2f} |")
    print()


def _without_packing(way: Callable[[], object]) -> object:
    kept, saccade.core.packing.MAX_LIVE_SHARE = saccade.core.packing.MAX_LIVE_SHARE, 0.0
    try:
        return way()
    finally:
        saccade.core.packing.MAX_LIVE_SHARE = kept


def quartiles(ways: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Lower quartile of each one's seconds, interleaved."""
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 2):
        for taken, way in zip(times, ways, strict=True):
            start = time.perf_counter()
            way()
            if turn >= 2:
                taken.append(time.perf_counter() - start)
    return [quantiles(t, n=4, method="inclusive")[0] for t in times]


if __name__ == "__main__":
    main()
