"""How well a latency curve tells times: every setting of the menus, predicted from the curve and timed beside dense.

    python benchmarks/latency_curve.py --model vit_tiny_patch16_224 --batch 1 8 32 --runner fp32 openvino

Random weights; one interleaved run for each runner and batch. The curve is fitted to its own points of that run, and
tells the times of all others: compositions, schedules, and what lies between the weakest and the strongest of a menu.
With ``--schedules 30`` it is the curve that ``tune`` searches by, and the others are so many schedules drawn at random,
on any tokenizer of the search. The error of a setting is |predicted ÷ measured − 1|. Asked: a median of 5 %, and none
above 12 %.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from statistics import median

import torch

import saccade
from saccade.core.registry import registry
from saccade.evaluation.device_curve import some_of_each
from saccade.evaluation.interleaved import interleaved
from saccade.evaluation.latency_curve import fitted, points
from saccade.evaluation.schedule import Space, by_macs
from saccade.evaluation.schedule_price import points as of_search
from saccade.model import AdaptiveViT
from saccade.runners.runner import Runner

COMPOSED = [
    "grid(16, size=176) | mctf(r=12)",
    "imagepiece() | evit(0.8)",
    "quadtree(127, size=224) | mctf(r=8)",
    "tome(r=(0, 0, 40, 0, 40))",
    "grid(16, size=192) | tofu(r=(0, 20, 0, 10, 0, 30)) | tome(r=(0, 0, 0, 10))",
    *(
        f"grid(16, size=160) | {s}"
        for s in ("tome(r=9)", "tofu(r=9)", "diffrate(2, 6)", "mctf(share=0.25)", "evit(0.7)")
    ),
]


def main() -> None:
    """Print a row for each runner and batch, and the settings that are farthest off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--runner", nargs="+", default=["fp32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, for each runner and batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worst", type=int, default=5, help="settings to name")
    parser.add_argument("--schedules", type=int, help="tell so many schedules, not the menus")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    model = saccade.create_model(asked.model)
    if asked.schedules:
        space = Space.of(model.eval())
        known, told = of_search(space), drawn(space, asked.schedules)
    else:
        menus = [s for entry in registry().values() for s in entry.menu(model.backbone)]
        known, told = some_of_each(model), [*menus, *COMPOSED]
    print("| model | runner | batch | settings | not known | median error | worst |\n|---|---|---|---|---|---|---|")
    for name in asked.runner:
        base = model.deploy(Runner.of(name)).eval()
        views = {s: base.at(s).eval() for s in points(model, [*known, *told])}
        for batch in asked.batch:
            row(model, asked.model, known, views, Runner.of(name), batch, asked.seconds, asked.worst)


def drawn(space: Space, count: int) -> list[str]:
    """Schedules of one or two methods in any shape, at 1.3 to 3 times fewer MACs, on every tokenizer in turn that
    leaves something to do."""
    draw, dense, found = random.Random(0), space.macs(space.empty("")), list[str]()
    while len(found) < count:
        tokenizer, limit = space.tokenizers[len(found) % len(space.tokenizers)], dense / draw.uniform(1.3, 3.0)
        if space.macs(space.empty(tokenizer)) <= limit:
            tokenizer = ""
        rules = {rule: draw.random() for rule in draw.sample(space.rules, draw.choice((1, 2)))}
        shape = [0.0, *(draw.choice((0.0, 0.5, 1.0, 1.0)) * draw.random() for _ in range(space.depth - 1))]
        within = space.within(space.shaped(tokenizer, rules, shape), by_macs, limit) if sum(shape) else None
        found += [] if within is None else [str(space.setting(within))]
    return list(dict.fromkeys(found))


def row(
    model: AdaptiveViT,
    name: str,
    known: Sequence[str],
    views: Mapping[str, AdaptiveViT],
    runner: Runner,
    batch: int,
    seconds: float,
    worst: int,
) -> None:
    """Measure, predict, and print."""
    timed, failed = interleaved(views, batch, seconds)
    times = {setting: 1000 * median(found.seconds) for setting, found in timed.items()}
    curve = fitted(model, known, times, runner, batch)
    told = {s: curve.predict(model.at(s).eval()) for s in times if s not in points(model, known)}
    errors = {setting: ms / times[setting] - 1 for setting, ms in told.items() if ms is not None}
    far = sorted(errors, key=lambda s: -abs(errors[s]))
    sizes, unknown = [abs(error) for error in errors.values()], [s for s, ms in told.items() if ms is None]
    cells = name, runner, batch, len(errors), len(unknown), f"{median(sizes):.1%}", f"{max(sizes):.1%}"
    print(f"| {' | '.join(map(str, cells))} |")
    print(
        f"<!-- {', '.join(f'{s} {errors[s]:+.1%}' for s in far[:worst])}; not known: {unknown}; {failed} -->",
        flush=True,
    )


if __name__ == "__main__":
    main()
