"""Is a detector that was trained at random patch sizes as good at each as one that was trained at one?

Claim     FlexiViT (arXiv 2212.08013) §5.3: OWL-ViT (arXiv 2205.06230) trained at random patch sizes is at least as good
          as at a fixed one, at every size; and the size can be chosen when it is used.
Method    The built-in model with OWL-ViT's heads and a small text tower, on the built-in scenes: one object each, its
          class one of ten words. Trained at patches of 12, 16, 20 or 32 pixels, one drawn each step, and at 16 alone:
          the same images, steps and rates. COCO's average precision on test scenes, by patch size; 95 % intervals from
          the spread over ten groups of images, for differences too (the same groups).
Command   python studies/detection.py --out runs/detection
Cost      about 15 minutes of one core
Expected  within the interval at 16; ahead everywhere else.
Measured  docs/results.md, "Detection at any patch size"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from jobs import PRECISION, parser_of, train_all, write
from safetensors.torch import load_file

import saccade
from saccade.data import Loaders
from saccade.evaluation.accuracy import spread
from saccade.evaluation.stats import Interval
from saccade.storage.files import write_json
from saccade.tasks.detection.average_precision import average_precision, find, truths, with_spread
from saccade.tasks.detection.detection_data import open_boxes
from saccade.tasks.detection.detector import Found, squashed

TRAINED = (12, 16, 20, 32)
TESTED = (10, 12, 16, 20, 24, 32)
FIXED = 16
TOP = 20
Of = Callable[[Sequence[int]], float]  # a number of the images at some places, which are a range


def main() -> None:
    parser = parser_of(__doc__, "runs/detection")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=2000, help="test scenes")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    out: Path = arguments.out

    common = ["detect", f"run.steps={arguments.steps}", "data.holdout=0", "data.workers=0", "run.threads=1"]
    common += [f"run.precision={PRECISION}", "run.save_every=100"]
    sizes = {"random": list(TRAINED), "fixed": [FIXED]}
    runs = {name: [*common, f"sampling.settings={[f'grid({p})' for p in patches]}"] for name, patches in sizes.items()}
    train_all(runs, out, arguments.at_once)

    boxes = open_boxes("scenes", "test")
    places = spread(len(boxes), arguments.images)
    there, loaders = truths([boxes.objects[i] for i in places]), Loaders(boxes.images)

    def found(run: str, patch: int) -> tuple[list[Found], float]:
        """Detections of all test scenes, and 10^9 MACs per image; made once."""
        file = out / f"{run}-{patch}-{len(places)}.safetensors"
        if not file.exists():
            view = saccade.load(out / run / "model", f"grid({patch})").eval()
            each, seen, gmacs = find(view, loaders.of(squashed(view)), boxes.classes, places, 50, TOP)  # type: ignore[arg-type]
            assert seen == places
            kept = {name: torch.stack([f[name] for f in each]) for name in each[0]}
            write({**kept, "gmacs": torch.tensor(gmacs, dtype=torch.float64)}, file)
        kept = load_file(file)
        gmacs = kept.pop("gmacs").item()
        return [{name: rows[i] for name, rows in kept.items()} for i in range(len(places))], gmacs

    rows = []
    for patch in TESTED:
        (random, gmacs), (fixed, _) = found("random", patch), found("fixed", patch)
        ap = {name: _cached(each, there) for name, each in (("random", random), ("fixed", fixed))}
        rows.append(
            {
                "patch": patch,
                "GMACs": gmacs,
                "random sizes": with_spread(ap["random"], len(places)),
                f"fixed {FIXED}": with_spread(ap["fixed"], len(places)),
                "difference": with_spread(_apart(ap["random"], ap["fixed"]), len(places)),
                "AP50": (average_precision(random, there)["ap50"], average_precision(fixed, there)["ap50"]),
            }
        )
        show([rows[-1]], head=len(rows) == 1)
    plain = [{k: vars(v) if isinstance(v, Interval) else v for k, v in row.items()} for row in rows]
    write_json(out / "detection.json", plain)


def _cached(each: Sequence[Found], there: Sequence[Found]) -> Of:
    """AP of the images at some places, in points; every group is asked for twice."""

    @cache
    def of(places: Sequence[int]) -> float:
        return 100 * average_precision([each[i] for i in places], [there[i] for i in places])["ap"]

    return of


def _apart(a: Of, b: Of) -> Of:
    """The difference of two numbers of the same places."""
    return lambda places: a(places) - b(places)


def show(rows: list[dict], head: bool) -> None:
    """Rows of a Markdown table."""
    if head:
        print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        cells = []
        for name, value in row.items():
            if isinstance(value, Interval):
                sign = "+" if name == "difference" else ""
                mean, low, high = (f"{v:{sign}.1f}" for v in value.three())
                value = f"{mean} [{low}, {high}]"
            elif isinstance(value, tuple):
                value = " / ".join(f"{100 * v:.1f}" for v in value)
            cells.append(f"{value:.3f}" if isinstance(value, float) else str(value))
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
