"""``saccade segment``: a segmentation model's mIoU under settings, or what it sees in a photo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli.application import app
from saccade.cli.common import (
    Device,
    Json,
    Settings,
    Split,
    Threads,
    print_failures,
    print_json,
    print_result,
    use_threads,
)
from saccade.errors import UserError

if TYPE_CHECKING:
    from saccade.tasks.segmentation.segmenter import Segmenter


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
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images, evenly spread.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 8,
    out: Annotated[str, typer.Option(help="The PNG to write, for one photo.")] = "segments.png",
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """IoU of every class, and its mean, of settings on images with labels; or one photo under what is seen in it.

    Example: saccade segment runs/train/model camvid.zip -s "grid(12)" -s "grid(32)" -s "tome(r=13)"
    """
    from saccade.checkpoint import open_task
    from saccade.storage.image_names import EXTENSIONS
    from saccade.tasks.segmentation.mean_iou import Segmentation, evaluate_segmentation
    from saccade.tasks.segmentation.panoptic_quality import PanopticScores, evaluate_panoptic
    from saccade.tasks.segmentation.segmenter import HOW, Segmenter
    from saccade.terminal.progress import Progress
    from saccade.terminal.text_table import print_table

    use_threads(threads)
    found = open_task(model, Segmenter, "segmentation model", "segment", device)
    chosen = next((name for name in HOW if name == how), None)
    if chosen is None:
        raise UserError(f"--how {how} is not one of {', '.join(HOW)}")
    if data.lower().endswith(EXTENSIONS):
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
    if json:
        print_json({"rows": [row.to_dict() for row in scores.rows], "not_read": scores.failures})
        return
    print_result(scores, f"{model}, {data}: {scores.rows[0].images} images")
    if isinstance(scores, Segmentation):
        print_table(scores.classes())
    print_failures(scores.failures, "pairs could not be read and count nowhere")


def _draw(model: Segmenter, photo: str, settings: list[str], out: str, json: bool) -> None:
    from saccade.data import decode
    from saccade.storage.files import check_picture, write_picture
    from saccade.tasks.segmentation.class_picture import paint

    if len(settings) > 1:
        raise UserError(f"a photo is drawn under one setting and {len(settings)} were given; run it once for each")
    if not Path(photo).is_file():
        raise UserError(f"there is no photo {photo!r}")
    check_picture(out)
    picture = paint(model.at(settings[0]).eval() if settings else model, decode(Path(photo), photo))
    write_picture(out, picture)
    if json:
        print_json({"out": out, "size": list(picture.size)})
    else:
        print(out)
