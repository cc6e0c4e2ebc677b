"""A photo under the colours of what a segmenter sees in it."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from saccade.data import Preprocess
from saccade.evaluation.defined import require_finite
from saccade.model import AdaptiveViT
from saccade.tasks.segmentation.segmenter import look


def paint(model: AdaptiveViT, image: Image.Image) -> Image.Image:
    """A photo under the colours of what a segmenter sees in it. Raises UserError where its logits are not finite."""
    weight = model.vit.patch_embed.proj.weight
    pixels = Preprocess.of(model.vit).normalise(pil_to_tensor(image)).unsqueeze(0)
    with torch.no_grad():
        seen = look(model, pixels.to(weight.device, weight.dtype))
    require_finite(seen.logits, model.setting)
    return painted(image, seen.logits[0].argmax(0).cpu())


def painted(image: Image.Image, classes: Tensor, share: float = 0.6) -> Image.Image:
    """A photo under a colour for each class: ``classes`` int64 [h, w] at the photo's size."""
    flat = Image.fromarray(colours(int(classes.max()) + 1)[classes].numpy())
    return Image.blend(image.convert("RGB"), flat, share)


def colours(count: int) -> Tensor:
    """A colour for each class, uint8 [count, 3]: hues a golden section apart, every third lighter or darker."""
    made = [Image.new("HSV", (1, 1), (int(i * 157.6) % 256, 200, (230, 170, 120)[i % 3])) for i in range(count)]
    return torch.tensor([one.convert("RGB").getpixel((0, 0)) for one in made], dtype=torch.uint8).reshape(-1, 3)
