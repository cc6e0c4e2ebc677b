"""Figures of findings: a matrix as colours, and paths in the plane, as inline SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from saccade.reports.figure import Figure
from saccade.reports.formatting import escape
from saccade.reports.label_placement import place_labels
from saccade.reports.svg import TEXT, Axis, canvas, segment, span, tag
from saccade.reports.token_map import elide, font

SIDE, LEFT, TOP = 430.0, 118.0, 30.0  # of a matrix, px


def colours(values: np.ndarray, name: str = "viridis") -> np.ndarray:
    """Values 0 … 1 of any shape -> uint8 RGB [..., 3]; NaN is grey."""
    import matplotlib

    rgb = matplotlib.colormaps[name](np.clip(np.nan_to_num(values), 0.0, 1.0))[..., :3]
    return np.where(np.isnan(values)[..., None], 128, np.rint(255 * rgb)).astype(np.uint8)


def heat_figure(
    title: str, hint: str, groups: Sequence[tuple[str, int]], values: Sequence[Sequence[float | None]]
) -> Figure:
    """A square matrix of values 0 … 1 with its groups named at two sides, and what the colours mean."""
    matrix = np.array([[math.nan if v is None else v for v in row] for row in values], dtype=np.float64)
    count = len(matrix)
    uri = _png(colours(matrix))
    out = [
        tag("image", x=LEFT, y=TOP, width=SIDE, height=SIDE, href=uri, preserveAspectRatio="none",
            style="image-rendering: pixelated")
    ]  # fmt: skip
    start, face = 0, font(TEXT)
    for name, size in groups:
        middle, first, last = (SIDE * v / count for v in (start + size / 2, start, start + size))
        across, down = elide(name, last - first - 4, face), elide(name, LEFT - 12, face)
        out.append(tag("text", escape(across), kind="tick", x=LEFT + middle, y=TOP - 8, text_anchor="middle"))
        out.append(tag("text", escape(down), kind="tick", x=LEFT - 8, y=TOP + middle + 4, text_anchor="end"))
        if start:
            stroke = "stroke: var(--card); stroke-width: 2"
            edges = (LEFT + first, TOP, LEFT + first, TOP + SIDE), (LEFT, TOP + first, LEFT + SIDE, TOP + first)
            out += [f'<g style="{stroke}">{segment("edge", edge)}</g>' for edge in edges]
        start += size
    scale = _png(colours(np.linspace(0, 1, 64)[None]))
    bottom = TOP + SIDE + 14
    out.append(tag("image", x=LEFT, y=bottom, width=SIDE, height=9.0, href=scale, preserveAspectRatio="none"))
    for v in (0.0, 0.25, 0.5, 0.75, 1.0):
        out.append(tag("text", f"{v:g}", kind="tick", x=LEFT + v * SIDE, y=bottom + 24, text_anchor="middle"))
    svg = canvas(LEFT + SIDE + 12, bottom + 30, out, f"{title}: {count} × {count} values")
    return Figure(title, hint, {"any": svg})


def path_figure(title: str, hint: str, paths: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Paths in the plane at one scale for both axes; the first and the last point of each have their number."""
    points = [p for path in paths.values() for p in path]
    spans = [span([p[axis] for p in points], 0.08) for axis in (0, 1)]
    reach = max(high - low for low, high in spans) / 2
    middle = [(low + high) / 2 for low, high in spans]
    x = Axis(middle[0] - reach, middle[0] + reach, 20.0, 20.0 + SIDE)
    y = Axis(middle[1] - reach, middle[1] + reach, TOP + SIDE, TOP)
    out, marks, wanted = [], [], []
    for k, (name, path) in enumerate(paths.items()):
        kind = f"series s{k % 8}"
        spots = [(x(p[0]), y(p[1])) for p in path]
        out.append(tag("path", kind=f"line {kind}", d="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in spots)))
        for level, (a, b) in enumerate(spots):
            shape = tag("title", f"{escape(name)}, {level}") + tag("circle", cx=a, cy=b, r=3.0)
            out.append(tag("g", shape, kind=f"mark {kind}"))
        marks += spots
        wanted.append((*spots[-1], f"{name}, {len(spots) - 1}", 60.0))
        wanted.append((*spots[0], "0", 22.0))
    area = 4.0, 8.0, SIDE + 150.0, TOP + SIDE + 10
    for label in place_labels(wanted, area, marks, [], 200.0):
        if label:
            left, _, _, bottom = label.box
            line = segment("leader", (label.x, label.y, *label.leader_end())) if label.leader else ""
            out.append(line + tag("text", escape(label.text), kind="label", x=left, y=bottom - 4))
    return Figure(title, hint, {"any": canvas(SIDE + 150, TOP + SIDE + 16, out, f"{title}: {len(paths)} paths")})


def _png(pixels: np.ndarray) -> str:
    """uint8 [h, w, 3] as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
