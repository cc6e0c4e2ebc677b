"""From an RGB image to a model's input, exactly as timm does it for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from math import floor
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms.functional import normalize

from saccade.data.decode import ImageError, check_pixels, pixel_limit
from saccade.errors import UserError


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop and normalise. ``size`` is (height, width) in pixels; the other names and values are timm's."""

    size: tuple[int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise UserError(f"image size {self.size[0]}×{self.size[1]} is below 1 pixel: give a positive size")

    @classmethod
    def of(cls, vit: torch.nn.Module, size: int | tuple[int, int] | None = None) -> Preprocess:
        """The preprocessing ``vit`` was trained for, from timm's resolved data config.

        ``size`` is a side or (height, width) and leaves ``crop_pct`` as it is. Without it the size is the one the
        model was built for, which timm's config does not know of when ``img_size`` was passed to ``create_model``.
        """
        config = resolve_model_data_config(vit)
        built = getattr(getattr(vit, "patch_embed", None), "img_size", None)
        chosen = (built or config["input_size"][1:]) if size is None else size
        height, width = (chosen, chosen) if isinstance(chosen, int) else chosen
        return cls(
            (height, width),
            config["interpolation"],
            config["crop_pct"],
            config["crop_mode"],
            tuple(config["mean"]),
            tuple(config["std"]),
        )

    def __call__(self, image: Image.Image, name: str = "image") -> torch.Tensor:
        """Float tensor [3, h, w], equal to that of ``timm.data.create_transform``. Raises ImageError as ``crop``."""
        return self.normalise(self.crop(image, name))

    def crop(self, image: Image.Image, name: str = "image") -> torch.Tensor:
        """The part of an RGB image that the model sees, uint8 [3, h, w].

        Raises ImageError, before allocating, for an image so narrow that resizing it takes more pixels than
        ``pixel_limit()`` or leaves a side without any.
        """
        width, height = self._resized(*image.size)
        check_pixels(name, "too narrow: resized it is", width, height, pixel_limit())
        if min(width, height) < 1:
            raise ImageError(name, f"too narrow: {image.width}×{image.height} shrinks to {width}×{height}")
        return self._crop(image)

    def normalise(self, crops: torch.Tensor) -> torch.Tensor:
        """uint8 [..., 3, h, w] to the float input of the model, same shape."""
        return normalize(crops.float().div_(255), list(self.mean), list(self.std), inplace=True)

    def to_dict(self) -> dict[str, Any]:
        """The fields; ``from_dict`` is the inverse, also after a trip through JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preprocess:
        """Raises TypeError for a missing or unknown field."""
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
        return cls(**values)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the image between timm's resize and its crop."""
        target_height, target_width = (floor(side / self.crop_pct) for side in self.size)
        if self.crop_mode == "squash":
            return target_width, target_height
        fit = min if self.crop_mode == "border" else max
        ratio = fit(target_width / width, target_height / height)
        return round(width * ratio), round(height * ratio)

    @cached_property
    def _crop(self) -> Callable[[Image.Image], torch.Tensor]:
        # `use_prefetcher` is timm's name for stopping short of normalisation, at uint8.
        return create_transform(
            input_size=(3, *self.size),
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=self.mean,  # "border" pads with it
            use_prefetcher=True,
        )
