"""``saccade detect``: a detector's average precision under settings, or what it finds in a photo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    from saccade.tasks.detection.detector import Detector


@app.command("detect")
def command(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder that `saccade train detect` wrote.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A COCO JSON, the word scenes, or one photo.")],
    setting: Settings = [],  # noqa: B006  (typer reads it)
    images: Annotated[str | None, typer.Option(help="Folder or zip of the JSON's images; its own by default.")] = None,
    ask: Annotated[
        list[str] | None, typer.Option(help="What to look for in a photo, in words; repeatable. Default: its classes.")
    ] = None,
    least: Annotated[float, typer.Option(min=0, max=1, help="Of the score, in a photo.")] = 0.3,
    split: Split = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images, evenly spread.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    out: Annotated[str, typer.Option(help="The PNG to write, for one photo.")] = "boxes.png",
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """COCO's average precision of settings, with intervals; or one photo with boxes around what was asked for.

    Example: saccade detect runs/detect/model scenes --limit 1000 -s "grid(12)" -s "grid(32)"
    """
    from saccade.checkpoint import open_task
    from saccade.storage.image_names import EXTENSIONS
    from saccade.tasks.detection.average_precision import evaluate_detection
    from saccade.tasks.detection.detection_data import open_boxes
    from saccade.tasks.detection.detector import Detector
    from saccade.terminal.progress import Progress

    use_threads(threads)
    found = open_task(model, Detector, "detector", "detect", device)
    if data.lower().endswith(EXTENSIONS):
        _draw(found, data, setting, ask, least, out, json)
        return
    boxes = open_boxes(data, split, images)
    with Progress(shown=True) as progress:
        scores = evaluate_detection(found, boxes, setting, limit=limit, batch=batch, progress=progress)
    if json:
        print_json({"rows": [row.to_dict() for row in scores.rows], "not_read": scores.failures})
        return
    print_result(scores, f"{model}, {data}: {scores.rows[0].images} images, {len(boxes.classes)} classes")
    print_failures(scores.failures)


def _draw(
    model: Detector, photo: str, settings: list[str], ask: list[str] | None, least: float, out: str, json: bool
) -> None:
    from saccade.data import decode
    from saccade.storage.files import check_picture, write_picture
    from saccade.tasks.detection.detector import draw, look

    if len(settings) > 1:
        raise UserError(f"a photo is drawn under one setting and {len(settings)} were given; run it once for each")
    if not Path(photo).is_file():
        raise UserError(f"there is no photo {photo!r}")
    check_picture(out)
    image, view = decode(Path(photo), photo), model.at(settings[0]).eval() if settings else model
    names = ask or view.heads.names
    found = look(view, image, names, least)
    write_picture(out, draw(image, found, names))
    each = [(names[i], s) for i, s in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)]
    if json:
        rows = zip(each, found["boxes"].tolist(), strict=True)
        print_json({"out": out, "found": [{"name": name, "score": s, "box": box} for (name, s), box in rows]})
    else:
        print(f"{out}: {', '.join(f'{name} {s:.2f}' for name, s in each) or 'nothing of ' + ', '.join(names)}")
