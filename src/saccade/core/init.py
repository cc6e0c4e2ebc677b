"""Where the parameters of a method start: the same in every process, and no random number taken from anybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def outside() -> Iterator[None]:
    """What is made in here outlives the caller's contexts: no inference tensors, and on the CPU by default."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield


def draw(shape: tuple[int, ...], std: float, seed: int = 0) -> Tensor:
    """Normal numbers from a generator of their own."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32) * std


def init_module(make: Callable[[], Module], seed: int = 0) -> Module:
    """Build a module: matrices and kernels normal with variance 1 / fan-in, biases 0, the rest as torch starts it."""
    with torch.random.fork_rng(devices=[]):
        module = make().float()  # whatever torch's default type is at the moment
    with torch.no_grad():
        for i, (name, weight) in enumerate(module.named_parameters()):
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim > 1:
                weight.copy_(draw(tuple(weight.shape), weight[0].numel() ** -0.5, seed + 1000 * i))
    return module
