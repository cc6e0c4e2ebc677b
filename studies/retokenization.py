"""Does re-tokenization beat pruning, merging and random dropping at equal MACs, without training?

Claim     ImagePiece (arXiv 2412.16491), Tables 1-2: merging inattentive tokens and judging again beats EViT and ToMe.
          The paper trains 300 epochs with a convolutional stem; here the same reduction runs training-free.
Method    Every method's one knob is solved so that its executed MACs meet the ratio to about one percent. Top-1 on the
          photos of DATA, paired differences, 95 % intervals over them.
Command   python studies/retokenization.py vit_tiny_patch16_224 inval227_dev.zip
          --weights vit_tiny_patch16_224.safetensors; the same with nette160.zip --limit 500
Cost      an estimate: 10 minutes of one core; five settings for each ratio, and the dense model, once over the photos
Measured  docs/results.md
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jobs import nearest, parser_of, points

import saccade
from saccade.data import open_images
from saccade.evaluation.accuracy import paired, score, spread
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.stats import bootstrap, mcnemar
from saccade.storage.files import write_json
from saccade.terminal.progress import Progress

METHODS: dict[str, Callable[[float], str]] = {  # one knob each, from 0 (most) to 1 (least reduction)
    "re-tokenize, then prune": lambda k: f"imagepiece(keep={k:.3f})",
    "prune (EViT)": lambda k: f"evit({k:.3f})",
    "prune, fuse the rest": lambda k: f"evit({k:.3f}, fuse=True)",
    "merge (ToMe)": lambda k: merging(k),
    "random": lambda k: f"random({k:.3f})",
}


def merging(k: float, blocks: int = 12, most: int = 24) -> str:
    """ToMe with r per block that may differ by one, so that any number of tokens in all can be merged away."""
    total = round((1 - k) * most * blocks)
    return f"tome(r={tuple(total // blocks + (i < total % blocks) for i in range(blocks))})"


def main() -> None:
    """Print the table of each ratio, and the paired differences to the first method."""
    parser = parser_of(__doc__, "runs/retokenization", "model", "data")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--ratio", type=float, nargs="+", default=[1.5, 1.8, 2.2])
    parser.add_argument("--limit", type=int)
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
                setting = nearest(model, make, dense.macs.mean().item() / ratio, low=0.01, steps=12)
                run(0, what=setting)
                found = judge.predict(model.at(setting).eval(), places, run)
                first = first or found
                row = score(setting, found, dense, judge)
                assert row.delta is not None  # photos with labels
                a, b = (judge.hits(p) for p in paired(first, found))
                gap, p_value = bootstrap(a.double() - b.double()), mcnemar(a, b)
                rows.append({"ratio": ratio, "method": name, "gap": gap.three(), "p": p_value, **row.to_dict()})
                cells = [f"{row.mac_ratio:.2f}", name, f"`{setting}`", f"{row.gmacs:.3f}", f"{row.value.mean:.2%}"]
                cells += [points(row.delta), "" if found is first else points(gap), f"{p_value:.2g}"]
                print("| " + " | ".join(cells) + " |", flush=True)
    write_json(arguments.out / f"{Path(arguments.data).stem}.json", rows)


if __name__ == "__main__":
    main()
