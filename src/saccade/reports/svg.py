"""What a small plot needs: elements, scales and ticks. Plain SVG text, no state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saccade.reports.formatting import escape

Line = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
Box = tuple[float, float, float, float]  # left, top, right, bottom
TEXT = 12  # size of all text in a plot, px


def tag(name: str, content: str = "", **attributes: object) -> str:
    """One element: ``content`` is markup, attributes are escaped; ``kind`` becomes ``class``, ``_`` becomes ``-``."""
    words = []
    for key, value in attributes.items():
        key = "class" if key == "kind" else key.replace("_", "-")
        words.append(f'{key}="{value:.5g}"' if isinstance(value, float) else f'{key}="{escape(value)}"')
    return f"<{' '.join([name, *words])}>{content}</{name}>"


def segment(kind: str, line: Line) -> str:
    """A straight line."""
    return tag("line", kind=kind, x1=line[0], y1=line[1], x2=line[2], y2=line[3])


@dataclass(frozen=True)
class Axis:
    """Maps values ``low … high`` to pixels ``start … end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def clamp(self, value: float) -> float:
        """The place of a value, or of the end that it lies beyond."""
        return self(min(max(value, self.low), self.high))

    def ticks(self, wanted: int) -> list[float]:
        """Round values inside the axis, about ``wanted`` of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
                found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
                if len(found) >= min(wanted, 4):
                    return found
        raw = (self.high - self.low) / wanted
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(s * unit for s in (1.0, 2.0, 2.5, 5.0, 10.0) if s * unit >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def span(values: Sequence[float], pad: float = 0.06, log: bool = False) -> tuple[float, float]:
    """The range of ``values`` with a margin; never empty."""
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** pad if high > low else 1.2
        return low / margin, high * margin
    margin = (high - low) * pad or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def frame(
    x: Axis, y: Axis, names: tuple[str, str], text: tuple[Callable[[float], str], Callable[[float], str]], arrow: str
) -> list[str]:
    """Grid lines, tick labels and the names of both axes; ``arrow``: the end that the horizontal name stands at."""
    out = []
    for v in y.ticks(6):
        out.append(segment("grid", (x.start, y(v), x.end, y(v))))
        out.append(tag("text", text[1](v), kind="tick", x=x.start - 8, y=y(v) + 4, text_anchor="end"))
    for v in x.ticks(6 if x.end > 400 else 5):
        out.append(segment("tickline", (x(v), y.start, x(v), y.start + 5)))
        out.append(tag("text", text[0](v), kind="tick", x=x(v), y=y.start + 18, text_anchor="middle"))
    out.append(segment("axis", (x.start, y.start, x.end, y.start)))
    out.append(tag("text", escape(names[1]), kind="name", x=4, y=13))
    at, anchor, name = (x.end, "end", f"{names[0]} →") if arrow == "→" else (x.start, "start", f"← {names[0]}")
    out.append(tag("text", escape(name), kind="name", x=at, y=y.start + 38, text_anchor=anchor))
    return out


def canvas(width: float, height: float, parts: Sequence[str], name: str) -> str:
    """A whole plot with its accessible name."""
    view = f"0 0 {width:.0f} {height:.0f}"
    return tag("svg", "\n".join(parts), viewBox=view, font_size=TEXT, role="img", aria_label=name)
