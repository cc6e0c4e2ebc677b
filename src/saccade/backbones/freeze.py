"""A plain timm ViT of a plain grid's patch and input size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saccade.backbones.vit import set_resize
from saccade.core.hooks import copied
from saccade.errors import UserError
from saccade.tokenizers.grid import Grid

if TYPE_CHECKING:
    from saccade.core.timm_types import ViT
    from saccade.model import AdaptiveViT
    from saccade.setting import Setting


def freeze(model: AdaptiveViT, setting: str | Setting | None = None) -> ViT:
    """A plain timm ViT of one patch size and one input size, which gives what a view gives on images of that size.

    Its state dict loads strictly into ``timm.create_model(name, patch_size=…, img_size=…)``.

    Args:
        setting: a plain grid, like ``grid(16)`` or ``grid(16, size=192)``; None: the model's own.

    Raises:
        UserError: anything else: a fixed ViT has no reductions, no overlapping patches, no padding, no embedding head.
    """
    view = model if setting is None else model.at(setting)
    if view.task_head is not None and view.task_head.embeds:
        raise UserError("a plain ViT has no embedding head: freeze the model without it, AdaptiveViT(model.vit)")
    grid, can = view.tokenizer, "freeze a plain grid, like 'grid(16)' or 'grid(16, size=192)'"
    if not isinstance(grid, Grid) or view.plan.methods:
        raise UserError(f"'{view.setting}' cannot be frozen: it decides anew for each image; {can}")
    if grid.stride != grid.patch:
        raise UserError(f"'{view.setting}' cannot be frozen: timm's patches do not overlap; {can}")
    asked = view.input_size()
    size = grid.fitted(asked)
    if size != asked and grid.fit == "pad":
        raise UserError(f"'{view.setting}' cannot be frozen: it pads images of {asked[0]}x{asked[1]} pixels; {can}")
    if grid.fit == "crop" and size[0] <= asked[0] and size[1] <= asked[1]:
        size = asked  # timm leaves out the same pixels
    cells = size[0] // grid.patch[0], size[1] // grid.patch[1]
    with torch.no_grad():
        kernel, table = grid.weights(view.vit, cells)
    made = rebuilt(view.vit, kernel, table, cells, size)
    set_resize(made, None)
    return made


def rebuilt(vit: ViT, kernel: Tensor, table: Tensor | None, grid: tuple[int, int], size: tuple[int, int]) -> ViT:
    """A copy of a timm ViT with another kernel [D, C, ph, pw] and position table [1, P + gh * gw, D], for inputs of
    ``size`` pixels. The rest of it stays as it is."""
    swaps = [(vit.patch_embed.proj.weight, kernel)]
    if table is not None and vit.pos_embed is not None:
        swaps.append((vit.pos_embed, table))
    new = {id(old): nn.Parameter(_own(value), old.requires_grad) for old, value in swaps}
    made = copied(vit, new)  # takes what is there already as the copies of the old ones
    patch, embed = (kernel.shape[-2], kernel.shape[-1]), made.patch_embed
    embed.proj.kernel_size = embed.proj.stride = embed.patch_size = patch
    embed.grid_size, embed.num_patches = grid, grid[0] * grid[1]
    # timm derives the grid from the input size. A flexible table has a grid of its own: timm is told a size that fits.
    height, width = (s if s // p == g else p * g for s, p, g in zip(size, patch, grid, strict=True))
    embed.img_size = fits = (height, width)
    made.set_input_size(img_size=fits, patch_size=patch)  # changes nothing; timm notes it for rebuilding
    embed.img_size = size
    made.feature_info = [{**info, "reduction": max(patch)} for info in made.feature_info]
    made.pretrained_cfg = {**made.pretrained_cfg, "input_size": (embed.proj.in_channels, *size)}
    return made


def _own(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)
