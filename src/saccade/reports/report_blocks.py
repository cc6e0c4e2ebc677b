"""What findings are made of — tables, heat maps, paths, pictures — and how each looks on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from saccade.reports.formatting import escape
from saccade.reports.heat_map import heat_figure, path_figure
from saccade.reports.html_table import Column, Head, lay_out, scrolling
from saccade.reports.page import render_figures
from saccade.reports.pictures import render_panels
from saccade.reports.svg import tag

PICTURE, PICTURE_BYTES = 320, 60_000  # the longer side in pixels, and bytes, of each picture on a page

Cell = tuple[float | None, str]  # what sorts, and what is written


@dataclass(frozen=True)
class Table:
    """One row for each setting or combination of settings; columns by name."""

    title: str
    hint: str
    columns: Mapping[str, str]  #             name -> what it means
    rows: Mapping[str, Sequence[Cell]]  #     name -> cells, in the order of the columns


@dataclass(frozen=True)
class Heat:
    """A square matrix of similarities 0 … 1 between things in groups; None: not defined."""

    title: str
    hint: str
    groups: Sequence[tuple[str, int]]  # name and how many rows
    values: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Paths:
    """Points in the plane joined in their order, one path for each name; only distances mean anything."""

    title: str
    hint: str
    paths: Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Pictures:
    """Rows of pictures: a name, and ``(caption, picture)`` each."""

    title: str
    hint: str
    rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]]


Part = Table | Heat | Paths | Pictures


def render_parts(parts: Sequence[Part]) -> str:
    """Markup of parts; heat maps and paths stand side by side, before the others."""
    figures = [heat_figure(p.title, p.hint, p.groups, p.values) for p in parts if isinstance(p, Heat)]
    figures += [path_figure(p.title, p.hint, p.paths) for p in parts if isinstance(p, Paths)]
    out = [render_figures(figures)] if figures else []
    for part in parts:
        if isinstance(part, Table):
            out.append(_head(part.title, part.hint) + _table(part))
        elif isinstance(part, Pictures):
            rows = (render_panels(name, panels, PICTURE, PICTURE_BYTES) for name, panels in part.rows)
            out.append(_head(part.title, part.hint) + "".join(rows))
    return "".join(out)


def _head(title: str, hint: str) -> str:
    return (tag("h3", escape(title)) if title else "") + (tag("p", escape(hint), kind="hint") if hint else "")


def _table(part: Table) -> str:
    def column(k: int, name: str) -> Column[str]:
        return Column(
            name, part.columns[name], lambda row: part.rows[row][k][0], lambda row: escape(part.rows[row][k][1])
        )

    def head(row: str) -> Head:
        return Head(row, "dense" if row == "dense" else "reduction")

    table = lay_out([*part.rows], head, [column(k, name) for k, name in enumerate(part.columns)])
    return scrolling(table, part.title)
