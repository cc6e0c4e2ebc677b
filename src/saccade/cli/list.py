"""``saccade list``: what a setting may name."""

from __future__ import annotations

from saccade.cli.application import app
from saccade.cli.common import Json, print_json


@app.command("list")
def command(json: Json = False) -> None:
    """Methods and tokenizers that a setting may name, with their knobs.

    Example: saccade list
    """
    from saccade.terminal.listing import list_methods
    from saccade.terminal.text_table import print_table

    found = list_methods()
    if json:
        print_json(found.to_dicts())
    else:
        print_table(found.table())
