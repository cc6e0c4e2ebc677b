"""The faster forms of operators give what the operators give; what they are not for is left as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from saccade.core.reduction import Merge, means
from saccade.methods.common.matching import units
from saccade.runners.engines.openvino_operators import FORMS, aten, quicken

SLICE, SORTS = aten.slice.Tensor, {aten.argsort.stable, aten.sort.default, aten.scatter_add.default}


class Merging(nn.Module):
    """Every form once: scores x [B, 7] with ties, keys [B, 3, 7, 4], places [B, 2] that merge into [B, 2]."""

    def forward(self, x, keys, src, dst):
        key = units(keys.mean(1))
        kept = torch.arange(4).expand(x.shape[0], -1)
        order = x.argsort(dim=1, descending=True, stable=True)
        up = x.argsort(dim=1, stable=True)
        mean, size = means(key, None, kept, Merge(src, dst))
        return order, up, order[:, 2:].sort(dim=1).values, x.sort(1, descending=True)[0], key[:, 1::2], mean, size


def program(module: nn.Module, given: tuple, free: bool) -> ExportedProgram:
    shapes = tuple({0: Dim("batch")} for _ in given) if free else None
    return torch.export.export(module, given, dynamic_shapes=(*shapes,) if shapes else None)


@pytest.mark.parametrize("free", [False, True])
def test_faster_forms_give_the_same(free):
    torch.manual_seed(0)
    x, keys = torch.randn(2, 7).round(), torch.randn(2, 3, 7, 4)
    keys[0, :, 3] = 0  # of length 0, and stays so
    given = (x, keys, torch.tensor([[5, 6], [6, 4]]), torch.tensor([[1, 1], [0, 3]]))  # two merge into one
    made = program(Merging(), given, free)
    assert {node.target for node in made.graph.nodes} >= FORMS.keys()
    expected = made.module()(*given)
    quicken(made)
    left = [node for node in made.graph.nodes if node.target in SORTS or (node.target is SLICE and len(node.args) > 4)]
    assert not left
    for found, right in zip(made.module()(*given), expected, strict=True):
        assert found.dtype == right.dtype and torch.allclose(found, right, rtol=1e-6, atol=1e-7)


def test_what_they_are_not_for_is_left():
    class Other(nn.Module):
        def forward(self, x, rows):
            spread = torch.zeros(2, 4, 5).scatter_add(1, rows, x)  # each number has a place of its own
            values, order = x.sort(2)
            return spread, values, order, x.mean(1), x / x.norm(dim=1, keepdim=True).clamp_min(1e-6)

    given = (torch.randn(2, 3, 5), torch.randint(0, 4, (2, 3, 5)))
    made = program(Other(), given, False)
    before = [node.target for node in made.graph.nodes]
    quicken(made)
    assert [node.target for node in made.graph.nodes] == before
