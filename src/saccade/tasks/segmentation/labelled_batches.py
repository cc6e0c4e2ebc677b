"""What a segmenter says of images whose labels are known, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from saccade.data import Failures, ImageError, Preprocess
from saccade.errors import UserError
from saccade.evaluation.defined import require_choice, require_finite
from saccade.model import AdaptiveViT
from saccade.tasks.segmentation.segmentation_data import PixelSet
from saccade.tasks.segmentation.segmenter import How, Seen, look

Step = Callable[[int], None]
Pairs = tuple[list[Tensor], list[Tensor], list[int]]


def looks(
    model: AdaptiveViT, pixels: PixelSet, places: Sequence[int], how: How, batch: int, step: Step
) -> Iterator[tuple[Seen, list[Tensor], list[int]]]:
    """What a segmenter says of images, with their labels and places, batch by batch.

    Raises UserError where not one pair can be read.
    """
    weight = model.vit.patch_embed.proj.weight
    prepare, any_read = Preprocess.of(model.vit), False
    for images, labels, at in batches(pixels, places, batch, step):
        normal = prepare.normalise(torch.stack(images)).to(weight.device, weight.dtype)
        with torch.no_grad():  # not inference mode, whose tensors must not meet training's
            seen = look(model, normal, how)
        require_choice(require_finite(seen.logits, model.setting), model.setting)
        yield seen, labels, at
        any_read = True
    if not any_read:
        raise UserError(f"nothing to measure on in {pixels.images.path}: {failures(pixels) or 'no images'}")


def batches(pixels: PixelSet, places: Sequence[int], batch: int, step: Step) -> Iterator[Pairs]:
    """Images uint8 [3, h, w], their labels and places, of one size each time, at most ``batch`` at once."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    kept: list[int] = []
    for place in places:
        try:
            image, label = pixels.read(place)
        except ImageError as error:
            pixels.failures[error.name] = error.reason
            step(1)
            continue
        pixel = pil_to_tensor(image)
        if images and (len(images) == batch or images[0].shape != pixel.shape):
            yield images, labels, kept
            step(len(kept))
            images, labels, kept = [], [], []
        images.append(pixel)
        labels.append(torch.from_numpy(label))
        kept.append(place)
    if images:
        yield images, labels, kept
        step(len(kept))


def failures(pixels: PixelSet) -> Failures:
    """What could not be used, as one line."""
    inside = {*pixels.images.names, *pixels.labels}
    alone = sum(name not in inside for name in pixels.failures)
    return Failures(len(pixels) + alone, [*pixels.failures.items()])
