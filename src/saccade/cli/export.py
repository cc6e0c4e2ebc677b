"""``saccade export``: a folder that an engine runs without Saccade."""

from __future__ import annotations

from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import (
    IMAGES,
    Json,
    Model,
    NumClasses,
    Pretrained,
    Settings,
    Weights,
    open_model,
    print_json,
    print_result,
)


@app.command("export")
def command(
    model: Model,
    out: Annotated[str, typer.Option(help="Folder for the artefact; of several settings, each in one of its own.")],
    runner: Annotated[
        str, typer.Option(help="onnx, openvino, aoti or torch; with a number type: 'openvino bf16', 'onnx int8'.")
    ] = "onnx",
    setting: Settings = [],  # noqa: B006  (typer reads it)
    batch: Annotated[str, typer.Option(help="Batch size of every call: 1, 8, …; or dynamic for any.")] = "dynamic",
    size: Annotated[int | None, typer.Option(min=1, help="Input size in pixels, where the setting has none.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Images to compare on; without: drawn scenes.", rich_help_panel=IMAGES)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use at most this many of them.", rich_help_panel=IMAGES)] = 300,
    provenance: Annotated[
        bool, typer.Option("--provenance", help="Add the outputs 'owner' (the token of each cell) and 'tokens'.")
    ] = False,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Take photos of any size, uint8 NHWC: preprocessing is in the graph.")
    ] = False,
    least: Annotated[
        float, typer.Option(min=0, max=1, help="Write nothing where fewer answers agree with the original.")
    ] = 0.995,
    weights: Weights = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    json: Json = False,
) -> None:
    """A model under a setting as one file for an engine, with predict.py, which needs no Saccade, and a parity report.

    Example: saccade export runs/photos/model --runner onnx --data photos/ --out exported
    """
    from saccade.errors import UserError
    from saccade.evaluation.export import export
    from saccade.storage.run_folder import check_apart
    from saccade.terminal.progress import Progress

    if batch != "dynamic" and not (batch.isdigit() and int(batch)):
        raise UserError(f"--batch {batch[:20]!r} is neither a number of images nor dynamic")
    check_apart(out, [model, weights, data])
    with Progress(shown=True) as progress:
        made = export(
            open_model(model, weights, pretrained, "cpu", num_classes=num_classes),
            out,
            runner=runner,
            settings=setting,
            batch=None if batch == "dynamic" else int(batch),
            size=size,
            data=data,
            limit=limit,
            provenance=provenance,
            pixels=pixels,
            least=least,
            progress=progress,
        )
    if json:
        print_json({"source": made.source, "rows": made.to_dicts()})
        return
    print_result(made, f"{model}, exported")
    for row in made.rows:
        print(f"{row.setting}: {row.folder}")
