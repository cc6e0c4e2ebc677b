"""From pixels to a model's input, inside a graph: resize, crop and normalise as Pillow and timm do, at any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import floor, pi
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import UserError


def _cubic(x: Tensor) -> Tensor:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _lanczos(x: Tensor) -> Tensor:
    y = (x * pi).clamp(min=1e-12)
    return torch.where(x < 3, y.sin() / y * (y / 3).sin() / (y / 3), torch.zeros_like(x))


def _bytes(x: Tensor) -> Tensor:
    """Rounded as Pillow rounds between its two passes."""
    return (x + 0.5).floor().clamp(0, 255)


FILTERS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {  # half width, and weight at a distance; Pillow's
    "bilinear": (1.0, lambda x: (1 - x).clamp(min=0)),
    "bicubic": (2.0, _cubic),
    "lanczos": (3.0, _lanczos),
}
MODES = ("center", "squash")


class InputStage(nn.Module):
    """uint8 images [B, H, W, 3] of any size -> float [B, 3, h, w], within 1/255 of the Python preprocessing.

    Resizing is two products with matrices of Pillow's filter weights, which the graph makes for the size of its images.
    Where "squash" widens and lowers a photo, its height is first, as in Pillow 13; earlier releases differ.

    Args:
        prepare: timm's names: size, interpolation, crop_pct, crop_mode, mean, std.

    Raises:
        UserError: an interpolation or a crop mode that is not done by filters.
    """

    def __init__(self, prepare: Mapping[str, Any]) -> None:
        super().__init__()
        for name, known in (("interpolation", FILTERS), ("crop_mode", MODES)):
            if prepare[name] not in known:
                raise UserError(f"{name} {prepare[name]!r} is not done in a graph, only {', '.join(known)}")
        self.size, self.mode = tuple(prepare["size"]), prepare["crop_mode"]
        self.radius, self.weight = FILTERS[prepare["interpolation"]]
        self.whole = tuple(floor(side / prepare["crop_pct"]) for side in self.size)  # before the crop
        for name in ("mean", "std"):
            self.register_buffer(
                name, torch.tensor(prepare[name], dtype=torch.float32)[:, None, None], persistent=False
            )
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, h, w]."""
        x = images.permute(0, 3, 1, 2).float()
        places = [torch.arange(side, device=x.device, dtype=torch.float64) for side in x.shape[2:]]
        sides = [place.amax(0) + 1 for place in places]
        resized = self._resized(*sides)
        down, right = (self._matrix(*facts) for facts in zip(places, sides, resized, self.size, strict=True))
        found = _bytes(down @ _bytes(x @ right.mT))
        if self.mode == "squash":
            first = (resized[1] > sides[1]) & (resized[0] < sides[0])
            found = torch.where(first, _bytes(_bytes(down @ x) @ right.mT), found)
        return (found / 255 - self.mean) / self.std

    def _resized(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Sides before the crop."""
        tall, wide = self.whole
        if self.mode == "squash":
            return torch.full_like(height, tall), torch.full_like(width, wide)
        if tall == wide:  # torchvision rounds the longer side down
            short = torch.minimum(height, width)
            return (tall * height / short).floor(), (tall * width / short).floor()
        ratio = torch.maximum(wide / width, tall / height)
        return (height * ratio).round(), (width * ratio).round()

    def _matrix(self, place: Tensor, side: Tensor, resized: Tensor, crop: int) -> Tensor:
        """[crop, side]: each output pixel's weights."""
        first = ((resized - crop) / 2).round()
        scale = side / resized
        wide = scale.clamp(min=1)
        centre = (torch.arange(crop, device=place.device, dtype=torch.float64) + first + 0.5).unsqueeze(1) * scale
        reach = self.radius * wide
        inside = (place >= (centre - reach + 0.5).floor()) & (place < (centre + reach + 0.5).floor())
        weights = self.weight(((place + 0.5 - centre) / wide).abs()) * inside
        return (weights / weights.sum(1, keepdim=True)).float()
