"""Modules without values, for their shapes and types: made on the meta device, and nothing is initialised there.

A meta tensor has no values, yet torch works out shapes in Python for every operator that fills one: for a ViT-L that
is over a second of a save or a load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FILLING = {  # what initialisers are made of: the tensor that they are given is the one that they return
    getattr(Tensor, name)
    for name in ("add_", "clamp_", "copy_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_", "uniform_", "zero_")
}


class _Unfilled(TorchFunctionMode):
    """Operators that only change values leave meta tensors alone."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in FILLING and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return function(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Tensors made inside are on the meta device: shapes and types alone."""
    with torch.device("meta"), _Unfilled():
        yield


def emptied(module: nn.Module) -> nn.Module:
    """A skeleton with memory of its own, to be filled; what no state dict holds (rotary tables) is computed anew."""
    module.to_empty(device="cpu")
    return with_buffers(module)


def with_buffers(module: nn.Module) -> nn.Module:
    """The same module, where buffers that no state dict holds have the values that their modules give them."""
    for part in module.modules():
        if callable(fill := getattr(part, "init_non_persistent_buffers", None)):
            for name in part._non_persistent_buffers_set:
                if (value := part._buffers[name]) is not None and value.is_meta:
                    part._buffers[name] = torch.empty_like(value, device="cpu")
            fill()
    return module
