"""``saccade eval``: accuracy and speed of settings on images, or what another task's model is measured by."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import (
    IMAGES,
    Data,
    Device,
    Json,
    Limit,
    Metric,
    Model,
    NumClasses,
    Pretrained,
    Rivals,
    Settings,
    Split,
    Threads,
    Weights,
    kept_in,
    open_model,
    print_failures,
    rival_weights,
)


@app.command("eval")
def command(
    model: Model,
    data: Data,
    setting: Settings = [],  # noqa: B006  (typer reads it)
    weights: Weights = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    split: Split = None,
    limit: Limit = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Batch size, also of the timing. Default: 32, or 8.", rich_help_panel=IMAGES),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds of timing, all settings in turn; 0: none. Default: 10 with a range, else 0."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder for scores.csv, scores.json and report.html; the run can then be resumed."),
    ] = None,
    corrupt: Annotated[
        str | None, typer.Option(help="Corrupt the images: masks:50, gaussian_noise:3, jpeg:2, … (strength 1 to 5).")
    ] = None,
    metric: Metric = None,
    rival: Rivals = [],  # noqa: B006  (typer reads it)
    dtype: Annotated[
        str | None, typer.Option(help="Number type, for dense too: fp32, bf16 or fp16. Default: the folder's.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """A metric, agreement, GMACs and speed of settings on images, with 95 % intervals, beside the dense model.

    The metric is top-1 where folders give classes and agreement with the dense model where not; of an encoder (a model
    without a classifier) knn and recall@10. What it is, and why, is said.

    A setting may hold ranges, a..b or a..b..step: one row for each value. A folder of another task is measured as
    segment, detect or zeroshot do, by the options that these have too.

    Example: saccade eval vit_tiny_patch16_224 photos/ --pretrained -s "tome(r=13)" -s "evit(0.7)"

    Example: saccade eval vit_tiny_patch16_224 photos/ --pretrained -s "grid(8..40)" --out runs/sweep
    """
    from saccade.cli.scored import show_scores
    from saccade.evaluation.sweep_result import Evaluation, untrained_note
    from saccade.storage.run_folder import check_apart
    from saccade.tasks.evaluate import evaluate
    from saccade.terminal.progress import Progress

    if out is not None:
        check_apart(out, [model, data, weights, *rival, *rival_weights(rival)])
    vit = open_model(model, weights, pretrained, device, threads, num_classes=num_classes)
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
            metric=metric,
            rivals=rival,
            command=shlex.join(["saccade", *sys.argv[1:]]),
            progress=progress,
        )
    if isinstance(found, Evaluation):
        print_failures(found.left_out, "setting", "cannot be scored")
        print_failures({r.setting: untrained_note(r) for r in found.rows if r.untrained}, "untrained setting", "below")
    show_scores(found, f"{model}, {found.table().title} of {data}" + (f", {corrupt}" if corrupt else ""), json)
    if out is not None and not json:
        print(f"report: {out}/report.html")
