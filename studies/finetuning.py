"""Does fine-tuning give back what a training-free reduction loses?

Claim     Every reduction here was published with training; training-free use loses accuracy that fine-tuning recovers.
Method    ViT-Tiny (AugReg) to Caltech-101 at 160 px: dense, and under each reduction, the same images, steps and seed.
          Test top-1 of the dense model, of the dense model under each reduction (training-free), and of each model
          trained under its reduction; 95 % intervals, paired over the test images.
Command   python studies/finetuning.py caltech160.zip vit_tiny_patch16_224.safetensors --out runs/caltech
Cost      four runs of 3 epochs over 5,784 images: about 35 minutes of one core each at most
Expected  each fine-tuned model closes at least half of the gap that its reduction opens
Measured  docs/results.md, "Fine-tuning"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jobs import hits, train_all

import saccade
from saccade.data import open_images
from saccade.files import write_json
from saccade.measure.stats import bootstrap, proportion

SETTINGS = {"dense": "dense", "evit": "evit(0.5)", "tome": "tome(r=6)", "imagepiece": "imagepiece()"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("weights")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=3)
    arguments = parser.parse_args()

    common = [
        "finetune",
        f"data.path={arguments.data}",
        f"model.weights={arguments.weights}",
        "model.size=160",
        "model.crop_pct=1.0",
        "data.holdout=0",  # all training images; the test images are the last word
        "data.workers=0",
        f"run.epochs={arguments.epochs}",
        f"run.threads={max(1, 2 // arguments.at_once)}",
        "run.save_every=45",
    ]
    runs = {name: [*common, f"sampling.settings={[setting]}"] for name, setting in SETTINGS.items()}
    train_all(runs, arguments.out, arguments.at_once)

    images = open_images(arguments.data, "test")
    dense = saccade.load(arguments.out / "dense" / "model")
    reference = hits(dense, "dense", images)
    rows = []
    for name, setting in SETTINGS.items():
        free = hits(dense, setting, images)
        trained = hits(saccade.load(arguments.out / name / "model"), setting, images) if name != "dense" else reference
        state = next((arguments.out / name / "checkpoints").glob("last-*/state.json"))
        gap = (reference - free).mean().item()
        rows.append(
            {
                "setting": setting,
                "free": vars(proportion(free.bool())),
                "trained": vars(proportion(trained.bool())),
                "gain": vars(bootstrap(trained - free)),
                "to_dense": vars(bootstrap(trained - reference)),
                "closed": (trained - free).mean().item() / gap if gap > 0 else None,
                "minutes": json.loads(state.read_text())["seconds"] / 60,
            }
        )
    write_json(arguments.out / "finetuning.json", rows)
    print("| setting | training-free | fine-tuned | gain | against dense | gap closed | minutes |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        free, trained = (
            f"{100 * row[k]['mean']:.1f} % [{100 * row[k]['low']:.1f}, {100 * row[k]['high']:.1f}]"
            for k in ("free", "trained")
        )
        gain, away = (
            f"{100 * row[k]['mean']:+.1f} [{100 * row[k]['low']:+.1f}, {100 * row[k]['high']:+.1f}]"
            for k in ("gain", "to_dense")
        )
        closed = "" if row["closed"] is None else f"{row['closed']:.0%}"
        print(f"| `{row['setting']}` | {free} | {trained} | {gain} | {away} | {closed} | {row['minutes']:.1f} |")


if __name__ == "__main__":
    main()
