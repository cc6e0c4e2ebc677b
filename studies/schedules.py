"""Training-free reduction at equal MACs: is a searched schedule better than the best single method, and by how much?

Claim     Where to reduce, by how much, by which rule and from which input size, chosen together for one budget, loses
          less than any one method at a strength, and than compositions that are written by hand. No paper says so of
          these methods together; where to prune was searched by latency at WACV 2025.
Method    A pretrained model, nothing trained. Half of the photos choose, stratified by class: the schedule by its
          total variation from the dense model on at most 96, without labels; which of the three nearest, which
          single method and which composition is the best one, by top-1 on the whole half. The other half reports:
          top-1, paired differences, 95 % intervals over images. Rivals are written for the same executed MACs.
Command   python studies/schedules.py vit_tiny_patch16_224 vit_tiny_patch16_224.safetensors inval227_dev.zip
          --out runs/schedules
Cost      an estimate: 25 minutes of two cores; interrupted runs go on
Expected  2×: at least 1.5 points above the best single method; 1.5×: at most 0.5 points below dense
Measured  docs/results.md
"""

from __future__ import annotations

import json
import random
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from jobs import parser_of

import saccade
from saccade.data import open_images
from saccade.errors import UserError
from saccade.evaluation.allowance import Allowance
from saccade.evaluation.candidates import price
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.prediction_cache import Cache
from saccade.evaluation.schedule import Space
from saccade.evaluation.schedule_candidates import schedules
from saccade.evaluation.schedule_price import macs
from saccade.evaluation.schedule_search import TRIES
from saccade.evaluation.stats import paired_difference
from saccade.evaluation.successive_halving import shuffled_halves
from saccade.storage.files import write_json

SINGLE = ("tome", "tofu", "mctf", "pitome", "diffrate", "evit", "imagepiece", "dpc_knn", "token_pooling", "algm")
SIZES = (0.93, 0.86, 0.79)  # of the model's own input side, before a method
BLIND = "so many photos choose and so many report, at random among those that --limit N does not take"
FAMILIES = ("plain", "single", "composition", "schedule")


def main() -> None:
    parser = parser_of(__doc__, "runs/schedules", "model", "weights")
    parser.add_argument("data", help="photos with labels")
    parser.add_argument("--split")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.5, 2.0, 3.0], help="times fewer MACs")
    parser.add_argument("--limit", type=int, help="take only so many photos, spread evenly over the split")
    parser.add_argument("--blind", type=int, nargs=3, metavar=("N", "CHOOSE", "REPORT"), help=BLIND)
    parser.add_argument("--tries", type=int, default=TRIES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = saccade.create_model(given.model, weights=given.weights).eval()
    images = open_images(given.data, given.split)
    if given.limit:
        images = images.subset([i * len(images) // given.limit for i in range(given.limit)])
    evaluator = Evaluator(model, images)
    store = Cache.of(given.out / "cache", evaluator)
    halves = shuffled_halves(len(evaluator.images), given.seed, evaluator.labels)
    if given.blind:
        halves = unseen(len(evaluator.images), *given.blind)
    rows = []
    for speed in given.speeds:
        lines = {family: rivals(model, family, speed) for family in FAMILIES[:3]}
        found = schedules(
            evaluator,
            halves[0],
            partial(macs, ratio=speed),
            Allowance(),
            tries=given.tries,
            seed=given.seed,
            folder=store.folder,
        )
        lines["schedule"] = [candidate.setting for candidate in found.candidates]
        print(f"{speed}×: {found.note}", file=sys.stderr, flush=True)
        rows += table(evaluator, store, halves, speed, lines)
        write_json(given.out / f"{Path(given.data).stem}-schedules.json", {"rows": rows})
    print(json.dumps(rows, indent=2))


def unseen(count: int, limit: int, choose: int, report: int) -> tuple[list[int], list[int]]:
    """Places that choose and that report, in order, none of which is in an evenly spread subset of so many."""
    seen = {i * count // limit for i in range(limit)}
    rest = [i for i in range(count) if i not in seen]
    random.Random(1).shuffle(rest)
    return sorted(rest[:choose]), sorted(rest[choose : choose + report])


def rivals(model: saccade.AdaptiveViT, family: str, speed: float) -> list[str]:
    """Settings of a family for a budget, those within reach."""
    side, space = model.backbone.input_size[0], Space.of(model)
    patch, dense = model.backbone.patch_size[0], space.macs(space.empty(""))
    sizes = [f"grid({patch}, size={s})" for s in sorted({patch * round(share * side / patch) for share in SIZES})]
    sizes = [before for before in sizes if space.macs(space.empty(before)) > dense / speed]
    if family == "plain":
        menu = {t: space.macs(space.empty(t)) for t in space.tokenizers}
        return [max((t for t in menu if menu[t] <= dense / speed), key=lambda t: menu[t])]
    found = []
    for name in SINGLE:
        for before in [""] if family == "single" else sizes:
            with suppress(UserError):  # out of its reach
                setting = strength(space, before, name, dense / speed) if before else f"{name}(speed={speed})"
                model.at(setting)
                found.append(setting)
    return found


def strength(space: Space, before: str, name: str, budget: float) -> str:
    """A method at the strength that meets a budget behind a tokenizer; its own knob counts in the model's own size.

    Raises UserError where none does.
    """
    low, high = 0.0, space.macs(space.empty("")) / 1e9
    for _ in range(16):
        middle = (low + high) / 2
        with suppress(UserError):
            if price(space.model, f"{before} | {name}(gmacs={middle:.6f})") > budget:
                high = middle
                continue
        low = middle
    setting = f"{before} | {name}(gmacs={low:.6f})"
    if price(space.model, setting) > budget:
        raise UserError(f"{setting} is over {budget:g} MACs")
    return setting


def table(evaluator: Evaluator, store: Cache, halves: tuple, speed: float, lines: dict[str, list[str]]) -> list[dict]:
    """Of each family the best by the half that chooses, on the half that reports; with differences."""

    def hits(setting: str, half: int) -> torch.Tensor:
        view = evaluator.dense if setting == "dense" else evaluator.dense.at(setting).eval()
        said = store.get(setting, halves[half], lambda: evaluator.predict(view, halves[half]))
        gmacs[setting] = said.macs.mean().item() / 1e9
        order = said.indices.argsort()
        return evaluator.hits(said)[order]

    gmacs: dict[str, float] = {}
    dense, chosen = hits("dense", 1), {}
    hits("dense", 0)
    for family, settings in lines.items():
        scores = {setting: hits(setting, 0).double().mean().item() for setting in settings}
        if scores:
            chosen[family] = max(scores, key=lambda setting: scores[setting])
    rows = []
    for family, setting in chosen.items():
        own = hits(setting, 1)
        row = {"speed": speed, "family": family, "tried": len(lines[family]), "setting": setting}
        row |= {"gmacs": gmacs[setting], "top1": own.double().mean().item(), "images": len(own)}
        row["against dense"] = paired_difference(own, dense).three()
        if family != "schedule" and "schedule" in chosen:
            row["schedule − this"] = paired_difference(hits(chosen["schedule"], 1), own).three()
        rows.append(row)
        print(json.dumps(row, ensure_ascii=False), file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
