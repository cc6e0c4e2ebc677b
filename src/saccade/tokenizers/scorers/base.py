"""What a scorer is, the registry where each scorer's own file puts its name, and what a batch may bring along.

A scorer says how much every block that can be split wants to be: one number a block, higher first. Which blocks then
are split is none of its business. Adding one is a file here, or for one's own use::

    @register_scorer("edges")
    def edges(backbone):
        return lambda images, size: my_edges(images, size)  # [B, C, h, w] -> [B, h // size, w // size]

    model.at("quadtree(100, scorer='edges')")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.plan import Backbone
from saccade.core.timm_types import ViT
from saccade.errors import UserError, nearest
from saccade.setting import Setting
from saccade.tokenizers.grid import Grid
from saccade.tokenizers.mosaic.geometry import Geometry


@dataclass(frozen=True)
class Scene:
    """What a scorer sees of a batch."""

    images: Tensor  #         [B, C, H, W] fp32 (or fp64), normalised as the ViT wants it
    levels: list[Tensor]  #   the pyramid that leaves will be read from, images at 1, 1/2, 1/4, …
    geometry: Geometry
    vit: ViT
    fine: Grid  #             the plain grid of the finest patches

    def pixels(self) -> Tensor:
        """The images as they were before normalisation, 0 … 1."""
        mean, std = normalisation(self.vit, self.images)
        return self.images * std + mean


class Scorer(nn.Module):
    """Says how much each block wants to be split."""

    learns: ClassVar[bool] = False  # its scores carry a gradient in training

    def check(self, patch: int) -> None:
        """Raises UserError where blocks of ``2 * patch`` pixels are too small for it."""

    def forward(self, scene: Scene) -> list[Tensor]:
        """Scores of the blocks of every splittable level, the coarsest first: [B, h, w] each, fp32."""
        raise NotImplementedError

    def macs(self, vit: ViT, geometry: Geometry) -> int:
        """Multiply-accumulates per image, of matrix products and convolutions as everywhere."""
        return 0


class Called(Scorer):
    """A user's function ``(images [B, C, H, W], size) -> [B, H // size, W // size]`` as a scorer."""

    def __init__(self, name: str, function: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, scene: Scene) -> list[Tensor]:
        g, found = scene.geometry, []
        for level in g.splittable:
            score = self.function(scene.images, g.patch << level)
            expected = (scene.images.shape[0], *g.grid(level))
            if not isinstance(score, Tensor) or tuple(score.shape) != expected:
                shape = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
                raise UserError(f"scorer {self.name!r} gave {shape} for blocks of {g.patch << level}: give {expected}")
            found.append(score.float())
        return found


def pooled(image: Tensor, geometry: Geometry) -> list[Tensor]:
    """Mean of a map over each splittable block: [B, h, w] of any size over the image -> as ``Scorer.forward``."""
    cells = on_cells(image, geometry)
    return [block_mean(cells, geometry, level, 1) for level in geometry.splittable]


def on_cells(image: Tensor, geometry: Geometry) -> Tensor:
    """A map [B, h, w] of any size that covers the image -> one value a cell, [B, gh, gw].

    A map that the cells divide, or that divides the cells, is taken as it is; another is resized bilinearly.
    """
    (h, w), (gh, gw) = image.shape[-2:], geometry.cells
    if h % gh == 0 and w % gw == 0:
        return image.unflatten(1, (gh, h // gh)).unflatten(3, (gw, w // gw)).mean((2, 4))
    if gh % h == 0 and gw % w == 0:
        return image.repeat_interleave(gh // h, 1).repeat_interleave(gw // w, 2)
    return F.interpolate(image.unsqueeze(1), size=(gh, gw), mode="bilinear").squeeze(1)


def block_mean(x: Tensor, geometry: Geometry, level: int, unit: int) -> Tensor:
    """Means over the blocks of a level: x [B, …, H, W] with ``unit`` × ``unit`` places a cell -> [B, …, h, w]."""
    h, w = geometry.grid(level)
    edge = unit << level
    x = x[..., : h * edge, : w * edge]
    return x.unflatten(-2, (h, edge)).sum(-2).unflatten(-1, (w, edge)).sum(-1) / edge**2


# --- normalisation --------------------------------------------------------------------------------------------------


def normalisation(vit: ViT, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that images were normalised by, [C, 1, 1] each.

    timm's, for the model; where the channels are not those of timm's config, their average for every channel.
    """
    cfg = vit.pretrained_cfg or {}
    given = (tuple(cfg.get(name) or (0.5,)) for name in ("mean", "std"))
    channels = like.shape[1]
    whole = [v if len(v) == channels else (sum(v) / len(v),) * channels for v in given]
    mean, std = (torch.tensor(v, dtype=like.dtype, device=like.device)[:, None, None] for v in whole)
    return mean, std


# --- what a batch brings along --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """What is known of a batch beside its pixels."""

    maps: Tensor | None = None  #    [B, h, w]  importance, of any size
    labels: Tensor | None = None  #  [B] int64


_GIVEN: ContextVar[Given] = ContextVar("given", default=Given())  # noqa: B039  (frozen)


@contextmanager
def given(*, maps: Tensor | None = None, labels: Tensor | None = None) -> Iterator[None]:
    """Within this block, and this thread, batches come with importance maps [B, h, w] or labels [B].

    ``with given(maps=maps): model.at("quadtree(100, scorer='maps')")(images)``
    """
    now = _GIVEN.get()
    token = _GIVEN.set(replace(now, **{k: v for k, v in (("maps", maps), ("labels", labels)) if v is not None}))
    try:
        yield
    finally:
        _GIVEN.reset(token)


def current() -> Given:
    """What was given for this batch."""
    return _GIVEN.get()


# --- registry -------------------------------------------------------------------------------------------------------

Factory = Callable[..., Any]  # (backbone, **knobs) -> a Scorer, or a function as ``Called`` takes it
_SCORERS: dict[str, Factory] = {}


def register_scorer(name: str) -> Callable[[Factory], Factory]:
    """Put a factory ``build(backbone, **knobs)`` into the registry under the name that ``scorer=`` uses."""

    def add(build: Factory) -> Factory:
        _SCORERS[name] = build
        return build

    return add


def list_scorers() -> dict[str, str]:
    """Names that ``scorer=`` may use, and what they are in a line."""
    return {name: (inspect.getdoc(build) or "").split("\n", 1)[0] for name, build in sorted(_SCORERS.items())}


def build_scorer(text: str, backbone: Backbone) -> Scorer:
    """A scorer by its name or its name with knobs, ``"pixel"`` or ``"pixel(weight='area')"``.

    Raises:
        UserError: unknown scorer or knob, a knob out of range.
    """
    if not isinstance(text, str):
        raise UserError(f"quadtree: scorer={text!r} is not a name; register a function with register_scorer first")
    calls = Setting.parse(text).calls
    if len(calls) != 1:
        raise UserError(f"quadtree: scorer={text!r} is not one scorer; they are {', '.join(sorted(_SCORERS))}")
    (call,) = calls
    if call.name not in _SCORERS:
        raise UserError(f"quadtree: there is no scorer {call.name!r}{nearest(call.name, _SCORERS)}")
    build = _SCORERS[call.name]
    try:
        inspect.signature(build).bind(backbone, *call.args, **dict(call.kwargs))
    except TypeError as error:
        knobs = ", ".join(str(p).replace("'", "") for p in list(inspect.signature(build).parameters.values())[1:])
        raise UserError(f"scorer {call.name}: {error}; its knobs are ({knobs})") from None
    built = build(backbone, *call.args, **dict(call.kwargs))
    return built if isinstance(built, Scorer) else Called(call.name, built)
