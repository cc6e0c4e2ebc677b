"""Tensors that depend on plain values alone, like index tables: built once, shared by every model; and autocast."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def constant(build: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    """Make ``build(*values) -> array`` a function ``(*values, device) -> Tensor`` that builds once for each device.

    ``torch.compile`` and ``torch.export`` see a constant. Do not write to what it returns.
    """

    @lru_cache(maxsize=512)
    def kept(*key: object) -> Tensor:
        # Inference mode, a default device and a tracer's fake tensors belong to the thread that set them, and what is
        # kept outlives them: a new thread has none.
        with ThreadPoolExecutor(1) as clean:
            return clean.submit(lambda: torch.from_numpy(build(*key[:-1])).to(key[-1])).result()  # type: ignore[call-overload]

    @torch.compiler.assume_constant_result  # takes a plain function: torch.compile would trace through the cache
    def shared(*key: object) -> Tensor:
        return kept(*key)

    return shared


def full_precision(like: Tensor) -> AbstractContextManager:
    """Autocast off, where it is on: left out else, or an exported graph would keep it."""
    kind = like.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()
