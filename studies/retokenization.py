"""Does re-tokenization beat pruning, merging and chance at equal MACs, without training?

Claim    ImagePiece (arXiv 2412.16491), Tables 1-2: merging inattentive tokens and judging again beats EViT and ToMe.
         The paper trains 300 epochs with a convolutional stem; here the same reduction runs training-free.
Command  python studies/retokenization.py MODEL DATA --weights FILE [--ratio 1.5 1.8 2.2] [--limit N] [--json FILE]
Cost     four settings for each ratio, and the dense model, once over the images.
Result   docs/results.md

Every method's one knob is solved so that its executed MACs meet the ratio to about one percent.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import saccade
from saccade.data import open_images
from saccade.evaluation.accuracy import paired, score, spread
from saccade.evaluation.candidates import price
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.stats import bootstrap, mcnemar
from saccade.model import AdaptiveViT
from saccade.storage.files import write_json
from saccade.terminal.progress import Progress

METHODS: dict[str, Callable[[float], str]] = {  # one knob each, from 0 (most) to 1 (least reduction)
    "re-tokenize, then prune": lambda k: f"imagepiece(keep={k:.3f})",
    "prune (EViT)": lambda k: f"evit({k:.3f})",
    "prune, fuse the rest": lambda k: f"evit({k:.3f}, fuse=True)",
    "merge (ToMe)": lambda k: merging(k),
    "chance": lambda k: f"random({k:.3f})",
}


def merging(k: float, blocks: int = 12, most: int = 24) -> str:
    """ToMe with r per block that may differ by one, so that any number of tokens in all can be merged away."""
    total = round((1 - k) * most * blocks)
    return f"tome(r={tuple(total // blocks + (i < total % blocks) for i in range(blocks))})"


def solve(model: AdaptiveViT, make: Callable[[float], str], macs: float) -> str:
    """The setting whose executed MACs come nearest to a budget, by bisection."""
    low, high = 0.01, 1.0
    tried: dict[str, float] = {}
    for _ in range(12):
        middle = (low + high) / 2
        setting = make(middle)
        tried[setting] = tried.get(setting) or price(model, setting)
        low, high = (low, middle) if tried[setting] > macs else (middle, high)
    return min(tried, key=lambda s: abs(tried[s] - macs))


def main() -> None:
    """Print the table of each ratio, and the paired differences to the first method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--ratio", type=float, nargs="+", default=[1.5, 1.8, 2.2])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    model = saccade.create_model(arguments.model, weights=arguments.weights)
    images = open_images(arguments.data)
    judge, places = Evaluator(model, images), spread(len(images), arguments.limit)
    rows = []
    with Progress(shown=True) as progress:
        run = progress.start("dense", len(places) * (1 + len(arguments.ratio) * len(METHODS)))
        dense = judge.predict(judge.dense, places, run)
        print(f"{arguments.model}, {len(dense.indices)} images, dense {judge.hits(dense).double().mean():.2%}\n")
        print("| MAC ratio | method | setting | GMACs | top-1 | − dense, points | first method − this, points | p |")
        print("|---|---|---|---|---|---|---|---|")
        for ratio in arguments.ratio:
            first = None
            for name, make in METHODS.items():
                setting = solve(model, make, dense.macs.mean().item() / ratio)
                run(0, what=setting)
                found = judge.predict(model.at(setting).eval(), places, run)
                first = first or found
                row = score(setting, found, dense, judge)
                a, b = (judge.hits(p) for p in paired(first, found))
                gap, chance = bootstrap(a.double() - b.double()), mcnemar(a, b)
                rows.append({"ratio": ratio, "method": name, "gap": gap.three(), "p": chance, **row.to_dict()})
                cells = [f"{row.mac_ratio:.2f}", name, f"`{setting}`", f"{row.gmacs:.3f}", f"{row.top1.mean:.2%}"]
                cells += [points(row.delta), "" if found is first else points(gap), f"{chance:.2g}"]
                print("| " + " | ".join(cells) + " |", flush=True)
    if arguments.json:
        write_json(arguments.json, rows)


def points(interval) -> str:  # type: ignore[no-untyped-def]
    """``−1.2 [−2.5, +0.1]``, in points."""
    mean, low, high = (f"{100 * v:+.1f}".replace("-", "−") for v in interval.three())
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    main()
