"""``saccade segment``: a segmentation model's mIoU under settings, or what it sees in a photo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saccade.cli import app
from saccade.cli.common import Device, Json, Settings, Split, Threads, open_model, print_json, print_table
from saccade.errors import UserError

if TYPE_CHECKING:
    from saccade.measure.stats import Interval
    from saccade.tasks.miou import Segmented
    from saccade.tasks.panoptic import Panoptic
    from saccade.tasks.segment import Segmenter


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
    from saccade.data.decode import EXTENSIONS
    from saccade.progress import Progress
    from saccade.tasks.miou import evaluate_segmentation
    from saccade.tasks.panoptic import evaluate_panoptic
    from saccade.tasks.segment import HOW, Segmenter

    found = open_model(model, device=device, threads=threads)
    if not isinstance(found, Segmenter):
        raise UserError(f"{model!r} holds no segmentation model: train one with `saccade train segment`")
    chosen = next((name for name in HOW if name == how), None)
    if chosen is None:
        raise UserError(f"--how {how} is not one of {', '.join(HOW)}")
    if data.lower().endswith(EXTENSIONS):
        _draw(found, data, setting, out, json)
        return
    settings, title = [str(found.setting), *setting], f"{model}, {data}"
    with Progress(shown=True) as progress:
        if things is None:
            rows, failures = evaluate_segmentation(
                found, data, settings, split=split, void=void, how=chosen, limit=limit, batch=batch, progress=progress
            )
            shown, tables = [row.to_dict() for row in rows], _tables(title, rows)
        else:
            named = [name.strip() for name in things.split(",") if name.strip()]
            scores, failures = evaluate_panoptic(
                found,
                data,
                named,
                settings,
                split=split,
                void=void,
                how=chosen,
                limit=limit,
                batch=batch,
                progress=progress,
            )
            shown, tables = [row.to_dict() for row in scores], [_panoptic(title, scores)]
    if json:
        print_json({"rows": shown, "not_read": failures})
        return
    for table in tables:
        print_table(*table)
    if failures:
        print(f"{len(failures)} pairs could not be read and count nowhere:", file=sys.stderr)
        for name, reason in failures.items():
            print(f"  {name}: {reason}", file=sys.stderr)


Table = tuple[str, list[str], list[list[str]], str]


def _tables(title: str, rows: list[Segmented]) -> list[Table]:
    """A row for each setting, and IoU by class."""
    columns = ["setting", "mIoU", "points vs dense", "pixel accuracy", "GMACs", "of these decoder", "MAC ratio"]
    cells = [
        [
            r.setting,
            _interval(r.miou),
            "" if r.delta is None else " ".join((f"{100 * r.delta.mean:+.2f}", _limits(r.delta, "+"))),
            _interval(r.pixel_accuracy),
            f"{r.gmacs:.3f}",
            f"{r.decoder_gmacs:.3f}",
            f"{r.mac_ratio:.2f}×",
        ]
        for r in rows
    ]
    title = f"{title}: {rows[0].images} images"
    each = [[name, *(_percent(r.classes[name]) for r in rows)] for name in rows[0].classes]
    return [
        (title, columns, cells, "Intervals are at 95 %, over images."),
        ("IoU of each class", ["class", *(r.setting for r in rows)], each, ""),
    ]


def _panoptic(title: str, rows: list[Panoptic]) -> Table:
    cells = [
        [r.setting, _interval(r.pq), *map(_percent, (r.sq, r.rq, r.pq_things, r.pq_stuff)), f"{r.gmacs:.3f}"]
        for r in rows
    ]
    said = "Intervals are at 95 %. Things are connected parts of the map of classes: a trivial baseline."
    return f"{title}: {rows[0].images} images", ["setting", "PQ", "SQ", "RQ", "things", "stuff", "GMACs"], cells, said


def _draw(model: Segmenter, photo: str, settings: list[str], out: str, json: bool) -> None:
    from saccade.data import decode
    from saccade.files import check_folder, replacing
    from saccade.tasks.miou import paint

    if len(settings) > 1:
        raise UserError(f"a photo is drawn under one setting and {len(settings)} were given; run it once for each")
    if not Path(photo).is_file():
        raise UserError(f"there is no photo {photo!r}")
    check_folder(Path(out).parent)
    picture = paint(model.at(settings[0]).eval() if settings else model, decode(Path(photo), photo))
    with replacing(out) as part:
        picture.save(part, "PNG")
    if json:
        print_json({"out": out, "size": list(picture.size)})
    else:
        print(out)


def _interval(value: Interval) -> str:
    return f"{value.mean:.2%} {_limits(value)}"


def _limits(value: Interval, sign: str = "") -> str:
    low, high = (f"{100 * v:{sign}.1f}" for v in (value.low, value.high))
    return f"[{low}, {high}]" if sign else f"[{low}%, {high}%]"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
