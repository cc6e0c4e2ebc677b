"""``saccade detect``: a detector's average precision under settings, or what it finds in a photo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import (
    Batch,
    Device,
    Drawing,
    Json,
    Limit,
    ListedImages,
    Settings,
    Split,
    Threads,
    print_json,
    use_threads,
)

if TYPE_CHECKING:
    from saccade.model import AdaptiveViT


@app.command("detect")
def command(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder that `saccade train detect` wrote.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A COCO JSON, the word scenes, or one photo.")],
    setting: Settings = [],  # noqa: B006  (typer reads it)
    images: ListedImages = None,
    ask: Annotated[
        list[str] | None, typer.Option(help="What to look for in a photo, in words; repeatable. Default: its classes.")
    ] = None,
    least: Annotated[float, typer.Option(min=0, max=1, help="Draw what scores at least this, in a photo.")] = 0.3,
    split: Split = None,
    limit: Limit = None,
    batch: Batch = 32,
    out: Drawing = "boxes.png",
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """COCO's average precision of settings, with intervals; or one photo with boxes around what was asked for.

    Example: saccade detect runs/detect/model scenes --limit 1000 -s "grid(12)" -s "grid(32)"
    """
    from saccade.checkpoint import open_task
    from saccade.cli.scored import is_photo, show_scores
    from saccade.tasks.detection.average_precision import evaluate_detection
    from saccade.tasks.detection.detection_data import open_boxes
    from saccade.tasks.detection.detector import DetectionHead
    from saccade.terminal.progress import Progress

    use_threads(threads)
    found = open_task(model, DetectionHead, device)
    if is_photo(data):
        _draw(found, data, setting, ask, least, out, json)
        return
    boxes = open_boxes(data, split, images)
    with Progress(shown=True) as progress:
        scores = evaluate_detection(found, boxes, setting, limit=limit, batch=batch, progress=progress)
    show_scores(scores, f"{model}, {data}: {scores.table().title}, {len(boxes.classes)} classes", json)


def _draw(
    model: AdaptiveViT, photo: str, settings: list[str], ask: list[str] | None, least: float, out: str, json: bool
) -> None:
    from saccade.cli.scored import open_photo
    from saccade.storage.files import write_picture
    from saccade.tasks.detection.detector import DetectionHead, draw, look

    view, image = open_photo(model, photo, settings, out)
    names = ask or DetectionHead.of(view).class_names
    found = look(view, image, names, least)
    write_picture(out, draw(image, found, names))
    each = [(names[i], s) for i, s in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)]
    if json:
        rows = zip(each, found["boxes"].tolist(), strict=True)
        print_json({"out": out, "found": [{"name": name, "score": s, "box": box} for (name, s), box in rows]})
    else:
        print(f"{out}: {', '.join(f'{name} {s:.2f}' for name, s in each) or 'nothing of ' + ', '.join(names)}")
