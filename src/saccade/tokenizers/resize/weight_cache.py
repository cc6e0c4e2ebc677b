"""Resized weights that are kept for the next request: per ViT, so that every view of it finds them.

What they were made of is kept beside them and compared, value by value, before each use: an edit of any kind is noticed
(in place, through ``.data``, by an optimiser, by pruning), and takes a tenth of the time that making them again does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from saccade.core.init import outside
from saccade.core.timm_types import ViT

MOST = 128 * 2**20  # bytes for one ViT: ten patch sizes of a ViT-B, kernels and position tables, are 40 MB


class Shelf:
    """What was made of one weight, the latest used last."""

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.made: dict[tuple, Tensor] = {}

    def holds(self, source: Tensor) -> bool:
        """Whether it was made of these very values."""
        own = self.source
        alike = own.shape == source.shape and own.dtype == source.dtype and own.device == source.device
        return alike and torch.equal(own, source)

    def bytes(self) -> int:
        """Of all that is kept on it, its source too."""
        return sum(_bytes(t) for t in (self.source, *self.made.copy().values()))


# A ViT that is gone takes its shelves along. Every step below is one operation of a dict, so that threads need no lock;
# at worst two of them make the same thing.
_KEPT: WeakKeyDictionary[Any, dict[str, Shelf]] = WeakKeyDictionary()


def cached_weight(vit: ViT, kind: str, how: tuple, source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """``make(source)``, remembered for a ViT whose weight ``source`` is of a ``kind``, under ``how`` it was made.

    Made anew where a gradient is asked for, under a compiler, on a GPU (where a comparison would wait for the device
    and making costs little), and where ``source`` has other values than it had. At most ``MOST`` bytes are kept.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or source.device.type != "cpu":
        return make(source)
    shelves = _KEPT.setdefault(vit, {})
    shelf = shelves.get(kind)
    if shelf is not None and shelf.holds(source):
        found = shelf.made.pop(how, None)
        if found is not None:
            shelf.made[how] = found
            return found
    with outside(), torch.no_grad():
        made = make(source)
        if made is source or _bytes(made) + 2 * _bytes(source) > MOST:
            return made
        if shelf is None or not shelf.holds(source):
            shelf = shelves[kind] = Shelf(source.detach().clone())
    shelf.made[how] = made
    _make_room(shelves)
    return made


def kept_bytes(vit: ViT) -> int:
    """Bytes that are kept for a ViT."""
    return sum(shelf.bytes() for shelf in _KEPT.get(vit, {}).copy().values())


def _make_room(shelves: dict[str, Shelf]) -> None:
    """Forget what was used longest ago, on the fullest shelf first, until all fit."""
    while sum(shelf.bytes() for shelf in shelves.copy().values()) > MOST:
        fullest = max(shelves.copy().items(), key=lambda item: (bool(item[1].made), item[1].bytes()))
        oldest = next(iter(fullest[1].made.copy()), None)
        if oldest is None:
            shelves.pop(fullest[0], None)
        else:
            fullest[1].made.pop(oldest, None)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
