"""After fine-tuning, is a searched schedule still better than single methods at the same executed MACs?

Claim     A schedule that was searched for on the dense model, without labels, keeps its lead once every setting is
          fine-tuned alike. No paper says so of these methods.
Method    DENSE: ViT-Tiny (AugReg), fine-tuned to Caltech-101 at 160 px (studies/adavit.py makes it). On 96 training
          photos the nearest schedule to it is searched for, and diffrate's lists are learned on others; rivals are
          written for the same executed MACs: single methods, a smaller input, random. From DENSE five epochs under
          each setting, and dense: the same images, steps and rates. Top-1 on the 2,893 test images before and after,
          95 % intervals, differences paired over images; one seed. With ``--epochs 0`` nothing is trained.
Command   python studies/tuned_schedules.py caltech160.zip DENSE --out runs/tuned-schedules
Cost      an estimate: an hour of one core; interrupted runs go on
Expected  schedule ≥ each rival
Measured  docs/results.md, "A schedule for a budget"
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from jobs import TRAINED, Memory, hits, level, parser_of, points, show, train_all, verdict

import saccade
from saccade.data import open_images
from saccade.evaluation.accuracy import spread
from saccade.evaluation.allowance import Allowance
from saccade.evaluation.calibrate import calibrate
from saccade.evaluation.candidates import price
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.knob_search import KnobSearch
from saccade.evaluation.schedule import Space
from saccade.evaluation.schedule_candidates import schedules
from saccade.evaluation.schedule_price import macs
from saccade.evaluation.stats import bootstrap
from saccade.storage.files import write_json

SINGLE = ("tome", "evit", "mctf", "random")
LOOK = 400  # training photos that choose


def main() -> None:
    parser = parser_of(__doc__, "runs/tuned-schedules", "data")
    parser.add_argument("dense", help="folder of the dense model")
    parser.add_argument("--speed", type=float, default=2.0, help="times fewer MACs")
    parser.add_argument("--epochs", type=float, default=5, help="0: nothing is trained, all are as they are on DENSE")
    parser.add_argument("--tries", type=int, default=400)
    parser.add_argument("--moves", type=int, default=100, help="of learning diffrate's lists")
    parser.add_argument("--runs", nargs="+", help="train only these, and report on what is trained")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dense = saccade.load(given.dense, "dense").eval()
    settings = {**chosen(dense, given), "dense": "dense"}
    common = [*TRAINED, "data.cache_gb=0", "optim.lr=1e-4", "optim.head=1", "run.save_every=60"]
    common += [f"data.path={given.data}", f"model.name={given.dense}", f"run.epochs={given.epochs}"]
    runs = {n: ["finetune", *common, f"sampling.settings={json.dumps([s])}"] for n, s in settings.items()}
    if given.epochs:
        train_all({n: run for n, run in runs.items() if given.runs is None or n in given.runs}, given.out, 1)
        settings = {n: s for n, s in settings.items() if (given.out / n / "model").is_dir()}
    images, memory = open_images(given.data, "test"), Memory(given.out / "hits.safetensors")

    def seen(folder: Path, run: str, setting: str) -> torch.Tensor:
        return memory(f"{run}|{setting}", lambda: hits(saccade.load(folder, "dense"), setting, images))

    before = {n: seen(Path(given.dense), "untrained", s) for n, s in settings.items()}
    after = {n: seen(given.out / n / "model", n, s) for n, s in settings.items()} if given.epochs else before
    rows = []
    for name, setting in settings.items():
        gap = bootstrap(after["schedule"] - after[name])
        row = {"run": name, "setting": f"`{setting}`", "GMACs": f"{price(dense, setting) / 1e9:.3f}"}
        row |= {"training-free": level(before[name])} | ({"fine-tuned": level(after[name])} if given.epochs else {})
        row["against DENSE"] = points(bootstrap(after[name] - seen(Path(given.dense), "untrained", "dense")))
        rival = name not in ("dense", "schedule")
        rows.append(row | {"schedule − this": points(gap) if rival else "", "better": verdict(gap) if rival else ""})
    write_json(given.out / "tuned.json", rows)
    show(f"{given.speed:g}× fewer MACs, {given.epochs:g} epochs", rows)


def chosen(dense: saccade.AdaptiveViT, given: argparse.Namespace) -> dict[str, str]:
    """The schedule and its rivals for the budget; what was found is written down, so that a later call has it too."""
    file = given.out / "settings.json"
    if file.exists():
        return json.loads(file.read_text())
    space = Space.of(dense)
    budget = space.macs(space.empty("")) / given.speed
    evaluator = Evaluator(dense, open_images(given.data, "train"))
    places = spread(len(evaluator.images), LOOK)
    folder = given.out / "search"
    folder.mkdir(parents=True, exist_ok=True)
    found = schedules(
        evaluator, places, partial(macs, ratio=given.speed), Allowance(), tries=given.tries, folder=folder
    )
    print(found.note, file=sys.stderr, flush=True)
    settings = {"schedule": found.candidates[0].setting}
    settings |= {name: f"{name}(speed={given.speed})" for name in SINGLE}
    learned = calibrate(dense, given.data, "diffrate()", budget / 1e9, split="train", limit=LOOK, cache=folder,
                        search=KnobSearch(0, moves=given.moves))  # fmt: skip
    smaller = {t: space.macs(space.empty(t)) for t in space.tokenizers if t.startswith("grid")}
    settings["diffrate"] = learned.setting
    settings["smaller input"] = max((t for t in smaller if smaller[t] <= budget), key=lambda t: smaller[t])
    write_json(file, settings)
    return settings


if __name__ == "__main__":
    main()
