"""``stem()``: overlapping convolutions in place of the patch embedding, so that neighbouring tokens see common pixels.

The local coherence module of ImagePiece (AAAI 2025, arXiv 2412.16491): "four 3×3 convolutions and one 1×1". Strides and
widths are those of Xiao et al. (arXiv 2106.14881), D/8, D/4, D/2, D, then D. Neither norm nor activation is in the text
that there is; here it is a ReLU and no norm: one over batches would make an image depend on its batch in training.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.init import init_module
from saccade.core.plan import Backbone, Tokenizer
from saccade.core.provenance import Cells
from saccade.core.registry import register
from saccade.core.timm_types import ViT
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.tokenizers.grid import grid_positions, place
from saccade.tokenizers.resize.resampling import ResizeSpec, choose
from saccade.tokenizers.rotary import rotary

SIDES = (8, 16, 32)  # pixels from one token to the next that four convolutions reach
Size = int | tuple[int, int]


class Stem(Tokenizer):
    """Images -> tokens by convolutions that step ``side`` pixels in all; other patch sizes resize the image to it.

    Args:
        patch: pixels of the image that one token stands for.
        side: one of ``SIDES``. 8 leaves out the last halving; 32 begins with pixels folded two by two into channels.
    """

    def __init__(
        self, channels: int, dim: int, side: int, patch: tuple[int, int], size: tuple[int, int] | None, spec: ResizeSpec
    ) -> None:
        super().__init__()
        self.side, self.patch, self.size, self.spec = side, patch, size, spec
        self.fold = 2 if side == 32 else 1
        self.strides = (2, 2, 2, 1 if side == 8 else 2)
        widths = (channels * self.fold**2, dim // 8, dim // 4, dim // 2, dim)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, padding=1) for (a, b), stride in zip(pairwise(widths), self.strides, strict=True)
        )
        self.last = nn.Conv2d(dim, dim, 1)

    def input_size(self, native: tuple[int, int]) -> tuple[int, int]:
        return self.size or native

    def macs(self, vit: ViT, tokens: Tokens) -> int:
        side, total = self.side // self.fold, self.last.weight.numel()
        for conv, stride in zip(self.convs, self.strides, strict=True):
            side //= stride
            total += side**2 * conv.weight.numel()  # type: ignore[operator]
        return tokens.num_patches * total

    def forward(self, vit: ViT, images: Tensor) -> Tokens:
        x = self.last(self.levels(images)[-1])
        grid = x.shape[-2], x.shape[-1]
        x = place(vit, vit.patch_embed.norm(x.flatten(2).transpose(1, 2)), grid_positions(vit, grid, self.spec))
        cells: Any = Cells(x.shape[0], grid[0] * grid[1], x.device)  # an owner map, once it is read
        return Tokens(x, cells, grid, vit.num_prefix_tokens, state=rotary(vit, x.shape[0], grid))

    def levels(self, images: Tensor) -> list[Tensor]:
        """Pixels as they enter, and the features after each ReLU, [B, c, h, w]."""
        found = [F.pixel_unshuffle(self.fitted(images), self.fold)]
        for conv in self.convs:
            found.append(conv(found[-1]).relu())
        return found

    def fitted(self, images: Tensor) -> Tensor:
        """The images in pixels of which ``side`` make a token."""
        given = self.size or (images.shape[-2], images.shape[-1])
        target = tuple(max(s // p, 1) * self.side for s, p in zip(given, self.patch, strict=True))
        if tuple(images.shape[-2:]) == target:
            return images
        x = images if images.dtype == torch.float64 else images.float()  # not made for half precision on the CPU
        return F.interpolate(x, size=target, mode="bicubic", antialias=True, align_corners=False).to(images.dtype)


@register("stem", kind="tokenizer")  # no menu: what was not trained is not tried
def stem(backbone: Backbone, patch: Size | None = None, size: Size | None = None) -> Stem:
    """Overlapping convolutions in place of the patch embedding, to be fitted or trained (arXiv 2412.16491).

    ``saccade stem MODEL`` fits it to a pretrained ViT's patch embedding; without that it starts at random.

    Args:
        patch: pixels of a patch, p or (ph, pw); None: the weights' own. At another the image is resized, so that the
            same convolutions serve.
        size: pixels that images are brought to, s or (h, w); None: as they come.
    """
    own = max(backbone.patch_size)
    side = next((s for s in SIDES if s >= own), None)
    if side is None or backbone.dim % 8:
        what = f"patches of {own} pixels (at most 32)" if side is None else f"width {backbone.dim} (no multiple of 8)"
        raise UserError(f"stem: its convolutions do not fit this model's {what}; use grid(…)")
    sides = backbone.patch_size if patch is None else _pair("patch", patch, 256)
    backbone.check_cells("stem", sides)
    pixels = None if size is None else _pair("size", size, 8192)
    spec = choose("stem", None, backbone.resize)
    make = partial(Stem, backbone.channels, backbone.dim, side, sides, pixels, spec)
    made = init_module(make)
    with torch.no_grad():
        for conv in made.convs:
            conv.weight.mul_(math.sqrt(2))  # type: ignore[operator]  # a ReLU lets half of the variance through
    return made


def _pair(knob: str, value: Size, high: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(type(v) is int and 1 <= v <= high for v in pair):
        raise UserError(f"stem: {knob}={value!r} is not one or two whole numbers in [1, {high}] (pixels)")
    return pair
