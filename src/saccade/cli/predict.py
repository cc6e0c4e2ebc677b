"""``saccade predict``: what a model says of photos."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import Device, Json, Model, NumClasses, Pretrained, Threads, Weights, use_threads


@app.command("predict")
def command(
    model: Model,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Photos, folders, zips, or '*.jpg'.")],
    setting: Annotated[
        str | None, typer.Option("--setting", "-s", help="A setting, 'tome(r=13)'; the model's own by default.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to name for each image.")] = 5,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size; default: as the folder says, or 8.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row for each image.")] = False,
    embed: Annotated[
        str | None, typer.Option(help="Write embeddings and names: FILE.npz or FILE.safetensors.", metavar="FILE")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for predictions.csv, and tokens/: token maps as PNG.")] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Classes, probabilities and embeddings of photos: a line for each, as soon as it is known.

    In a pipe, and with --json, each line is a JSON object; that of an encoder holds the embedding. A photo that cannot
    be read is named, and the others go on.

    Example: saccade predict vit_tiny_patch16_224 photos/ --pretrained --top 3
    """
    from saccade.data.inputs import notes
    from saccade.errors import UserError
    from saccade.prediction.prediction_files import EmbeddingFile, PredictionFolder, printer
    from saccade.prediction.predictor import Predictor
    from saccade.storage.run_folder import check_apart
    from saccade.terminal.results import counted

    if json and csv:
        raise UserError("give one of --json and --csv")
    use_threads(threads)
    for place in (embed, out):
        if place is not None:
            check_apart(place, [model, weights, *images])
    keepers: list[EmbeddingFile | PredictionFolder] = []
    keepers += [] if embed is None else [EmbeddingFile(embed)]
    keepers += [] if out is None else [PredictionFolder(out, top)]
    predictor = Predictor(
        model,
        weights=weights,
        pretrained=pretrained,
        num_classes=num_classes,
        setting=setting,
        device=device,
        batch=batch,
        top=top,
    )
    for line in notes(images):
        print(line, file=sys.stderr)
    show, count, failures = printer(json, csv, top), 0, dict[str, str]()
    for found in predictor.stream(images if len(images) > 1 else images[0]):
        show(found)
        for keeper in keepers:
            keeper.add(found)
        count += 1
        if found.error is not None:
            failures[found.name] = found.error
    if len(failures) == count:
        raise UserError("no image could be read: " + "; ".join(f"{n}: {why}" for n, why in [*failures.items()][:3]))
    for keeper in keepers:
        keeper.close()
    if failures:
        print(f"{len(failures)} of {counted(count, 'image')} could not be read", file=sys.stderr)
