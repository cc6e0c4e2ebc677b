"""``saccade list``: what a setting may name."""

from __future__ import annotations

from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import Json, print_json


@app.command("list")
def command(
    name: Annotated[str | None, typer.Argument(metavar="METHOD", help="One method, to see its knobs.")] = None,
    json: Json = False,
) -> None:
    """Methods and tokenizers that a setting may name; of one, its knobs and where their defaults are from.

    Example: saccade list evit
    """
    from saccade.terminal.listing import list_methods
    from saccade.terminal.text_table import print_table

    found = list_methods(name)
    if json:
        print_json(found.to_dicts())
    else:
        print_table(found.table())
