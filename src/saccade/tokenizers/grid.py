"""``grid(patch, size)``: a regular grid at any patch size and any input size, from one set of weights.

FlexiViT (arXiv 2212.08013): the patch kernel is resized by the pseudo-inverse of a linear resize, the position table by
the resize itself, both inside the forward pass. Here: in any ViT, without a copy of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.errors import UserError
from saccade.plan import Backbone, Tokenizer, ViT, register
from saccade.tokenizers.embed import PRESETS, ResizeSpec, resize_kernel, resize_positions
from saccade.tokens import Tokens

Size = int | tuple[int, int]
FITS = ("resize", "pad", "crop", "error")


class Grid(Tokenizer):
    """Square or rectangular patches on a regular grid."""

    def __init__(self, patch: tuple[int, int], size: tuple[int, int] | None, spec: ResizeSpec, fit: str) -> None:
        super().__init__()
        self.patch, self.size, self.spec, self.fit = patch, size, spec, fit
        self._ready: dict[tuple, tuple[tuple[Tensor, Tensor | None], list[Tensor]]] = {}

    def input_size(self, native: tuple[int, int]) -> tuple[int, int]:
        return self.size or native

    def macs(self, vit: ViT, images: Tensor) -> int:
        gh, gw = (s // p for s, p in zip(self._fitted(tuple(images.shape[-2:])), self.patch, strict=True))
        proj = vit.patch_embed.proj
        return gh * gw * proj.in_channels * self.patch[0] * self.patch[1] * proj.out_channels

    def forward(self, vit: ViT, images: Tensor) -> Tokens:
        images = self._fit(images)
        grid = images.shape[-2] // self.patch[0], images.shape[-1] // self.patch[1]
        kernel, positions = self._weights(vit, grid)
        x = F.conv2d(images, kernel, vit.patch_embed.proj.bias, stride=self.patch)
        x = vit.patch_embed.norm(x.flatten(2).transpose(1, 2))
        x = place(vit, x, positions)
        cells = torch.arange(grid[0] * grid[1], device=x.device)
        return Tokens(x, cells.expand(x.shape[0], -1), grid, vit.num_prefix_tokens)

    def _weights(self, vit: ViT, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Kernel and positions at this patch size and grid; kept for the next call where no gradient is asked for."""
        kernel, table = vit.patch_embed.proj.weight, vit.pos_embed
        keep = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        sources = [w for w in (kernel, table) if w is not None]
        # An inference tensor has no version; weights born in inference mode are not edited outside of it.
        versions = tuple(0 if w.is_inference() else w._version for w in sources) if keep else ()
        now = (grid, versions, *((w.data_ptr(), w.dtype, w.device) for w in sources)) if keep else ()
        if keep and (ready := self._ready.get(now)) is not None:  # another thread may be dropping it
            return ready[0]
        old = tuple(vit.patch_embed.grid_size)
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        made = (
            resize_kernel(kernel, self.patch, self.spec),
            None if table is None else resize_positions(table, old, grid, prefix, self.spec),
        )
        if keep:
            if len(self._ready) >= 16:  # many sizes, or weights that keep changing: forget the oldest
                for oldest in tuple(self._ready)[:1]:  # another thread may be at it too
                    self._ready.pop(oldest, None)
            # With the weights, or their memory could go to others, which would be found under the same address.
            self._ready[now] = made, [w.detach() for w in sources]
        return made

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_ready": {}}

    def _fitted(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Pixels that are used of an image of this size, a multiple of the patch."""
        h, w = self.size or size
        (ph, pw) = self.patch
        if self.fit == "error" and (h % ph or w % pw):
            raise UserError(f"patches of {ph}x{pw} do not divide {h}x{w} pixels; choose another size or fit='resize'")
        if self.fit == "pad":
            return -(-h // ph) * ph, -(-w // pw) * pw
        if self.fit == "crop":
            return _at_least(h // ph * ph, ph), _at_least(w // pw * pw, pw)
        return _at_least(round(h / ph) * ph, ph), _at_least(round(w / pw) * pw, pw)

    def _fit(self, images: Tensor) -> Tensor:
        target = self._fitted(tuple(images.shape[-2:]))
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


def place(vit: ViT, x: Tensor, positions: Tensor | None) -> Tensor:
    """Add positions and prefix tokens as timm's ``_pos_embed`` does (Apache-2.0): x [B, N, D] -> [B, P+N, D]."""
    known = [getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    prefix = [token.expand(x.shape[0], -1, -1) for token in known if token is not None]
    if positions is not None and vit.no_embed_class:
        x = x + positions
    x = torch.cat([*prefix, x], dim=1) if prefix else x
    if positions is not None and not vit.no_embed_class:
        x = x + positions
    return vit.norm_pre(vit.pos_drop(x)).contiguous()


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    x = images if images.dtype == torch.float64 else images.float()  # not made for half precision on the CPU
    return F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).to(images.dtype)


def _at_least(value: int, least: int) -> int:
    return max(value, least)


def _menu(backbone: Backbone) -> list[str]:
    """The dense family: smaller inputs at the native patch, larger patches at the native input."""
    (ph, pw), (h, w) = backbone.patch_size, backbone.input_size
    if ph != pw or h != w:
        return []
    sizes = [s for s in range(h - ph, h // 3, -ph) if (h - s) % (2 * ph) == 0]
    patches = [p for p in range(ph + 1, 2 * ph + 1) if h % p == 0]
    return [f"grid({ph}, size={s})" for s in sizes] + [f"grid({p})" for p in patches]


@register("grid", kind="tokenizer", menu=_menu)
def grid(
    backbone: Backbone,
    patch: Size | None = None,
    size: Size | None = None,
    resize: str = "default",
    fit: str = "resize",
) -> Grid:
    """A regular grid at any patch and input size (FlexiViT, arXiv 2212.08013).

    Args:
        patch: pixels of a patch, p or (ph, pw); None: the weights' own.
        size: pixels that images are brought to, s or (h, w); None: as they come.
        resize: 'default' (antialiased bilinear), 'google' (FlexiViT's own weights) or 'timm' (bicubic).
        fit: where patches do not divide the image: 'resize' it to the nearest multiple, 'pad' with zeros (the mean) or
            'crop' at the lower right, or 'error'.
    """
    if resize not in PRESETS:
        raise UserError(f"grid: resize={resize!r} is not one of {', '.join(PRESETS)}")
    if fit not in FITS:
        raise UserError(f"grid: fit={fit!r} is not one of {', '.join(FITS)}")
    sides = backbone.patch_size if patch is None else _pair("patch", patch, 1, 256)
    return Grid(sides, None if size is None else _pair("size", size, 1, 8192), PRESETS[resize], fit)


def _pair(knob: str, value: Size, low: int, high: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if len(pair) != 2 or not all(type(v) is int and low <= v <= high for v in pair):
        raise UserError(f"grid: {knob}={value!r} is not one or two whole numbers in [{low}, {high}] (pixels)")
    return pair
