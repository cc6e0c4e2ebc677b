"""The frontier as a picture, for notebooks and slides; the report draws its own as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from saccade.errors import UserError
from saccade.reports.scale import SHARE, Scale

INCHES, DPI = (6.4, 3.4), 110
LABELLED = 10  # of more points, only those of the frontier have their names
LOOKS = {  # marker, colour
    "dense": ("s", "#4b5563"),
    "reduction": ("o", "#0f766e"),
    "random": ("x", "#b45309"),
    "rival": ("D", "#7c3aed"),
}
NAMES = {"dense": "plain dense", "reduction": "fewer tokens", "random": "random baseline", "rival": "another model"}


class Point(NamedTuple):
    """A measured setting: speed-up over dense, the metric in its own unit, and the ends of its interval where known."""

    setting: str
    family: str  # "dense" | "reduction" | "random"
    speedup: float
    accuracy: float
    low: float | None = None
    high: float | None = None
    chosen: bool = False


def frontier_picture(points: Sequence[Point], metric: str = "top-1", title: str = "") -> Image.Image:
    """Accuracy against measured speed-up, the frontier as a line through the points that no other beats in both.

    Raises UserError where fewer than two settings have both numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if len(points) < 2:
        raise UserError(f"{len(points)} settings have accuracy and speed: a frontier needs two or more")
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scale = Scale.of(metric)
    best, unit = _frontier(points, scale), 100 if scale.share else 1
    axes.plot([p.speedup for p in best], [unit * p.accuracy for p in best], color="#9ca3af", linewidth=1, zorder=1)
    for family, (marker, colour) in LOOKS.items():
        found = [p for p in points if p.family == family]
        if not found:
            continue
        axes.scatter([p.speedup for p in found], [unit * p.accuracy for p in found], marker=marker, color=colour,
                     s=30, label=NAMES[family], zorder=3)  # fmt: skip
        for p in found:
            if p.low is not None and p.high is not None:
                axes.vlines(p.speedup, unit * p.low, unit * p.high, color=colour, alpha=0.35, linewidth=1, zorder=2)
    for p in points if len(points) <= LABELLED else best:
        weight = "bold" if p.chosen else "normal"
        axes.annotate(p.setting, (p.speedup, unit * p.accuracy), (5, 5), textcoords="offset points", fontsize=7.5,
                      fontweight=weight)  # fmt: skip
    axes.set(xlabel="measured speed-up over dense", ylabel=scale.axis(metric))
    axes.yaxis.set_inverted(scale.lower)  # better is up
    axes.set_title(title, fontsize=9, loc="left")
    axes.margins(x=0.14, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")


def _frontier(points: Sequence[Point], scale: Scale = SHARE) -> list[Point]:
    """The points than which none is faster and better, the fastest last; other models are none of it."""
    kept: list[Point] = []
    ours = [p for p in points if p.family != "rival"]
    for p in sorted(ours, key=lambda p: (-p.speedup, -scale.merit(p.accuracy))):
        if not kept or scale.merit(p.accuracy) > scale.merit(kept[-1].accuracy):
            kept.append(p)
    return kept[::-1]
