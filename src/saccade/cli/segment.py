"""``saccade segment``: a segmentation model's mIoU under settings, or what it sees in a photo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli.application import app
from saccade.cli.common import Batch, Device, Drawing, Json, Limit, Settings, Split, Threads, print_json, use_threads
from saccade.errors import UserError

if TYPE_CHECKING:
    from saccade.model import AdaptiveViT
    from saccade.tasks.segmentation.mean_iou import Segmentation
    from saccade.tasks.segmentation.panoptic_quality import PanopticScores


@app.command("segment")
def command(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder that `saccade train segment` wrote.")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A folder or zip of split/images and split/labels; or one photo.")
    ],
    setting: Settings = [],  # noqa: B006  (typer reads it)
    split: Split = None,
    void: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Value in label files that is no class; as in training.")
    ] = None,
    how: Annotated[
        str, typer.Option(help="fit: the whole image at the model's size; whole: at its own; slide: windows of it.")
    ] = "fit",
    things: Annotated[
        str | None, typer.Option(help="Panoptic quality instead, of split/panoptic; which classes are things: car,bus.")
    ] = None,
    limit: Limit = None,
    batch: Batch = 8,
    out: Drawing = "segments.png",
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """IoU of every class, and its mean, of settings on images with labels; or one photo under what is seen in it.

    Example: saccade segment runs/train/model camvid.zip -s "grid(12)" -s "grid(32)" -s "tome(r=13)"
    """
    from saccade.checkpoint import open_task
    from saccade.cli.scored import is_photo, show_scores
    from saccade.tasks.segmentation.mean_iou import evaluate_segmentation
    from saccade.tasks.segmentation.panoptic_quality import evaluate_panoptic
    from saccade.tasks.segmentation.segmenter import HOW, SegmentationHead
    from saccade.terminal.progress import Progress

    use_threads(threads)
    found = open_task(model, SegmentationHead, device)
    chosen = next((name for name in HOW if name == how), None)
    if chosen is None:
        raise UserError(f"--how {how} is not one of {', '.join(HOW)}")
    if is_photo(data):
        _draw(found, data, setting, out, json)
        return
    settings = [str(found.setting), *setting]
    options: Any = {"split": split, "void": void, "how": chosen, "limit": limit, "batch": batch}
    scores: Segmentation | PanopticScores
    with Progress(shown=True) as progress:
        if things is None:
            scores = evaluate_segmentation(found, data, settings, progress=progress, **options)
        else:
            named = [name.strip() for name in things.split(",") if name.strip()]
            scores = evaluate_panoptic(found, data, named, settings, progress=progress, **options)
    show_scores(scores, f"{model}, {data}: {scores.table().title}", json)


def _draw(model: AdaptiveViT, photo: str, settings: list[str], out: str, json: bool) -> None:
    from saccade.cli.scored import open_photo
    from saccade.storage.files import write_picture
    from saccade.tasks.segmentation.class_picture import paint

    picture = paint(*open_photo(model, photo, settings, out))
    write_picture(out, picture)
    if json:
        print_json({"out": out, "size": list(picture.size)})
    else:
        print(out)
