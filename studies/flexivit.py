"""What a flexible patch size is worth: the claims of FlexiViT, at the scale of one processor.

Paper     FlexiViT, arXiv 2212.08013 (CVPR 2023). Its orderings are tested, not its numbers: data and scale differ.
Method    ViT-Tiny (AugReg, patch 16) to Caltech-101 at 160 px, two epochs, batch 32. Fixed: one patch size throughout.
          Flexible: one drawn in each step, the same images, steps and rates. Test top-1 on 2,893 images with 95 %
          intervals, differences paired over the images; each claim gets a number and a verdict.
Command   python studies/flexivit.py ../shared/data --out runs/flexivit [--seeds 0 1]
Cost      about two hours of one core for the first seed, one for each further one; interrupted runs go on
Measured  docs/results.md, "FlexiViT"
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

import torch
from jobs import logits, right, train_all
from safetensors.torch import load_file, save_file
from torch import Tensor

import saccade
from saccade.data import ImageSet, class_indices, open_images
from saccade.files import write_text
from saccade.measure.stats import bootstrap, proportion

SIZES = (10, 16, 20, 32, 40)  # patch sizes trained for: 256, 100, 64, 25 and 16 tokens
BEYOND = (80,)  # 4 tokens; seen by no run
BEGINNINGS = ("teacher-init", "random-init", "labels-random-init")
GRIDS = [f"grid({p})" for p in SIZES]
SIZED = ["model.size=160", "model.crop_pct=1.0"]
QUICK = [
    "data.holdout=0",
    "data.workers=0",
    "run.batch=32",
    "run.threads=1",
    "run.precision=bf16",
    "run.save_every=100",
]


def runs_of(data: Path, out: Path, seeds: list[int]) -> dict[str, list[str]]:
    """Every training run of the study: name -> arguments of ``saccade train``, in the order in which they matter."""
    weights = f"model.weights={data / 'vit_tiny_patch16_224.safetensors'}"
    caltech = [f"data.path={data / 'caltech160.zip'}", *QUICK, "run.epochs=2"]
    source = [weights, *SIZED]
    many = f"sampling.settings={GRIDS}"
    first = seeds[0]
    runs: dict[str, list[str]] = {}

    def fixed(p: int, seed: int) -> None:
        one = f"sampling.settings={[f'grid({p})']}"
        runs[f"fixed-{p}-{seed}"] = ["finetune", *source, *caltech, one, f"run.seed={seed}"]

    def flexible(seed: int) -> None:
        runs[f"flexible-{seed}"] = ["flexivit", *source, *caltech, many, f"run.seed={seed}"]

    flexible(first)
    for p in (32, 40, 16, 20):
        fixed(p, first)

    # flexible without labels, on other photos, from its own source as the teacher: what §4.2 starts from
    teacher = f"distill.teacher_weights={data / 'vit_tiny_patch16_224.safetensors'}"
    nette = [f"data.path={data / 'nette160.zip'}", *QUICK, "run.epochs=3"]
    runs["pretrained"] = ["flexivit_distill", *source, *nette, teacher, many, "augment.mixup=0.0"]
    coarse = [*caltech, "sampling.settings=['grid(32)']"]
    for seed in seeds:
        runs[f"coarse-{seed}"] = [
            "flexivit_coarse", f"model.name={out / 'pretrained' / 'model'}", *coarse, f"run.seed={seed}"
        ]  # fmt: skip

    fixed(10, first)
    # one teacher, three ways to begin
    taught = [*SIZED, *caltech, many, "run.epochs=1", "augment.mixup=0.0", "optim.lr=2e-4", "optim.head=5.0"]
    opinion = ["distill.weight=1.0", f"distill.teacher={out / f'fixed-16-{first}' / 'model'}"]
    args = "model.args={num_classes=101, img_size=160}"
    runs["teacher-init"] = ["flexivit_distill", *taught, *opinion, args, "distill.init=true"]
    runs["random-init"] = ["flexivit_distill", *taught, *opinion, args, "distill.init=false"]
    runs["labels-random-init"] = ["flexivit", *taught, args]

    # large to small patches against the small one throughout: more steps, the same MACs
    small = "sampling.settings=['grid(40)', 'grid(32)', 'grid(20)', 'grid(16)']"
    knots = (
        "sampling.weights=[{at=0.0, weights=[1,0,0,0]}, {at=0.3, weights=[0,1,1,0]}, {at=0.5, weights=[0,0,1,1]}, "
        "{at=0.65, weights=[0,0,0,1]}]"
    )
    runs["curriculum"] = ["flexivit_curriculum", *source, *caltech, small, knots, "run.epochs=2.86"]
    for seed in seeds[1:]:
        flexible(seed)
        for p in (32, 40, 16, 20, 10):
            fixed(p, seed)
    # what was tried where one model at the price of one fell short of five: twice the price
    runs["flexible-long"] = ["flexivit", *source, *caltech, many, "run.epochs=4"]
    return runs


class Tests:
    """Logits of finished runs on the test images, each computed once and kept."""

    def __init__(self, out: Path, images: ImageSet) -> None:
        self.out, self.images, self.file = out, images, out / "logits.safetensors"
        self.seen = load_file(self.file) if self.file.exists() else {}
        self.models: dict[str, saccade.AdaptiveViT] = {}

    def model(self, run: str) -> saccade.AdaptiveViT:
        if run not in self.models:
            self.models[run] = saccade.load(self.out / run / "model")
        return self.models[run]

    def logits(self, run: str, setting: str) -> Tensor:
        key = f"{run}|{setting}"
        if key not in self.seen:
            self.seen[key] = logits(self.model(run), setting, self.images).half()
            save_file(self.seen, self.file)
        return self.seen[key].float()

    def hits(self, run: str, setting: str) -> Tensor:
        return right(self.logits(run, setting), self.model(run), self.images)

    def gmacs(self, run: str, setting: str) -> float:
        view = self.model(run).at(setting)
        with torch.inference_mode():
            return view(torch.zeros(1, 3, *view.input_size())).trace.macs().item() / 1e9


@dataclass(frozen=True)
class Claim:
    """What is said, the difference in points that decides it, and how far below zero it may be."""

    text: str
    difference: Tensor  # [n] paired differences, positive where the claim is right
    slack: float = 0.0

    def row(self) -> list[str]:
        found = bootstrap(self.difference)
        mean, low, high = (100 * v for v in found.three())
        verdict = "holds" if low > -self.slack else "does not hold" if high < -self.slack else "not decided"
        return [self.text, f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", verdict]


def claims_of(tests: Tests, seeds: list[int]) -> list[Claim]:
    """The paper's orderings, each as a paired difference over the test images (means over the seeds there are)."""

    def mean(run: str, setting: str) -> Tensor:
        return torch.stack([tests.hits(f"{run}-{seed}", setting) for seed in seeds]).mean(0)

    found = []
    off = [p for p in SIZES if p != 16]
    for p in off:
        found.append(Claim(f"a model of patch 16 falls by 15 points or more at {p}",
                           mean("fixed-16", "grid(16)") - mean("fixed-16", f"grid({p})") - 0.15))  # fmt: skip
    for p in SIZES:
        text = f"at {p}, flexible is within 1 point of the model trained for {p} alone"
        found.append(Claim(text, mean("flexible", f"grid({p})") - mean(f"fixed-{p}", f"grid({p})"), 0.01))
    first = seeds[0]
    for p in SIZES:
        text = f"at {p}, flexible with twice the steps is within 1 point of the model trained for {p} alone"
        each = tests.hits("flexible-long", f"grid({p})") - tests.hits(f"fixed-{p}-{first}", f"grid({p})")
        found.append(Claim(text, each, 0.01))
    for fine, coarse in pairwise(SIZES):
        found.append(Claim(f"flexible: patch {fine} is at least as good as {coarse}",
                           mean("flexible", f"grid({fine})") - mean("flexible", f"grid({coarse})")))  # fmt: skip
    for p in off:
        for better, worse in pairwise(("pi", "area", "vanilla")):
            found.append(Claim(f"a model of patch 16, run at {p}: {better} ≥ {worse}",
                               tests.hits(f"fixed-16-{first}", resized(p, better))
                               - tests.hits(f"fixed-16-{first}", resized(p, worse))))  # fmt: skip
    average = {run: torch.stack([tests.hits(run, g) for g in GRIDS]).mean(0) for run in BEGINNINGS}
    for better, worse in pairwise(BEGINNINGS):
        found.append(Claim(f"mean over the sizes: {better} > {worse}", average[better] - average[worse]))
    for p in (20, 16, 10):
        for run, what in (("coarse", "flexible"), ("fixed-32", "fixed")):
            gain = mean(run, f"grid({p})") - mean(run, "grid(32)")
            text = f"fine-tuned at 32, deployed at {p}: a {what} model {'gains' if run == 'coarse' else 'loses'}"
            found.append(Claim(text, gain if run == "coarse" else -gain))
    found.append(Claim("large patches first, at equal MACs, is as good as patch 16 throughout",
                       tests.hits("curriculum", "grid(16)") - tests.hits(f"fixed-16-{first}", "grid(16)")))  # fmt: skip
    return found + ensembles(tests, f"flexible-{first}")


def ensembles(tests: Tests, run: str) -> list[Claim]:
    """Averaging sizes against the best single size that costs no more."""
    cost = {g: tests.gmacs(run, g) for g in GRIDS}
    labels = torch.tensor(class_indices(tests.images, tests.model(run).vit.num_classes))
    found = []
    for pair in combinations(GRIDS, 2):
        total = sum(cost[g] for g in pair)
        single = max((g for g in GRIDS if cost[g] <= total), key=lambda g: cost[g])
        shares = torch.stack([tests.logits(run, g).softmax(-1) for g in pair]).mean(0)
        together = (shares.argmax(-1) == labels).double()
        text = f"{single} alone ({cost[single]:.2f} GMACs) ≥ {' and '.join(pair)} averaged ({total:.2f} GMACs)"
        found.append(Claim(text, tests.hits(run, single) - together))
    return found


def resized(patch: int, how: str) -> str:
    """The setting of a patch size reached by one of the paper's ways to resize a kernel."""
    return f"grid({patch})" if how == "pi" else f"grid({patch}, how={how!r})"


def accuracies(tests: Tests, seeds: list[int]) -> list[list[str]]:
    """Rows: models; columns: patch sizes. Sizes that no model was trained for are the last ones."""
    runs = [*(f"flexible-{s}" for s in seeds), "flexible-long", *(f"fixed-{p}-{s}" for p in SIZES for s in seeds)]
    rows = []
    for run in [*runs, *(f"coarse-{s}" for s in seeds), *BEGINNINGS, "curriculum"]:
        cells = [proportion(tests.hits(run, f"grid({p})").bool()) for p in (*SIZES, *BEYOND)]
        rows.append([run, *(f"{100 * c.mean:.1f} ±{50 * (c.high - c.low):.1f}" for c in cells)])
    return rows


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with caltech160.zip, nette160.zip and the weights")
    parser.add_argument("--out", type=Path, default=Path("runs/flexivit"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    train_all(runs_of(arguments.data, arguments.out, arguments.seeds), arguments.out, arguments.at_once)

    tests = Tests(arguments.out, open_images(arguments.data / "caltech160.zip", "test"))
    sizes = [f"grid({p})" for p in (*SIZES, *BEYOND)]
    costs = ["GMACs", *(f"{tests.gmacs('flexible-long', g):.2f}" for g in sizes)]
    claims = [claim.row() for claim in claims_of(tests, arguments.seeds)]
    text = [table(["top-1, %", *sizes], [costs, *accuracies(tests, arguments.seeds)])]
    text.append(table(["claim", "difference, points", "verdict"], claims))
    write_text(arguments.out / "flexivit.md", "\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
