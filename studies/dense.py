"""Which way of saving tokens leaves most of a segmentation, at the same measured time?

Claim     ALGM (arXiv 2406.09936): merging alike neighbours early and alike tokens later costs a segmenter nothing or
          less. ImagePiece (arXiv 2412.16491) and ToMe (arXiv 2210.09461) merge without a word on dense tasks. All of
          them are held against plain ways to be as fast, smaller inputs and larger patches, and the random baseline.
Method    ViT-Tiny (AugReg) to CamVid's 11 classes with a linear head, photos brought to 288×384 (432 tokens); merged
          tokens give their features to all of their cells, dropped ones their last. Trained once, dense. Then every
          method at four strengths without training; then one strength of each is tuned from there, and tested at its
          neighbours too: the same images and steps for all, dense as well. mIoU on the 101 validation photos at their
          own 360×480. Speed-ups: fp32, batch 8, two threads, all interleaved with dense, medians. At equal time: read
          off the line between a method's two strengths next to it. 95 % intervals, paired over photos; one seed.
Command   python studies/dense.py camvid_dev.zip vit_tiny_patch16_224.safetensors --out runs/dense; again with
          --time (on a machine at rest; more such calls are averaged), and again without: nothing is trained twice
Cost      an estimate: 25 minutes of one core, most of it training
Expected  algm > tome > imagepiece, whose judge, the class token, no segmenter trains; all above the random baseline.
Measured  docs/results-imagepiece.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jobs import Memory, autocast, between, parser_of, points, show, timed, train_all, verdict
from torch import Tensor

import saccade
from saccade.evaluation.stats import Interval
from saccade.storage.files import write_json
from saccade.tasks.segmentation.mean_iou import Counts, count, interval, mean_iou
from saccade.tasks.segmentation.segmentation_data import PixelSet, open_pixels
from saccade.training.config import read_config

SIZE = (288, 384)
METHODS = {  # settings that run 1/1.25, 1/1.5, 1/1.8 and about 1/2.2 of the dense model's MACs, as near as they come
    "algm": [f"algm({local}, {merge})" for local, merge in ((0.17, 0.09), (0.31, 0.15), (0.43, 0.22), (0.56, 0.28))],
    "tome": [f"tome(r={r})" for r in (13, 22, 30, 35)],
    "imagepiece": [f"imagepiece(merge={share})" for share in (0.043, 0.08, 0.117, 0.15)],
    "imagepiece, received": [f"imagepiece(merge={share}, score='received')" for share in (0.043, 0.08, 0.117, 0.15)],
    "random": [f"random({keep})" for keep in (0.86, 0.74, 0.61, 0.45)],
    "smaller input": [f"grid(16, size={size})" for size in ((256, 352), (240, 320), (224, 304), (208, 272))],
    "larger patches": [f"grid({patch})" for patch in (18, 20, 22, 24)],
}
TUNED = ("algm", "tome", "imagepiece", "random", "smaller input")
STRENGTH = 1  # that they are tuned at; tested at its neighbours too
SPEEDS = (1.2, 1.4, 1.6)
PLAIN = ("random", "smaller input", "larger patches")
SLACK = 0.01  # what may be lost by one that costs nothing

Point = Sequence[tuple[float, Counts]]  # shares, and what they are of: a place on a line between two settings


def main() -> None:
    parser = parser_of(__doc__, "runs/dense", "data", "weights")
    parser.add_argument("--steps", type=int, default=300, help="of the dense run")
    parser.add_argument("--tuning", type=int, default=80, help="steps of every other run")
    parser.add_argument("--limit", type=int, help="validation photos; default: all")
    parser.add_argument("--time", action="store_true", help="only time all settings, and stop")
    parser.add_argument("--seconds", type=float, default=75, help="of timing")
    arguments = parser.parse_args()
    out: Path = arguments.out
    times = out / "speed.json"
    calls: dict[str, list[float]] = json.loads(times.read_text()) if times.exists() else {}
    if arguments.time:
        every = [setting for own in METHODS.values() for setting in own]
        found = timed(saccade.load(out / "dense" / "model", "dense"), every, arguments.seconds, batch=8)
        write_json(times, calls | {s: [*calls.get(s, []), v] for s, v in found.items()})
        return

    torch.set_num_threads(1)
    common = [f"data.path={arguments.data}", f"model.size={list(SIZE)}", "segment.head=linear"]
    common += ["data.holdout=0", "data.workers=0", "run.batch=8", "run.threads=1", "run.save_every=40"]
    first = [f"model.weights={arguments.weights}", f"run.steps={arguments.steps}", "sampling.settings=['dense']"]
    train_all({"dense": ["segment", *common, *first]}, out, 1)
    asked = Asked(out, arguments.data, arguments.limit)
    speed = {setting: sum(found) / len(found) for setting, found in calls.items()}
    free = {name: [("dense", setting) for setting in own] for name, own in {"dense": ["dense"], **METHODS}.items()}
    report(asked, "without training", free, speed)

    rule = [f"model.name={out / 'dense' / 'model'}", f"run.steps={arguments.tuning}", "optim.lr=1e-4"]
    settings = {"dense": ["dense"], **{name: METHODS[name][STRENGTH - 1 : STRENGTH + 2] for name in TUNED}}
    tuned = {name: [(f"tuned-{name.replace(' ', '-')}", s) for s in own] for name, own in settings.items()}
    chosen = dict(own[len(own) // 2] for own in tuned.values())
    train_all({run: ["segment", *common, *rule, f"sampling.settings={[s]}"] for run, s in chosen.items()}, out, 1)
    report(asked, "tuned", tuned, speed)


class Asked:
    """What a run's model, under a setting, says of the validation photos; remembered in a file."""

    def __init__(self, out: Path, data: str, limit: int | None) -> None:
        rule = read_config("segment").segment
        self.out, self.memory = out, Memory(out / "counts.safetensors")
        self.pixels: PixelSet = open_pixels(data, "val", rule.classes, rule.void)
        self.places = range(len(self.pixels))[:limit]

    def __call__(self, run: str, setting: str) -> Counts:
        key = f"{run}|{setting}|{len(self.places)}"

        def make() -> dict[str, Tensor]:
            model: Any = saccade.load(self.out / run / "model", setting)
            with autocast():  # as it was trained
                found = count(model.eval(), self.pixels, self.places, "fit", 8, lambda done: None)
            assert not self.pixels.failures, self.pixels.failures
            print(f"{key}: {level([(1.0, found)]).mean:.1%}", file=sys.stderr, flush=True)
            return {"sums": torch.stack(found.sums), "macs": torch.tensor([found.macs], dtype=torch.float64)}

        seen = self.memory.all({"sums": key, "macs": f"{key}|macs"}, make)
        hit, there, said = seen["sums"].unbind()
        return Counts(torch.tensor(self.places), hit, there, said, seen["macs"].item())


def report(asked: Asked, title: str, methods: dict[str, list[tuple[str, str]]], speed: dict[str, float]) -> None:
    """Print the tables and verdicts of methods' runs under their settings, dense first, and write them as JSON."""
    found = {name: [(setting, asked(run, setting)) for run, setting in own] for name, own in methods.items()}
    dense: Point = [(1.0, found["dense"][0][1])]
    rows = [
        {
            "method": name,
            "setting": f"`{setting}`",
            "GMACs": f"{counts.macs / 1e9:.3f}",
            "speed-up": f"{speed[setting]:.2f}×" if setting in speed else "",
            "mIoU": shown([(1.0, counts)]),
            "− dense": "" if name == "dense" else points(level([(1.0, counts)], dense)),
        }
        for name, own in found.items()
        for setting, counts in own
    ]
    tables = {f"CamVid, {title}": rows}
    if speed:
        lines = {n: [*dense, *((speed[s], c) for s, c in own)] for n, own in found.items() if n != "dense"}
        there = {(name, goal): at_speed(line, goal) for name, line in lines.items() for goal in SPEEDS}
        tables[f"CamVid, {title}, at equal measured time"] = [
            {"method": name, **{f"{goal:g}×": shown(there[name, goal]) for goal in SPEEDS}} for name in lines
        ]
        tables[f"Claims, {title}"] = claims(there, dense)
    write_json(asked.out / f"{title.replace(' ', '-')}.json", {"tables": tables, "speed": speed})
    for name, table in tables.items():
        show(name, table)


def claims(there: dict[tuple[str, float], Point | None], dense: Point) -> list[dict[str, str]]:
    """Verdicts at each speed-up that both sides of a claim can be read at."""
    found = []
    merging = [name for name in dict.fromkeys(name for name, _ in there) if name not in PLAIN]
    pairs = [(a, b) for i, a in enumerate(merging) for b in merging[i + 1 :]]
    pairs += [(a, b) for a in merging for b in PLAIN if (b, SPEEDS[0]) in there]
    for goal in SPEEDS:
        sides = [(f"{a} > {b}", there[a, goal], there[b, goal], 0.0) for a, b in pairs]
        sides += [(f"{a} within {100 * SLACK:g} point of dense", there[a, goal], dense, SLACK) for a in merging]
        for words, one, other, slack in sides:
            if one is not None and other is not None:
                gap = level(one, other)
                found.append({"claim": f"at {goal:g}×: {words}", "points": points(gap), "verdict": verdict(gap, slack)})
    return found


def at_speed(line: Sequence[tuple[float, Counts]], goal: float) -> Point | None:
    """The place at a speed-up on the line through (speed-up, counts), straight in time; None beyond its ends."""
    speeds = [speed for speed, _ in line]
    if not min(speeds) <= goal <= max(speeds):
        return None
    return between([(1 / speed, counts) for speed, counts in line], 1 / goal)


def level(point: Point, other: Point = ()) -> Interval:
    """mIoU of a place on a line with its 95 % interval over photos, or its paired difference to that of another."""
    parts = [*point, *((-share, counts) for share, counts in other)]

    def statistic(*sums: Tensor) -> Tensor:
        each = [mean_iou(*sums[3 * i : 3 * i + 3]) for i in range(len(parts))]
        return torch.stack([share * value for (share, _), value in zip(parts, each, strict=True)]).sum(0)

    return interval(statistic, [part for _, counts in parts for part in counts.sums])


def shown(point: Point | None) -> str:
    return (
        "out of reach" if point is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in level(point).three()))
    )


if __name__ == "__main__":
    main()
