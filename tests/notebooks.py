"""Notebooks run cell by cell, as Jupyter would, without Jupyter: what a cell ends in is what it shows."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


class Shown(NamedTuple):
    """What the cells of a notebook show."""

    tables: list[str]
    pictures: list[Any]


def cells(notebook: Path, kind: str = "code") -> list[str]:
    """The text of its cells of one kind, in order."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def execute(notebook: Path) -> Shown:
    """Run all cells in one namespace, where the process stands."""
    known: dict[str, Any] = {"__name__": "__main__"}
    shown = Shown([], [])
    for place, source in enumerate(cells(notebook)):
        tree = ast.parse(source, f"{notebook.name}, cell {place}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{notebook.name}, cell {place}", "exec"), known)
        if isinstance(last, ast.Expr):
            file = f"{notebook.name}, cell {place}"
            _sort(eval(compile(ast.Expression(last.value), file, "eval"), known), shown)
    return shown


def _sort(value: Any, shown: Shown) -> None:
    if isinstance(value, Image.Image):
        shown.pictures.append(value)
    elif hasattr(value, "_repr_html_"):
        markup = value._repr_html_()
        (shown.tables if "<table" in markup else shown.pictures).append(markup)
