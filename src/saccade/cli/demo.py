"""``saccade demo``: the main job, on whatever is at hand."""

from __future__ import annotations

from typing import Annotated

import typer

from saccade.cli import app
from saccade.cli.common import Json, open_model


@app.command("demo")
def command(
    model: Annotated[str, typer.Option(help="A timm model name.")] = "vit_tiny_patch16_224",
    weights: Annotated[str | None, typer.Option(help="Its weights, safetensors; without: random, speed only.")] = None,
    data: Annotated[str | None, typer.Option(help="Images; without: speed only.")] = None,
    out: Annotated[str, typer.Option(help="Folder for the report.")] = "runs/demo",
    json: Json = False,
) -> None:
    """A frontier and a report in a minute: speed only, unless weights and images are given."""
    from saccade.cli.tune import show
    from saccade.measure.publish import tune
    from saccade.progress import Progress

    vit = open_model(model, weights, trained=False)
    images = data if weights else None
    with Progress(shown=True) as progress:
        if images is None:
            progress.say("No weights or images were given: random weights, speed only.")
        tuned = tune(
            vit,
            images,
            "1.5x",
            out=out,
            limit=300,
            seconds=10.0,
            compiled=False,
            command="saccade demo",
            progress=progress,
        )
    show(tuned, json)
