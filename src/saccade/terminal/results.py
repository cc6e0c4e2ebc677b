"""What verbs give back: one kind of result, which is printed, listed, and made a data frame of in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saccade.errors import UserError
from saccade.terminal.text_table import Table

if TYPE_CHECKING:
    from pandas import DataFrame

SHOWN, WIDTH = 10, 80  # rows and characters of a line in a Python prompt


class Result:
    """The base of what verbs give back.

    A subclass has ``rows`` — dataclasses or mappings, one for each thing that was measured — and may override
    ``table``, which both the command and a prompt show.
    """

    rows: Any

    def table(self) -> Table:
        """The rows as cells of text; a subclass chooses columns and their order, the most important first."""
        found = self.to_dicts()
        names = list(dict.fromkeys(name for row in found for name in row))
        return Table("", names, [[_cell(row.get(name)) for name in names] for row in found])

    def tables(self) -> list[Table]:
        """All that the command prints: ``table``, and after it what a subclass adds."""
        return [self.table()]

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as flat dictionaries of plain values: an interval ``value`` is value, value_low and value_high, and
        what stands in a row of its own keeps its name before a dot, like ``speed.p50_ms``."""
        return [flat(row) for row in self.rows]

    def to_df(self) -> DataFrame:
        """The rows of ``to_dicts`` as a data frame. Raises UserError without pandas."""
        try:
            from pandas import DataFrame
        except ImportError:
            raise UserError("to_df needs pandas: pip install pandas; or take to_dicts(), which needs nothing") from None
        return DataFrame(self.to_dicts())

    def __repr__(self) -> str:
        table = self.table()
        if not table.rows:
            return f"{type(self).__name__}: no rows"
        rest = len(table.rows) - SHOWN
        more = f"… and {rest} more rows: .rows\n" if rest > 0 else ""
        cut = Table(table.title or type(self).__name__, table.columns, table.rows[:SHOWN], table.caption)
        return (cut.render(WIDTH, ".to_dicts()") + more).rstrip("\n")

    def _repr_html_(self) -> str:
        return self.table().html()


class Pair(NamedTuple):
    """Rows, and why others are missing."""

    rows: Any
    failures: dict[str, str]  # images that could not be read, and why


class Scores(Result, Pair):
    """Rows of scores, and the images that could not be read: ``rows, failures = …`` takes it apart."""

    __slots__ = ()
    item = "image"  # what ``failures`` names

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {"rows": [row.to_dict() for row in self.rows], "not_read": self.failures}


def counted(count: int, what: str) -> str:
    """``1 image``, ``3 images``: the plural is by an s."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def flat(row: Any) -> dict[str, Any]:
    """One row as a flat dictionary of plain values."""
    found: dict[str, Any] = {}
    for name, value in _items(row):
        if not isinstance(value, Mapping) and not is_dataclass(value):
            found[name] = str(value) if isinstance(value, Path) else value
            continue
        parts = flat(value)
        if parts.keys() == {"mean", "low", "high"}:
            found |= {name: parts["mean"], f"{name}_low": parts["low"], f"{name}_high": parts["high"]}
        else:
            found |= {f"{name}.{part}": inner for part, inner in parts.items()}
    return found


def _items(row: Any) -> list[tuple[str, Any]]:
    if isinstance(row, Mapping):
        return [(str(name), value) for name, value in row.items()]
    return [(field.name, getattr(row, field.name)) for field in fields(row)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_cell, value))
    return "" if value is None else str(value)
