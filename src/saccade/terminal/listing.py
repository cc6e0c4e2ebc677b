"""``list``: what a setting may name."""

from __future__ import annotations

import inspect
from typing import Any

from saccade.core.registry import Entry, registry
from saccade.terminal.results import Result
from saccade.terminal.text_table import Column, Table


class Methods(Result, list[str]):
    """The names that a setting may use; ``rows`` tell of each its kind, its knobs and what it does."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each name: what it is and takes."""
        known = registry()
        return [_described(known[name]) for name in self]

    def __repr__(self) -> str:
        return list.__repr__(self)

    def table(self) -> Table:
        """Tokenizers first, as in a setting."""
        order = sorted(self.rows, key=lambda row: row["kind"] != "tokenizer")
        knobs = (", ".join(knob.removesuffix("=None") for knob in row["knobs"]) for row in order)
        rows = [[row["name"], row["kind"], shown, row["summary"]] for row, shown in zip(order, knobs, strict=True)]
        columns = [Column("name"), Column("kind", rank=9), Column("knobs", prose=True), Column("what it does", 0, True)]
        return Table("A setting is built from these, joined by ' | '; a tokenizer comes first", columns, rows)


def list_methods() -> Methods:
    """Methods and tokenizers that a setting may name: a list of names that tells more of each in ``rows``."""
    return Methods(registry())


def _described(entry: Entry) -> dict[str, Any]:
    knobs = [str(knob).split(":")[0] + _default(knob) for knob in entry.knobs.values()]
    return {"name": entry.name, "kind": entry.kind, "knobs": knobs, "summary": entry.summary}


def _default(knob: inspect.Parameter) -> str:
    return "" if knob.default is knob.empty else f"={knob.default!r}"
