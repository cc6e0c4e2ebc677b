"""What every report has in common: the page around it, its tiles, legends, figures and how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template

from saccade.reports.figure import Figure
from saccade.reports.formatting import escape, prose


def render_page(
    title: str,
    tone: str,
    answer: str,
    reasons: Sequence[str],
    tiles: str,
    sections: Iterable[str],
    style: str = "",
    banner: str = "",
) -> str:
    """The page as one string.

    ``tone`` is "good" or "plain", the colour beside the answer; ``banner`` (above the answer), ``tiles`` and
    ``sections`` are markup; ``style`` is a further style sheet of this package.
    """
    parts = files("saccade.reports")
    sheets = [parts.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", style) if name]
    return Template(parts.joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        style="\n".join(sheets),
        tone=tone,
        banner=banner,
        answer=prose(answer),
        reasons="".join(f"<p>{prose(line)}</p>" for line in reasons),
        tiles=tiles,
        sections="\n".join(sections),
    )


def section(name: str, heading: str, body: str) -> str:
    """A heading and what stands below it."""
    return f'<section id="{name}"><h2>{heading}</h2>\n{body}\n</section>'


def render_tiles(tiles: Sequence[tuple[str, str, str]]) -> str:
    """``(name, number, what stands below)`` each, the number large; the last two are markup."""
    cells = "".join(f'<div><dt>{escape(n)}</dt><dd>{v}</dd><dd class="sub">{s}</dd></div>' for n, v, s in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def render_legend(keys: Sequence[tuple[str, str]], rows: bool = False) -> str:
    """``(shape, text)`` each, both markup; ``rows``: the entries belong to the rows of the table, in order."""
    items = "".join(
        f"<li{f' data-row={chr(34)}{i}{chr(34)}' if rows else ''}>"
        f'<svg class="key" viewBox="-10 -10 20 20" aria-hidden="true">{shape}</svg>{text}</li>'
        for i, (shape, text) in enumerate(keys)
    )
    return f'<ul class="legend">{items}</ul>'


def render_figures(figures: Sequence[Figure], kind: str = "figures") -> str:
    """Figures side by side."""
    return f'<div class="{kind}">{"".join(render_figure(f) for f in figures)}</div>'


def render_figure(figure: Figure) -> str:
    """One plot below its heading, in each of its layouts."""
    svgs = "".join(f'<div class="{name}">{svg}</div>' for name, svg in figure.svgs.items())
    title = figure.title[:1].upper() + figure.title[1:]
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(figure.hint)}</figcaption>{svgs}</figure>"


def how_it_was(command: str, facts: Mapping[str, str], notes: Sequence[str]) -> str:
    """The command, the circumstances and the remarks."""
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    remarks = "".join(f"<li>{prose(note)}</li>" for note in notes)
    return (
        (f'<pre tabindex="0"><code>{escape(command)}</code></pre>' if command else "")
        + (f'<dl class="facts">{listed}</dl>' if facts else "")
        + (f'<ul class="notes">{remarks}</ul>' if notes else "")
    )
