"""``saccade zeroshot``: what an image and a text tower know of each other, under settings."""

from __future__ import annotations

from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import Batch, Device, Json, Limit, ListedImages, Settings, Split, Threads, use_threads


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
    images: ListedImages = None,
    split: Split = None,
    limit: Limit = None,
    batch: Batch = 32,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Accuracy of naming classes in words; or, where images have texts, how often both find each other.

    Example: saccade zeroshot runs/flexilit/model photos.zip --split test -s "grid(10)" -s "grid(32)"
    """
    from saccade.cli.scored import show_scores
    from saccade.tasks.image_text.zero_shot import evaluate_words
    from saccade.terminal.progress import Progress

    use_threads(threads)
    with Progress(shown=True) as progress:
        found = evaluate_words(
            model,
            data,
            setting,
            device=device,
            templates=template or None,
            images=images,
            split=split,
            limit=limit,
            batch=batch,
            progress=progress,
        )
    show_scores(found, f"{model}, {data}: {found.table().title}", json)
