"""Values of cells laid over a photo: what is alike, what is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from saccade.reports.heat_map import colours

COVER = 0.62  # how much of its colour covers a cell; the rest is the photo in grey


def draw_overlay(
    image: Image.Image,
    values: Any,
    grid: tuple[int, int],
    marks: Sequence[tuple[float, float, str]] = (),
    *,
    side: int = 320,
) -> Image.Image:
    """The photo in grey under the values of its cells, the lowest dark and the highest bright.

    Args:
        image: a PIL image, any size: what the model saw, after the crop.
        values: numbers [G], array or tensor; NaN is grey.
        grid: (gh, gw), G = gh * gw.
        marks: (y, x, shape) in shares of the picture's height and width; shape is "ring" or "cross".
        side: the longer side of the picture in pixels.
    """
    cells = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
    if cells.size != grid[0] * grid[1]:
        raise ValueError(f"a {grid[0]}x{grid[1]} grid has {grid[0] * grid[1]} cells, got {cells.size} values")
    scale = side / max(image.size)
    width, height = (max(1, round(n * scale)) for n in image.size)
    photo = np.asarray(image.convert("L").resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    finite = cells[np.isfinite(cells)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    level = (cells.reshape(grid) - low) / (high - low if high > low else 1.0)
    rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    tint = colours(level, "inferno")[rows[:, None], columns].astype(np.float32)
    out = Image.fromarray(np.rint(COVER * tint + (1 - COVER) * photo[..., None]).astype(np.uint8))
    draw = ImageDraw.Draw(out)
    for y, x, shape in marks:
        _mark(draw, x * width, y * height, shape, side / 36)
    return out


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float, shape: str, r: float) -> None:
    """A white mark with a dark edge, to be seen on any ground."""
    for colour, width in (((20, 20, 24), 5), ((255, 255, 255), 2)):
        if shape == "ring":
            draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=width)
        else:
            draw.line((x - r, y - r, x + r, y + r), fill=colour, width=width)
            draw.line((x - r, y + r, x + r, y - r), fill=colour, width=width)
