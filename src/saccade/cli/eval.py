"""``saccade eval``: accuracy and speed of settings on images."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from saccade.cli.application import app
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
    kept_in,
    open_model,
    print_failures,
    print_json,
    print_result,
)
from saccade.errors import UserError


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
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16, for dense too. Default: what the folder is run in.")
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
    from saccade.evaluation.sweep import evaluate
    from saccade.evaluation.sweep_result import untrained_note
    from saccade.terminal.progress import Progress

    vit = open_model(model, weights, pretrained, device, threads)
    if vit.describe().get("task") == "segment":
        from saccade.cli import segment

        options = {"--seconds": seconds, "--out": out, "--corrupt": corrupt, "--dtype": dtype}
        if given := [name for name, value in options.items() if value is not None]:
            raise UserError(
                f"{model!r} is a segmentation model, for which {', '.join(given)} does not exist: leave it out"
            )
        segment.command(
            model, data, setting, split, limit=limit, batch=batch, device=device, threads=threads, json=json
        )
        return
    with Progress(shown=True) as progress, kept_in(out):
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
            dtype=dtype,
            command=shlex.join(["saccade", *sys.argv[1:]]),
            progress=progress,
        )
    rows, failures = found
    print_failures(found.left_out, "settings cannot be scored")
    print_failures({r.setting: untrained_note(r) for r in rows if r.untrained}, "settings are untrained")
    if json:
        print_json({"rows": [r.to_dict() for r in rows], "not_read": failures, "left_out": found.left_out})
        return
    print_result(found, f"{model}, {rows[0].images} images of {data}" + (f", {corrupt}" if corrupt else ""))
    if out is not None:
        print(f"report: {out}/report.html")
    print_failures(failures)
