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

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from operator import index
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import UserError, nearest

MODES = ("bilinear", "bicubic")
METHODS = ("pi", "vanilla", "area")


def _one_of(what: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    if name not in known:
        raise UserError(f"unknown {what} {name!r}{nearest(str(name), known)}")
    return name


@dataclass(frozen=True)
class ResizeSpec:
    """How the kernel and the position table are resized.  Weights belong to the spec they were trained with.

    Raises `UserError` for an unknown mode.
    """

    kernel_mode: str = "bilinear"
    kernel_antialias: bool = True
    pos_mode: str = "bilinear"
    pos_antialias: bool = True

    def __post_init__(self) -> None:
        _one_of("resize mode", self.kernel_mode, MODES)
        _one_of("resize mode", self.pos_mode, MODES)

    @classmethod
    def preset(cls, name: str) -> ResizeSpec:
        """One of `PRESETS` by its name; `UserError` if there is none."""
        return PRESETS[_one_of("resize preset", name, PRESETS)]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ResizeSpec:
        """Inverse of `to_dict`.  `UserError` for an unknown field and for a missing one: a default would guess."""
        known = [field.name for field in fields(cls)]
        for name in values:
            _one_of("resize field", name, known)
        if missing := [name for name in known if name not in values]:
            raise UserError(f"the resize spec lacks {', '.join(missing)}: give every field, or use a preset")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Without antialiasing, shrinking a 32 px kernel to 8 px reads 256 of its 1024 taps and keeps a quarter of its response
# to a constant: hence the default.  Google's weights were trained that way, so reading them needs 'google'.
PRESETS = {
    "default": ResizeSpec(),
    "google": ResizeSpec(kernel_antialias=False),
    "timm": ResizeSpec(kernel_mode="bicubic", pos_mode="bicubic"),
}


def resize_matrix(old: int, new: int, mode: str, antialias: bool) -> Tensor:
    """``B`` [new, old], float64 on the CPU: resizes one axis from `old` to `new` pixels, with half-pixel centres.

    Built once and shared: do not write to it.  `UserError` for an unknown mode and a size below 1.
    """
    return _matrix("vanilla", index(old), index(new), mode, antialias, torch.device("cpu"), torch.float64)


def pi_matrix(old: int, new: int, mode: str, antialias: bool) -> Tensor:
    """``P = (Bᵀ)⁺`` [new, old], float64 on the CPU: resizes one axis of a kernel (arXiv 2212.08013, §3.4).

    Built once and shared: do not write to it.  Raises as `resize_matrix`.
    """
    return _matrix("pi", index(old), index(new), mode, antialias, torch.device("cpu"), torch.float64)


@torch.compiler.assume_constant_result  # takes a plain function: torch.compile would trace through the cache
def _matrix(*key: Any) -> Tensor:
    return _cached(*key)


@lru_cache(maxsize=1024)
def _cached(*key: Any) -> Tensor:
    # Autocast, inference mode, a default device, torch.func's levels and a tracer's fake tensors all belong to the
    # thread that set them.  What is kept outlives them, so it must carry none of them: a new thread has none.
    with ThreadPoolExecutor(1) as clean:
        return clean.submit(_build, *key).result()


def _build(
    how: str, old: int, new: int, mode: str, antialias: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The matrix [new, old] that resizes one axis by the method `how`."""
    _one_of("resize mode", mode, MODES)
    if min(old, new) < 1:
        raise UserError(f"cannot resize {old} to {new} pixels: both must be at least 1")
    # One image whose columns are the basis, not a batch of columns: antialiased resizing of (N > 1, 1, old, 1) gives
    # wrong rows on the CPU (torch 2.15).
    basis = torch.eye(old, dtype=torch.float64)[None, None]
    matrix = F.interpolate(basis, size=(new, old), mode=mode, align_corners=False, antialias=antialias)[0, 0]
    if how == "pi":
        # B has full rank and is well conditioned (at worst 6 up to 64 pixels, 22 at 1000): rcond is to drop nothing.
        # NumPy, because torch would first start an OpenMP team for the new thread, which takes milliseconds.
        matrix = torch.from_numpy(np.linalg.pinv(matrix.T.numpy(), rcond=1e-10))
    elif how == "area":
        matrix = matrix * (old / new)
    return matrix.to(dtype).to(device)


def _resize(x: Tensor, new: Sequence[int], how: str, mode: str, antialias: bool) -> Tensor:
    """Resize the trailing ``len(new)`` axes, one after the other, in at least float32; same dtype out."""
    out = x if x.dtype == torch.float64 else x.float()
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    # Autocast would run the products in half precision.  Off already, it is left out: an exported graph would keep it.
    with torch.autocast(kind, enabled=False) if autocast else nullcontext():
        for axis in range(-len(new), 0):
            old, size = index(out.shape[axis]), index(new[axis])  # no symbols: torch.compile makes a program per size
            if old != size:
                matrix = _matrix(how, old, size, mode, antialias, x.device, out.dtype)
                out = F.linear(out.transpose(axis, -1), matrix).transpose(axis, -1)
    return out.to(x.dtype)


def resize_kernel(kernel: Tensor, new: Sequence[int], spec: ResizeSpec, how: str = "pi") -> Tensor:
    """A kernel [..., *old] at another patch size [..., *new]: the trailing ``len(new)`` axes, 1-D, 2-D or 3-D alike.

    `how` is 'pi', or what the paper compares it with (arXiv 2212.08013, Fig. 4): 'vanilla', the kernel resized like an
    image, and 'area', that times the old area over the new.  The same size returns `kernel` itself.

    `UserError` for an unknown `how`, a size below 1, and more sizes than axes.
    """
    _one_of("kernel resize", how, METHODS)
    if not 0 < len(new) <= kernel.ndim:
        raise UserError(
            f"a kernel of {kernel.ndim} axes cannot be resized to {tuple(new)}: give 1 to {kernel.ndim} sizes"
        )
    if tuple(kernel.shape[-len(new) :]) == tuple(new):
        return kernel
    return _resize(kernel, new, how, spec.kernel_mode, spec.kernel_antialias)


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
    resized = _resize(grid.mT.unflatten(-1, old), new, "vanilla", spec.pos_mode, spec.pos_antialias)
    return torch.cat([prefix, resized.flatten(-2).mT], dim=-2)
