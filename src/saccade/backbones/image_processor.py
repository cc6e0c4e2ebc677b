"""Hugging Face's image processors in timm's words: how a photo is resized, cropped and normalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, FiniteFloat, ValidationError
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from saccade.errors import UserError
from saccade.storage.folder_config import Positive, Side, Strict

FILE = "preprocessor_config.json"
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # as Pillow counts
HALF = {"image_mean": IMAGENET_INCEPTION_MEAN, "image_std": IMAGENET_INCEPTION_STD}
IMAGENET = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
CENTRE = {"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True}
# What the processor of each kind does where no file says otherwise; all but the first two resize bicubically.
USUAL: dict[str, dict[str, Any]] = {
    "vit": {**HALF, "resample": 2},
    "ijepa": {**IMAGENET, "resample": 2},
    "deit": {**IMAGENET, **CENTRE},
    "dinov2": {**IMAGENET, **CENTRE},
    "dinov2_with_registers": {**IMAGENET, **CENTRE},
    "dinov3_vit": IMAGENET,
    "clip_vision_model": {
        "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD, **CENTRE, "size": {"shortest_edge": 224},
    },
    "siglip_vision_model": HALF,
    "siglip2_vision_model": HALF,
}  # fmt: skip


class Lengths(Strict):
    """Pixels: of the shorter side, or of both."""

    model_config = ConfigDict(extra="ignore")
    shortest_edge: Side | None = None
    height: Side | None = None
    width: Side | None = None


class Processor(Strict):
    """What is used of ``preprocessor_config.json``, within bounds."""

    model_config = ConfigDict(extra="ignore")
    do_center_crop: bool = False
    do_normalize: bool = True
    size: Side | Lengths = 224
    crop_size: Side | Lengths | None = None
    resample: int = Field(3, ge=0, le=5)
    rescale_factor: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1 / 255
    image_mean: Annotated[list[FiniteFloat], Field(min_length=1, max_length=1024)]
    image_std: Annotated[list[Positive], Field(min_length=1, max_length=1024)]


def preprocessing(values: Mapping[str, Any] | None, kind: str, where: str) -> dict[str, Any]:
    """timm's ``mean``, ``std``, ``interpolation``, ``crop_pct`` and ``crop_mode`` of an image processor.

    Args:
        values: what its file says, or ``processor.to_dict()``; None: what is usual for the kind of model.
        kind: transformers' ``model_type`` of the vision tower.

    Raises:
        UserError: values out of bounds, and another scale of pixels than 0 to 1 before they are normalised.
    """
    given = {k: v for k, v in (values or {}).items() if k in Processor.model_fields and v is not None}
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in {**USUAL[kind], **given}.items()}
    try:
        known = Processor.model_validate({**given, "resample": int(given.get("resample", 3))})
    except (ValidationError, ValueError, TypeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{where}: {FILE} cannot be used ({reason[:150]})") from None
    if abs(known.rescale_factor * 255 - 1) > 1e-3:
        raise UserError(f"{where}: its pixels are scaled by {known.rescale_factor:g}, and here only 1/255 is possible")
    plain = {"image_mean": [0.0] * len(known.image_mean), "image_std": [1.0] * len(known.image_std)}
    norm = plain if not known.do_normalize else {"image_mean": known.image_mean, "image_std": known.image_std}
    short, crop = _shortest(known.size), _shortest(known.crop_size) or _height(known.crop_size)
    centred = known.do_center_crop and crop is not None
    before = short or _height(known.size)
    return {
        "mean": norm["image_mean"],
        "std": norm["image_std"],
        "interpolation": RESAMPLING[known.resample],
        "crop_pct": crop / before if centred and crop and before else 1.0,
        "crop_mode": "center" if short or centred else "squash",
    }


def _shortest(size: int | Lengths | None) -> int | None:
    return size.shortest_edge if isinstance(size, Lengths) else None


def _height(size: int | Lengths | None) -> int | None:
    return size.height if isinstance(size, Lengths) else size
