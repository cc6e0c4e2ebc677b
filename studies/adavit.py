"""Is what AdaViT learns to leave out better than random gates, and better than fixed counts, when skipping is real?

Paper     AdaViT, arXiv 2111.15668 (CVPR 2022), beside EViT 2202.07800, IdleViT's top-k 2310.05654 and DynamicViT
          2106.02034. The published AdaViT computes everything; here MACs are those that ran. Orderings are tested, not
          numbers: data and scale differ.
Claims    1. At half of the dense model's MACs: dense ≥ AdaViT > Random+ (trained with random gates) > Random.
          2. Training meets what it is held to: usage within 0.03 on each axis, MACs within 3 %.
          3. Deciding on patches, heads and branches beats one axis alone; full head deactivation against partial.
          4. EViT, top-k and DynamicViT at the same MACs, and at the same measured time, against AdaViT.
          5. Images that the dense model finds hard cost more; a threshold per image is as good as fixed counts.
Method    ViT-Tiny (AugReg) to Caltech-101 at 160 px, two epochs dense; from there one more (--epochs) for every
          method, the same images, steps and backbone rate. Thresholds are found on training images, so that the mean
          cost is half; the rest is measured on the 2,893 test images, differences paired over them, 95 % intervals.
Command   python studies/adavit.py caltech160.zip vit_tiny_patch16_224.safetensors --out runs/adavit
Cost      an hour and a half of one core, most of it masked training, which skips nothing; interrupted runs go on.
          The stages train, test, time and report can be run by themselves (--stage); time wants a quiet machine.
          --stage places: by block and axis, what runs, and whether that goes with the dense model's loss.
Expected  1, 2 and 5 hold; EViT is not worse than AdaViT (published for DeiT-S at 2.3 GMACs: 78.5 against 77.3).
Measured  docs/results-adavit.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jobs import BATCH, RATE, TRAINED, Memory, autocast, labels, loader_of, parser_of, points, train_all
from torch import Tensor

import saccade
from saccade.core.gates import Gates
from saccade.data import Loader, Preprocess, open_images
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.evaluation.calibrate import bisect, by_count, fixed_levels, logit, sigmoid, with_threshold
from saccade.evaluation.stats import bootstrap, rank_correlation
from saccade.runners.allocator import steady_allocator
from saccade.storage.files import write_json, write_text

SHARE = 0.5  # of the dense model's executed MACs
USAGE = 0.7  # of each axis, where training is held to that and not to MACs
LEARN = "tau=1.0, weight=10.0"
STEPS = ((1.5, 1.0), (1.2, 0.5), (1.0, 0.25))  # budgets that training goes through, as multiples of the last; noise
TUNE = 160  # training images that thresholds are found on
TIMED = 32  # images of a batch
KEEPS = (0.3, 0.5, 0.7)  # at which rivals are timed, to find AdaViT's time between them
RIVALS = ("evit", "topk", "dynamicvit")
GATED = ("patches", "heads", "attention", "MLP")
AXES = {"patch": "patches alone", "block": "branches alone"}


class Study:
    """Runs, the settings at half of the MACs, and what each model said of each test image."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.data, self.weights, self.out = arguments.data, arguments.weights, arguments.out
        self.epochs, self.at_once, self.limit = arguments.epochs, arguments.at_once, arguments.limit
        self.dense_epochs = arguments.dense_epochs
        self.only, self.seed = arguments.runs, arguments.seed
        self.seen = Memory(self.out / "seen.safetensors")
        self.images = {split: open_images(self.data, split) for split in ("train", "test")}

    # --- training ---------------------------------------------------------------------------------------------------

    def common(self) -> list[str]:
        """What all runs share."""
        return [f"data.path={self.data}", *TRAINED, "run.save_every=60"]

    def train_dense(self) -> None:
        """The model that everything starts from."""
        start = [f"model.weights={self.weights}", "model.size=160", "model.crop_pct=1.0", f"optim.lr={2e-4 * RATE:g}"]
        told = [f"run.epochs={self.dense_epochs}", f"run.seed={self.seed}"]
        train_all({"dense-0": ["finetune", *self.common(), *start, *told]}, self.out, 1)

    def train(self) -> None:
        """All that start from the dense model, in the order in which they matter."""
        self.train_dense()
        names = self.settings()
        start = [
            f"model.name={self.out / 'dense-0' / 'model'}",
            f"run.epochs={self.epochs}",
            f"optim.lr={1e-4 * RATE:g}",
        ]
        plain = ["finetune", *self.common(), *start, "optim.head=1", f"run.seed={self.seed}"]
        taught = [f"distill.teacher={self.out / 'dense-0' / 'model'}", "distill.weight=0.5"]
        gates = ["optim.methods=50", f"optim.freeze={0.1 * self.epochs}"]  # gates learn faster, and first
        runs: dict[str, Sequence[str]] = {
            "adavit": [*plain, *gates, *self.annealed()],
            "evit": [*plain, _one(names["evit"])],
            "random_plus": [*plain, _one(names["random_plus"])],
            "topk": [*plain, _one(names["topk"])],
            "dynamicvit": [*plain, "optim.methods=10", gates[1], _one(names["dynamicvit"])],
            **{axis: [*plain, *gates, *self.annealed(f"axes={axis!r}")] for axis in AXES},
            "noisy": [*plain, *gates, _one(names["noisy"])],  # as published: all of the budget and the noise at once
            "usage": [*plain, *gates, *self.used()],
            "partial": [*plain, *gates, *self.annealed("heads='partial'")],
            "adavit-taught": [*plain, *gates, *self.annealed(), *taught],
            "head": [*plain, *gates, *self.used("axes='head'")],
            "evit-taught": [*plain, _one(names["evit"]), *taught],
            "dense-long": [*plain, _one("dense")],
            "quiet": [*plain, *gates, *self.annealed(last=0.0)],
            "class": [*plain, *gates, *self.annealed("form='paper'")],
        }
        chosen = {name: run for name, run in runs.items() if self.only is None or name in self.only}
        train_all(chosen, self.out, self.at_once)

    def annealed(self, *knobs: str, last: float | None = None) -> list[str]:
        """A budget and a noise that shrink to their ends over the first half of the steps: the gentler schedule.

        last: another noise to end with.
        """
        steps = STEPS if last is None else (*STEPS[:-1], (STEPS[-1][0], last))
        return _through([(f"gmacs={self.budget() * step:.5f}", *knobs, LEARN, f"noise={n}") for step, n in steps])

    def used(self, *knobs: str) -> list[str]:
        """The same for a usage of each axis."""
        return _through([(f"{USAGE * (2 + step) / 3:.3f}", *knobs, LEARN, f"noise={n}") for step, n in STEPS])

    # --- settings at the same cost ----------------------------------------------------------------------------------

    def model(self, run: str) -> saccade.AdaptiveViT:
        return saccade.load(self.out / run / "model", "dense")

    def budget(self) -> float:
        """Half of what the dense model runs, 10^9 MACs."""
        return SHARE * _gmacs(self.model("dense-0"), "dense")

    def settings(self) -> dict[str, str]:
        """What each method is trained for; each costs half, but for those that are held to a usage."""
        dense, budget = self.model("dense-0"), self.budget()

        def cheap(name: str) -> str:
            """The largest strength, in thousandths, at which a setting is within the budget."""
            low, high = 1, 1000
            while low < high:
                middle = (low + high + 1) // 2
                fits = _gmacs(dense, at_strength(name, middle / 1000)) <= budget
                low, high = (middle, high) if fits else (low, middle - 1)
            return at_strength(name, low / 1000)

        trained = {name: cheap(name) for name in ("random_plus", *RIVALS)}
        own = f"adavit(gmacs={budget:.5f}, {LEARN})"
        partial = f"adavit(gmacs={budget:.5f}, heads='partial', {LEARN})"
        axes = {axis: f"adavit(gmacs={budget:.5f}, axes={axis!r}, {LEARN})" for axis in AXES}
        usage = {"usage": f"adavit({USAGE}, {LEARN})", "head": f"adavit({USAGE}, axes='head', {LEARN})"}
        token = {"adavit": own, "partial": partial, "adavit-taught": own, "noisy": own, "quiet": own}
        by_class = f"adavit(gmacs={budget:.5f}, form='paper', {LEARN})"
        return trained | token | {"class": by_class, "dense-long": "dense"} | axes | usage

    def calibrated(self, run: str, text: str, each: bool) -> str:
        """The setting at the threshold where its mean cost on training images is half of the dense model's.

        each: another threshold for each stage, where there are several (as ``saccade calibrate`` does).
        """
        places, levels = spread(len(self.images["train"]), TUNE), []
        if each and (view := by_count(self.model(run), text)) is not None:
            batches = self._loader(view, "train").batches(BATCH, places)
            device = next(view.parameters()).device
            with torch.inference_mode(), autocast():
                levels = fixed_levels(view, lambda: [view(batch.images.to(device)) for batch in batches])

        def at(threshold: float) -> str:
            moved = tuple(sigmoid(level + logit(threshold)) for level in levels)
            return with_threshold(text, moved or threshold)

        def cost(threshold: float) -> float:
            return float(self.look(run, at(threshold), "train", places)["macs"].mean()) / 1e9

        return at(bisect(cost, self.budget()))

    def sampled(self) -> str:
        """``ats`` on the dense model at the largest number of levels, in hundredths, that costs half on average."""
        places, low, high = spread(len(self.images["train"]), TUNE), 1, 100
        while low < high:
            middle = (low + high + 1) // 2
            cost = float(self.look("dense-0", f"ats({middle / 100})", "train", places)["macs"].mean()) / 1e9
            low, high = (middle, high) if cost <= self.budget() else (low, middle - 1)
        return f"ats({low / 100})"

    # --- testing ----------------------------------------------------------------------------------------------------

    def test(self) -> None:
        """Everything on the test images; the settings that were tested go to ``tested.json``."""
        names, tested = self.settings(), {"dense": ("dense-0", "dense")}
        tested["random"] = ("dense-0", names["random_plus"])
        for run in (*names, "evit-taught"):
            if not (self.out / run / "model").is_dir():
                continue
            text = names[run.removesuffix("-taught")]
            if run in ("usage", "head"):
                tested[f"{run}, as trained"] = run, text
            if text.startswith("adavit") and run != "head":
                text = self._threshold(run, text)
            tested[run] = run, text
            if run == "dynamicvit":
                tested["dynamicvit, per image"] = run, self._threshold(run, text, True)
                tested["dynamicvit, per image, one threshold"] = run, self._threshold(run, text)
        tested["evit, untrained"] = "dense-0", names["evit"]
        tested["ats, untrained"] = "dense-0", self.sampled()
        for run, text in tested.values():
            self.look(run, text)
        write_json(self.out / "tested.json", tested)

    def _threshold(self, run: str, text: str, each: bool = False) -> str:
        found = self.out / "thresholds.json"
        known = json.loads(found.read_text()) if found.exists() else {}
        if (key := f"{run}|{text}" + "|each" * each) not in known:
            # before the search: an error here is not the threshold's
            self.look(run, text, "train", spread(len(self.images["train"]), TUNE))
            try:
                known[key] = self.calibrated(run, text, each)
            except UserError:  # a threshold cannot make it so cheap
                known[key] = text
            write_json(found, known)
        return known[key]

    def look(
        self, run: str, setting: str, split: str = "test", places: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Whether each image is classified rightly, -log p of its class, and the MACs that ran, [n] float64 each."""

        def make() -> dict[str, Tensor]:
            view = self.model(run).at(setting).eval()
            chosen = spread(len(self.images[split]), self.limit) if places is None else places
            logits, macs, use, device = [], [], [], next(view.parameters()).device
            for batch in self._loader(view, split).batches(BATCH, chosen):
                with torch.inference_mode(), autocast():
                    out = view(images := batch.images.to(device))
                    asked = "usage" in run or run == "head"
                    use.append(_usage(view, images).cpu() if asked else torch.zeros(1, 3))
                logits.append(out.logits.double().cpu())
                macs.append(out.trace.macs().cpu())
            logp, truth = torch.cat(logits).log_softmax(-1), labels(view, self.images[split], chosen)
            found = {"hit": (logp.argmax(-1) == truth).double(), "macs": torch.cat(macs), "use": torch.cat(use)}
            return found | {"nll": -logp.gather(1, truth.unsqueeze(1)).squeeze(1)}

        return self.seen.all({name: f"{run}|{setting}|{split}|{name}" for name in ("hit", "macs", "nll", "use")}, make)

    def _loader(self, view: saccade.AdaptiveViT, split: str) -> Loader:
        return loader_of(self.images[split], Preprocess.of(view.vit, view.input_size()))

    def places(self) -> str:
        """By axis and block of AdaViT, what of it runs, and whether that goes with the dense model's loss (ρ)."""
        run, setting = json.loads((self.out / "tested.json").read_text())["adavit"]
        view, loss, used = self.model(run).at(setting).eval(), self.look("dense-0", "dense")["nll"], list[Tensor]()
        chosen = spread(len(self.images["test"]), self.limit)
        for batch in self._loader(view, "test").batches(BATCH, chosen):
            images = batch.images.to(next(view.parameters()).device)
            with torch.inference_mode(), autocast():
                used.append(torch.stack([_shares(g, len(images)) for g in _gates(view, images)]).cpu())
        shares = torch.cat(used, dim=1).double()  # [blocks, images, axes]
        lines = ["| block | " + " | ".join(f"{axis}, share | ρ" for axis in GATED) + " |", "|" + "---|" * 9]
        for i, block in enumerate([*shares, shares.mean(0)]):
            cells = [f"{s.mean():.2f} | {rank_correlation(s, loss):+.2f}" for s in block.T]
            name = "all" if i == len(shares) else str(i + 1)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    # --- time -------------------------------------------------------------------------------------------------------

    def time(self, seconds: float) -> None:
        """Seconds of a batch of test images, interleaved, fp32; and the rivals at AdaViT's time (``times.json``)."""
        steady_allocator()
        tested = json.loads((self.out / "tested.json").read_text())
        shown = ("dense", "adavit", "patch", "random_plus", "dynamicvit, per image", "adavit-taught", *RIVALS)
        ways = {name: tested[name] for name in shown if name in tested}
        for name in RIVALS:
            ways |= {f"{name}|{k}": (name, at_strength(name, k)) for k in KEEPS if name in tested}
        views = {name: self.model(run).at(text).eval() for name, (run, text) in ways.items()}
        places = spread(len(self.images["test"]), 4 * TIMED)
        batches = list(self._loader(views["dense"], "test").batches(TIMED, places))
        taken: dict[str, list[float]] = {name: [] for name in views}
        start, turn = time.perf_counter(), 0
        with torch.inference_mode():
            for view in views.values():
                view(batches[0].images)
            while turn < 2 * len(batches) or time.perf_counter() - start < seconds:
                for name, view in views.items():
                    begin = time.perf_counter()
                    view(batches[turn % len(batches)].images)
                    taken[name].append(time.perf_counter() - begin)
                turn += 1
        middle = {name: statistics.median(values) for name, values in taken.items()}
        ratios = {name: _quartiles([d / v for d, v in zip(taken["dense"], taken[name], strict=True)]) for name in taken}
        at_time = {}
        for name in RIVALS:
            if name in tested:
                own = {k: middle[f"{name}|{k}"] for k in KEEPS}
                at_time[name] = name, at_strength(name, _where(own, middle["adavit"]))
        shown_times = {name: {"seconds": middle[name], "speedup": ratios[name], "runs": turn} for name in taken}
        write_json(self.out / "times.json", {"times": shown_times, "at AdaViT's time": at_time})

    # --- report -----------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """The tables, as Markdown."""
        tested = json.loads((self.out / "tested.json").read_text())
        known = self.out / "times.json"
        timed = json.loads(known.read_text()) if known.exists() else {"times": {}, "at AdaViT's time": {}}
        tested |= {f"{name}, at AdaViT's time": found for name, found in timed["at AdaViT's time"].items()}
        seen = {name: self.look(*found) for name, found in tested.items()}
        dense = seen["dense"]
        lines = ["| run | setting | GMACs (p5, p95) | share | top-1 | points vs dense | speed-up |", "|" + "---|" * 7]
        for name, (_, text) in tested.items():
            own = seen[name]
            low, middle, high = own["macs"].quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
            away = "" if name == "dense" else points(bootstrap(own["hit"] - dense["hit"]))
            fast = timed["times"].get(name)
            faster = "" if fast is None else "{:.2f} ({:.2f}–{:.2f})".format(*(fast["speedup"][i] for i in (1, 0, 2)))
            mean, share = own["macs"].mean().item(), (own["macs"].mean() / dense["macs"].mean()).item()
            spread = "" if high - low < 1e-4 * middle else f" ({low / 1e9:.3f}, {high / 1e9:.3f})"
            cells = [name, f"`{text}`", f"{mean / 1e9:.3f}{spread}", f"{share:.3f}", f"{own['hit'].mean():.2%}"]
            lines.append("| " + " | ".join([*cells, away, faster]) + " |")
        lines += ["", "| claim | measured | verdict |", "|---|---|---|"]
        lines += [f"| {c.text} | {c.measured(seen)} | {c.verdict(seen)} |" for c in CLAIMS if set(c.needs) <= set(seen)]
        if "usage, as trained" in seen:
            use = seen["usage, as trained"]["use"].mean(0).tolist()
            near = "holds" if max(abs(u - USAGE) for u in use) <= 0.03 else "does not hold"
            texts = ", ".join(f"{axis} {u:.3f}" for axis, u in zip(("patches", "heads", "branches"), use, strict=True))
            lines.append(f"| usage within 0.03 of {USAGE} on each axis | {texts} | {near} |")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Claim:
    """What is said of some runs, and a number that bears it out where it is above ``least``."""

    text: str
    needs: tuple[str, ...]
    value: Callable[[dict[str, dict[str, Tensor]]], tuple[float, float, float]]
    least: float = 0.0
    unit: float = 100.0  # 1: not points

    def measured(self, seen: dict[str, dict[str, Tensor]]) -> str:
        return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(
            *(self.unit * v for v in self.value(seen)), d=1 if self.unit > 1 else 2
        )

    def verdict(self, seen: dict[str, dict[str, Tensor]]) -> str:
        _, low, high = self.value(seen)
        return "holds" if low > self.least else "does not hold" if high < self.least else "not decided"


def better(a: str, b: str, slack: float = 0.0) -> Claim:
    """One run is right more often than another, on the same images, or less often by ``slack`` at most."""

    def value(seen: dict[str, dict[str, Tensor]]) -> tuple[float, float, float]:
        return bootstrap(seen[a]["hit"] - seen[b]["hit"]).three()

    return Claim(f"{a} ≥ {b}" + (f" − {100 * slack:g}" if slack else ""), (a, b), value, -slack)


def harder(run: str) -> Claim:
    """What an image costs goes with the dense model's loss on it (rank correlation)."""

    def value(seen: dict[str, dict[str, Tensor]]) -> tuple[float, float, float]:
        return _rank_correlation(seen[run]["macs"], seen["dense"]["nll"])

    return Claim(f"{run}: cost goes with the dense model's loss (Spearman's ρ)", (run, "dense"), value, unit=1.0)


CLAIMS = (
    better("dense", "adavit"),
    better("dense-long", "adavit"),
    better("adavit", "evit", 0.02),
    better("adavit", "random_plus"),
    better("random_plus", "random"),
    better("adavit", "patch"),
    better("adavit", "block"),
    better("adavit", "partial", 0.01),
    better("adavit", "noisy"),
    better("adavit", "usage", 0.01),
    better("evit", "adavit"),
    better("topk", "adavit"),
    better("dynamicvit", "adavit"),
    better("evit", "patch"),
    better("evit, at AdaViT's time", "adavit"),
    better("topk, at AdaViT's time", "adavit"),
    better("dynamicvit, at AdaViT's time", "adavit"),
    better("adavit-taught", "adavit"),
    better("evit-taught", "adavit-taught"),
    harder("adavit"),
    harder("adavit-taught"),
    harder("quiet"),
    harder("class"),
    harder("noisy"),
    harder("block"),
    harder("patch"),
    harder("dynamicvit, per image"),
    harder("ats, untrained"),
    better("dynamicvit, per image", "dynamicvit", 0.01),
    better("dynamicvit, per image", "dynamicvit, per image, one threshold"),
    better("ats, untrained", "evit, untrained", 0.01),
)


def at_strength(name: str, keep: float) -> str:
    """A method that keeps such a share: of what is left at each of three stages, or of everything (random_plus)."""
    if name != "topk":
        return f"{name}({keep})"
    shares = tuple(round(keep**stage, 4) for stage in (1, 1, 1, 2, 2, 2, 3, 3))  # the schedule of IdleViT
    return f"topk({shares}, at={tuple(range(3, 11))})"


def _one(setting: str) -> str:
    return f"sampling.settings={[setting]}"


def _through(knobs: Sequence[Sequence[str]]) -> list[str]:
    """Settings of adavit that training goes through, in equal steps over its first half."""
    settings = [f"adavit({', '.join(given)})" for given in knobs]
    rows = torch.eye(len(settings), dtype=torch.int64).tolist()
    last = len(rows) - 1
    knots = [f"{{at={0.5 * i / last}, weights={row}}}" for i, row in enumerate(rows)]
    knots.append(f"{{at=1.0, weights={rows[-1]}}}")
    return [f"sampling.settings={settings}", f"sampling.weights=[{', '.join(knots)}]"]


def _gmacs(model: saccade.AdaptiveViT, setting: str) -> float:
    """10^9 MACs that one image runs, where that does not depend on the image."""
    with torch.inference_mode():
        images = torch.zeros(1, 3, *model.input_size(), device=next(model.parameters()).device)
        return model.at(setting).eval()(images).trace.macs().item() / 1e9


def _usage(view: saccade.AdaptiveViT, images: Tensor) -> Tensor:
    """Shares of patches, heads and branches that each image uses in the blocks that decide, [B, 3]."""
    patches, heads, attn, mlp = torch.stack([_shares(g, len(images)) for g in _gates(view, images)]).mean(0).unbind(1)
    return torch.stack([patches, heads, (attn + mlp) / 2], dim=1)


def _gates(view: saccade.AdaptiveViT, images: Tensor) -> list[Gates]:
    """Of the blocks that decide."""
    return [b.gates for b in view.forward_tokens(images, sparse=False)[1].blocks if b.gates is not None]


def _shares(gates: Gates, images: int) -> Tensor:
    """What runs of a block, [B, 4]: patches, heads, attention, MLP; 1 where nothing is decided."""
    given = (gates.patch, gates.head, gates.attn, gates.mlp)
    return torch.stack(
        [torch.ones(images) if g is None else g.float().view(images, -1).mean(1).cpu() for g in given], 1
    )


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4)


def _where(seconds: dict[float, float], wanted: float) -> float:
    """The knob, in thousandths, at which straight lines through the times meet the one that is wanted."""
    knobs = sorted(seconds)
    pairs = list(pairwise(knobs))
    a, b = next((pair for pair in pairs if wanted <= seconds[pair[1]]), pairs[-1])
    slope = (seconds[b] - seconds[a]) / (b - a)
    return min(1.0, max(0.05, round(a + (wanted - seconds[a]) / slope, 3)))


def _rank_correlation(a: Tensor, b: Tensor, draws: int = 1000) -> tuple[float, float, float]:
    """Spearman's ρ and its 95 % bootstrap interval over images."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        chosen = torch.randint(len(a), (len(a),), generator=generator)
        found.append(rank_correlation(a[chosen], b[chosen]))
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    return rank_correlation(a, b), low, high


def main() -> None:
    """Train what is not trained yet, test, time, and write the tables."""
    parser = parser_of(__doc__, "runs/adavit", "data", "weights")
    parser.add_argument("--epochs", type=float, default=1.0, help="of each method, after those of the dense model")
    parser.add_argument("--dense-epochs", type=float, default=2.0, help="of the dense model")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--runs", nargs="+", help="train only these")
    parser.add_argument("--seed", type=int, default=0, help="of every run; a folder for each")
    parser.add_argument("--limit", type=int, help="test only so many images")
    parser.add_argument("--seconds", type=float, default=100.0, help="of timing")
    parser.add_argument("--stage", choices=("train", "test", "time", "report", "places"), help="one of them alone")
    arguments = parser.parse_args()
    study, stages = Study(arguments), [arguments.stage] if arguments.stage else ["train", "test", "time", "report"]
    todo: dict[str, Callable[[], Any]] = {
        "train": study.train, "test": study.test, "time": lambda: study.time(arguments.seconds)
    }  # fmt: skip
    for stage in stages:
        if stage in todo:
            todo[stage]()
    if "places" in stages:
        print(study.places())
    if "report" in stages:
        text = study.report()
        write_text(study.out / "adavit.md", text)
        print(text)


if __name__ == "__main__":
    main()
