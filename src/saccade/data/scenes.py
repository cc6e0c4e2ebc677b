"""A labelled image set made by code: one small shape somewhere in a cluttered scene, the same on every machine."""

from __future__ import annotations

import errno
import hashlib
import os
from functools import cache
from pathlib import Path

import numpy as np

from saccade.data.shapes import SHAPES, Distance, Field
from saccade.data.source import ImageSet
from saccade.data.splits import choose_split
from saccade.errors import UserError, nearest

VERSION = 1  # to be raised with every change of the pixels, so that caches of predictions do not outlive it
SIZE = 128
SPLITS = {"train": 40_000, "val": 2_000, "test": 10_000}
NAME = "scenes"

LEAST_SIZE = 64
ACROSS = (27, 58)  # pixels at SIZE, longer side of the object's box
DISTRACTORS = (1, 3)
STANDS_OUT = 0.3  # distance in RGB 0..1 from most of what lies around
COLOURS = 6
VARIANTS = 8
HEADER = f"P6\n{SIZE} {SIZE}\n255\n".encode()

CLASSES = tuple(sorted(SHAPES))

Box = tuple[int, int, int, int]  # top, left, bottom, right in pixels, the last two exclusive


def render(split: str, index: int, *, seed: int = 0, size: int = SIZE) -> tuple[np.ndarray, int, Box]:
    """One scene: uint8 RGB [size, size, 3], its class (a place in ``CLASSES``) and the object's box in pixels.

    The box is (top, left, bottom, right), the last two exclusive, of the pixels whose middle the object covers; it
    lies wholly inside the image. Its longer side is ``ACROSS`` pixels at ``SIZE``, in proportion at other sizes. The
    class is ``index % len(CLASSES)``; nothing but the shape depends on it. Equal arguments give equal pixels, whatever
    was rendered before and wherever.

    Raises UserError for an unknown split, a negative index or seed, or a size below ``LEAST_SIZE``.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r} in {NAME}{nearest(split, SPLITS)}")
    if min(index, seed) < 0:
        raise UserError(f"index {index} or seed {seed} is below 0: give whole numbers from 0 on")
    if size < LEAST_SIZE:
        raise UserError(f"a scene of {size} pixels is below {LEAST_SIZE}: give at least {LEAST_SIZE}")
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
    label = index % len(CLASSES)
    canvas, rough = _background(rng, size)
    for _ in range(rng.integers(*DISTRACTORS, endpoint=True)):
        _distract(rng, canvas, rough)
    box = _place(rng, canvas, rough, SHAPES[CLASSES[label]])
    y, x = _axes(size)
    down, right = rng.uniform(-0.3, 0.3, 2).tolist()
    canvas *= 1 + down * (y / size - 0.5) + right * (x / size - 0.5)
    canvas += rng.uniform(0, 0.08) * (rng.random((size, size), dtype=np.float32) - 0.5)
    pixels = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)), label, box


def _background(rng: np.random.Generator, size: int) -> tuple[Field, Field]:
    """RGB in about 0..1, [3, size, size], and one smooth noise field of unit variance, [size, size]."""
    y, x = _axes(size)
    tone, red, blue, rough = _noise(rng, size)
    contrast = rng.uniform(0.04, 0.1)
    level = rng.uniform(0.15, 0.4) + contrast * tone
    red, blue = (rng.uniform(-0.08, 0.08) + rng.uniform(0.01, 0.04) * c for c in (red, blue))
    # Regions of another tone with ragged or soft edges, as things that stand in front of one another have.
    others = (tone[::-1], rough), (tone[:, ::-1], rough.T), (tone.T, rough[::-1])
    for flipped, bump in others[: rng.integers(1, 4)]:
        down, right = _direction(rng)
        away = down * (y - size * rng.uniform(0.1, 0.9)) + right * (x - size * rng.uniform(0.1, 0.9))
        inside = _cover(away + size * 0.15 * bump, size * (0.01, 0.03, 0.15)[rng.integers(3)])
        level += inside * (rng.uniform(0.12, 0.45) + rng.uniform(0.03, 0.08) * flipped - level)
        red += inside * rng.uniform(-0.12, 0.12)
        blue += inside * rng.uniform(-0.12, 0.12)
    for _ in range(rng.integers(1, 4)):
        middle, spread = rng.uniform(0, size, 2).tolist(), size * rng.uniform(0.1, 0.3)
        near = np.exp(-(((y - middle[0]) / spread) ** 2)) * np.exp(-(((x - middle[1]) / spread) ** 2))
        level += rng.uniform(0.03, 0.1) * near * _waves(rng, y, x, size)
    return _rgb(level, red, blue), rough


def _distract(rng: np.random.Generator, canvas: Field, rough: Field) -> None:
    """Draw one thing about as large as an object that is none of the classes."""
    size = canvas.shape[-1]
    radius = size / SIZE * rng.uniform(*ACROSS) / 2
    centre = rng.uniform(0, size, 2)
    window, y, x = _window(centre, 1.3 * radius, size)
    down, right = _direction(rng)
    u, w = (right * x + down * y) / radius, (right * y - down * x) / radius
    kind, (bend, flat) = rng.integers(4), rng.uniform(0, 1, 2).tolist()
    soft = rng.uniform(1, 1.8)
    if kind == 0:  # a bent stroke
        rise = (0.3 + 0.5 * bend) * (np.abs(u) - 0.5)
        away = np.maximum(np.abs(w - rise) - 0.08 - 0.1 * flat, np.abs(u) - 1)
    elif kind == 1:  # part of the rim of an ellipse
        w = w / (0.5 + 0.3 * flat)
        r = np.hypot(u, w)
        away = np.maximum(np.abs(r - 0.85) - 0.12, (r * np.cos(0.7 + 1.1 * bend) - (u + w) / 2**0.5))
    elif kind == 2:  # a blur
        away = np.hypot(u, w / (0.4 + 0.4 * flat)) - 0.6
        soft = radius * rng.uniform(0.6, 1)
    else:  # a patch without a form
        bump = rough[window] - rough[window].mean()
        r = np.hypot(u, w / (0.45 + 0.25 * flat))
        away = np.maximum(r - 0.75 + (0.35 + 0.25 * bend) * bump, r - 1.2)
    _paint(rng, canvas[:, *window], rough[window], away * radius, soft)


def _place(rng: np.random.Generator, canvas: Field, rough: Field, shape: Distance) -> Box:
    """Draw the object, anywhere inside and at any angle, and return its box."""
    size = canvas.shape[-1]
    variant, stretch = rng.integers(VARIANTS), rng.uniform(0.88, 1 / 0.88) ** 0.5
    first, last = _turn(rng), _turn(rng)
    outline = first @ np.diag([stretch, 1 / stretch]) @ last @ _outline(shape, variant)
    low, high = outline.min(1), outline.max(1)
    scale = size / SIZE * rng.uniform(*ACROSS) / float((high - low).max())
    low, high = low * scale, high * scale
    x0, y0 = rng.uniform(1 - low, size - 1 - high)
    window, y, x = _window((y0, x0), max(-low.min(), high.max()) + 5, size)
    (a, b), (c, d) = (last.T @ np.diag([1 / stretch, stretch]) @ first.T / scale).astype(np.float32)
    u, w = a * x + b * y, c * x + d * y
    away = shape(u, w, variant / (VARIANTS - 1)) * scale
    _paint(rng, canvas[:, *window], rough[window], away, rng.uniform(1, 1.8))
    (top, bottom), (left, right) = (np.flatnonzero((away < 0).any(axis))[[0, -1]] for axis in (1, 0))
    above, before = window[0].start, window[1].start
    return int(above + top), int(before + left), int(above + bottom + 1), int(before + right + 1)


def _paint(rng: np.random.Generator, canvas: Field, rough: Field, away: Field, soft: float) -> None:
    """Fill where ``away`` (pixels) is negative: a random texture in a random colour that differs from its surround."""
    candidates = _rgb(rng.uniform(0.62, 0.95, (COLOURS, 1)), *(0.12 * rng.standard_normal((2, COLOURS, 1))))
    around = canvas[:, (away > 0) & (away < 4)][:, ::3]
    apart = (((candidates - around[:, None]) ** 2).sum(0) > STANDS_OUT**2).sum(1)
    colour = candidates[:, np.minimum(apart, 0.9 * around.shape[1]).argmax()]  # the first of those good enough
    down, right = _direction(rng) * (3 / len(away))
    height, width = away.shape
    y, x = _axes(max(height, width))
    y, x = y[:height], x[:, :width]
    ramp = down * (y - height / 2) + right * (x - width / 2)
    weights = rng.uniform(0, 0.07, 3).tolist()
    texture = weights[0] * rough + weights[1] * ramp + weights[2] * _waves(rng, y, x, SIZE)
    canvas += _cover(away, soft) * (colour[:, :, None] + texture - canvas)


def _noise(rng: np.random.Generator, size: int) -> Field:
    """Four periodic fields of about unit variance, [4, size, size]: one with amplitude 1/f, three smoother."""
    every, lowest = _falloff(size)
    tone = np.fft.irfft2(_phases()[rng.integers(256, size=every.shape, dtype=np.uint8)] * every, s=(size, size))
    coarse = _phases()[rng.integers(256, size=(3, *lowest.shape), dtype=np.uint8)] * lowest
    return np.concatenate([tone[None], np.fft.irfft2(coarse, s=(size, size))]).astype(np.float32, copy=False)


def _waves(rng: np.random.Generator, y: Field, x: Field, size: int) -> Field:
    """Stripes of 5 to 15 pixels at ``SIZE``, in −1..1."""
    down, right = _direction(rng) * (2 * np.pi * SIZE / size / rng.uniform(5, 15))
    return np.sin(down * y + (right * x + rng.uniform(0, 2 * np.pi)))


def _direction(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.sin(angle), np.cos(angle)], dtype=np.float32)


def _turn(rng: np.random.Generator) -> np.ndarray:
    sine, cosine = _direction(rng)
    return np.array([[cosine, -sine], [sine, cosine]])


def _cover(away: Field, soft: float) -> Field:
    """How far the inside covers each pixel, 0..1, over an edge ``soft`` pixels wide."""
    return np.clip(0.5 - away / soft, 0, 1)


def _rgb(level: Field, red: Field, blue: Field) -> Field:
    """[3, …] of a luminance and two differences of colour that leave it as it is."""
    return np.stack([level + red, level - 0.51 * red - 0.19 * blue, level + blue]).astype(np.float32)


def _window(
    centre: tuple[float, float] | np.ndarray, radius: float, size: int
) -> tuple[tuple[slice, slice], Field, Field]:
    """The part of the image within ``radius`` pixels, and its y [h, 1] and x [1, w] from ``centre``."""
    rows, columns = (slice(max(0, int(c - radius)), min(size, int(c + radius) + 2)) for c in centre)
    y, x = _axes(size)
    return (rows, columns), y[rows] - np.float32(centre[0]), x[:, columns] - np.float32(centre[1])


@cache
def _axes(size: int) -> tuple[Field, Field]:
    """Centres of the pixels: y [size, 1] and x [1, size]."""
    middles = np.arange(size, dtype=np.float32) + np.float32(0.5)
    return middles[:, None], middles[None]


@cache
def _phases() -> np.ndarray:
    return np.exp(2j * np.pi * np.arange(256) / 256).astype(np.complex64)


@cache
def _falloff(size: int) -> tuple[Field, Field]:
    """Amplitudes by frequency as ``irfft2`` takes them: 1/f for all, and 1/f^1.5 for the lowest 2/5."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) * size
    f[0, 0] = np.inf
    low = size // 5
    every, lowest = 1 / f, np.where(f <= low, f**-1.5, 0)[:, : low + 1]
    every, lowest = (size**2 * a / np.sqrt(2 * (a**2).sum()) for a in (every, lowest))
    return every.astype(np.float32), lowest.astype(np.float32)


@cache
def _outline(shape: Distance, variant: int) -> np.ndarray:
    """Points x, y of the edge, [2, n]."""
    ticks = np.linspace(-1.5, 1.5, 193)
    x, y = np.meshgrid(ticks, ticks)
    edge = np.abs(shape(x, y, variant / (VARIANTS - 1))) < ticks[1] - ticks[0]
    return np.stack([x[edge], y[edge]])


class Rendered:
    """The scenes of ``counts`` as files ``split/class/number.ppm``, rendered when they are read.

    Image ``number`` of a class is ``render``'s index ``number * len(CLASSES) + label``. ``counts`` are images by
    split, default ``SPLITS``; a split that it leaves out is not there. ``box`` gives where the object of a file is,
    at no cost for one that was read before.

    Raises UserError for an unknown split, a count below 1 or a seed below 0.
    """

    def __init__(self, seed: int = 0, counts: dict[str, int] | None = None):
        if seed < 0:
            raise UserError(f"seed {seed} is below 0: give a whole number from 0 on")
        self.seed, self.counts = seed, dict(SPLITS if counts is None else counts)
        for split, count in self.counts.items():
            if split not in SPLITS:
                raise UserError(f"no split {split!r} in {NAME}{nearest(split, SPLITS)}")
            if count < 1:
                raise UserError(f"{count} scenes in split {split!r} is below 1: give at least 1")
        self._boxes: dict[str, Box] = {}

    def names(self) -> list[str]:
        """Of all scenes, split by split."""
        return [name for split in sorted(self.counts) for name in _names(split, self.counts[split])]

    def size(self, name: str) -> int:
        """Bytes of a scene's file."""
        return len(HEADER) + 3 * SIZE * SIZE

    def digest(self, name: str, limit: int) -> bytes:
        """Of what decides the pixels, which need not be rendered for it."""
        return hashlib.blake2b(f"scenes {VERSION} seed {self.seed} {name}".encode(), digest_size=16).digest()

    def read(self, name: str, limit: int = 2**20) -> bytes:
        """A binary PPM. Raises FileNotFoundError for a name that is not among ``names``."""
        return HEADER + self._render(name).tobytes()

    def box(self, name: str) -> Box:
        """The box of a file's object, as ``render`` gives it. Raises FileNotFoundError as ``read``."""
        if name not in self._boxes:
            self._render(name)
        return self._boxes[name]

    def _render(self, name: str) -> np.ndarray:
        split, label, number = (*name.removesuffix(".ppm").split("/"), "", "")[:3]
        index = int(number) * len(CLASSES) + CLASSES.index(label) if number.isdecimal() and label in CLASSES else -1
        if not 0 <= index < self.counts.get(split, 0) or name != _name(split, index):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        pixels, _, self._boxes[name] = render(split, index, seed=self.seed)
        return pixels


def scenes(split: str | None = None, *, seed: int = 0, counts: dict[str, int] | None = None) -> ImageSet:
    """The built-in image set: ten shapes, ``counts`` images by split (default ``SPLITS``); ``val`` if none is asked.

    Raises UserError for an unknown split, a count below 1 or a seed below 0.
    """
    store = Rendered(seed, counts)
    split = choose_split(Path(NAME), set(store.counts), split)
    names = list(_names(split, store.counts[split]))
    labels = [CLASSES.index(name.split("/")[1]) for name in names]
    return ImageSet(Path(NAME), split, names, labels, list(CLASSES), store)


def _name(split: str, index: int) -> str:
    return f"{split}/{CLASSES[index % len(CLASSES)]}/{index // len(CLASSES):05}.ppm"


@cache
def _names(split: str, count: int) -> tuple[str, ...]:
    """Sorted."""
    return tuple(sorted(_name(split, index) for index in range(count)))
