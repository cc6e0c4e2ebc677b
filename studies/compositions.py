"""Is a chain of methods better than each of its parts alone, at the same compute?

Claim     Regions, merging, pruning and gates answer different questions (docs/architecture.md): mild doses of several
          should lose less than a strong dose of one. No paper says so of quadtree (arXiv 2304.00287), imagepiece
          (2412.16491) and evit (2202.07800), or of grid (2212.08013), tome (2210.09461) and adavit (2111.15668).
Method    DENSE: ViT-Tiny (AugReg), fine-tuned to Caltech-101 at 160 px, where a grid has 100 tokens (studies/adavit.py
          makes it). From there half an epoch for each chain and each part, at the middle one of three budgets of MACs,
          2.0 to 2.7 times below dense: the same images, steps and rates. Each model is tested at all three: strengths
          are solved, adavit's thresholds found on training images. Gates learn for twice as long, as in
          studies/adavit.py, in favour of what has them. Top-1 on the 2,893 test images with the MACs that ran;
          differences, paired, 95 % intervals, to each part read off its line at the chain's own MACs. One seed. The
          best part is chosen on the same images, which is kind to it.
Command   python studies/compositions.py caltech160.zip DENSE --out runs/compositions
Cost      an estimate: 25 minutes of one core; interrupted runs go on
Expected  each chain ≥ its best part
Measured  docs/results-imagepiece.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from jobs import (
    TRAINED,
    Memory,
    answers,
    between,
    labels,
    level,
    nearest,
    parser_of,
    points,
    right,
    show,
    train_all,
    verdict,
)
from torch import Tensor

import saccade
from saccade.data import Preprocess, open_images
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.evaluation.calibrate import calibrate
from saccade.evaluation.candidates import price
from saccade.evaluation.stats import bootstrap
from saccade.storage.files import write_json

GOALS = (0.205, 0.24, 0.28)  # 10^9 MACs; trained at the middle one
TUNE = 96  # training images that thresholds are found on


def mosaic(k: float) -> str:
    """From 25 to 100 patches of 16 and 32 px on 160."""
    return f'quadtree({25 + 3 * round(25 * k)}, sizes=(16, 32), scorer="entropy")'


STATIC: dict[str, Callable[[float], str]] = {  # more MACs with more of k, which is between 0 and 1
    "quadtree-imagepiece-evit": lambda k: f"{mosaic(k)} | imagepiece() | evit(0.8)",
    "quadtree-imagepiece": lambda k: f"{mosaic(k)} | imagepiece()",
    "quadtree": mosaic,
    "imagepiece": lambda k: f"imagepiece(p={1 - 0.9 * k:.3f}, merge={(1 - 0.9 * k) / 2:.4f})",
    "evit": lambda k: f"evit({max(k, 0.01):.3f})",
    "grid-tome": lambda k: f"grid(20) | tome(r={round(12 * (1 - k))})",
    "grid": lambda k: ("grid(27)", "grid((23, 27))", "grid(23)", "grid(20)")[min(int(4 * k), 3)],  # 36, 42, 49, 64
    "tome": lambda k: f"tome(r={round(24 * (1 - k))})",
}
GATED = {  # what stands before adavit, and the weight of its budget, which pulls less the less there is to save
    "grid-tome-adavit": ("grid(20) | tome(r=2) | ", 100),
    "adavit": ("", 10),
}
STEPS = ((0.5, 1.0), (0.75, 0.5), (1.0, 0.25))  # shares of what is to be saved, that training goes through; noise
CHAINS = {
    "quadtree-imagepiece-evit": ("quadtree", "imagepiece", "evit", "quadtree-imagepiece"),
    "grid-tome-adavit": ("grid", "tome", "adavit", "grid-tome"),
    "quadtree-imagepiece": ("quadtree", "imagepiece"),
    "grid-tome": ("grid", "tome"),
}
Mark = tuple[float, Tensor]  # 10^9 MACs, mean of the images; whether each image is classified rightly


def main() -> None:
    parser = parser_of(__doc__, "runs/compositions", "data")
    parser.add_argument("dense", help="folder of the dense model")
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--limit", type=int, help="test images; default: all")
    parser.add_argument("--report", action="store_true", help="only from the runs that are finished")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dense = saccade.load(arguments.dense, "dense")
    settings = {name: [nearest(dense, make, goal * 1e9) for goal in GOALS] for name, make in STATIC.items()}
    runs = {name: annealed(dense, name, 2 * arguments.epochs) for name in GATED}
    runs |= {name: [f"sampling.settings={json.dumps([own[1]])}"] for name, own in settings.items()}
    common = [*TRAINED, "data.cache_gb=0", "optim.lr=1e-4", "optim.head=1", "run.save_every=45"]
    common += [f"data.path={arguments.data}", f"model.name={arguments.dense}", f"run.epochs={arguments.epochs}"]
    if not arguments.report:
        train_all({name: ["finetune", *common, *own] for name, own in runs.items()}, arguments.out, 1)
    asked = Asked(arguments.out, Path(arguments.dense), arguments.data, arguments.limit)
    there = [name for name in runs if (arguments.out / name / "model").is_dir()]
    known = {name: settings.get(name) or asked.calibrated(name, gated(dense, name)) for name in there}
    known = {"dense": ["dense"], **known}
    report(arguments.out, {n: {s: asked(n, s) for s in dict.fromkeys(own)} for n, own in known.items()})


def gated(dense: saccade.AdaptiveViT, name: str, part: float = 1.0, noise: str = "") -> str:
    """A setting whose adavit is held to a part of the way from everything to the middle budget."""
    before, weight = GATED[name]
    saved = 1 - GOALS[1] * 1e9 / price(dense, before.removesuffix(" | ") or "dense")
    return f"{before}adavit(share={1 - part * saved:.4f}, tau=1.0, weight={weight}{noise})"


def annealed(dense: saccade.AdaptiveViT, name: str, epochs: float) -> list[str]:
    """Budget and noise shrink to their ends over the first half of the steps; gates learn faster, and first."""
    settings = [gated(dense, name, part, f", noise={noise}") for part, noise in STEPS]
    rows = torch.eye(len(settings), dtype=torch.int64).tolist()
    knots = [f"{{at={0.5 * i / (len(rows) - 1)}, weights={row}}}" for i, row in enumerate(rows)]
    knots.append(f"{{at=1.0, weights={rows[-1]}}}")
    told = [f"sampling.settings={json.dumps(settings)}", f"sampling.weights=[{', '.join(knots)}]"]
    return [*told, "optim.methods=50", f"optim.freeze={0.1 * epochs}", f"run.epochs={epochs}"]


class Asked:
    """Whether a run's model, under a setting, is right on each test image, and what it ran; remembered in files."""

    def __init__(self, out: Path, dense: Path, data: str, limit: int | None) -> None:
        self.out, self.dense, self.data, self.images = out, dense, data, open_images(data, "test")
        self.places = spread(len(self.images), limit)
        self.memory = Memory(out / "hits.safetensors")

    def model(self, run: str) -> saccade.AdaptiveViT:
        return saccade.load(self.dense if run == "dense" else self.out / run / "model", "dense")

    def __call__(self, run: str, setting: str) -> Mark:
        key = f"{run}|{setting}|{len(self.places)}"

        def make() -> dict[str, Tensor]:
            view = self.model(run).at(setting).eval()
            logits, macs = answers(view, self.images, self.places, Preprocess.of(view.vit))
            hits = right(logits, labels(view, self.images, self.places))
            print(f"{key}: {hits.mean():.2%}", file=sys.stderr, flush=True)
            return {"hits": hits, "macs": macs}

        found = self.memory.all({"hits": key, "macs": f"{key}|macs"}, make)
        return found["macs"].mean().item() / 1e9, found["hits"]

    def calibrated(self, run: str, setting: str) -> list[str]:
        """The setting at the thresholds where its mean MACs on training images meet ``GOALS``, where they can."""
        found, cache = [], self.out / "cache"
        for goal in GOALS:
            with suppress(UserError):  # no threshold makes it so cheap
                own = calibrate(self.model(run), self.data, setting, goal, split="train", limit=TUNE, cache=cache)
                found.append(own.setting)
        return found or [setting]


def at_macs(marks: Sequence[Mark], goal: float) -> Tensor:
    """Hits at so many MACs, on the line between the two marks next to it."""
    return torch.stack([share * hits for share, hits in between(marks, goal)]).sum(0)


def report(out: Path, marks: dict[str, dict[str, Mark]]) -> None:
    """Print the tables and verdicts of what is there, and write them as JSON."""
    rows = [
        {"method": name, "setting": f"`{setting}`", "GMACs": f"{ran:.3f}", "top-1": level(hits)}
        for name, own in marks.items()
        for setting, (ran, hits) in own.items()
    ]
    tables = {"Every model at three budgets": rows}
    for chain, parts in CHAINS.items():
        claims = []
        for ran, hits in sorted(marks.get(chain, {}).values(), key=lambda mark: mark[0]):
            others = {p: at_macs([*marks[p].values(), marks["dense"]["dense"]], ran) for p in parts if p in marks}
            alone = [part for part in others if "-" not in part]
            best = max(alone, key=lambda part: float(others[part].mean()), default=None)
            for part in others:
                gap = bootstrap(hits - others[part])
                words = {"at GMACs": f"{ran:.3f}", "claim": f"> {part}" + (", the best part" if part == best else "")}
                claims.append({**words, "points": points(gap), "verdict": verdict(gap)})
        if claims:
            tables[f"{chain} against its parts, at its own MACs"] = claims
    write_json(out / "compositions.json", tables)
    for title, table in tables.items():
        show(title, table)


if __name__ == "__main__":
    main()
