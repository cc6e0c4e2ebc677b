"""A latency curve as figures: what a block takes by its tokens, and what deciding takes by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from saccade.reports.figure import Figure
from saccade.reports.formatting import escape, number
from saccade.reports.plots import LAYOUTS, marker
from saccade.reports.svg import TEXT, Axis, canvas, frame, segment, tag

LINE, SIDE = 22.0, 118.0  # px: of a bar with its name, and of the names
SHORT = 150  # px by which these are lower than a frontier


def latency_figures(
    tokens: Sequence[float], block: Sequence[float], deciding: Mapping[str, float], dense: float
) -> list[Figure]:
    """Two plots.

    Args:
        tokens: numbers of tokens, in order; block: milliseconds of a batch in a block of so many.
        deciding: milliseconds by which a method's decision makes one block longer, by method.
        dense: milliseconds of a block of the unreduced model, which the bars are compared with.
    """
    hint = "straight: a token fewer saves as much wherever it is taken; flat: fewer tokens save nothing"
    found = [
        Figure("a block's time by its tokens", hint, {n: _line(tokens, block, size) for n, size in LAYOUTS.items()})
    ]
    if deciding:
        hint = f"milliseconds for one block; the block itself takes {number(dense)} ms with all tokens"
        found.append(Figure("what deciding takes", hint, {n: _bars(deciding, size) for n, size in LAYOUTS.items()}))
    return found


def _line(tokens: Sequence[float], block: Sequence[float], size: tuple[int, int]) -> str:
    width, height = size[0], size[1] - SHORT
    x = Axis(0.0, 1.03 * max(tokens), 46, width - 14)
    y = Axis(0.0, 1.1 * max(block), height - 44, 26)
    out = frame(x, y, ("tokens", "ms a block"), (lambda v: f"{v:.10g}", number), "→")
    spots = " ".join(f"{x(n):.1f},{y(ms):.1f}" for n, ms in zip(tokens, block, strict=True))
    out.append(tag("polyline", kind="frontier-line", points=spots))
    for n, ms in zip(tokens, block, strict=True):
        title = tag("title", escape(f"{n:.0f} tokens: {number(ms)} ms"))
        out.append(tag("g", title + marker("reduction"), transform=f"translate({x(n):.1f},{y(ms):.1f})"))
    return canvas(width, height, out, f"milliseconds of a block by its tokens, {len(tokens)} measured")


def _bars(deciding: Mapping[str, float], size: tuple[int, int]) -> str:
    width, rows = size[0], sorted(deciding.items(), key=lambda row: -row[1])
    bottom = 12 + LINE * len(rows)
    x = Axis(0.0, max(1e-6, 1.12 * max(ms for _, ms in rows)), SIDE, width - 14)
    out = [segment("tickline", (x(v), 6, x(v), bottom)) for v in x.ticks(4)]
    out += [tag("text", number(v), kind="tick", x=x(v), y=bottom + 16, text_anchor="middle") for v in x.ticks(4)]
    for i, (name, ms) in enumerate(rows):
        top, value = 8 + LINE * i, max(0.0, ms)
        out.append(tag("text", escape(name), kind="tick", x=SIDE - 8, y=top + TEXT, text_anchor="end"))
        bar = f"M{SIDE:.1f} {top:.1f}H{x(value):.1f}v{LINE - 8:.1f}H{SIDE:.1f}z"
        out.append(tag("g", tag("title", f"{number(ms)} ms") + f'<path d="{bar}"/>', kind="mark reduction"))
        out.append(tag("text", number(ms), kind="tick", x=x(value) + 5, y=top + TEXT))
    return canvas(width, bottom + 24, out, f"milliseconds of deciding by method, {len(rows)} methods")
