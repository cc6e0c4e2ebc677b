"""``saccade tune``: the main job."""

from __future__ import annotations

import shlex
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import (
    Data,
    Device,
    Json,
    Metric,
    Model,
    NumClasses,
    Pretrained,
    Rivals,
    Split,
    Threads,
    Weights,
    kept_in,
    open_model,
    print_json,
    print_result,
    rival_weights,
)
from saccade.errors import UserError

if TYPE_CHECKING:
    from saccade.evaluation.tune_result import TuneResult

QUICK = 2.0  # minutes


@app.command("tune")
def command(
    model: Model,
    data: Data,
    target: Annotated[str | None, typer.Option(help="Target: a speed-up over dense, 1.5x or 2x.")] = None,
    gmacs: Annotated[float | None, typer.Option(help="Target: GMACs (10^9 multiply-accumulates) per image.")] = None,
    ms: Annotated[float | None, typer.Option(help="Target: median milliseconds per batch.")] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="Target: the fastest that loses at most this, 1%; of kl, cosine, cells 0.01.")
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder for frontier.csv, frontier.json, report.html and model/.")
    ] = "runs/tune",
    weights: Weights = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    split: Split = None,
    limit: Annotated[
        int, typer.Option(min=20, help="Use at most this many images: half to choose, half to report.")
    ] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of the timing.")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="Finish in two minutes: fewer images and settings.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Time limit for all of it; none by default.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of timing, all settings in turn.")] = 30.0,
    compiled: Annotated[bool, typer.Option(help="Also time the dense model under torch.compile.")] = True,
    runner: Annotated[
        list[str],
        typer.Option(help="How to run: auto (bf16, torch.compile, installed engines), bf16, onnx, openvino, …"),
    ] = ["auto"],  # noqa: B006  (typer reads it)
    schedules: Annotated[
        int | None,
        typer.Option(min=0, help="Schedules to try in a search for the budget's best; 0: none. Default: up to 400."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split into halves, and of the search.")] = 0,
    metric: Metric = None,
    rival: Rivals = [],  # noqa: B006  (typer reads it)
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """The best accuracy at a budget: a measured frontier, a report, and a model to deploy.

    Without a target: the fastest that loses at most one point. Interrupted, the same command takes up what it measured.

    Example: saccade tune vit_tiny_patch16_224 photos/ --pretrained --target 1.5x --out runs/photos
    """
    from saccade.evaluation.report import tune
    from saccade.storage.run_folder import check_apart
    from saccade.terminal.progress import Progress

    if quick and minutes is not None:
        raise UserError("give one of --quick and --minutes")
    check_apart(out, [model, data, weights, *rival, *rival_weights(rival)])
    start = time.perf_counter()
    vit = open_model(model, weights, pretrained, device, threads, num_classes=num_classes)
    minutes = QUICK if quick else minutes
    used = (time.perf_counter() - start) / 60 if minutes is not None and minutes > 0 else 0.0  # opening the model
    with Progress(shown=True) as progress, kept_in(out):
        tuned = tune(
            vit,
            data,
            target,
            gmacs=gmacs,
            ms=ms,
            max_drop=max_drop,
            out=out,
            minutes=None if minutes is None else max(minutes - used, minutes / 10),
            split=split,
            limit=limit,
            batch=batch,
            seconds=seconds,
            compiled=compiled,
            runner="auto" if runner == ["auto"] else runner,
            schedules=schedules,
            seed=seed,
            metric=metric,
            rivals=rival,
            command=shlex.join(["saccade", *sys.argv[1:]]),
            progress=progress,
        )
    show(tuned, json)


def show(tuned: TuneResult, json: bool = False) -> None:
    """The answer and the table on standard output."""
    if json:
        found = {"verdict": tuned.recommendation, "met": tuned.met, "setting": tuned.setting, "runner": tuned.runner}
        found |= {"folder": str(tuned.folder), "left_out": tuned.left_out}
        print_json({**found, "rows": [vars(row) for row in tuned.rows]})
        return
    print_result(tuned)
    print(f"report: {tuned.folder / 'report.html'}")
    if (tuned.folder / "model").is_dir():
        print(f"model:  {tuned.folder / 'model'}  ({tuned.setting}, {tuned.runner})")
