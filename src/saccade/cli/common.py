"""Options that several verbs share, and how they are turned into a model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.errors import UserError

if TYPE_CHECKING:
    from saccade.model import AdaptiveViT
    from saccade.tables import Column

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A timm model name, or a folder saved by Saccade.")]
Data = Annotated[
    str, typer.Argument(metavar="DATA", help="Images: class/name, split/class/name, a zip, or unlabelled.")
]
Settings = Annotated[
    list[str], typer.Option("--setting", "-s", help="Like 'tome(r=13)' or 'grid(20) | evit(0.7)'; repeatable.")
]
Weights = Annotated[str | None, typer.Option(help="A safetensors file with timm's keys.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="timm's own weights, from the hub.")]
Split = Annotated[str | None, typer.Option(help="Split of a folder of splits; the held-out one by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto: a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")]


def open_model(
    name: str,
    weights: str | None = None,
    pretrained: bool = False,
    device: str = "auto",
    threads: int | None = None,
    *,
    trained: bool = True,
) -> AdaptiveViT:
    """The model that MODEL, --weights and --pretrained name, on its device.

    Raises UserError; also where ``trained`` weights are needed and none are given.
    """
    import torch

    from saccade.checkpoint import CONFIG, check_name, create_model, load

    if threads:
        torch.set_num_threads(threads)
    if os.path.isdir(name):
        if weights or pretrained:
            raise UserError(f"{name!r} is a model folder and has its weights: leave out --weights and --pretrained")
        model = load(name)
    elif os.sep in name or name.endswith(CONFIG):
        raise UserError(f"there is no model folder {name!r}")
    else:
        if weights and pretrained:
            raise UserError("give one of --weights and --pretrained")
        check_name(name)
        if trained and not (weights or pretrained):
            raise UserError(f"{name} would have random weights: give --weights FILE or --pretrained")
        model = create_model(name, weights=weights, pretrained=pretrained)
    return model.to(open_device(device))


def open_device(name: str) -> Any:
    """A torch device; ``auto`` is a GPU where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not usable here ({str(error).splitlines()[0]}); try cpu") from None
    return device


def print_json(value: Any) -> None:
    """JSON on standard output."""
    print(json.dumps(value, indent=2))


def print_table(title: str, columns: Sequence[Column | str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """A table on standard output: the first column names the row, the others stand in order of importance."""
    from saccade.tables import Table
    from saccade.tables import print_table as show

    show(Table(title, columns, rows, caption))
