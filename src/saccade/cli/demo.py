"""``saccade demo``: the main job, offline, on what the package brings along."""

from __future__ import annotations

from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import Json, kept_in, open_model


@app.command("demo")
def command(
    model: Annotated[str | None, typer.Option(help="A timm name or a folder; the built-in model by default.")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights of a timm name, safetensors.")] = None,
    data: Annotated[str, typer.Option(help="A folder or zip of images, or the built-in scenes.")] = "scenes",
    out: Annotated[str, typer.Option(help="Folder for the report.")] = "runs/demo",
    json: Json = False,
) -> None:
    """The main job in under three minutes, offline: a small elastic ViT on images that are drawn by our own code."""
    from saccade.assets import folder
    from saccade.cli.tune import show
    from saccade.evaluation.report import tune
    from saccade.runners.engine import installed
    from saccade.terminal.progress import Progress

    vit = open_model(model or folder("scenes"), weights)
    with Progress(shown=True) as progress, kept_in(out):
        if model is None:
            millions = sum(p.numel() for p in vit.parameters()) / 1e6
            progress.say(
                f"The built-in model: {millions:.1f} M parameters, trained on generated scenes; not for photos."
            )
        tuned = tune(
            vit,
            data,
            "1.5x",
            out=out,
            minutes=2.0,
            limit=1000,
            batch=32,
            seconds=10.0,
            schedules=60,
            runner=["bf16", *installed()[-1:]],  # OpenVINO if it is there: it starts several times sooner
            command="saccade demo",
            progress=progress,
        )
    show(tuned, json)
