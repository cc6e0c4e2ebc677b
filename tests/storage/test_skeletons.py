"""Modules without values have the shapes and types of those with values, and take no time for initialising."""

from __future__ import annotations

import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from oracles import FAMILIES
from saccade.storage.skeletons import FILLING, without_values


class Operators(TorchDispatchMode):
    """Counts those that fill a tensor."""

    filling = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.filling += func.__name__.split(".")[0] in {f.__name__ for f in FILLING}
        return func(*args, **(kwargs or {}))


def test_shapes_and_types_are_those_of_a_module_with_values():
    for name, shape in FAMILIES.values():
        small = {"depth": 1, "embed_dim": 96, "num_heads": 3, **shape}
        plain = timm.create_model(name, **small)
        with without_values():
            bare = timm.create_model(name, **small)
        assert all(value.is_meta for value in bare.state_dict().values())
        kinds = [{n: (v.shape, v.dtype) for n, v in module.state_dict().items()} for module in (plain, bare)]
        assert kinds[0] == kinds[1], name
        assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in bare.parameters()]


def test_truncated_normal_weights_cost_nothing():
    weight = torch.empty(8, 8, device="meta")
    with Operators() as usual:
        timm.layers.trunc_normal_(weight)
    with Operators() as skipped, without_values():
        assert timm.layers.trunc_normal_(weight) is weight
    assert usual.filling > 0 == skipped.filling


def test_tensors_with_values_are_filled():
    with without_values():
        layer = nn.Linear(3, 3, device="cpu")
        nn.init.constant_(layer.weight, 2.0)
    layer.bias.data.zero_()
    assert layer(torch.ones(1, 3)).tolist() == [[6.0] * 3]
