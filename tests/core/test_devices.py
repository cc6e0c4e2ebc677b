"""Where a model is, everything is: no method makes a tensor on the CPU, or reads one from there, in a forward.

The device is one that only pretends to be a GPU (PyTorch's fake tensors know shapes and devices, and no numbers).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from oracles import make_vit
from registered_settings import SHAPE, settings_of
from saccade.core import constant_cache
from saccade.core.registry import registry
from saccade.model import AdaptiveViT


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """A mode in which tensors are made as fakes; so are constants, on the GPU at once, from arrays that are real."""
    mode = FakeTensorMode(allow_non_fake_inputs=False, shape_env=ShapeEnv())

    def kept(family: str, build, key: tuple) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            real = build(*key[:-1], "cpu")
        assert torch.device(key[-1]).type == "cuda", family
        return torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=key[-1])

    monkeypatch.setattr(constant_cache, "_kept", kept)
    yield mode


def moved(model: AdaptiveViT) -> None:
    for module in model.modules():
        for own, wrap in ((module._parameters, nn.Parameter), (module._buffers, lambda given: given)):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = wrap(torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*registry()])
def test_everything_is_where_the_model_is(name: str, training: bool, pretended: FakeTensorMode) -> None:
    for setting in settings_of(name)[:3]:
        model = AdaptiveViT(make_vit(**SHAPE), setting)
        with pretended:
            moved(model)
            model.train(training)
            with torch.set_grad_enabled(training):
                try:
                    out = model(torch.empty(2, 3, 128, 128, device="cuda"))
                    assert out.logits.device.type == "cuda"
                except GuardOnDataDependentSymNode:
                    continue  # numbers decide how it goes on: as far as here, all was where the model is
