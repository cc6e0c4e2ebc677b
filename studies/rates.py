"""Training-free methods at equal MACs: what are learned counts worth?

Claim     DiffRate (arXiv 2305.17997, Table 1): with counts learned for each block it loses less than merging or pruning
          alone, without training the model (DeiT-S at 2.3 GMACs: 78.8 %, ToMe 78.0 %).
Method    A pretrained model. `saccade calibrate` learns diffrate's lists for each budget from photos without labels, by
          moves on the real thing and by gradients as published; every rival gets its strength by arithmetic for the
          same budget, and `ltmp`, whose counts depend on the image, the threshold of dropping that meets it on the
          photos to learn from. `dynamicvit` is untrained, and so a random control with predictors to pay for. Top-1 on
          other photos, with paired differences to the dense model and of the counts by moves to each rival, 95 %
          intervals over images; the learned lists of one seed.
Command   python studies/rates.py vit_tiny_patch16_224 vit_tiny_patch16_224.safetensors --learn nette160.zip
          --test inval227_dev.zip nette160.zip --out runs/rates
Cost      an estimate: 40 minutes of one core; what was interrupted goes on from its last move or piece of photos.
          The stages learn and test can be run by themselves (--stage)
Expected  learned diffrate ≥ each rival
Measured  docs/results.md, "Training-free methods at equal MACs"
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from jobs import parser_of, points, verdict, write
from safetensors.torch import load_file
from torch import Tensor

import saccade
from saccade.data import Loader, Preprocess, head_labels, open_images
from saccade.evaluation.accuracy import spread
from saccade.evaluation.calibrate import bisect, calibrate
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.knob_search import KnobSearch
from saccade.evaluation.stats import paired_difference, proportion
from saccade.storage.files import write_json, write_text

SPEEDS = (1.5, 2.0)  # times fewer MACs
PIECE = 96  # photos between two notes of what was said
FEW = 96  # photos that a threshold is found on
BEST = "diffrate, by moves"
RIVALS = ("diffrate", "tome", "tofu", "mctf", "pitome", "algm", "dpc_knn", "evit", "dynamicvit", "random")
Lines = dict[tuple[str, float], str]  # settings by method and speed
Seen = dict[str, dict[str, Tensor]]  # by setting: whether each photo is classified rightly, and its MACs, [n] each


def main() -> None:
    parser = parser_of(__doc__, "runs/rates", "model", "weights")
    parser.add_argument("--learn", required=True, help="photos with a split train")
    parser.add_argument("--test", nargs="+", required=True, help="photos with labels")
    parser.add_argument("--moves", type=int, default=150, help="of learning, 96 photos each")
    parser.add_argument("--steps", type=int, default=100, help="of learning by gradients, 16 photos each")
    parser.add_argument("--limit", type=int, default=400, help="photos to learn from")
    parser.add_argument("--test-limit", type=int, help="test only so many of each kind")
    parser.add_argument("--stage", choices=("learn", "test"), help="one of them alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    model = saccade.create_model(given.model, weights=given.weights).eval()
    if given.stage in (None, "learn"):
        learn(model, given)
    if given.stage != "learn":
        lines = known(given)
        tables = {Path(data).stem: tested(model, data, ["dense", *lines.values()], given) for data in given.test}
        text = report(lines, tables)
        write_text(given.out / "rates.md", text)
        print(text)


def learn(model: saccade.AdaptiveViT, given: argparse.Namespace) -> None:
    """Find what no arithmetic tells, and write it down."""
    dense = float(model(torch.zeros(1, 3, *model.input_size())).trace.macs()) / 1e9
    for speed in SPEEDS:
        gmacs = dense / speed
        ways: dict[str, Callable[[], str]] = {
            BEST: partial(learned, model, gmacs, given, KnobSearch(0, moves=given.moves)),
            "diffrate, by gradients": partial(learned, model, gmacs, given, KnobSearch(given.steps, moves=0)),
            "ltmp": partial(dropping, model, gmacs, given),
        }
        for name, find in ways.items():
            found = read(given)
            if (key := f"{name}|{speed}") not in found:
                found[key] = find()
                write_json(given.out / "settings.json", found)
                print(f"{speed}×, {name}: {found[key]}", file=sys.stderr, flush=True)


def read(given: argparse.Namespace) -> dict[str, str]:
    """What was found so far, by method and speed."""
    file = given.out / "settings.json"
    return json.loads(file.read_text()) if file.exists() else {}


def known(given: argparse.Namespace) -> Lines:
    """The settings that can be tested: all, once all are found."""
    lines: Lines = {}
    for key, line in read(given).items():
        name, speed = key.split("|")
        lines[name, float(speed)] = line
    return lines | {(name, speed): f"{name}(speed={speed})" for speed in SPEEDS for name in RIVALS}


def learned(model: saccade.AdaptiveViT, gmacs: float, given: argparse.Namespace, search: KnobSearch) -> str:
    """The setting whose counts are learned for a budget."""
    found = calibrate(model, given.learn, "diffrate()", gmacs, split="train", limit=given.limit,
                      cache=given.out / "learned", search=search)  # fmt: skip
    return found.setting


def dropping(model: saccade.AdaptiveViT, gmacs: float, given: argparse.Namespace) -> str:
    """ltmp with the threshold of dropping, the same in all blocks, that meets a budget on average."""
    evaluator = Evaluator(model, open_images(given.learn, "train"))
    places = spread(len(evaluator.images), min(FEW, given.limit))

    def cost(threshold: float) -> float:
        view = apart(model, f"ltmp(start={threshold})")
        return evaluator.predict(view, places).macs.mean().item() / 1e9

    return f"ltmp(start={bisect(cost, gmacs)})"


def apart(model: saccade.AdaptiveViT, setting: str) -> saccade.AdaptiveViT:
    """The same ViT under a setting, with thresholds that start there and not where another setting's did."""
    return saccade.AdaptiveViT(model.vit, setting).eval()


def tested(model: saccade.AdaptiveViT, data: str, lines: Sequence[str], given: argparse.Namespace) -> Seen:
    """What each setting says to some photos, written down a piece at a time: an interrupted one goes on."""
    file = given.out / f"{Path(data).stem}.safetensors"
    images = open_images(data)
    labels = torch.tensor(head_labels(images, model.vit).indices)
    places = spread(len(images), given.test_limit)
    loader = Loader(images, Preprocess.of(model.vit, model.input_size()))
    flat = load_file(file) if file.exists() else {}
    for line in lines:
        view = apart(model, line)
        hit, macs = (flat.get(f"{line}|{what}", torch.empty(0, dtype=torch.float64)) for what in ("hit", "macs"))
        while len(hit) < len(places):
            piece = places[len(hit) : len(hit) + PIECE]
            for batch in loader.batches(32, piece):
                with torch.inference_mode():
                    out = view(batch.images)
                right = out.logits.argmax(-1) == labels[list(batch.indices)]
                hit, macs = torch.cat([hit, right.double()]), torch.cat([macs, out.trace.macs().double()])
            flat |= {f"{line}|hit": hit, f"{line}|macs": macs}
            write(flat, file)
    assert not loader.failures.items, loader.failures.items
    return {line: {what: flat[f"{line}|{what}"] for what in ("hit", "macs")} for line in lines}


def report(lines: Lines, tables: dict[str, Seen]) -> str:
    """Tables by photos, as Markdown: the better first."""
    parts = []
    for photos, seen in tables.items():
        dense, count = seen["dense"]["hit"], len(seen["dense"]["hit"])
        parts += [f"{photos}, {count} photos, dense {proportion(dense).percent()}:", ""]
        parts += ["| speed | method | GMACs | top-1 | − dense, points | by moves − this, points | by moves is better |"]
        parts += ["|" + "---|" * 7]
        for speed in SPEEDS:
            if (BEST, speed) not in lines:
                continue
            best = seen[lines[BEST, speed]]["hit"]
            rows = [(name, seen[line]) for (name, at), line in lines.items() if at == speed]
            for name, own in sorted(rows, key=lambda row: -row[1]["hit"].double().mean().item()):
                away = paired_difference(best, own["hit"])
                told = ("", "") if name == BEST else (points(away), verdict(away))
                cells = [f"{speed}×", name, f"{own['macs'].mean() / 1e9:.3f}", f"{own['hit'].double().mean():.1%}"]
                cells += [points(paired_difference(own["hit"], dense)), *told]
                parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    found = dict.fromkeys((name, speed, line) for (name, speed), line in lines.items() if name not in RIVALS)
    parts += [f"- {speed}×, {name}: `{line}`" for name, speed, line in found]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
