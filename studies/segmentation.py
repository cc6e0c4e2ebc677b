"""Is one segmentation model, trained at random patch sizes, as good at each as one that was trained at that size?

Claim     FlexiViT (arXiv 2212.08013) §4 and §6: a dense task trained at random patch sizes works at all of them, also
          when it starts from an ordinary ViT; a model trained at one size works at that size alone. Segmenter
          (arXiv 2105.05633): its mask transformer is better than a linear head.
Method    ViT-Tiny (AugReg, ImageNet-1k, patch 16) to CamVid's 11 classes, images brought to 192×256. Fixed: every step
          at patch 16 (or 32). Flexible: every step at one of 12, 16, 20, 24, 32, drawn evenly. The same images, steps
          and learning rates. mIoU on the 101 validation images at their own 360×480, at sizes trained and not, with
          95 % bootstrap intervals over images; differences are paired. One seed unless more are given.
Command   python studies/segmentation.py camvid_dev.zip vit_tiny_patch16_224.safetensors --out runs/segmentation
Cost      an estimate: 25 minutes of one free core for each seed
Expected  flexible: no worse at 16 than fixed, far better away from it; near the one trained at 32 there.
Measured  not yet
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jobs import Memory, autocast, parser_of, table, train_all

import saccade
from saccade.evaluation.stats import Interval
from saccade.storage.files import write_json
from saccade.tasks.segmentation.mean_iou import Counts, count, interval, iou, mean_iou
from saccade.tasks.segmentation.segmentation_data import PixelSet, open_pixels
from saccade.training.config import read_config

SIZE = (192, 256)
TRAINED = (12, 16, 20, 24, 32)
TESTED = (10, *TRAINED, 40)  # the first and the last were not trained at
RUNS = {  # head, patch sizes of the steps
    "mask-fixed16": ("mask", (16,)),
    "mask-fixed32": ("mask", (32,)),
    "mask-flexible": ("mask", TRAINED),
    "linear-fixed16": ("linear", (16,)),
    "linear-flexible": ("linear", TRAINED),
}
OTHERS = ("tome(r=8)", "tome(r=13)", "evit(0.7)")  # merging and pruning at patch 16, never trained


def main() -> None:
    parser = parser_of(__doc__, "runs/segmentation", "data", "weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = arguments.out

    common = [
        f"data.path={arguments.data}",
        f"model.weights={arguments.weights}",
        f"model.size={list(SIZE)}",
        "data.holdout=0",  # the validation images are the last word
        "data.workers=0",
        f"run.steps={arguments.steps}",
        "run.batch=12",
        "run.threads=1",
        "run.save_every=50",
    ]
    runs = {
        f"{name}-{seed}": [
            "segment",
            *common,
            f"segment.head={head}",
            f"sampling.settings={[_setting(p) for p in patches]}",
            f"run.seed={seed}",
        ]
        for seed in arguments.seeds
        for name, (head, patches) in RUNS.items()
    }
    train_all(runs, out, arguments.at_once)

    rule = read_config("segment").segment
    pixels: PixelSet = open_pixels(arguments.data, "val", rule.classes, rule.void)
    memory = Memory(out / "counts.safetensors")  # of finished runs, which do not change

    def of(run: str, setting: str) -> Counts:
        def make() -> dict[str, torch.Tensor]:
            model: Any = saccade.load(out / run / "model", setting)
            with autocast():  # as it was trained
                found = count(model.eval(), pixels, range(len(pixels)), "fit", 8, lambda done: None)
            assert not pixels.failures, pixels.failures
            macs = torch.tensor([found.macs, found.decoder], dtype=torch.float64)
            return {"sums": torch.stack(found.sums), "macs": macs}

        key = f"{run}|{setting}"
        seen = memory.all({"sums": key, "macs": f"{key}|macs"}, make)
        return Counts(torch.arange(len(pixels)), *seen["sums"], *seen["macs"].tolist())

    facts = {run: json.loads(next((out / run / "checkpoints").glob("last-*/state.json")).read_text()) for run in runs}
    tables = {}
    for seed in arguments.seeds:
        for head in ("linear", "mask"):
            fixed, flexible = (f"{head}-{kind}-{seed}" for kind in ("fixed16", "flexible"))
            tables[f"{head} head, seed {seed}"] = [
                _row(setting, of(fixed, setting), of(flexible, setting), of(f"mask-fixed32-{seed}", setting), head)
                for setting in (*map(_setting, TESTED), *OTHERS)
            ]
        heads = [(s, of(f"mask-flexible-{seed}", s), of(f"linear-flexible-{seed}", s)) for s in map(_setting, TESTED)]
        tables[f"heads, flexible, seed {seed}"] = [
            {
                "setting": setting,
                "linear": interval(mean_iou, linear.sums),
                "mask": interval(mean_iou, mask.sums),
                "mask − linear": interval(mean_iou, mask.sums, linear.sums),
                "GMACs linear": linear.macs / 1e9,
                "GMACs mask": mask.macs / 1e9,
            }
            for setting, mask, linear in heads
        ]
    first = arguments.seeds[0]
    named = (("fixed16", "dense"), ("flexible", "dense"), ("flexible", _setting(12)))
    each = {f"{kind}, {s}": iou(*(p.sum(0) for p in of(f"mask-{kind}-{first}", s).sums)).tolist() for kind, s in named}
    tables[f"IoU of each class, mask head, seed {first}"] = [
        {"setting": name, **{k: v[i] for k, v in each.items()}} for i, name in enumerate(rule.classes)
    ]
    costs = {run: {"minutes": f["seconds"] / 60, "GMACs": sum(f["spent"])} for run, f in facts.items()}
    plain = {
        title: [{k: vars(v) if isinstance(v, Interval) else v for k, v in row.items()} for row in rows]
        for title, rows in tables.items()
    }
    write_json(out / "segmentation.json", {"tables": plain, "costs": costs})
    for title, rows in tables.items():
        show(title, rows)
    print()
    for run, cost in costs.items():
        print(f"{run}: {cost['minutes']:.1f} minutes, {cost['GMACs']:,.0f} GMACs")


def _setting(patch: int) -> str:
    return "dense" if patch == 16 else f"grid({patch})"


def _row(setting: str, fixed: Counts, flexible: Counts, coarse: Counts, head: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "setting": setting,
        "fixed at 16": interval(mean_iou, fixed.sums),
        "flexible": interval(mean_iou, flexible.sums),
        "flexible − fixed": interval(mean_iou, flexible.sums, fixed.sums),
    }
    if head == "mask":
        row["fixed at 32"] = interval(mean_iou, coarse.sums)
    return {**row, "GMACs": flexible.macs / 1e9, "of these decoder": flexible.decoder / 1e9}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A Markdown table."""
    print(f"\n{title}\n\n{table([*rows[0]], [[_cell(*item) for item in row.items()] for row in rows])}")


def _cell(name: str, value: Any) -> str:
    if isinstance(value, Interval):
        mean, low, high = (f"{100 * v:{'+' if '−' in name else ''}.1f}" for v in value.three())
        return f"{mean} [{low}, {high}]"
    if isinstance(value, float):
        return f"{value:.2f}" if "GMACs" in name or "decoder" in name else f"{value:.1%}"
    return f"`{value}`"


if __name__ == "__main__":
    main()
