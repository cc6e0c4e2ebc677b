"""``saccade analyze``: what changes inside a model between settings."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import (
    LIMIT,
    Batch,
    Data,
    Device,
    Json,
    Model,
    NumClasses,
    Pretrained,
    Settings,
    Split,
    Threads,
    Weights,
    kept_in,
    open_model,
    print_json,
)


@app.command("analyze")
def command(
    model: Model,
    data: Data,
    setting: Settings = [],  # noqa: B006  (typer reads it)
    what: Annotated[
        str,
        typer.Option(
            help="bias, cka, correspondence, ensemble, merging or relevance; several: 'cka | bias'. Default: all."
        ),
    ] = "",
    out: Annotated[str, typer.Option(help="Folder for analysis.json and report.html.")] = "runs/analyze",
    weights: Weights = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    split: Split = None,
    limit: Annotated[int, LIMIT] = 300,
    batch: Batch = 32,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compare settings inside the model: similar layers (CKA), matching patches, relevance maps, ensembles, merging.

    A setting may hold ranges. Interrupted, the same command goes on where it stopped.

    Example: saccade analyze vit_tiny_patch16_224 photos/ --pretrained -s "grid(16)" -s "grid(28)" --what cka
    """
    from saccade.analysis import analyze
    from saccade.storage.run_folder import check_apart
    from saccade.terminal.progress import Progress

    check_apart(out, [model, data, weights])
    vit = open_model(model, weights, pretrained, device, threads, num_classes=num_classes)
    with Progress(shown=True) as progress, kept_in(out, "cache/*.json"):
        found = analyze(
            vit,
            data,
            setting,
            what,
            split=split,
            limit=limit,
            batch=batch,
            out=out,
            command=shlex.join(["saccade", *sys.argv[1:]]),
            progress=progress,
        )
    if json:
        print_json({name: {"lines": f.lines, **f.data} for name, f in found.items()})
        return
    for name, finding in found.items():
        print(f"{name}:")
        for line in finding.lines:
            print(f"  {line.replace('`', '')}")
    print(f"report: {out}/report.html")
