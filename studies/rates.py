"""Training-free methods at equal MACs: what are learned counts worth?

Claim     DiffRate (arXiv 2305.17997, Table 1): with counts learned for each block it loses less than merging or pruning
          alone, without training the model (DeiT-S at 2.3 GMACs: 78.8 %, ToMe 78.0 %).
Method    A pretrained model. `saccade calibrate` learns diffrate's lists for each budget from photos without labels, by
          moves on the real thing and by gradients as published;
          every rival gets its strength by arithmetic for the same budget. Top-1 on other photos, and paired differences
          to the dense model, 95 % intervals over images; the learned lists of one seed.
Command   python studies/rates.py vit_tiny_patch16_224 vit_tiny_patch16_224.safetensors --learn nette160.zip
          --test inval227_dev.zip nette160.zip --out runs/rates
Cost      an estimate: 20 minutes of one core; interrupted runs go on
Expected  learned diffrate ≥ each rival
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import saccade
from saccade.evaluation.calibrate import calibrate
from saccade.evaluation.knob_search import KnobSearch
from saccade.storage.files import write_json

SPEEDS = (1.5, 2.0)  # times fewer MACs
RIVALS = ("diffrate", "tome", "tofu", "mctf", "pitome", "evit", "random")
LEARNED = {"by moves": "diffrate, by moves", "by gradients": "diffrate, by gradients"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("weights")
    parser.add_argument("--learn", required=True, help="photos with a split train")
    parser.add_argument("--test", nargs="+", required=True, help="photos with labels")
    parser.add_argument("--moves", type=int, default=150, help="of learning, 96 photos each")
    parser.add_argument("--steps", type=int, default=100, help="of learning by gradients, 16 photos each")
    parser.add_argument("--limit", type=int, default=400, help="photos to learn from")
    parser.add_argument("--out", type=Path, default=Path("runs/rates"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = saccade.create_model(given.model, weights=given.weights).eval()
    dense = float(model(torch.zeros(1, 3, *model.input_size())).trace.macs()) / 1e9
    lines = {(name, speed): f"{name}(speed={speed})" for speed in SPEEDS for name in RIVALS}
    for speed in SPEEDS:
        for how, name in LEARNED.items():
            steps, moves = (0, given.moves) if how == "by moves" else (given.steps, 0)
            lines[name, speed] = learned(model, dense / speed, given, KnobSearch(steps, moves=moves))
            print(f"{speed}×, {how}: {lines[name, speed]}", file=sys.stderr, flush=True)
    tables = {}
    for data in given.test:
        rows = saccade.eval(model, data, list(lines.values()), seconds=0, out=given.out / Path(data).stem)
        tables[Path(data).stem] = rows.to_dicts()
    write_json(given.out / "rates.json", {"lines": [[*key, line] for key, line in lines.items()], "rows": tables})
    print(json.dumps(summary(lines, tables), indent=2))


def learned(model: saccade.AdaptiveViT, gmacs: float, given: argparse.Namespace, search: KnobSearch) -> str:
    """The setting whose counts are learned for a budget."""
    found = calibrate(model, given.learn, "diffrate()", gmacs, split="train", limit=given.limit,
                      cache=given.out / "learned", search=search)  # fmt: skip
    return found.setting


def summary(lines: dict[tuple[str, float], str], tables: dict[str, Sequence[dict]]) -> list[dict]:
    """Accuracy and MACs of each line, by photos and speed."""
    rows = {(data, row["setting"]): row for data, found in tables.items() for row in found}
    return [
        {"photos": data, "speed": speed, "method": name, "setting": line}
        | {key: rows[data, line][key] for key in ("top1", "delta", "delta_low", "delta_high", "gmacs")}
        for (name, speed), line in lines.items()
        for data in tables
    ]


if __name__ == "__main__":
    main()
