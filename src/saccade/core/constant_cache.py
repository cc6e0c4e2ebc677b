"""Tensors that depend on plain values alone, like index tables: built once, shared by every model; and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from hashlib import sha256
from operator import index
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LIMIT = 256 * 2**20  # bytes of all constants together; those of ten patch sizes are 30 kB

_KEPT: dict[tuple, Tensor] = {}  # the one that was not used for longest stands first
_NAMED = ModuleType("saccade_constants")  # what a compiler calls: a function for each constant, under its own name

_HELD: ContextVar[list[Tensor] | None] = ContextVar("constants that a block of code was given", default=None)

Build = Callable[..., Tensor | np.ndarray]


def constant(build: Build) -> Callable[..., Tensor]:
    """Make ``build(*values) -> array`` a function ``(*values, device) -> Tensor`` that builds once for each device.

    ``torch.compile`` and ``torch.export`` see a constant. Do not write to what it returns.

    A compiler knows a constant by the name of the function that gave it. Two tensors under one name it takes for one
    whose shape changes, or refuses them. So each has its own name, found in a module, which every trace reads anew.
    """
    family = f"{build.__module__}.{build.__qualname__}"

    def plain(*key: Any) -> Tensor:
        return torch.as_tensor(build(*key[:-1])).to(key[-1])

    def parameter(*key: Any) -> Tensor:  # its shape is never a symbol, whatever ``dynamic`` says
        return nn.Parameter(_kept(family, plain, key), requires_grad=False)

    @torch.compiler.assume_constant_result
    def named(*key: object) -> str:
        name = f"{build.__name__}_{sha256(repr((family, key)).encode()).hexdigest()[:16]}"
        if hasattr(_NAMED, name):  # another function would make the graphs invalid that know this one
            return name

        def read() -> Tensor:
            return _kept(f"{family} of a graph", parameter, key)

        read.__code__ = read.__code__.replace(co_name=name)
        setattr(_NAMED, name, torch.compiler.assume_constant_result(read))
        return name

    @wraps(build)
    def shared(*key: object) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return getattr(_NAMED, named(*map(_plain, key)))()
        found = _kept(family, plain, key)
        if (given := _HELD.get()) is not None:
            given.append(found)
        return found

    return shared


@contextmanager
def held() -> Iterator[list[Tensor]]:
    """The constants that this thread is given in the block: who records their addresses has to keep them too."""
    given: list[Tensor] = []
    before = _HELD.set(given)
    try:
        yield given
    finally:
        _HELD.reset(before)


def _plain(value: Any) -> Any:
    """A number that a compiler may have made a symbol, as a constant of the trace; tuples too."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, float):
        return value.__float__()  # `float()` would leave it the symbol that it is
    return value if isinstance(value, bool) or not isinstance(value, int) else index(value)


def forget() -> None:
    """Drop all constants; who holds one keeps it."""
    _KEPT.clear()


def _kept(family: str, build: Callable[..., Tensor], key: tuple) -> Tensor:
    # Each step is one operation of a dict, so that threads need no lock; at worst two of them build the same.
    found = _KEPT.pop((family, key), None)
    if found is None:
        # Autocast, inference mode, a default device, torch.func's levels and a tracer's fake tensors all belong to the
        # thread that set them.  What is kept outlives them, so it must carry none of them: a new thread has none.
        with ThreadPoolExecutor(1) as clean:
            found = clean.submit(build, *key).result()
        _make_room(found.nbytes)
    _KEPT[family, key] = found
    return found


def _make_room(size: int) -> None:
    sizes = {name: tensor.nbytes for name, tensor in _KEPT.copy().items()}
    over = sum(sizes.values()) + size - LIMIT
    for name, freed in sizes.items():
        if over <= 0:
            return
        _KEPT.pop(name, None)
        over -= freed


def full_precision(like: Tensor) -> AbstractContextManager:
    """Autocast off, where it is on: left out else, or an exported graph would keep it."""
    kind = like.device.type
    on = _has_autocast(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


@torch.compiler.assume_constant_result  # torch 2.9 cannot trace it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)
