"""The ten shapes of the built-in scenes, as distances from their edge."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Field = np.ndarray
Distance = Callable[[Field, Field, float], Field]

# Shapes: about 1 in radius; x, y → distance outside the edge, negative inside; `v` in 0..1 varies the proportions.


def _arrow(x: Field, y: Field, v: float) -> Field:
    shaft = np.maximum(np.abs(y) - 0.17 - 0.06 * v, np.abs(x + 0.4) - 0.6)
    return np.minimum(shaft, np.maximum(-x, (x + 1.2 * np.abs(y) - 1) / 1.56))


def _crescent(x: Field, y: Field, v: float) -> Field:
    return np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x - 0.45 - 0.15 * v, y))


def _cross(x: Field, y: Field, v: float) -> Field:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.24 - 0.1 * v)


def _disc(x: Field, y: Field, v: float) -> Field:
    return np.hypot(x, y) - 1


def _heart(x: Field, y: Field, v: float) -> Field:
    x = np.abs(x) * (0.93 + 0.14 * v)
    point = np.maximum(0.766 * x - 0.643 * (y + 1), (y + 0.43 * x - 0.4) / 1.09)
    return np.minimum(np.hypot(x - 0.48, y - 0.35) - 0.5, point)


def _hourglass(x: Field, y: Field, v: float) -> Field:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(y - 1, (x - (0.65 + 0.2 * v) * y - 0.08) / 1.25)


def _ring(x: Field, y: Field, v: float) -> Field:
    return np.abs(np.hypot(x, y) - 0.8) - 0.14 - 0.1 * v


def _square(x: Field, y: Field, v: float) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85


def _star(x: Field, y: Field, v: float) -> Field:
    r, step = np.hypot(x, y), np.pi / 5
    turn = np.abs((np.arctan2(y, x) + step) % (2 * step) - step)
    inner = 0.4 + 0.1 * v
    u, w = 1 - inner * np.cos(step), inner * np.sin(step)
    return ((r * np.cos(turn) - 1) * w + r * np.sin(turn) * u) / np.hypot(u, w)


def _triangle(x: Field, y: Field, v: float) -> Field:
    return np.maximum(-y - 0.5, (y - 1 + (1.6 + 0.3 * v) * np.abs(x)) / 2)


SHAPES: dict[str, Distance] = {
    "arrow": _arrow,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "heart": _heart,
    "hourglass": _hourglass,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
