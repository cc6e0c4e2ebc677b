"""Peak memory of a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """Peak of what a call allocates, MB (10^6 bytes)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with LiveMemory() as memory:
        run()
    return memory.peak / 1e6


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of live tensors made inside; scratch space within one operator is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {s._cdata for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        out = func(*args, **(kwargs or {}))
        for storage in map(_storage, tree_leaves(out)):
            if storage is not None and storage._cdata not in given and storage._cdata not in self._live:
                key = storage._cdata
                self._live[key] = (weakref.ref(storage, partial(self._gone, key)), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out

    def _gone(self, key: int, _: Any) -> None:
        self._live.pop(key, None)


def _storage(value: Any) -> torch.UntypedStorage | None:
    return value.untyped_storage() if isinstance(value, Tensor) else None
