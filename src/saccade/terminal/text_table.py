"""Tables of text: columns are chosen by the room there is, so that no number and no name is ever cut.

Where there is little room, intervals go below their numbers and prose is wrapped; then columns are left out whole, the
least important first, and named below the table.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from rich.box import HEAVY_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

READABLE = 120  # characters of a line where nothing says how many there are; names and numbers may make it longer
NARROWEST = 40
NAME, PROSE = 24, 22  # characters that a wrapped name and wrapped prose get at least
FRAME = 3  # characters that the frame of a column takes; one more for the table


@dataclass(frozen=True)
class Column:
    """One column: its heading, and what becomes of it where there is little room.

    rank: those of the highest rank are left out first; 0: never. None: its place, counted from the left.
    prose: its cells are sentences, which are wrapped.
    """

    name: str
    rank: int | None = None
    prose: bool = False


@dataclass(frozen=True)
class Table:
    """A title, columns, one row of cells for each thing listed, and a caption. The first column names the row.

    A cell like ``85.0% [80.1%, 88.2%]`` is a number and its interval. Columns without any text are not shown.
    """

    title: str
    columns: Sequence[Column | str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def render(self, width: int | None = None, more: str = "--json") -> str:
        """The table as text of at most ``width`` characters a line; None: nothing is left out for want of room.

        more: what shows the columns that are left out, for the line that names them.
        """
        whole = self._filled()
        if width is None:
            return _text(whole, max(READABLE, whole._least(whole=True)), whole=True)
        width = max(width, NARROWEST)
        shown = whole
        while shown._least() > width and shown._stacked()._least() > width and (goes := shown._least_important()):
            shown = shown._without(goes)
        drawn = shown if shown._least() <= width else shown._stacked()
        text = _text(drawn, max(width, drawn._least()))
        if left_out := [c.name for c in whole._described() if c.name not in {d.name for d in shown._described()}]:
            said = f"Not shown for want of room: {', '.join(left_out)} ({more} has all)."
            text += _print(Text(said), width)
        return text

    def html(self, limit: int = 100) -> str:
        """The same as an HTML table of at most ``limit`` rows."""
        table = self._filled()
        head = "".join(f"<th>{escape(column.name)}</th>" for column in table._described())
        rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows[:limit])
        body = "".join(f"<tr>{cells}</tr>" for cells in rows)
        rest = len(table.rows) - limit
        more = f"<p>… and {rest} more rows</p>" if rest > 0 else ""
        said = f"<p>{escape(self.caption)}</p>" if self.caption else ""
        title = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}{said}"

    def _described(self) -> list[Column]:
        columns = (column if isinstance(column, Column) else Column(column) for column in self.columns)
        return [replace(c, rank=i if c.rank is None else c.rank) for i, c in enumerate(columns)]

    def _cells(self, i: int) -> list[str]:
        return [row[i] for row in self.rows]

    def _filled(self) -> Table:
        """The table without columns that have nothing to say."""
        used = [i for i in range(len(self.columns)) if i == 0 or any(self._cells(i))]
        columns = self._described()
        return replace(self, columns=[columns[i] for i in used], rows=[[row[i] for i in used] for row in self.rows])

    def _without(self, goes: Column) -> Table:
        columns = self._described()
        kept = [i for i, column in enumerate(columns) if column != goes]
        return replace(self, columns=[columns[i] for i in kept], rows=[[row[i] for i in kept] for row in self.rows])

    def _stacked(self) -> Table:
        """The table with intervals below their numbers, and headings of several words on two lines."""
        described = self._described()
        prose = [column.prose or i == 0 for i, column in enumerate(described)]
        rows = [[c if words else c.replace(" [", "\n[") for c, words in zip(r, prose, strict=True)] for r in self.rows]
        columns = [
            column if words else replace(column, name=column.name.replace(" ", "\n", 1))
            for column, words in zip(described, prose, strict=True)
        ]
        return replace(self, columns=columns, rows=rows)

    def _least_important(self) -> Column | None:
        can_go = [column for column in self._described()[1:] if column.rank]
        return max(can_go, key=lambda column: column.rank or 0) if can_go else None

    def _least(self, whole: bool = False) -> int:
        """Characters of a line that it needs: prose and, unless ``whole``, names may be wrapped; the rest may not."""
        needs = 1
        for i, column in enumerate(self._described()):
            lines = [line for cell in (column.name, *self._cells(i)) for line in cell.split("\n")]
            most = PROSE if column.prose else NAME if i == 0 and not whole else None
            natural = max(map(cell_len, lines))
            needs += (natural if most is None else min(natural, most)) + FRAME
        return needs


def width_of(stream: object) -> int | None:
    """Characters of a line of ``stream``, as ``$COLUMNS`` or its terminal says; None: nothing says."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    terminal = bool(getattr(stream, "isatty", lambda: False)())
    return Console().width if terminal else None


def print_table(table: Table, more: str = "--json") -> None:
    """A table on standard output, in the room that there is; in a pipe nothing is left out."""
    sys.stdout.write(table.render(width_of(sys.stdout), more))


def _text(table: Table, width: int, whole: bool = False) -> str:
    drawn = Drawn(
        title=Text(table.title) if table.title else None,
        caption=Text(table.caption) if table.caption else None,
        title_justify="left",
        caption_justify="left",
        box=HEAVY_HEAD,
    )
    for i, column in enumerate(table._described()):
        words = i == 0 or column.prose or not any(c.isdigit() for cell in table._cells(i) for c in cell)
        wraps = column.prose or (i == 0 and not whole)
        drawn.add_column(Text(column.name), justify="left" if words else "right", no_wrap=not wraps, overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return _print(drawn, width)


def _print(drawn: Drawn | Text, width: int) -> str:
    file = _Page(getattr(sys.stdout, "encoding", None) or "utf-8")
    Console(file=file, width=width, color_system=None, legacy_windows=False).print(drawn)
    return "".join(line.rstrip() + "\n" for line in file.getvalue().splitlines())


class _Page(io.StringIO):
    """Text in memory that names the encoding it will be printed in, so that frames are drawn in its characters."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding
