"""Options that several verbs share, and how they are turned into a model."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from saccade.model import AdaptiveViT
    from saccade.terminal.results import Result

INTERRUPTED = 130  # exit code
MODEL, IMAGES, MACHINE = "Model", "Images", "Machine and output"  # panels of --help


def complete_setting(given: str) -> list[str]:
    """Names that a setting may go on with, for the shell: read from the files that register them, nothing is run."""
    before, bar, last = given.rpartition("|")
    package = Path(__file__).parents[1]
    texts = (
        file.read_text(encoding="utf-8")
        for part in ("methods", "tokenizers")
        for file in package.glob(f"{part}/**/*.py")
    )
    names = sorted(name for text in texts for name in re.findall(r'@register\(\s*"(\w+)"', text))
    return [f"{before}{bar}{' ' if bar else ''}{name}" for name in names if name.startswith(last.strip())]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A timm name, hf-hub:owner/name, local-dir:FOLDER, or a folder that Saccade saved."
    ),
]
Data = Annotated[
    str, typer.Argument(metavar="DATA", help="A folder or zip of images: class/name, split/class/name, or unlabelled.")
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--setting",
        "-s",
        help="A setting: 'tome(r=13)', 'grid(20) | evit(0.7)'; repeatable.",
        rich_help_panel=MODEL,
        autocompletion=complete_setting,
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="Weights to load: a safetensors file with timm's keys.", rich_help_panel=MODEL)
]
Pretrained = Annotated[
    bool,
    typer.Option("--pretrained", help="Download the pretrained weights of a timm or hub name.", rich_help_panel=MODEL),
]
NumClasses = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Classes of a name's head, where its weights have another; 0: none, an encoder.",
        rich_help_panel=MODEL,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(help="Which split of DATA to use; the held-out one by default.", rich_help_panel=IMAGES),
]
LIMIT = typer.Option(min=1, help="Use at most this many images, spread evenly.", rich_help_panel=IMAGES)
Limit = Annotated[int | None, LIMIT]
BATCH = typer.Option(min=1, help="Batch size.", rich_help_panel=IMAGES)
Metric = Annotated[
    str | None,
    typer.Option(
        help="top-1, agreement, kl or cells; of an encoder recall@10, reindexed@10, cosine, knn or cells.",
        rich_help_panel=IMAGES,
    ),
]
Rivals = Annotated[
    list[str],
    typer.Option(
        "--rival",
        help="Another model to measure beside: a timm name, NAME=weights.safetensors or a folder; repeatable.",
        rich_help_panel=MODEL,
    ),
]
Batch = Annotated[int, BATCH]
ListedImages = Annotated[
    str | None,
    typer.Option(help="Folder or zip of the images that DATA lists; DATA's own by default.", rich_help_panel=IMAGES),
]
Drawing = Annotated[str, typer.Option(help="The PNG to write, for one photo.")]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON and nothing else on standard output.", rich_help_panel=MACHINE),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, …; auto: a GPU where there is one.", rich_help_panel=MACHINE)
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.", rich_help_panel=MACHINE)]


def open_model(
    name: str,
    weights: str | None = None,
    pretrained: bool = False,
    device: str = "auto",
    threads: int | None = None,
    *,
    num_classes: int | None = None,
    trained: bool = True,
) -> AdaptiveViT:
    """The model that MODEL and the options beside it name, on its device; see ``saccade.checkpoint``."""
    from saccade import checkpoint as opening

    use_threads(threads)
    return opening.open_model(name, weights, pretrained, device, num_classes=num_classes, trained=trained)


def rival_weights(rivals: list[str]) -> list[str]:
    """The files of those rivals that are named with one: ``NAME=weights.safetensors``."""
    return [weights for _, _, weights in (rival.partition("=") for rival in rivals) if weights]


def use_threads(threads: int | None) -> None:
    """Compute in so many CPU threads; None: in all cores."""
    if threads:
        import torch

        torch.set_num_threads(threads)


def print_json(value: Any) -> None:
    """JSON on standard output."""
    print(json.dumps(value, indent=2))


def print_result(found: Result, title: str = "") -> None:
    """A result's tables on standard output, the first under another title where one is given."""
    from saccade.terminal.text_table import print_table

    first, *others = found.tables()
    for table in (replace(first, title=title or first.title), *others):
        print_table(table)


def print_failures(failures: Mapping[str, str], item: str = "image", what: str = "could not be read, left out") -> None:
    """The names of what could not be used, and why, on standard error: ``2 images could not be read, left out:``."""
    from saccade.terminal.results import counted

    if failures:
        print(f"{counted(len(failures), item)} {what}:", file=sys.stderr)
        for name, reason in failures.items():
            print(f"  {name}: {reason}", file=sys.stderr)


@contextmanager
def kept_in(
    folder: str | os.PathLike | None, kind: str = "*.safetensors", how: str = "the same command"
) -> Iterator[None]:
    """Around work that writes what it measures below a folder: an interruption says whether there is anything to take
    up, and how, and ends with exit code 130.

    Args:
        folder: None: nothing is written.
        kind: files that something can be taken up from.
    """
    try:
        yield
    except KeyboardInterrupt:
        kept = folder is not None and next(Path(folder).rglob(kind), None) is not None
        said = f"{how} takes up what is in {os.fspath(folder or '')}" if kept else "nothing was kept to take up"
        print(f"saccade: interrupted; {said}", file=sys.stderr)
        sys.exit(INTERRUPTED)
