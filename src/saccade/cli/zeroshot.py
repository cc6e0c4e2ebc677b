"""``saccade zeroshot``: what an image and a text tower know of each other, under settings."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from saccade.cli import app
from saccade.cli.common import Device, Json, Settings, Split, Threads, open_model, print_json, print_table
from saccade.errors import UserError


@app.command("zeroshot")
def command(
    model: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder that `saccade train flexilit` or `flexiclip` wrote.")
    ],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Images by class; or with texts: name.jpg and name.txt, or a table.")
    ],
    setting: Settings = [],  # noqa: B006  (typer reads it)
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt with {} for the class; repeatable. Default: 'a photo of a {}.'")
    ] = None,
    images: Annotated[str | None, typer.Option(help="Folder or zip of a table's images; its own by default.")] = None,
    split: Split = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images, evenly spread.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Accuracy of naming classes in words; or, where images have texts, how often both find each other.

    Example: saccade zeroshot runs/flexilit/model photos.zip --split test -s "grid(10)" -s "grid(32)"
    """
    from saccade.measure.stats import Interval
    from saccade.progress import Progress
    from saccade.tasks.space import TextImage
    from saccade.tasks.zeroshot import ZeroShot, evaluate_words

    found = open_model(model, device=device, threads=threads)
    if not isinstance(found, TextImage):
        raise UserError(f"{model!r} holds no text tower: train one with `saccade train flexilit`")
    with Progress(shown=True) as progress:
        rows, failures = evaluate_words(
            found,
            data,
            setting,
            templates=template or None,
            images=images,
            split=split,
            limit=limit,
            batch=batch,
            progress=progress,
        )
    if json:
        print_json({"rows": [row.to_dict() for row in rows], "not_read": failures})
        return

    def share(value: Interval) -> str:
        return f"{value.mean:.1%} [{value.low:.1%}, {value.high:.1%}]"

    first = rows[0]
    if isinstance(first, ZeroShot):
        columns, names = ["setting", "top-1", "top-5", "GMACs"], ["top1", "top5"]
        title = f"{model}, {data}: {first.images} images"
    else:
        columns = ["setting", "text R@1", "text R@5", "image R@1", "image R@5", "GMACs"]
        names = ["text_at_1", "text_at_5", "image_at_1", "image_at_5"]
        title = f"{model}, {data}: {first.images} images, {first.texts} different texts"
    cells = [[r.setting, *(share(getattr(r, name)) for name in names), f"{r.gmacs:.3f}"] for r in rows]
    print_table(title, columns, cells, "Intervals are at 95 %.")
    if failures:
        print(f"{len(failures)} images could not be read and count nowhere:", file=sys.stderr)
        for name, reason in failures.items():
            print(f"  {name}: {reason}", file=sys.stderr)
