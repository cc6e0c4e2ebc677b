"""The small matrices that resize one axis of an image, of a patch kernel, of a position table. Each is built once.

Resizing an image is linear: ``B`` [new, old] per axis says all of it, and what a kernel needs follows from it
(``embed.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import index

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.constant_cache import constant
from saccade.errors import UserError, nearest

MODES = ("bilinear", "bicubic")


def one_of(what: str, name: str, known: Iterable[str]) -> str:
    """`name` if it is known, else a `UserError` with the nearest."""
    known = list(known)
    if name not in known:
        raise UserError(f"unknown {what} {name!r}{nearest(str(name), known)}")
    return name


def resize_matrix(old: int, new: int, mode: str, antialias: bool) -> Tensor:
    """``B`` [new, old], float64 on the CPU: resizes one axis from `old` to `new` pixels, with half-pixel centres.

    Built once and shared: do not write to it.  `UserError` for an unknown mode and a size below 1.
    """
    return axis_matrix("image", 0.0, index(old), index(new), mode, antialias, torch.float64, torch.device("cpu"))


def pi_matrix(old: int, new: int, mode: str, antialias: bool) -> Tensor:
    """``P = (Bᵀ)⁺`` [new, old], float64 on the CPU: resizes one axis of a kernel (arXiv 2212.08013, §3.4).

    Built once and shared: do not write to it.  Raises as `resize_matrix`.
    """
    return axis_matrix("pi", 0.0, index(old), index(new), mode, antialias, torch.float64, torch.device("cpu"))


@constant
def axis_matrix(axis: str, rho: float, old: int, new: int, mode: str, antialias: bool, dtype: torch.dtype) -> Tensor:
    """The matrix [new, old] of one axis ([old, new] for 'root'), one of `AXES`; the last argument is its device."""
    one_of("resize mode", mode, MODES)
    if min(old, new) < 1:
        raise UserError(f"cannot resize {old} to {new} pixels: both must be at least 1")
    # One image whose columns are the basis, not a batch of columns: antialiased resizing of (N > 1, 1, old, 1) gives
    # wrong rows on the CPU (torch 2.15).
    basis = torch.eye(old, dtype=torch.float64)[None, None]
    image = F.interpolate(basis, size=(new, old), mode=mode, align_corners=False, antialias=antialias)[0, 0]
    # NumPy, because torch would first start an OpenMP team for the thread of a constant, which takes milliseconds.
    return torch.from_numpy(AXES[axis](image.numpy(), rho)).to(dtype)


def _pinv(matrix: np.ndarray) -> np.ndarray:
    # B has full rank and is well conditioned (at worst 6 up to 64 pixels, 22 at 1000): rcond is to drop nothing.
    return np.linalg.pinv(matrix, rcond=1e-10)


def _root(size: int, rho: float) -> np.ndarray:
    """``L`` with ``L Lᵀ = Σ``, the covariance ``ρ^|i - j|`` of `size` pixels in a row."""
    away = np.subtract.outer(np.arange(size), np.arange(size))
    return np.linalg.cholesky(rho ** np.abs(away).astype(float))


# What becomes of B [new, old] on one axis.
AXES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "image": lambda b, rho: b,
    "area": lambda b, rho: b * (b.shape[1] / b.shape[0]),
    "pi": lambda b, rho: _pinv(b.T),
    # argmin ‖w - Bᵀŵ‖_Σ = (LᵀBᵀ)⁺ Lᵀ w, which is also (BΣBᵀ)⁻¹ BΣ w, the best linear guess of <x, w> from B x.
    "sigma": lambda b, rho: _pinv(_root(b.shape[1], rho).T @ b.T) @ _root(b.shape[1], rho).T,
    "root": lambda b, rho: (b @ _root(b.shape[1], rho)).T.copy(),  # its product with B x has the covariance of B x
}
