"""Resized weights that are kept for the next request: per ViT, so that every view of it finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from saccade.plan import ViT

MOST = 32  # of one ViT: ten patch sizes are ten kernels and ten position tables


class Entry(NamedTuple):
    state: tuple  #   what the source was
    source: Tensor  # with its memory, which could go to other weights else, found under the same address
    made: Tensor


# A ViT that is gone takes its entries along. Every step below is one operation of a dict, so that threads need no lock;
# at worst two of them make the same thing.
_KEPT: WeakKeyDictionary[Any, dict[tuple, Entry]] = WeakKeyDictionary()
# Fused optimisers write to weights without counting it as a new version.
register_optimizer_step_post_hook(lambda *_: _KEPT.clear())


def kept(vit: ViT, what: tuple, source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """``make(source)``, remembered under the name `what` for a ViT whose weight `source` is.

    Made anew where a gradient is asked for, under a compiler, and when `source` has changed: in place (but through
    ``.data``, which torch does not count), by another tensor, by an optimiser.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return make(source)
    # An inference tensor has no version; weights born in inference mode are not edited outside of it.
    version = 0 if source.is_inference() else source._version
    state = (source.data_ptr(), version, source.dtype, source.device)
    entries = _KEPT.setdefault(vit, {})
    found = entries.get(what)
    if found is not None and found.state == state:
        return found.made
    made = make(source)
    if made is not source:
        entries[what] = Entry(state, source.detach(), made)
        for oldest in list(entries)[: max(0, len(entries) - MOST)]:
            entries.pop(oldest, None)
    return made
