"""``list``: what a setting may name."""

from __future__ import annotations

import inspect
from typing import Any

from saccade.core.registry import SOURCES, Entry, registry, unknown
from saccade.setting import Preset, Setting, presets
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
        systems = "; ".join(f"{name}() is {preset.setting}" for name, preset in presets().items())
        title = "A setting is built from these, joined by ' | '; a tokenizer comes first"
        return Table(title, columns, rows, f"Published systems by name: {systems}")


class Knobs(Result, list[str]):
    """The knobs of one method or tokenizer; ``rows`` tell of each its default, where that is from, and what it is."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry.knobs)
        self.entry = entry

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each knob; ``source`` is one of ``registry.SOURCES``."""
        entry = self.entry
        return [
            {"knob": name, "default": repr(knob.default), "source": entry.source(name), "help": entry.help[name]}
            for name, knob in entry.knobs.items()
        ]

    def __repr__(self) -> str:
        return list.__repr__(self)

    def table(self) -> Table:
        """In the order in which they may be given without names."""
        rows = [[row["knob"], row["default"], row["source"], row["help"]] for row in self.rows]
        rows = [[*cells[:3], cells[3].removesuffix(f" [{cells[2]}]")] for cells in rows]
        columns = [Column("knob"), Column("default", 0), Column("from", 0), Column("what it is", 0, True)]
        caption = "from: " + "; ".join(f"{name}, {words}" for name, words in SOURCES.items())
        return Table(f"{self.entry.name}: {self.entry.summary}", columns, rows, caption)


class System(Result, list[str]):
    """The parts of a published system."""

    def __init__(self, name: str, preset: Preset) -> None:
        self.calls = Setting.parse(preset.setting).calls
        super().__init__(map(str, self.calls))
        self.name, self.about = name, preset.about

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each part of the setting, and what it does."""
        known = registry()
        return [{"part": str(call), "summary": known[call.name].summary} for call in self.calls]

    def __repr__(self) -> str:
        return list.__repr__(self)

    def table(self) -> Table:
        """In the order of the setting."""
        rows = [[row["part"], row["summary"]] for row in self.rows]
        return Table(f"{self.name}: {self.about}", [Column("part", prose=True), Column("what it does", 0, True)], rows)


def list_methods(name: str | None = None) -> Methods | Knobs | System:
    """Methods and tokenizers that a setting may name: a list of names that tells more of each in ``rows``.

    Args:
        name: one of them, whose knobs are listed instead, each with its default and where that is from; or a published
            system, whose parts are.

    Raises:
        UserError: there is no such method.
    """
    known = registry()
    if name is None:
        return Methods(known)
    if name in presets():
        return System(name, presets()[name])
    if name not in known:
        raise unknown(name, presets())
    return Knobs(known[name])


def _described(entry: Entry) -> dict[str, Any]:
    knobs = [str(knob).split(":")[0] + _default(knob) for knob in entry.knobs.values()]
    return {"name": entry.name, "kind": entry.kind, "knobs": knobs, "summary": entry.summary}


def _default(knob: inspect.Parameter) -> str:
    return "" if knob.default is knob.empty else f"={knob.default!r}"
