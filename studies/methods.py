"""What does each registered method cost and lose, training-free, near 1.5 and 2 times fewer MACs?

Claim     None of its own: one row for each method and budget on the same photos, for the methods' pages.
Method    Of each method's menu the setting whose executed MACs on 16 of the photos come nearest to a budget; where none
          is within 5 % and the method takes a budget, that budget. A method that has to be trained has no row. Top-1
          with 95 % intervals, paired differences to the dense model.
Command   python studies/methods.py vit_tiny_patch16_224 vit_tiny_patch16_224.safetensors inval227_dev.zip; then, on a
          machine at rest, the same with --time, which adds speed.json
Cost      an estimate: 15 minutes of one core; an interrupted call goes on. With --time about 10 minutes
Measured  docs/measured/methods.json and speed.json, which the site's pages of methods show
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jobs import parser_of

import saccade
from saccade.core.registry import Entry, registry
from saccade.errors import UserError
from saccade.evaluation.circumstances import circumstances
from saccade.storage.files import write_json
from saccade.terminal.progress import Progress

GOALS = (1.5, 2.0)  # times fewer MACs
NEAR = math.log(1.05)  # how far from its goal a setting of the menu may be, where the method takes a budget
FEW = 16  # photos that settings are priced on
SCORED: tuple[str, ...] = ("gmacs", "mac_ratio", "tokens", "p_value")
SCORED += tuple(f"{name}{end}" for name in ("value", "delta") for end in ("", "_low", "_high"))
TIMED = ("runner", "batch", "speedup", "speedup_low", "speedup_high", "images_per_s", "conversion", "runs")
OUT = Path(__file__).parents[1] / "docs" / "measured"


def main() -> None:
    parser = parser_of(__doc__, OUT, "model")
    parser.add_argument("weights", type=Path)
    parser.add_argument("data", type=Path, help="photos with labels")
    parser.add_argument("--cache", type=Path, default=Path("runs/methods"), help="folder to go on from")
    parser.add_argument("--limit", type=int, help="photos; default: all")
    parser.add_argument("--time", action="store_true", help="only time the settings of methods.json")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runner", nargs="+", default=["eager"])
    parser.add_argument("--seconds", type=float, default=240, help="of timing, for each batch size")
    given = parser.parse_args()
    if not given.time:
        torch.set_num_threads(1)
    model = saccade.create_model(given.model, weights=given.weights).eval()
    command = f"python studies/methods.py {given.model} {given.weights.name} {given.data.name}"
    with Progress(shown=True) as progress:
        if given.time:
            rows = timed(model, given, progress)
            write_json(given.out / "speed.json", {"about": about(model, f"{command} --time"), "rows": rows})
            return
        rows = scored(model, given, progress)
    # One thread or two, this processor or that: accuracy does not depend on the machine.
    facts = {name: fact for name, fact in about(model, command).items() if name not in ("device", "threads")}
    facts |= {"data": given.data.name, "images": rows[0]["images"], "metric": "top-1"}
    write_json(given.out / "methods.json", {"about": facts, "rows": rows})


def about(model: saccade.AdaptiveViT, command: str) -> dict[str, Any]:
    """What a file says of its origin."""
    return {"command": command, **circumstances(model)}


def scored(model: saccade.AdaptiveViT, given: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """A row for dense, and one for each method and goal."""
    menus = {name: menu(entry, model) for name, entry in registry().items()}
    every = [setting for settings in menus.values() for setting in settings]
    priced = saccade.eval(model, given.data, every, limit=FEW, out=given.cache / "priced", progress=progress)
    ratios = {row.setting: row.mac_ratio for row in priced.rows}
    chosen = {name: chosen_of(menus[name], ratios) for name in menus}
    every = [setting for settings in chosen.values() for setting in settings]
    found = saccade.eval(model, given.data, every, limit=given.limit, out=given.cache / "scored", progress=progress)
    rows = {row["setting"]: row for row in found.to_dicts()}
    named = [("", "dense"), *((name, setting) for name, settings in chosen.items() for setting in settings)]
    return [
        {"method": name, "setting": setting, "images": rows[setting]["images"]} | rounded(rows[setting], SCORED)
        for name, setting in named
    ]


def menu(entry: Entry, model: saccade.AdaptiveViT) -> list[str]:
    """What a method offers without training: its menu and, where it takes a budget, itself at each goal.

    One that has to be trained offers nothing; a control that `tune` does not try offers itself as it is.
    """
    settings = list(entry.menu(model.backbone))
    if not settings and not entry.baseline:
        return []
    if "speed" in entry.knobs:
        settings += [line for goal in GOALS if within_reach(model, line := f"{entry.name}(speed={goal})")]
    return settings or [f"{entry.name}()"]


def within_reach(model: saccade.AdaptiveViT, setting: str) -> bool:
    try:
        model.at(setting)
    except UserError:
        return False
    return True


def chosen_of(settings: Sequence[str], ratios: dict[str, float]) -> list[str]:
    """For each goal the setting nearest to it; one with a budget only where no other is near."""
    found = []
    for goal in GOALS if settings else ():
        off = {setting: abs(math.log(ratios[setting] / goal)) for setting in settings}
        near = {s: far for s, far in off.items() if far <= NEAR and "speed=" not in s} or off
        found.append(min(near, key=lambda setting: near[setting]))
    return list(dict.fromkeys(found))


def timed(model: saccade.AdaptiveViT, given: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Speed of all settings of methods.json, interleaved with dense."""
    settings = [row["setting"] for row in json.loads((given.out / "methods.json").read_text())["rows"]]
    found = saccade.bench(
        model, settings, batch=given.batch, runner=given.runner, seconds=given.seconds, progress=progress
    )
    return [{"setting": row["setting"]} | rounded(row, TIMED) for row in found.to_dicts()]


def rounded(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """These facts of a row; numbers to five digits, which is more than they are sure of."""
    return {name: float(f"{row[name]:.5g}") if isinstance(row[name], float) else row[name] for name in names}


if __name__ == "__main__":
    main()
