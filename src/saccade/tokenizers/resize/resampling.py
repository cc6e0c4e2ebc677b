"""Resizing a patch-embedding kernel and a position table: pure functions, differentiable in what they resize.

Resizing an image is linear, so is its effect on each axis: a 1-D matrix ``B`` [new, old] per axis says all of it.  A
kernel that has to give on the resized patch ``B x`` the token it gave on ``x`` is not resized by ``B`` but by the
pseudo-inverse of its transpose, ``P = (Bᵀ)⁺`` ("PI-resize", FlexiViT, arXiv 2212.08013, §3.4).  What holds:

* enlarging an isolated patch is exact: ``<B x, P w> == <x, w>`` for every ``x``;
* shrinking gives the best approximation for white patches, it loses information, and resizes do not chain;
* a whole resized image mixes pixels over patch borders, so its tokens agree only nearly.

``(B_h ⊗ B_w)⁺ = B_h⁺ ⊗ B_w⁺``, hence two (or one, or three) small matrices do the work of one huge one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.constant_cache import full_precision
from saccade.errors import UserError
from saccade.tokenizers.resize.matrices import MODES, axis_matrix, one_of

RHO = 0.9  # correlation of neighbouring pixels where a method needs one: about that of photos


@dataclass(frozen=True)
class ResizeSpec:
    """How the kernel and the position table are resized.  Weights belong to the spec they were trained with.

    Raises `UserError` for an unknown mode, and where antialiasing is neither True nor False.
    """

    kernel_mode: str = "bilinear"
    kernel_antialias: bool = True
    pos_mode: str = "bilinear"
    pos_antialias: bool = True

    def __post_init__(self) -> None:
        one_of("resize mode", self.kernel_mode, MODES)
        one_of("resize mode", self.pos_mode, MODES)
        for name in ("kernel_antialias", "pos_antialias"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}={getattr(self, name)!r} of a resize spec is neither True nor False")

    def __str__(self) -> str:
        """The preset's name, or the fields in words."""
        named = [name for name, spec in PRESETS.items() if spec == self]
        smooth = {True: "antialiased", False: "not antialiased"}
        kernel, positions = smooth[self.kernel_antialias], smooth[self.pos_antialias]
        return named[0] if named else f"kernel {self.kernel_mode} {kernel}, positions {self.pos_mode} {positions}"

    @classmethod
    def preset(cls, name: str) -> ResizeSpec:
        """One of `PRESETS` by its name; `UserError` if there is none."""
        return PRESETS[one_of("resize preset", name, PRESETS)]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ResizeSpec:
        """Inverse of `to_dict`.  `UserError` for an unknown field and for a missing one: a default would guess."""
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise UserError(f"a resize spec has the fields {', '.join(known)}; it is not {str(values)[:50]!r}")
        for name in values:
            one_of("resize field", name, known)
        if missing := [name for name in known if name not in values]:
            raise UserError(f"the resize spec lacks {', '.join(missing)}: give every field, or use a preset")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``from_dict`` takes them."""
        return asdict(self)


# Without antialiasing, shrinking a 32 px kernel to 8 px reads 256 of its 1024 taps and keeps a quarter of its response
# to a constant: hence the default.  Google's weights were trained that way, so reading them needs 'google'.
PRESETS = {
    "default": ResizeSpec(),
    "google": ResizeSpec(kernel_antialias=False),
    "timm": ResizeSpec(kernel_mode="bicubic", pos_mode="bicubic"),
}


def choose(method: str, asked: str | None, trained: ResizeSpec | None) -> ResizeSpec:
    """The preset `asked` for by a knob ``resize``; None: what the weights were `trained` with, else 'default'.

    `UserError` for an unknown preset, and for another than the weights were trained with.
    """
    if asked is not None and asked not in PRESETS:
        raise UserError(f"{method}: resize={asked!r} is not one of {', '.join(PRESETS)}")
    spec = PRESETS.get(asked or "")
    if trained is not None and spec not in (None, trained):
        raise UserError(f"{method}: resize={asked!r} is not how these weights were trained ({trained}): leave it out")
    return trained or spec or PRESETS["default"]


def _product(x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Multiply the trailing ``len(matrices)`` axes, one after the other; None leaves an axis as it is."""
    with full_precision(x):
        for at, matrix in zip(range(-len(matrices), 0), matrices, strict=True):
            if matrix is not None:
                x = F.linear(x.transpose(at, -1), matrix).transpose(at, -1)
    return x


def _apply(x: Tensor, new: Sequence[int], axis: str, rho: float, mode: str, antialias: bool) -> Tensor:
    """Resize the trailing ``len(new)`` axes of a float32 or float64 tensor."""
    # No symbols: torch.compile makes a program per size.
    sizes = [(index(old), index(size)) for old, size in zip(x.shape[-len(new) :], new, strict=True)]
    key = mode, antialias, x.dtype, x.device
    return _product(x, [None if old == size else axis_matrix(axis, rho, old, size, *key) for old, size in sizes])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _filter_norm(kernel: Tensor, resized: Tensor, new: Sequence[int], spec: ResizeSpec, rho: float) -> Tensor:
    """Frobenius norm of each filter (of the whole, where there is one only), old over new."""
    inner = tuple(range(1 if kernel.ndim > len(new) else 0, kernel.ndim))
    norms = [torch.linalg.vector_norm(k, dim=inner, keepdim=True) for k in (kernel, resized)]
    return norms[0] / norms[1].clamp(min=torch.finfo(kernel.dtype).tiny)


def _token_norm(kernel: Tensor, resized: Tensor, new: Sequence[int], spec: ResizeSpec, rho: float) -> Tensor:
    """Root mean square of the tokens over patches of covariance Σ, old over new: a single number."""
    key = spec.kernel_mode, spec.kernel_antialias, kernel.dtype, kernel.device
    sizes = [(index(old), index(size)) for old, size in zip(kernel.shape[-len(new) :], new, strict=True)]
    before = _product(kernel, [axis_matrix("root", rho, old, old, *key) for old, _ in sizes])
    after = _product(resized, [axis_matrix("root", rho, old, size, *key) for old, size in sizes])
    tiny = torch.finfo(kernel.dtype).tiny
    return torch.linalg.vector_norm(before) / torch.linalg.vector_norm(after).clamp(min=tiny)


@dataclass(frozen=True)
class How:
    """A way to resize a kernel: what each axis is multiplied by, and then the whole."""

    axis: str  # one of `matrices.AXES`
    scale: Callable[[Tensor, Tensor, Sequence[int], ResizeSpec, float], Tensor] | None = None


# The ways that the paper compares (arXiv 2212.08013, Fig. 4; 'sigma': its appendix).
METHODS = {
    "pi": How("pi"),
    "vanilla": How("image"),
    "area": How("area"),
    "norm": How("image", _filter_norm),
    "token_norm": How("image", _token_norm),
    "sigma": How("sigma"),
}


def resize_kernel(kernel: Tensor, new: Sequence[int], spec: ResizeSpec, how: str = "pi", rho: float = RHO) -> Tensor:
    """A kernel [..., *old] at another patch size [..., *new]: the trailing ``len(new)`` axes, 1-D, 2-D or 3-D alike.

    The same size returns `kernel` itself.  `how` is 'pi' or what the paper compares it with (arXiv 2212.08013, Fig. 4):

    * 'vanilla': resized like an image.  Tokens of resized patches come out (new area / old area) times too large.
    * 'area': that, times the old area over the new.
    * 'norm': 'vanilla', each filter (the first axis; the whole where there is no other) brought to its Frobenius norm.
    * 'token_norm': 'vanilla', times the one number that keeps the root mean square of the tokens.  A kernel has no
      data, so it is that over patches ``x`` and ``B x`` whose pixels have variance 1 and correlation ``rho^distance``
      along each axis, none between channels; rho=0 are white patches.
    * 'sigma': the least mean squared error of the token over such patches, ``(BΣBᵀ)⁻¹BΣ``.  Enlarging, or with rho=0,
      it is 'pi'; it pays for shrinking a lot without antialiasing.

    The sources differ on what the paper's "norm heuristic" normalises, hence two.

    Raises:
        UserError: unknown `how`, rho outside [0, 0.999], a size below 1, more sizes than axes.
    """
    method = METHODS[one_of("kernel resize", how, METHODS)]
    if not 0 <= rho <= 0.999:
        raise UserError(f"rho={rho!r} is not in [0, 0.999]: the correlation of neighbouring pixels")
    if not 0 < len(new) <= kernel.ndim:
        raise UserError(
            f"a kernel of {kernel.ndim} axes cannot be resized to {tuple(new)}: give 1 to {kernel.ndim} sizes"
        )
    if tuple(kernel.shape[-len(new) :]) == tuple(new):
        return kernel
    wide = _wide(kernel)
    resized = _apply(wide, new, method.axis, rho, spec.kernel_mode, spec.kernel_antialias)
    if method.scale is not None:
        resized = resized * method.scale(wide, resized, new, spec, rho)
    return resized.to(kernel.dtype)


def resize_positions(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix: int, spec: ResizeSpec
) -> Tensor:
    """A position table [1, P + old_h * old_w, D] for another grid: [1, P + new_h * new_w, D].

    The first ``P = num_prefix`` entries (class token, registers) stay as they are.  Grids are compared as (h, w), so
    (4, 9) and (6, 6) differ though their counts agree.  The same grid returns `table` itself.

    `UserError` when the table does not have the entries `old` and `num_prefix` say, and for a size below 1.
    """
    if table.shape[-2] != num_prefix + old[0] * old[1]:
        raise UserError(
            f"the position table has {table.shape[-2]} entries, not {num_prefix} + {old[0]} x {old[1]}: "
            "give the grid it was made for"
        )
    if tuple(old) == tuple(new):
        return table
    prefix, grid = table[..., :num_prefix, :], table[..., num_prefix:, :]
    cells = _wide(grid.mT.unflatten(-1, old))
    resized = _apply(cells, new, "image", 0.0, spec.pos_mode, spec.pos_antialias).to(table.dtype)
    return torch.cat([prefix, resized.flatten(-2).mT], dim=-2)


LAYOUTS = ("last", "first", "apart")


def resize_output(
    weight: Tensor, old: Sequence[int], new: Sequence[int], spec: ResizeSpec, layout: str = "last"
) -> Tensor:
    """A projection *to* pixels (unpatchify) at another patch size: its pixels are then the old ones, resized.

    What it gives are pixels, so it is resized by ``B`` itself, not by ``(Bᵀ)⁺``, exactly in both directions.  1-D, 2-D
    or 3-D patches alike: ``len(old) == len(new)``.  The same size returns `weight` itself.

    Args:
        weight: a weight or a bias, in one of three layouts.
        layout: 'last': [*old · C, ...], pixels in rows, channels within a pixel, a ``Linear`` as in MAE;
            'first': [C · *old, ...], as ``fold`` and ``pixel_shuffle`` read it;
            'apart': [..., *old], the weight of a transposed convolution (its bias has no pixels: leave it).

    Raises:
        UserError: unknown layout, sizes below 1 or not as many new as old, a weight that has not that many pixels.
    """
    one_of("layout", layout, LAYOUTS)
    old, new = tuple(old), tuple(new)
    count = math.prod(old)
    if not old or len(old) != len(new) or min(old) < 1:
        raise UserError(f"cannot resize patches of {old} to {new} pixels: give as many sizes, each at least 1")
    fits = tuple(weight.shape[-len(old) :]) == old if layout == "apart" else weight.shape[0] % count == 0
    if not fits:
        raise UserError(f"an output weight of shape {tuple(weight.shape)} does not hold {old} pixels ({layout!r})")
    if old == new:
        return weight
    mode, antialias = spec.kernel_mode, spec.kernel_antialias
    if layout == "apart":
        return _apply(_wide(weight), new, "image", 0.0, mode, antialias).to(weight.dtype)
    rows = _wide(weight).movedim(0, -1)  # [..., outputs]
    if layout == "last":
        cells = _apply(rows.unflatten(-1, (*old, -1)).movedim(-1, -1 - len(old)), new, "image", 0.0, mode, antialias)
        cells = cells.movedim(-1 - len(old), -1)
    else:
        cells = _apply(rows.unflatten(-1, (-1, *old)), new, "image", 0.0, mode, antialias)
    return cells.flatten(-1 - len(old)).movedim(-1, 0).to(weight.dtype).contiguous()
