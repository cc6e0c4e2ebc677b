"""Token maps: what each token stands for, drawn from the owner map alone.

``owner[cell]`` is the index of the patch token that stands for a cell of the finest grid, -1 where it was dropped. No
method's name is known here, so every method that keeps the map gets its picture. Letters: ``G = gh * gw`` cells,
``h, w`` pixels of the photo, ``H, W`` pixels of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 16  # a cell is never drawn smaller than this, in pixels
LONGEST = 4096  # a side never grows beyond this for the sake of the photo's proportions
FLAT, CLEAR = 0.80, 0.12  # how much of its mean colour covers a merged token, and a token of a single cell
INK, PAPER, MUTED = (24, 28, 34), (255, 255, 255), (96, 104, 116)


def draw_tokens(image: Any, owner: Any, grid: tuple[int, int], *, side: int = 512) -> Image.Image:
    """Draw what each token stands for.

    A merged token is its mean colour over a trace of the photo, a token of one cell is the photo, and thin lines part
    the tokens. Cells of one token that do not touch share their colour. Dropped cells are dark, grey and hatched.

    Args:
        image: a PIL image or a uint8 array ``[h, w, 3]`` (or ``[h, w]``), any size: what the model saw, after the crop.
        owner: integers ``[G]``, array or tensor.
        grid: ``(gh, gw)``, the finest cells.
        side: the longer side of the picture in pixels; larger where a cell would be under 16 pixels.
    """
    photo, owner = _photo(image), _owner(owner, grid)
    height, width = _canvas(photo, grid, side)
    colours = token_colours(photo, owner, grid)  # [G, 3]
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)  # [H, W, 3]
    cells = _cells(height, width, grid)  # [H, W]

    _, token, areas = np.unique(owner, return_inverse=True, return_counts=True)
    cover = np.where(areas[token] > 1, FLAT, CLEAR).astype(np.float32)[cells, None]  # [H, W, 1]
    fill = colours.astype(np.float32)[cells]
    out = cover * fill + (1 - cover) * pixels

    line = min(3, max(1, round(min(height / grid[0], width / grid[1]) / 16)))
    dropped = (owner < 0)[cells]  # [H, W]
    out[dropped] = _dropped(pixels, line)[dropped]
    edge = _edges(token[cells], line)
    # Each half of a line takes its colour from the cell it lies on: white on the dark, near-black on the bright.
    bright = (np.where(dropped, 0.0, _grey(fill)) > 140)[..., None]
    out[edge] = np.where(bright, 0.42 * out, 0.30 * out + 0.70 * 255.0)[edge]
    return Image.fromarray(np.clip(np.rint(out), 0, 255).astype(np.uint8))


def token_colours(image: Any, owner: Any, grid: tuple[int, int]) -> np.ndarray:
    """The photo's mean colour over all cells of a cell's token, float64 ``[G, 3]``; a dropped cell has its own mean.

    Pixel ``(y, x)`` lies in cell ``(y * gh // h, x * gw // w)``; a photo of fewer pixels than cells is enlarged first.
    """
    photo, owner = _photo(image), _owner(owner, grid)
    gh, gw = grid
    if photo.height < gh or photo.width < gw:
        photo = photo.resize((max(photo.width, gw), max(photo.height, gh)), Image.Resampling.NEAREST)
    pixels = np.asarray(photo, dtype=np.float64)  # [h, w, 3]
    rows = -(-np.arange(gh) * photo.height // gh)  # first pixel row of each row of cells (ceil), strictly increasing
    cols = -(-np.arange(gw) * photo.width // gw)
    sums = np.add.reduceat(np.add.reduceat(pixels, rows, axis=0), cols, axis=1).reshape(-1, 3)  # [G, 3]
    counts = np.outer(np.diff(rows, append=photo.height), np.diff(cols, append=photo.width)).reshape(-1)  # [G]
    # A dropped cell is a group of its own: give it a label that no token has.
    group = np.where(owner < 0, owner.max(initial=0) + 1 + np.arange(owner.size), owner)
    _, group = np.unique(group, return_inverse=True)
    total = np.stack([np.bincount(group, weights=sums[:, c]) for c in range(3)], axis=1)
    return (total / np.bincount(group, weights=counts)[:, None])[group]


def draw_blocks(
    image: Any,
    owners: Sequence[Any],
    grid: tuple[int, int],
    titles: Sequence[str],
    columns: int | None = None,
    *,
    side: int = 320,
) -> Image.Image:
    """A contact sheet: the photo, then one token map per block with its title (``"block 4 · 124 tokens"``).

    Args:
        owners: one owner map ``[G]`` per panel.
        titles: one line per panel; cut with an ellipsis where it is wider than its panel.
        columns: panels per row; None: whatever leaves the fewest empty places.
        side: the longer side of a panel in pixels.
    """
    if len(owners) != len(titles):
        raise ValueError(f"draw_blocks got {len(owners)} owner maps and {len(titles)} titles: give one title per map")
    photo = _photo(image)
    height, width = _canvas(photo, grid, side)
    panels = [photo.resize((width, height), Image.Resampling.LANCZOS)]
    panels += [draw_tokens(photo, owner, grid, side=side) for owner in owners]
    columns = min(columns or _columns(len(panels)), len(panels))
    text = max(12, round(side / 22))
    gap, head, face = text, round(1.9 * text), font(text)
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap + head) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (panel, title) in enumerate(zip(panels, ["photo", *titles], strict=True)):
        left = gap + (i % columns) * (width + gap)
        top = gap + (i // columns) * (height + gap + head)
        draw.text((left, top + head / 2), elide(title, width, face), fill=INK if i else MUTED, font=face, anchor="lm")
        sheet.paste(panel, (left, top + head))
    return sheet


@lru_cache(maxsize=16)
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as bundled with matplotlib, so that no system font is needed."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def elide(text: str, width: float, face: ImageFont.FreeTypeFont) -> str:
    """``text`` in one line no wider than ``width`` pixels, its end replaced by ``…`` where it is."""
    text = " ".join(text.split())
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _photo(image: Any) -> Image.Image:
    """A PIL RGB image from a PIL image or a uint8 array."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
            raise ValueError(
                f"a token map needs a PIL image or a uint8 array [h, w, 3], got {array.dtype} {list(array.shape)}"
            )
        image = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    if not image.width or not image.height:
        raise ValueError(f"a token map needs at least one pixel, got an image of {image.width}x{image.height}")
    return image.convert("RGB")


def _owner(owner: Any, grid: tuple[int, int]) -> np.ndarray:
    """Owner map as int64 ``[G]``, every kind of "dropped" as -1."""
    array = np.asarray(owner.detach().cpu() if hasattr(owner, "detach") else owner)
    if min(grid) < 1 or array.shape != (grid[0] * grid[1],):
        raise ValueError(
            f"an owner map of a {grid[0]}x{grid[1]} grid has {grid[0] * grid[1]} cells, got {list(array.shape)}"
        )
    if array.dtype.kind not in "iu":
        raise ValueError(f"an owner map holds integers, got {array.dtype}")
    return np.maximum(array.astype(np.int64), -1)


def _canvas(photo: Image.Image, grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Picture size ``(H, W)``: the photo's proportions, its longer side ``side`` or more, no cell under 16 pixels."""
    least = CELL * grid[0], CELL * grid[1]
    scale = max(side / max(photo.height, photo.width), least[0] / photo.height, least[1] / photo.width)
    tall, wide = (min(round(n * scale), LONGEST) for n in (photo.height, photo.width))
    return max(tall, least[0]), max(wide, least[1])


def _cells(height: int, width: int, grid: tuple[int, int]) -> np.ndarray:
    """The cell of every pixel, ``[H, W]``."""
    return (np.arange(height) * grid[0] // height)[:, None] * grid[1] + np.arange(width) * grid[1] // width


def _edges(label: np.ndarray, line: int) -> np.ndarray:
    """Lines of ``line`` pixels where neighbours in ``label`` ``[H, W]`` differ, bool ``[H, W]``."""
    padded = np.pad(label.astype(np.int32), (line // 2, line - line // 2), mode="edge")
    shifts = range(line + 1)

    def window(extreme: Callable[[list[np.ndarray]], np.ndarray]) -> np.ndarray:  # over a square, axis by axis
        rows = extreme([padded[k : k + label.shape[0]] for k in shifts])
        return extreme([rows[:, k : k + label.shape[1]] for k in shifts])

    return window(np.minimum.reduce) != window(np.maximum.reduce)


def _dropped(pixels: np.ndarray, line: int) -> np.ndarray:
    """``pixels`` ``[H, W, 3]`` as dropped: dark, grey, with thin diagonal lines."""
    height, width = pixels.shape[:2]
    dark = 0.28 * _grey(pixels)[..., None] + np.array([8.0, 9.0, 11.0], dtype=np.float32)
    hatch = ((np.arange(height)[:, None] + np.arange(width)) % (7 * line) < line)[..., None]
    return np.where(hatch, 0.60 * dark + 58.0, dark)


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Luma ``[...]`` of ``[..., 3]``."""
    return pixels @ np.array([0.299, 0.587, 0.114], dtype=pixels.dtype)


def _columns(count: int) -> int:
    """Panels per row: the number from 3 to 6 that leaves the fewest empty places, the widest of equals."""
    return count if count <= 4 else min((6, 5, 4, 3), key=lambda c: (-count % c, -c))
