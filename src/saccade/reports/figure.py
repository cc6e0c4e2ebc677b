"""A figure of a report: a title, a hint, and its SVGs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One plot: a heading, a line that says how to read it, and the SVG of each layout."""

    title: str
    hint: str
    svgs: dict[str, str]
