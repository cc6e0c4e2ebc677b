"""Segmentation: a ViT under a setting and a head on its dense map — a class for every pixel, at any patch size.

The map is that of the whole grid whatever the setting did to the tokens on the way: a merged cell has its token's
features, a dropped one its last. So patch size, merging and pruning are call-time values here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.head import Body, Head
from saccade.core.output import Output
from saccade.core.timm_types import ViT
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.renamed.finder import moved
from saccade.tasks.segmentation.segmentation_heads import LinearHead, MaskTransformer, build_head

How = Literal["fit", "whole", "slide"]
HOW: tuple[How, ...] = ("fit", "whole", "slide")
VOID = 255  # of no class, in arrays of labels (uint8)
OVERLAP = 1 / 3  # least share of a window that its neighbour sees too
__getattr__ = moved(__name__)


class SegmentationHead(Head):
    """A decoder on the dense map: a class for every pixel.

    Args:
        decoder: of maps of the ViT's width; see ``saccade.tasks.segmentation.segmentation_heads``.
        classes: what each is called, in the decoder's order.
        void: the value that was no class in the label files it was trained on; see
        ``saccade.tasks.segmentation.segmentation_data``.

    Raises:
        UserError: a decoder of another number of classes.
    """

    task, noun, verb, config = "segment", "segmentation model", "segment", "segment"

    def __init__(self, decoder: LinearHead | MaskTransformer, classes: tuple[str, ...], void: int = VOID) -> None:
        super().__init__()
        if decoder.classes != len(classes):
            raise UserError(f"{len(classes)} names for a decoder of {decoder.classes} classes: give one each")
        self.decoder, self.classes, self.void = decoder, tuple(classes), void

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    def check(self, model: Body) -> None:
        if getattr(model.tokenizer, "fit", "resize") in ("pad", "crop"):
            raise UserError(f"{model.setting}: a class for every pixel needs a grid that covers them: use fit='resize'")

    def forward(self, model: Body, images: Tensor) -> Output:
        """images [B, C, h, w], normalised -> logits [B, K, h, w], tokens, trace; the trace's head is the decoder."""
        features, tokens, trace = model.features(images)
        logits = self.decoder(features)
        cells = logits.shape[-2] * logits.shape[-1]
        return Output(enlarged(logits, images.shape[-2:]), tokens, replace(trace, head=self.decoder.macs(cells)))

    def describe(self) -> dict[str, Any]:
        return {"decoder": self.decoder.describe(), "classes": list(self.classes), "void": self.void}

    @classmethod
    def rebuild(cls, vit: ViT, described: dict[str, Any]) -> SegmentationHead:
        decoder, classes, void = (described.get(name) for name in ("decoder", "classes", "void"))
        named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        if not (isinstance(decoder, dict) and named and type(void) is int and 0 <= void < 2**16):
            raise UserError("this segmentation model does not say what its decoder, its classes and void are")
        return cls(build_head(vit.embed_dim, **{"kind": None, **decoder}), tuple(classes or ()), void)


def segmenter(
    model: AdaptiveViT, classes: tuple[str, ...], kind: str = "mask", *, void: int = VOID, **knobs: Any
) -> AdaptiveViT:
    """A model with a new decoder in place of its classifier, which is taken off.

    Args:
        kind: of decoder, "linear" or "mask", and its ``knobs``.

    Raises:
        UserError: unknown kind or knobs, a grid that does not cover the image.
    """
    decoder = build_head(model.vit.embed_dim, kind, classes=len(classes), **knobs)
    return model.with_head(SegmentationHead(decoder, classes, void))


def enlarged(logits: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Logits [B, K, gh, gw] -> [B, K, h, w] in fp32, bilinear between the centres of cells."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Seen:
    """What a segmentation model says of images at their own size."""

    logits: Tensor  # [B, K, H, W] fp32
    macs: float  #    of an image: ViT, and decoder, of all windows
    decoder: float  # of these, the decoder's


def look(model: AdaptiveViT, images: Tensor, how: How = "fit") -> Seen:
    """Segment images of any size.

    Args:
        images: [B, 3, H, W], normalised.
        how: "fit" brings the whole image to as many pixels as the model's input has, in its own proportions; "whole"
            takes it as it is; "slide" looks through overlapping windows of the model's input size and averages logits.

    Raises:
        UserError: another ``how``, or a model for another task.
    """
    classes = len(SegmentationHead.of(model).classes)
    if how not in HOW:
        raise UserError(f"how={how!r} is not one of {', '.join(HOW)}")
    size, own = tuple(images.shape[-2:]), model.input_size()
    if how == "slide":
        return _slide(model, images, own, classes)
    target = fitted(size, own) if how == "fit" else size
    if target != size:
        images = F.interpolate(images, size=target, mode="bicubic", antialias=True)
    out = model(images)
    logits = out.logits if target == size else enlarged(out.logits, size)
    return Seen(logits, out.trace.macs().mean().item(), out.trace.head)


def fitted(size: tuple[int, ...], own: tuple[int, int]) -> tuple[int, int]:
    """``size`` (h, w) scaled to the area of ``own``."""
    ratio = math.sqrt(own[0] * own[1] / (size[0] * size[1]))
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))


def windows(size: tuple[int, ...], window: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, h, w) of evenly spaced windows that cover ``size``; neighbours share ``OVERLAP`` of each or more."""
    tops, lefts = (_starts(length, part) for length, part in zip(size, window, strict=True))
    h, w = (min(length, part) for length, part in zip(size, window, strict=True))
    return ((top, left, h, w) for top in tops for left in lefts)


def _starts(length: int, part: int) -> list[int]:
    if part >= length:
        return [0]
    count = math.ceil((length - part) / max(1, math.floor(part * (1 - OVERLAP)))) + 1
    return [round(i * (length - part) / (count - 1)) for i in range(count)]


def _slide(model: AdaptiveViT, images: Tensor, window: tuple[int, int], classes: int) -> Seen:
    size = images.shape[-2:]
    total = images.new_zeros(len(images), classes, *size, dtype=torch.float32)
    seen, macs, decoder = total.new_zeros(size), 0.0, 0.0
    for top, left, h, w in windows(size, window):
        rows, columns = slice(top, top + h), slice(left, left + w)
        out = model(images[..., rows, columns])
        total[..., rows, columns] += out.logits
        seen[rows, columns] += 1
        macs += out.trace.macs().mean().item()
        decoder += out.trace.head
    return Seen(total / seen, macs, decoder)
