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

from itertools import combinations, pairwise
from pathlib import Path

import torch
from jobs import TRAINED, Claim, Memory, labels, logits, parser_of, right, table, train_all
from torch import Tensor

import saccade
from saccade.data import ImageSet, open_images
from saccade.evaluation.accuracy import spread
from saccade.evaluation.stats import proportion
from saccade.storage.files import write_text

SIZES = (10, 16, 20, 32, 40)  # patch sizes trained for: 256, 100, 64, 25 and 16 tokens
BEYOND = (80,)  # 4 tokens; seen by no run
BEGINNINGS = ("teacher-init", "random-init", "labels-random-init")
GRIDS = [f"grid({p})" for p in SIZES]
SIZED = ["model.size=160", "model.crop_pct=1.0"]
QUICK = [*TRAINED, "run.save_every=100"]


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
    distilled = ["distill.weight=1.0", f"distill.teacher={out / f'fixed-16-{first}' / 'model'}"]
    args = "model.args={num_classes=101, img_size=160}"
    runs["teacher-init"] = ["flexivit_distill", *taught, *distilled, args, "distill.init=true"]
    runs["random-init"] = ["flexivit_distill", *taught, *distilled, args, "distill.init=false"]
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

    def __init__(self, out: Path, images: ImageSet, limit: int | None) -> None:
        self.out, self.images, self.places = out, images, spread(len(images), limit)
        self.seen = Memory(out / f"logits{limit or ''}.safetensors")
        self.models: dict[str, saccade.AdaptiveViT] = {}

    def there(self, *runs: str) -> bool:
        return all((self.out / run / "model").is_dir() for run in runs)

    def model(self, run: str) -> saccade.AdaptiveViT:
        if run not in self.models:
            self.models[run] = saccade.load(self.out / run / "model")
        return self.models[run]

    def logits(self, run: str, setting: str) -> Tensor:
        def make() -> Tensor:
            return logits(self.model(run), setting, self.images, self.places).half()

        return self.seen(f"{run}|{setting}", make).float()

    def hits(self, run: str, setting: str) -> Tensor:
        return self.right(run, self.logits(run, setting))

    def right(self, run: str, logits: Tensor) -> Tensor:
        """Whether the highest of the logits [n, K] is the label's, [n] float64."""
        return right(logits, labels(self.model(run), self.images, self.places))

    def gmacs(self, run: str, setting: str) -> float:
        view = self.model(run).at(setting)
        with torch.inference_mode():
            return view(torch.zeros(1, 3, *view.input_size())).trace.macs().item() / 1e9


def claims_of(tests: Tests, seeds: list[int]) -> list[Claim]:
    """The paper's orderings, each as a paired difference over the test images; of all seeds that have been run."""
    hits, first, found = tests.hits, seeds[0], []

    def claim(text: str, a: str, at: str, b: str, bt: str, slack: float = 0.0, less: float = 0.0) -> None:
        """Run ``a`` under ``at`` against run ``b`` under ``bt``; ``<seed>`` in their names stands for each seed."""
        pairs = [(a.replace("<seed>", str(s)), b.replace("<seed>", str(s))) for s in seeds]
        pairs = [pair for pair in dict.fromkeys(pairs) if tests.there(*pair)] or pairs[:1]

        def difference() -> Tensor:
            return torch.stack([hits(one, at) - hits(two, bt) for one, two in pairs]).mean(0) - less

        found.append(Claim(text, tuple(run for pair in pairs for run in pair), difference, slack))

    off = [p for p in SIZES if p != 16]
    for p in off:
        text = f"a model of patch 16 falls by 15 points or more at {p}"
        claim(text, "fixed-16-<seed>", "grid(16)", "fixed-16-<seed>", f"grid({p})", less=0.15)
    for run, what in (("flexible-<seed>", "flexible"), ("flexible-long", "flexible with twice the steps")):
        for p in SIZES:
            text = f"at {p}, {what} is within 1 point of the model trained for {p} alone"
            other = f"fixed-{p}-{'<seed>' if '<seed>' in run else first}"
            claim(text, run, f"grid({p})", other, f"grid({p})", slack=0.01)
    for fine, coarse in pairwise(SIZES):
        text = f"flexible: patch {fine} is at least as good as {coarse}"
        claim(text, "flexible-<seed>", f"grid({fine})", "flexible-<seed>", f"grid({coarse})")
    for p in off:
        for better, worse in pairwise(("pi", "area", "vanilla")):
            text, run = f"a model of patch 16, run at {p}: {better} ≥ {worse}", f"fixed-16-{first}"
            claim(text, run, resized(p, better), run, resized(p, worse))
            if p > 16:  # as in the paper: as many tokens as at 16, from an image that is as much larger as the patch
                size = 160 * p // 16
                text = f"the same at {p} with the image enlarged to {size}: {better} ≥ {worse}"
                claim(text, run, resized(p, better, size), run, resized(p, worse, size))
    for p in BEYOND:  # seen by no run
        near = f"grid({SIZES[-1]})"
        claim(f"at {p}: flexible > fixed-16", "flexible-<seed>", f"grid({p})", "fixed-16-<seed>", f"grid({p})")
        claim(f"flexible: {p} < {SIZES[-1]}", "flexible-<seed>", near, "flexible-<seed>", f"grid({p})")
    for better, worse in pairwise(BEGINNINGS):
        for p in (16, 32):
            claim(f"at {p}: {better} > {worse}", better, f"grid({p})", worse, f"grid({p})")
    for p in (20, 16, 10):
        own, large = f"grid({p})", "grid(32)"
        claim(f"fine-tuned at 32, deployed at {p}: flexible gains", "coarse-<seed>", own, "coarse-<seed>", large)
        claim(f"fine-tuned at 32, deployed at {p}: fixed loses", "fixed-32-<seed>", large, "fixed-32-<seed>", own)
    text = "large patches first, at equal MACs, is as good as patch 16 throughout"
    claim(text, "curriculum", "grid(16)", f"fixed-16-{first}", "grid(16)")
    return found + ensembles(tests, f"flexible-{first}")


def ensembles(tests: Tests, run: str) -> list[Claim]:
    """Averaging sizes against the best single size that costs no more."""
    cost = {g: tests.gmacs(run, g) for g in GRIDS}
    found = []
    for pair in combinations(GRIDS, 2):
        total = sum(cost[g] for g in pair)
        single = max((g for g in GRIDS if cost[g] <= total), key=lambda g: cost[g])

        def difference(pair: tuple[str, ...] = pair, single: str = single) -> Tensor:
            shares = torch.stack([tests.logits(run, g).softmax(-1) for g in pair]).mean(0)
            return tests.hits(run, single) - tests.right(run, shares)

        text = f"{single} alone ({cost[single]:.2f} GMACs) ≥ {' and '.join(pair)} averaged ({total:.2f} GMACs)"
        found.append(Claim(text, (run,), difference))
    return found


def resized(patch: int, how: str, size: int | None = None) -> str:
    """The setting of a patch size reached by one of the paper's ways to resize a kernel, on images of a size in px."""
    more = (f", how={how!r}" if how != "pi" else "") + (f", size={size}" if size else "")
    return f"grid({patch}{more})"


def accuracies(tests: Tests, seeds: list[int]) -> list[list[str]]:
    """Rows: models; columns: patch sizes, the last of which no model was trained for."""
    named = ["flexible-<seed>", "flexible-long", *(f"fixed-{p}-<seed>" for p in SIZES), "coarse-<seed>"]
    rows = []
    for name in named:
        runs = [run for run in dict.fromkeys(name.replace("<seed>", str(s)) for s in seeds) if tests.there(run)]
        if runs:
            cells = [
                proportion(torch.cat([tests.hits(run, f"grid({p})") for run in runs]).bool()) for p in (*SIZES, *BEYOND)
            ]
            rows.append([name.replace("-<seed>", f" ({len(runs)})"), *(f"{100 * c.mean:.1f}" for c in cells)])
    return rows


def main() -> None:
    parser = parser_of(__doc__, "runs/flexivit")
    parser.add_argument("data", type=Path, help="folder with caltech160.zip, nette160.zip and the weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--limit", type=int, help="test so many images, evenly spread")
    parser.add_argument("--no-training", action="store_true", help="test the runs that are there")
    given = parser.parse_args()
    if not given.no_training:
        train_all(runs_of(given.data, given.out, given.seeds), given.out, given.at_once)

    tests = Tests(given.out, open_images(given.data / "caltech160.zip", "test"), given.limit)
    sizes = [f"grid({p})" for p in (*SIZES, *BEYOND)]
    costs = ["GMACs", *(f"{tests.gmacs(f'flexible-{given.seeds[0]}', g):.2f}" for g in sizes)]
    claims = [claim.row(tests.there) for claim in claims_of(tests, given.seeds)]
    text = [table(["top-1, %", *sizes], [costs, *accuracies(tests, given.seeds)])]
    text.append(table(["claim", "difference, points", "verdict"], claims))
    write_text(given.out / "flexivit.md", "\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
