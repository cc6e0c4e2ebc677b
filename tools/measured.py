"""Measured rows of a method: of docs/measured/, and where the pages of results have more of it.

docs/measured/methods.json is written by ``python studies/methods.py``, docs/measured/speed.json by the same with
``--time``. Where there is no speed.json, the pages say that nothing was timed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
HEADING = re.compile(r"^(#{2,4}) (.+)$")
CELLS = re.compile(r"(?<!\\)\|")
DENSE = "dense"


def measured(name: str, docs: Path = DOCS) -> str:
    """The part of a method's page that says what was measured of it."""
    rows = scored(name, docs)
    found = elsewhere(name, docs)
    if rows:
        links = dict.fromkeys(f"[{place.heading}]({place.link})" for place in found)
        return "\n\n".join(["## Measured", rows, *([f"Also in the results: {', '.join(links)}."] if links else [])])
    said = "It has to be trained. " + ("What trained models gave:" if found else "No trained model is measured yet.")
    return "\n\n".join(["## Measured", said, *map(shown, found)])


def scored(name: str, docs: Path) -> str:
    """A method's rows of methods.json below those of the dense model, with speeds where these were measured; or ""."""
    scores, speeds = read(docs / "measured" / "methods.json"), read(docs / "measured" / "speed.json")
    rows = [row for row in scores.get("rows", []) if row["method"] == name]
    if not rows:
        return ""
    dense = next(row for row in scores["rows"] if row["setting"] == DENSE)
    timed = {(row["runner"], row["batch"], row["setting"]): row for row in speeds.get("rows", [])}
    columns = list(dict.fromkeys((runner, batch) for runner, batch, _ in timed))
    head = ["setting", "top-1", "points vs dense", "GMACs", "MAC ratio"]
    head += [f"speed-up, {runner}, batch {batch}" for runner, batch in columns] or ["speed-up"]
    cells = []
    for row in [dense, *rows]:
        own = [timed.get((*column, row["setting"])) for column in columns] or [None]
        cells.append([f"`{row['setting']}`", *accuracy(row), *map(speedup, own)])
    about = scores["about"]
    said = [f"{about['model']}, nothing trained; {about['images']} photos of `{about['data']}`, 95\u00a0% intervals."]
    said += [f"Made by `{about['command']}` with {about['versions']}: [the numbers](../measured/methods.json)."]
    if timing := speeds.get("about"):
        said += [f"Speed-up over dense, with quartiles, by `{timing['command']}` on {timing['device']}, "
                 f"{timing['threads']} threads, {timing['versions']}."]  # fmt: skip
    else:
        said += ["Not timed yet; `saccade bench` times it on your device."]
    return table(head, cells) + "\n\n" + " ".join(said)


def summary(name: str, docs: Path = DOCS) -> str:
    """A method's rows in a cell: points lost at what MAC ratio."""
    rows = [row for row in read(docs / "measured" / "methods.json").get("rows", []) if row["method"] == name]
    return ", ".join(f"{100 * row['delta']:+.1f}\u00a0at\u00a0{row['mac_ratio']:.1f}×" for row in rows).replace(
        "-", "−"
    )


def accuracy(row: Mapping[str, Any]) -> list[str]:
    """Accuracy and MACs of a row as cells."""
    value = "{:.1f}\u00a0% [{:.1f},\u00a0{:.1f}]".format(*(100 * row[f"value{end}"] for end in ("", "_low", "_high")))
    lost = "{:+.1f} [{:+.1f},\u00a0{:+.1f}]".format(*(100 * row[f"delta{end}"] for end in ("", "_low", "_high")))
    lost = "" if row["setting"] == DENSE else lost.replace("-", "−")
    return [value, lost, f"{row['gmacs']:.2f}", f"{row['mac_ratio']:.2f}×"]


def speedup(row: Mapping[str, Any] | None) -> str:
    """A measured speed-up with its quartiles as a cell."""
    return "not timed" if row is None else "{speedup:.2f}× ({speedup_low:.2f}–{speedup_high:.2f})".format(**row)


@dataclass(frozen=True)
class Place:
    """A table in a page of results that has rows of a method."""

    heading: str
    link: str  # from a method's page
    lines: tuple[str, ...]  # head of the table, and these rows


def elsewhere(name: str, docs: Path) -> list[Place]:
    """Tables of the pages of results in which a cell is a setting that begins with the method."""
    own = re.compile(rf"^`{name}\([^`]*`$")
    found = []
    for page in sorted(docs.glob("results*.md")):
        for heading, lines in tables(page):
            rows = [line for line in lines[2:] if any(own.match(cell.strip()) for cell in CELLS.split(line))]
            if rows:
                link = f"../{page.name}#{anchor(heading)}"
                found.append(Place(heading, link, (*lines[:2], *rows)))
    return found


@cache
def tables(page: Path) -> list[tuple[str, list[str]]]:
    """The tables of a page as lines, each with the heading that it stands under."""
    return list(_tables(page.read_text(encoding="utf-8").splitlines()))


def _tables(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    heading, table = "", []
    for line in [*lines, ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        if table:
            yield heading, table
            table = []
        if given := HEADING.match(line):
            heading = given[2]


def shown(place: Place) -> str:
    """A table with the rows of a method, and where it is from."""
    return "\n".join([*place.lines, "", f"From [{place.heading}]({place.link})."])


def anchor(heading: str) -> str:
    """The name that the site gives to a heading."""
    from markdown.extensions.toc import slugify

    return slugify(heading.replace("`", ""), "-")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(file: Path) -> dict[str, Any]:
    """A file of JSON; nothing where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
