"""``grid(patch, size)``: a regular grid at any patch size and any input size, from one set of weights.

FlexiViT (arXiv 2212.08013): the patch kernel is resized by the pseudo-inverse of a linear resize, the position table by
the resize itself, both inside the forward pass. Here: in any ViT, without a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.hooks import around, exact, kernel_of, layer_in, require_plain
from saccade.core.plan import Backbone, Tokenizer
from saccade.core.provenance import Cells
from saccade.core.registry import also, register
from saccade.core.rotation import CENTROID, FORMS, KEPT
from saccade.core.timm_types import ViT
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import fraction
from saccade.tokenizers.resize.resampling import METHODS, RHO, ResizeSpec, choose, resize_kernel, resize_positions
from saccade.tokenizers.resize.weight_cache import cached_weight
from saccade.tokenizers.rotary import rotary

Size = int | tuple[int, int]
# Patches of a row of so many strides' pixels, by what is done with the rest.
FITS: dict[str, Callable[[int, int], int]] = {
    "resize": lambda pixels, stride: round(pixels / stride),
    "pad": lambda pixels, stride: -(-pixels // stride),
    "crop": lambda pixels, stride: pixels // stride,
    "error": lambda pixels, stride: pixels // stride,
}


class Grid(Tokenizer):
    """Square or rectangular patches on a regular grid; with a stride below the patch size they overlap."""

    rotation = CENTROID  # of a merged token

    def __init__(
        self,
        patch: tuple[int, int],
        size: tuple[int, int] | None,
        spec: ResizeSpec,
        fit: str,
        stride: tuple[int, int],
        how: str = "pi",
        rho: float = RHO,
    ) -> None:
        super().__init__()
        self.patch, self.size, self.spec, self.fit = patch, size, spec, fit
        self.stride, self.how, self.rho = stride, how, rho

    def input_size(self, native: tuple[int, int]) -> tuple[int, int]:
        return self.size or native

    def macs(self, vit: ViT, tokens: Tokens) -> int:
        proj = layer_in(vit.patch_embed.proj, nn.Conv2d, "in_channels")
        return tokens.num_patches * proj.in_channels * self.patch[0] * self.patch[1] * proj.out_channels

    def forward(self, vit: ViT, images: Tensor) -> Tokens:
        images = self._fit(images)
        grid = self._cells(*images.shape[-2:])
        x = self._embed(vit, images)
        x = place(vit, x, self.positions(vit, grid))
        cells: Any = Cells(x.shape[0], grid[0] * grid[1], x.device)  # an owner map, once it is read
        turns = rotary(vit, x.shape[0], grid, self.rotation)
        return Tokens(
            x, cells, grid, vit.num_prefix_tokens, anchor=cells.made() if self.rotation == KEPT else None, state=turns
        )

    def _embed(self, vit: ViT, images: Tensor) -> Tensor:
        """images [B, C, h, w] -> [B, N, D]: timm's own layers where the patch is theirs, else its resized kernel."""
        embed, proj = vit.patch_embed, vit.patch_embed.proj
        own = self.patch == self.stride == tuple(embed.patch_size)

        def resized(images: Tensor) -> Tensor:  # read here, behind the hooks that compute the weight (pruning)
            return F.conv2d(images, self.kernel(vit), proj.bias, stride=self.stride)

        def forward(images: Tensor) -> Tensor:
            x = proj(images) if own else around(proj, resized, images)
            return embed.norm(x.flatten(2).transpose(1, 2))

        if not exact(embed, PatchEmbed):
            if own and images.shape[-2:] == embed.img_size:
                return embed(images)
            require_plain(embed, "patch_embed", PatchEmbed)
        return around(embed, forward, images)

    def kernel(self, vit: ViT) -> Tensor:
        """The weights' kernel at this patch size, [D, C, ph, pw]. UserError where there is no kernel to resize."""
        ways = self.spec, self.how, self.rho
        filters = kernel_of(vit.patch_embed.proj, "grid")
        return cached_weight(vit, "kernel", (self.patch, *ways), filters, lambda w: resize_kernel(w, self.patch, *ways))

    def weights(self, vit: ViT, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Kernel [D, C, ph, pw] and positions [1, P + gh * gw, D] of a ViT at this patch size and on this grid."""
        return self.kernel(vit), self.positions(vit, grid)

    def positions(self, vit: ViT, grid: tuple[int, int]) -> Tensor | None:
        """The weights' positions on a grid, [1, P + gh * gw, D]; None: they have none."""
        return grid_positions(vit, grid, self.spec)

    def _cells(self, h: int, w: int) -> tuple[int, int]:
        (ph, pw), (sh, sw) = self.patch, self.stride
        return (h - ph) // sh + 1, (w - pw) // sw + 1

    def fitted(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Pixels that are used of an image of this size: those that patches cover without a rest."""
        (h, w), (ph, pw), (sh, sw) = self.size or size, self.patch, self.stride
        rows, columns = h - ph + sh, w - pw + sw
        if self.fit == "error" and (rows % sh or columns % sw):
            raise UserError(f"patches of {ph}x{pw} do not divide {h}x{w} pixels; choose another size or fit='resize'")
        count = FITS[self.fit]
        return ph + (max(count(rows, sh), 1) - 1) * sh, pw + (max(count(columns, sw), 1) - 1) * sw

    def _fit(self, images: Tensor) -> Tensor:
        target = self.fitted(tuple(images.shape[-2:]))
        if self.size is not None and self.fit in ("pad", "crop") and tuple(images.shape[-2:]) != self.size:
            images = _resize(images, self.size)
        if tuple(images.shape[-2:]) == target:
            return images
        (h, w), (th, tw) = images.shape[-2:], target
        if self.fit == "pad":
            return F.pad(images, (0, tw - w, 0, th - h))
        if self.fit == "crop" and h >= th and w >= tw:
            return images[..., :th, :tw]
        return _resize(images, target)


def grid_positions(vit: ViT, grid: tuple[int, int], spec: ResizeSpec) -> Tensor | None:
    """A ViT's position table on a grid, [1, P + gh * gw, D] (no P where prefix tokens have none); None: no table."""
    if vit.pos_embed is None:
        return None
    old, prefix = vit.patch_embed.grid_size, 0 if vit.no_embed_class else vit.num_prefix_tokens
    make = partial(resize_positions, old=old, new=grid, num_prefix=prefix, spec=spec)
    return cached_weight(vit, "positions", (grid, old, spec), vit.pos_embed, make)


def place(vit: ViT, x: Tensor, positions: Tensor | None) -> Tensor:
    """Add positions and prefix tokens as timm's ``_pos_embed`` does (Apache-2.0): x [B, N, D] -> [B, P+N, D]."""
    known = [getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    prefix = [token.expand(x.shape[0], -1, -1) for token in known if token is not None]
    if positions is not None and vit.no_embed_class:
        x = x + positions
    x = torch.cat([*prefix, x], dim=1) if prefix else x
    if positions is not None and not vit.no_embed_class:
        x = x + positions
    x = vit.pos_drop(x)
    return vit.norm_pre(x if vit.patch_drop is None else vit.patch_drop(x)).contiguous()


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    x = images if images.dtype == torch.float64 else images.float()  # not made for half precision on the CPU
    return F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).to(images.dtype)


def _menu(backbone: Backbone) -> list[str]:
    """The dense family: smaller inputs at the native patch, larger patches at the native input."""
    (ph, pw), (h, w) = backbone.patch_size, backbone.input_size
    if ph != pw or h != w:
        return []
    sizes = [s for s in range(h - ph, h // 3, -ph) if (h - s) % (2 * ph) == 0]
    patches = [p for p in range(ph + 1, 2 * ph + 1) if h % p == 0 and backbone.rotary != "cells"]
    return [f"grid({ph}, size={s})" for s in sizes] + [f"grid({p})" for p in patches]


def _steps(backbone: Backbone, patch: Size | None, size: Size | None, stride: Size | None, **_: object) -> bool:
    """A range stops where patches divide the input; between, images would be resized to a grid that it has anyway."""
    sides = backbone.patch_size if patch is None else _pair("patch", patch, 1, 256)
    pixels = backbone.input_size if size is None else _pair("size", size, 1, 8192)
    steps = sides if stride is None else _pair("stride", stride, 1, 256)
    return all((s - p) % step == 0 for s, p, step in zip(pixels, sides, steps, strict=True))


def _finer(backbone: Backbone) -> list[str]:
    """Every input size down to half of the model's own, at the native patch."""
    (ph, pw), (h, w) = backbone.patch_size, backbone.input_size
    return [] if ph != pw or h != w else [f"grid({ph}, size={s})" for s in range(h - ph, h // 2, -ph)]


@also(finer=_finer)
@register("grid", sources={"paper": "how stride"}, kind="tokenizer", menu=_menu, range_filter=_steps, baseline=True)
def grid(
    backbone: Backbone,
    patch: Size | None = None,
    size: Size | None = None,
    resize: str | None = None,
    fit: str | None = None,
    stride: Size | None = None,
    how: str = "pi",
    rho: float = RHO,
    rotation: str | None = None,
) -> Grid:
    """A regular grid at any patch and input size (FlexiViT, arXiv 2212.08013).

    Args:
        patch: pixels of a patch, p or (ph, pw); None: the weights' own.
        size: pixels that images are brought to, s or (h, w); None: as they come.
        resize: 'default' (antialiased bilinear), 'google' (FlexiViT's own weights) or 'timm' (bicubic); None: what the
            weights were trained with, where that is known, and else 'default'.
        fit: where patches do not divide the image: 'resize' it to the nearest multiple, 'pad' with zeros (the mean) or
            'crop' at the lower right, or 'error'. None: 'resize'; but the weights' own patch size, where it does not
            divide their own input size, crops as in timm.
        stride: pixels from one patch to the next, s or (sh, sw); None: the patch size. Below it patches overlap, and
            there are more tokens of the same kernel (the paper's "flexible stride").
        how: 'pi', or what the paper compares it with: 'vanilla', 'area', 'norm', 'token_norm', 'sigma'.
        rho: correlation of neighbouring pixels that 'sigma' and 'token_norm' assume, in [0, 0.999].
        rotation: of a merged token, where positions are rotations: 'centroid', the mean rotation of its cells; 'kept',
            that of the token that stays; 'recomputed', that of the mean of its cells' positions. None: 'centroid'.
    """
    sides = backbone.patch_size if patch is None else _pair("patch", patch, 1, 256)
    if fit is None:
        rest = [s % p for s, p in zip(backbone.input_size, sides, strict=True)]
        fit = "crop" if size is None and sides == backbone.patch_size and any(rest) else "resize"
    if fit not in FITS:
        raise UserError(f"grid: fit={fit!r} is not one of {', '.join(FITS)}")
    if how not in METHODS:
        raise UserError(f"grid: how={how!r} is not one of {', '.join(METHODS)}")
    steps = sides if stride is None else _pair("stride", stride, 1, 256)
    if steps[0] > sides[0] or steps[1] > sides[1]:
        raise UserError(
            f"grid: stride={stride!r} is larger than the patch of {sides[0]}x{sides[1]} and would leave pixels out; "
            "make it smaller, or the patch larger"
        )
    backbone.check_cells("grid", steps)
    pixels = None if size is None else _pair("size", size, 1, 8192)
    spec = choose("grid", resize, backbone.resize)
    if rotation is not None and (rotation not in FORMS or backbone.rotary is None):
        known = "this model's positions are not rotations" if backbone.rotary is None else f"give {', '.join(FORMS)}"
        raise UserError(f"grid: rotation={rotation!r}: {known}")
    made = Grid(sides, pixels, spec, fit, steps, how, fraction("grid", "rho", rho, 0.0, 0.999))
    if sides != backbone.patch_size or pixels not in (None, backbone.input_size):
        made.resize = spec
    made.rotation = rotation or CENTROID
    return made


def _pair(knob: str, value: Size, low: int, high: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if len(pair) != 2 or not all(type(v) is int and low <= v <= high for v in pair):
        raise UserError(f"grid: {knob}={value!r} is not one or two whole numbers in [{low}, {high}] (pixels)")
    return pair
