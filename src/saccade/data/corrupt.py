"""Corrupted images, for robustness: random square masks, and a small fixed set of common corruptions.

    corrupt = corruption("masks:50")
    harder = corrupted(preprocess, corrupt)  # takes the place of the Preprocess

They act on the crop that the model sees, before it is normalised. An image's corruption is a function of the seed and
the image's name: the same for every setting, batch and input size (in fractions of the side, where it has places).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from saccade.data.preprocess import Preprocess
from saccade.errors import UserError, nearest

MASK = 1 / 14  # side of a mask, of the image's: 16 pixels of 224
MOST_MASKS = 1000
Corrupt = Callable[[Tensor, float, torch.Generator], Tensor]  # (image [3, h, w] in 0 … 1, strength, draws) -> the same


def _noise(image: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return image + std * torch.randn(image.shape, generator=generator)


def _shots(image: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(image * photons, generator=generator) / photons


def _impulses(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    hit, white = torch.rand(2, *image.shape, generator=generator)
    return torch.where(hit < share, (white < 0.5).to(image.dtype), image)


def _blur(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    sigma = sigma * min(image.shape[-2:]) / 224  # of what is seen, not of pixels
    reach = min(math.ceil(3 * sigma), min(image.shape[-2:]) - 1)
    return V.gaussian_blur(image, [2 * reach + 1] * 2, [sigma] * 2)


def _pixelate(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    height, width = image.shape[-2:]
    small = V.resize(image, [max(1, round(height * share)), max(1, round(width * share))], antialias=True)
    return V.resize(small, [height, width], InterpolationMode.NEAREST_EXACT)


def _jpeg(image: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    return V.to_dtype(V.jpeg(V.to_dtype(image, torch.uint8, scale=True), int(quality)), torch.float32, scale=True)


# Strengths of severity 1 … 5, our own, on the resized image. After the kinds of ImageNet-C (arXiv 1903.12261), which is
# made of the original files by other code: figures here are not comparable with figures there.
COMMON: dict[str, tuple[Corrupt, tuple[float, ...]]] = {
    "gaussian_noise": (_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shots, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulses, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": (_blur, (1, 2, 3, 4, 6)),
    "pixelate": (_pixelate, (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
    "contrast": (lambda image, factor, generator: V.adjust_contrast(image, factor), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": (lambda image, factor, generator: V.adjust_brightness(image, factor), (1.2, 1.4, 1.6, 1.8, 2.0)),
    "darkness": (lambda image, factor, generator: V.adjust_brightness(image, factor), (0.7, 0.5, 0.35, 0.2, 0.1)),
    "saturation": (lambda image, factor, generator: V.adjust_saturation(image, factor), (0.6, 0.4, 0.2, 0.1, 0.0)),
}


@dataclass(frozen=True)
class Corruption:
    """``name:amount``, made by ``corruption``."""

    name: str  #   "masks", or one of COMMON
    amount: int  # masks, or severity 1 … 5
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.amount}"

    def __call__(self, crop: Tensor, key: str, fill: tuple[float, ...] = (0.5, 0.5, 0.5)) -> Tensor:
        """Corrupt a crop, uint8 [3, h, w] -> the same, of an image named ``key``; the crop is not written to.

        Args:
            fill: colour of masks, 0 … 1: the mean that is subtracted later, so that masks are 0 for the model.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{key}".encode("utf-8", "surrogateescape")))
        if self.name == "masks":
            return _masked(crop, self.amount, fill, generator)
        act, strengths = COMMON[self.name]
        image = act(crop.float() / 255, strengths[self.amount - 1], generator)
        return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def corruption(spec: str, seed: int = 0) -> Corruption:
    """The corruption that a word names: ``masks:50`` or, with a severity of 1 to 5, ``gaussian_noise:3``.

    ``masks:n`` covers n squares of 1/14 of the side, at places that are not aligned with patches and may overlap; the
    first of more masks are those of fewer.

    Raises:
        UserError: an unknown name, an amount that is no whole number or out of range.
    """
    name, _, amount = spec.partition(":")
    if name != "masks" and name not in COMMON:
        raise UserError(f"there is no corruption {name!r}{nearest(name, ['masks', *COMMON])}")
    low, high = (0, MOST_MASKS) if name == "masks" else (1, 5)
    if not (amount.isascii() and amount.isdigit()) or not low <= int(amount[:9]) <= high:
        example = "masks:50" if name == "masks" else f"{name}:3"
        raise UserError(f"corruption {spec!r} needs a whole number in [{low}, {high}]: write it like {example}")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed={seed} of a corruption is not in [0, 2**31)")
    return Corruption(name, int(amount), seed)


def _masked(crop: Tensor, count: int, fill: tuple[float, ...], generator: torch.Generator) -> Tensor:
    crop, (height, width) = crop.clone(), crop.shape[-2:]
    side = max(1, round(MASK * min(height, width)))
    colour = (torch.tensor(fill) * 255).round().to(torch.uint8)[:, None, None]
    for down, right in torch.rand(count, 2, generator=generator).tolist():
        top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
        crop[:, top : top + side, left : left + side] = colour
    return crop


@dataclass(frozen=True)
class Corrupted(Preprocess):
    """A ``Preprocess`` whose crops are corrupted."""

    corrupt: Corruption

    def crop(self, image: Image.Image, name: str = "image") -> Tensor:
        return self.corrupt(super().crop(image, name), name, self.mean)


def corrupted(preprocess: Preprocess, corrupt: Corruption | None) -> Preprocess:
    """The same preprocessing with a corruption; None: as it is."""
    if corrupt is None:
        return preprocess
    return Corrupted(**{f.name: getattr(preprocess, f.name) for f in fields(Preprocess)}, corrupt=corrupt)
