"""``saccade eval``: accuracy and speed of settings on images."""

from __future__ import annotations

import shlex
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
    print_failures,
    print_json,
    print_result,
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
    batch: Annotated[int, typer.Option(min=1, help="Images at once, for timing too.")] = 32,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Of interleaved timing; 0: none. Default: 10 with a range, else 0.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder for scores.csv, scores.json and report.html; then it can be resumed.")
    ] = None,
    corrupt: Annotated[
        str | None, typer.Option(help="Corrupt the images: masks:50, gaussian_noise:3, jpeg:2, … (strength 1 to 5).")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Accuracy, agreement, GMACs and speed of settings on images, with 95 % intervals, beside the dense model.

    A setting may hold ranges, a..b or a..b..step: one row for each value.

    Example: saccade eval vit_tiny_patch16_224 photos/ --pretrained -s "tome(r=13)" -s "evit(0.7)"

    Example: saccade eval vit_tiny_patch16_224 photos/ --pretrained -s "grid(8..40)" --out runs/sweep
    """
    from saccade.measure.sweep import evaluate
    from saccade.progress import Progress

    vit = open_model(model, weights, pretrained, device, threads)
    if vit.describe().get("task") == "segment":
        from saccade.cli import segment

        segment.command(
            model, data, setting, split, limit=limit, batch=batch, device=device, threads=threads, json=json
        )
        return
    with Progress(shown=True) as progress:
        found = evaluate(
            vit,
            data,
            [str(vit.setting), *setting],
            split=split,
            limit=limit,
            batch=batch,
            seconds=seconds,
            out=out,
            corrupt=corrupt,
            command=shlex.join(["saccade", *sys.argv[1:]]),
            progress=progress,
        )
    if json:
        print_json({"rows": [r.to_dict() for r in found.rows], "not_read": found.failures})
        return
    print_result(found, f"{model}, {found.rows[0].images} images of {data}" + (f", {corrupt}" if corrupt else ""))
    if out is not None:
        print(f"report: {out}/report.html")
    print_failures(found.failures)
