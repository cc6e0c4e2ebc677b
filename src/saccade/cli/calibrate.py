"""``saccade calibrate``: the threshold of a setting for a mean budget."""

from __future__ import annotations

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
    Split,
    Threads,
    Weights,
    kept_in,
    open_model,
    print_json,
    print_result,
)


@app.command("calibrate")
def command(
    model: Model,
    data: Data,
    setting: Annotated[
        str,
        typer.Option("--setting", "-s", help="A method with a threshold, or with counts to learn: see saccade list."),
    ],
    gmacs: Annotated[float, typer.Option(help="The budget: mean GMACs (10^9 multiply-accumulates) per image.")],
    out: Annotated[str | None, typer.Option(help="Folder for the model under the setting that is found.")] = None,
    cache: Annotated[str | None, typer.Option(help="Folder for what was measured, to go on after a stop.")] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    split: Split = None,
    limit: Annotated[int, LIMIT] = 200,
    batch: Batch = 32,
    moves: Annotated[
        int, typer.Option(min=0, help="Where counts are learned: how many settings to try, 96 images each.")
    ] = 150,
    steps: Annotated[int, typer.Option(min=0, help="Gradient steps before that, 16 images each.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images' order, where counts are learned.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Find the thresholds at which the mean GMACs of images meet a budget; single images then cost less or more.

    Of a method without a threshold, the counts for a budget, learned from these images; labels are not needed.

    Example: saccade calibrate runs/dynamic/model photos/ -s "dynamicvit(0.7)" --gmacs 0.8 --out calibrated
    """

    from saccade.backbones.saving import check_savable
    from saccade.evaluation.calibrate import calibrate
    from saccade.evaluation.knob_search import KnobSearch
    from saccade.storage.model_folder import check_place
    from saccade.storage.run_folder import check_apart
    from saccade.terminal.progress import Progress

    if out is not None:
        check_place(out)
        check_apart(out, [model, data, weights])
    if cache is not None:
        check_apart(cache, [model, data, weights])
    vit = open_model(model, weights, pretrained, device, threads, num_classes=num_classes)
    if out is not None:
        check_savable(vit)
    with Progress(shown=True) as progress, kept_in(cache):
        found = calibrate(
            vit,
            data,
            setting,
            gmacs,
            split=split,
            limit=limit,
            batch=batch,
            cache=cache,
            search=KnobSearch(steps, seed=seed, moves=moves),
            progress=progress,
        )
    if out is not None:
        vit.at(found.setting).save(out)
    if json:
        print_json(found.to_dict())
        return
    print_result(found, f"{model}, {found.images} images of {data}")
    if out is not None:
        print(f"model: {out}")
