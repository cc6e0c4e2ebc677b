"""ImagePiece by parts: what are stem, re-tokenization and pruning worth, and is the whole better than others?

Claims    arXiv 2412.16491 (AAAI 2025; its code was never released). 1. Re-tokenizing and pruning beats pruning alone
          (Table 1), and merging (Table 2). 2. One model, pruned harder and harder, falls less than others (Fig. 3).
          3. It falls less under random masks (Table 4). 4. It helps other pruners and mergers (Table 9). The paper
          gives its stem to no baseline; here every part stands with and without every other.
Method    ViT-Tiny (AugReg), fine-tuned to Caltech-101 at 160 px, is the source of all. Its stem is fitted in closed
          form to its patch embedding (saccade.fit_stem). Then every cell of {patches, stem} × {re-tokenize} × {prune},
          and every rival at the MACs of re-tokenize + prune, is trained for the same steps on the same images. Top-1
          on the test images; sweeps and masks on fewer. 95 % intervals, paired; one seed: they are over images, not
          over trainings.
Command   python studies/imagepiece.py caltech160.zip vit_tiny_patch16_224.safetensors --out runs/imagepiece --time
          (on a machine at rest; more such calls are averaged), then the same without --time;
          with --untrained every method is taken as it is, on the source model: minutes.
          On Imagenette, fewer runs: nette160.zip for the photos, --source-epochs 0.25 --epochs 0.25 --runs NAME …, then
          --report in the place of --runs
Cost      an estimate: 40 minutes of one core, and 8 for the source model
Expected  1. + at equal MACs. 2. and 3. smaller falls. 4. + each.
Measured  docs/results-imagepiece.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from jobs import (
    TRAINED,
    Memory,
    Row,
    answers,
    between,
    labels,
    level,
    nearest,
    parser_of,
    points,
    right,
    show,
    timed,
    train_all,
    verdict,
)

import saccade
from saccade.analysis import analyze
from saccade.data import Preprocess, open_images
from saccade.evaluation.accuracy import spread
from saccade.evaluation.candidates import price
from saccade.evaluation.stats import Interval, bootstrap
from saccade.model import AdaptiveViT
from saccade.storage.files import write_json

KEEPS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
MASKS = (0, 7, 15, 25, 50)
PARTS = {"neither": "", "re-tokenize": "imagepiece()", "prune": "evit(0.8)", "both": "imagepiece(keep=0.8)"}
STARTS = ("patches", "stem")
CELLS = {
    f"{start}-{part}": " | ".join(filter(None, (stem, setting))) or "dense"
    for start, stem in (("patches", ""), ("stem", "stem()"))
    for part, setting in PARTS.items()
}
# Methods whose strength is a number k, the share of tokens kept at three blocks; tome merges the more the less k is.
SWEPT: dict[str, Callable[[float], str]] = {
    "imagepiece": lambda k: f"imagepiece(keep={k:.3g})",
    "stem-imagepiece": lambda k: f"stem() | imagepiece(keep={k:.3g})",
    "evit": lambda k: f"evit({k:.3f})",
    "stem-evit": lambda k: f"stem() | evit({k:.3f})",
    "tome": lambda k: f"tome(total={round((1 - k) * 400)})",
    "token_pooling": lambda k: f"token_pooling({k:.3f})",
    "dynamicvit": lambda k: f"dynamicvit({k:.3f})",
    "random": lambda k: f"random({k:.3f})",
}
RIVALS = ("evit", "tome", "token_pooling", "dynamicvit", "random")
TRIES = {  # other readings, tried where the default fell short
    "not in block 0": lambda k: f"imagepiece(keep={k:.3f}, merge_at=(1, 2, 4, 5, 7, 8))",
    "from block 2": lambda k: f"imagepiece(keep={k:.3f}, merge_at=(2, 4, 5, 7, 8))",
    "by attention received": lambda k: f"imagepiece(keep={k:.3f}, score='received')",
    "by patch": lambda k: f"imagepiece(keep={k:.3f}, per='patch')",
}
LATE = "late"  # the best of these without training, trained
LEARNED = ("dynamicvit", "tokenlearner")  # nothing without training
MASKED = ("imagepiece", "stem-imagepiece", "evit", "tome", "dynamicvit")
LEARNER = "tokenlearner(8, at=6)"  # its parameters belong to a number of tokens: one strength alone
MODELS = {"imagepiece": "patches-both", "stem-imagepiece": "stem-both"}  # of other methods: the run of their own name


def main() -> None:
    parser = parser_of(__doc__, "runs/imagepiece", "data", "weights")
    parser.add_argument("--epochs", type=float, default=0.5, help="of every run but the source")
    parser.add_argument("--source-epochs", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of every run but the source; a folder for each")
    parser.add_argument("--limit", type=int, default=1000, help="test images of sweeps and masks")
    parser.add_argument("--whole", type=int, help="test images of the other tables; default: all")
    parser.add_argument("--runs", nargs="*", help="train only these, and stop")
    parser.add_argument("--report", action="store_true", help="train nothing: the tables of the runs that are there")
    parser.add_argument("--untrained", action="store_true", help="every method as it is on the source model")
    parser.add_argument("--time", nargs="*", help="only time the settings of these methods, or 'cells'; none: all")
    parser.add_argument("--seconds", type=float, default=150, help="of timing")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    out: Path = arguments.out
    common = [f"data.path={arguments.data}", *TRAINED, "run.save_every=45"]
    source = [f"model.weights={arguments.weights}", "model.size=160", "model.crop_pct=1.0"]
    train_all({"source": ["finetune", *common, *source, f"run.epochs={arguments.source_epochs}"]}, out, 1)
    dense = saccade.load(out / "source" / "model", "dense")
    if not (out / "stemmed").is_dir():
        saccade.fit_stem(dense, open_images(arguments.data, "train")).save(str(out / "stemmed"))
    strengths = solve(dense)
    if arguments.time is not None:
        groups = {"cells": [*CELLS.values(), LEARNER], **strengths}
        every = [s for name in arguments.time or groups for s in groups[name]]
        known = json.loads((out / "speed.json").read_text()) if (out / "speed.json").exists() else {}
        found = timed(saccade.load(out / "stemmed", "dense"), every, arguments.seconds)
        write_json(out / "speed.json", known | {s: [*known.get(s, []), v] for s, v in found.items()})  # every call's
        return

    settings = {**CELLS, **{n: strengths[n][0] for n in SWEPT if n not in MODELS}, "tokenlearner": LEARNER}
    if not arguments.untrained:
        settings[LATE] = nearest(dense, TRIES["not in block 0"], price(dense, settings["patches-both"]))
    rule = [f"model.name={out / 'stemmed'}", "optim.lr=1e-4", f"run.epochs={arguments.epochs}", "data.cache_gb=0"]
    rule += [f"run.seed={arguments.seed}"] if arguments.seed else []
    runs = {n: ["finetune", *common, *rule, f"sampling.settings={json.dumps([s])}"] for n, s in settings.items()}
    if not (arguments.untrained or arguments.report):
        train_all({n: runs[n] for n in (arguments.runs or runs)}, out, arguments.at_once)
    if arguments.runs is not None:
        return
    torch.set_num_threads(1)
    asked = Asked(out, arguments.data, arguments.limit, arguments.whole, arguments.untrained)
    calls = json.loads((out / "speed.json").read_text()) if (out / "speed.json").exists() else {}
    report(asked, dense, settings, strengths, {setting: sum(found) / len(found) for setting, found in calls.items()})


def solve(model: AdaptiveViT) -> dict[str, list[str]]:
    """Each method's settings at the MACs of ``imagepiece`` at each of ``KEEPS``; with the stem, of that with it."""
    found: dict[str, list[str]] = {}
    for name, make in SWEPT.items():
        own = "stem-imagepiece" if name.startswith("stem-") else "imagepiece"
        goals = [price(model, SWEPT[own](keep)) for keep in KEEPS]
        found[name] = [SWEPT[own](k) for k in KEEPS] if name == own else [nearest(model, make, goal) for goal in goals]
    return found


class Asked:
    """Whether a trained model is right on each test image, under a setting and a corruption; remembered in a file."""

    def __init__(self, out: Path, data: str, limit: int, whole: int | None, untrained: bool) -> None:
        self.untrained = untrained
        self.out, self.images, self.memory = out, open_images(data), Memory(out / "hits.safetensors")
        self.every = spread(len(self.images), whole)
        self.some = [self.every[i] for i in spread(len(self.every), limit)]
        self._model = cache(lambda run: saccade.load(self.folder(run), "dense"))

    def __call__(self, run: str, setting: str, masks: int = 0, few: bool = False) -> torch.Tensor:
        """Hits, float64 [n], on all test images, or on those of sweeps and masks."""
        run = "stemmed" if self.untrained else run
        places = self.some if few or masks else self.every
        if few and not masks and (whole := f"{run}|{setting}|0|{len(self.every)}") in self.memory.seen:
            at = {place: i for i, place in enumerate(self.every)}
            return self.memory.seen[whole][[at[p] for p in places]]
        key = f"{run}|{setting}|{masks}|{len(places)}"

        def make() -> torch.Tensor:
            view, preprocess = self._model(run).at(setting).eval(), Preprocess.of(self._model("source").vit)
            logits, _ = answers(view, self.images, places, preprocess, f"masks:{masks}" if masks else "")
            found = right(logits, labels(view, self.images, places))
            print(f"{key}: {found.mean():.2%}", file=sys.stderr, flush=True)
            return found

        return self.memory(key, make)

    def there(self, run: str) -> bool:
        """Whether a method's run is finished; untrained, all are but those that are nothing without training."""
        return run not in LEARNED if self.untrained else self.folder(MODELS.get(run, run)).is_dir()

    def folder(self, run: str) -> Path:
        """Where a run's model is; untrained, all have the source's."""
        return self.out / "stemmed" if self.untrained or run == "stemmed" else self.out / run / "model"


def report(
    asked: Asked, dense: AdaptiveViT, settings: dict[str, str], strengths: dict[str, list[str]], speed: dict[str, float]
) -> None:
    """Print all tables and verdicts, and write them as JSON."""
    rivals, swept = ([name for name in names if asked.there(name)] for names in (RIVALS, SWEPT))
    costs = {s: price(dense, s) / 1e9 for s in {*settings.values(), *(s for f in strengths.values() for s in f)}}
    cells = {name: asked(name, setting) for name, setting in CELLS.items() if asked.there(name)}
    tables: dict[str, Sequence[Row]] = {}
    claims: list[Row] = []

    def timed_at(setting: str) -> str:
        return f"{speed[setting]:.2f}×" if setting in speed else ""

    def facts(name: str) -> Row:
        setting = settings[name]
        return {"setting": f"`{setting}`", "GMACs": f"{costs[setting]:.3f}", "speed-up": timed_at(setting)}

    def say(words: str, difference: torch.Tensor) -> Interval:
        found = bootstrap(difference)
        claims.append({"claim": words, "points": points(found), "verdict": verdict(found)})
        return found

    def few(name: str, i: int) -> torch.Tensor:
        return asked(MODELS.get(name, name), strengths[name][i], few=True)

    # The parts.
    tables["The parts"] = [
        {"cell": name, **facts(name), "not trained": level(asked("stemmed", settings[name], few=not asked.untrained))}
        | ({} if asked.untrained else {"trained": level(own)})
        for name, own in cells.items()
    ]
    pairs = [(cells.get(f"stem-{part}"), cells.get(f"patches-{part}")) for part in PARTS]
    stems = [with_stem - without for with_stem, without in pairs if with_stem is not None and without is not None]
    if stems:
        say(f"the stem helps (mean of {len(stems)} pairs)", torch.stack(stems).mean(0))
    fewer = "re-tokenizing before pruning at the same keep rate is better, at fewer MACs"
    for words, one, other in (
        *((f"{s}: re-tokenizing alone is better than dense", f"{s}-re-tokenize", f"{s}-neither") for s in STARTS),
        *((f"{s}: {fewer}", f"{s}-both", f"{s}-prune") for s in STARTS),
        *((f"{s}: re-tokenize + prune is better than dense (Table 1)", f"{s}-both", f"{s}-neither") for s in STARTS),
        ("stem-both is better than dense patches (Table 1)", "stem-both", "patches-neither"),
    ):
        if one in cells and other in cells:
            say(words, cells[one] - cells[other])

    # Rivals at equal MACs, and at equal time.
    rows: list[Row] = []
    others = [name for name in ("tokenlearner", "stem-evit") if asked.there(name)]
    for name in [*rivals, *others]:
        ours, run = ("stem-imagepiece", "stem-both") if name == "stem-evit" else ("imagepiece", "patches-both")
        own, note = asked(name, settings[name]), " (both with the stem)" if name == "stem-evit" else ""
        gain = say(f"re-tokenize + prune is better than {name} at equal MACs{note}", cells[run] - own)
        row: Row = {"method": name, **facts(name), "top-1": level(own), "imagepiece − this": points(gain)}
        if name in strengths and all(setting in speed for setting in strengths[name]):
            even = at_time(asked, name, strengths[name], speed, speed[strengths[ours][0]])
            late = say(f"… than {name} at equal measured time{note}", few(ours, 0) - even)
            row["at equal time"] = points(late)
        rows.append(row)
    tables["At the MACs of re-tokenize + prune"] = rows

    # One model each, at less and less compute.
    tables[f"One model each: top-1 and measured speed-up ({len(asked.some)} images)"] = [
        {"keep": keep, "GMACs": f"{costs[strengths['imagepiece'][i]]:.3f}"}
        | {n: f"{few(n, i).mean():.1%} {timed_at(strengths[n][i])}" for n in swept}
        for i, keep in enumerate(KEEPS)
    ]
    for name in swept:
        if name not in MODELS:
            mine = "stem-imagepiece" if name.startswith("stem-") else "imagepiece"
            fall, less = (few(n, 0) - few(n, len(KEEPS) - 1) for n in (name, mine))
            say(f"{mine} falls less than {name} from keep 0.8 to 0.3 (Fig. 3)", fall - less)

    # Masks.
    shown = {"dense": ("patches-neither", "dense"), "stem, dense": ("stem-neither", "stem()")}
    shown = {name: of for name, of in shown.items() if asked.there(of[0])}
    shown |= {n: (MODELS.get(n, n), strengths[n][0]) for n in swept if n in MASKED}
    under = {n: {m: asked(*of, masks=m, few=True) for m in MASKS} for n, of in shown.items()}
    falls = {n: found[0] - found[MASKS[-1]] for n, found in under.items()}
    tables[f"Random masks of 1/14 of the side ({len(asked.some)} images)"] = [
        {"model": n, **{str(m): f"{found[m].mean():.1%}" for m in MASKS}, "fall": points(bootstrap(falls[n]))}
        for n, found in under.items()
    ]
    for name in shown:
        if name not in ("stem, dense", *MODELS):
            less = falls[name] - falls["imagepiece"]
            say(f"imagepiece falls less than {name} under {MASKS[-1]} masks (Table 4)", less)
    if "stem-imagepiece" in falls:
        less = falls["imagepiece"] - falls["stem-imagepiece"]
        say(f"the stem makes the fall of imagepiece under {MASKS[-1]} masks smaller", less)

    # Company.
    for name in (n for n in rivals if n in ("tome", "dynamicvit")):
        both = nearest(dense, lambda k, make=SWEPT[name]: f"imagepiece() | {make(k)}", costs[settings[name]] * 1e9)  # type: ignore[misc]
        better = asked(name, both) - asked(name, settings[name])
        say(f"re-tokenizing first helps {name} at equal MACs (Table 9): `{both}`", better)
    for words, make in TRIES.items() if asked.untrained else ():  # trained, each would be a run of its own
        setting = nearest(dense, make, costs[settings["patches-both"]] * 1e9)
        for name in ("patches-both", "evit", "tome"):
            better = asked("stemmed", setting) - asked("stemmed", settings[name])
            say(f"merging {words} is better than {settings[name]}: `{setting}`", better)
    if LATE in settings and asked.there(LATE):
        own, setting = asked(LATE, settings[LATE]), settings[LATE]
        for name in ("patches-both", *rivals):
            if asked.there(name):
                say(f"`{setting}` is better than `{settings[name]}`", own - asked(name, settings[name]))
        less = falls["dense"] - (asked(LATE, setting, few=True) - asked(LATE, setting, masks=MASKS[-1], few=True))
        say(f"`{setting}` falls less than dense under {MASKS[-1]} masks", less)
    tables["Claims"] = claims

    for name in (n for n in ("imagepiece", "stem-imagepiece", "tome") if asked.there(n)):
        model = saccade.load(asked.folder(MODELS.get(name, name)), "dense")
        found = analyze(model, asked.images, [strengths[name][0]], "merging", limit=300)["merging"].data["layers"]
        tables[f"What merges: {name} (300 images)"] = [tidy(row) for row in found[strengths[name][0]]]
    write_json(
        asked.out / ("untrained.json" if asked.untrained else "imagepiece.json"), {"tables": tables, "speed": speed}
    )
    for title, shown_rows in tables.items():
        show(title, shown_rows)


def tidy(row: Row) -> Row:
    """One block of the analysis ``merging``, in words."""

    def cell(value: Sequence[float] | None, scale: float = 100, digits: int = 1) -> str:
        if value is None:
            return ""
        mean, low, high = (f"{scale * v:.{digits}f}" for v in value)
        return f"{mean} [{low}, {high}]"

    return {
        "block": row["block"],
        "tokens": f"{row['tokens']:.0f}",
        "attended to again, %": cell(row["risen"]),
        "merged": f"{row['merged']:.1f}",
        "cosine": cell(row["similarity"], 1, 3),
        **{f"in the top {round(100 * float(k))}, %": cell(value) for k, value in row["attentive"].items()},
    }


def at_time(asked: Asked, name: str, found: list[str], speed: dict[str, float], goal: float) -> torch.Tensor:
    """Hits of a method at a measured speed-up: between its two strengths next to it, in time (1 / speed-up)."""
    marks = [(1 / speed[s], asked(name, s, few=True)) for s in found[:4]]
    marks.append((1.0, asked("patches-neither", "dense", few=True)))
    return torch.stack([share * hits for share, hits in between(marks, 1 / goal)]).sum(0)


if __name__ == "__main__":
    main()
