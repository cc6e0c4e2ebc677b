"""``saccade eval``: accuracy of settings on images."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from saccade.cli import app
from saccade.cli.common import (
    Data,
    Device,
    Json,
    Model,
    Pretrained,
    Settings,
    Split,
    Threads,
    Weights,
    open_model,
    print_json,
    print_table,
)


@app.command("eval")
def command(
    model: Model,
    data: Data,
    setting: Settings = [],  # noqa: B006  (typer reads it)
    weights: Weights = None,
    pretrained: Pretrained = False,
    split: Split = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images, evenly spread.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Accuracy, agreement and GMACs of settings on images, with 95 % intervals, beside the dense model.

    Example: saccade eval vit_tiny_patch16_224 photos/ --pretrained -s "tome(r=13)" -s "evit(0.7)"
    """
    from saccade.measure.accuracy import evaluate
    from saccade.progress import Progress

    vit = open_model(model, weights, pretrained, device, threads)
    with Progress(shown=True) as progress:
        scores, failures = evaluate(
            vit, data, [str(vit.setting), *setting], split=split, limit=limit, batch=batch, progress=progress
        )
    if json:
        print_json({"rows": [s.to_dict() for s in scores], "not_read": failures})
        return
    rows = [
        [
            s.setting,
            f"{s.top1.mean:.2%} [{s.top1.low:.1%}, {s.top1.high:.1%}]",
            f"{s.top5.mean:.1%}",
            ""
            if s.delta is None
            else f"{100 * s.delta.mean:+.2f} [{100 * s.delta.low:+.1f}, {100 * s.delta.high:+.1f}]",
            f"{s.nll.mean:.3f}",
            f"{s.agreement.mean:.1%}",
            f"{s.kl.mean:.3f}",
            f"{s.tokens:.0f}",
            f"{s.gmacs:.3f}",
            f"{s.mac_ratio:.2f}×",
        ]
        for s in scores
    ]
    columns = [
        "setting",
        scores[0].metric,
        "top-5",
        "points vs dense",
        "NLL",
        "agree",
        "KL",
        "tokens",
        "GMACs",
        "MAC ratio",
    ]
    print_table(f"{model}, {scores[0].images} images of {data}", columns, rows, "Intervals are at 95 %.")
    if failures:
        print(f"{len(failures)} images could not be read and count nowhere:", file=sys.stderr)
        for name, reason in failures.items():
            print(f"  {name}: {reason}", file=sys.stderr)
