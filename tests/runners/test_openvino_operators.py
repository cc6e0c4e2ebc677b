"""The faster forms of operators give what the operators give; what they are not for is left as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.core.merging import Merge, means
from saccade.core.reduction import reduce
from saccade.core.tokens import Tokens
from saccade.methods.common.matching import BipartiteMerge, units
from saccade.runners.engines import openvino as engine
from saccade.runners.engines.openvino_operators import FORMS, aten, quicken
from saccade.runners.exported import silent

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
    assert {node.target for node in made.graph.nodes} >= FORMS.keys() - {aten.amax.default, aten.argmax.default}
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


class Pairing(nn.Module):
    """One merge of tokens [B, 1 + N, 4], and one more by hand; and a part of an order, by place."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.merge = BipartiteMerge(r, 4, "x")

    def forward(self, x):
        n = x.shape[1] - 1
        tokens = Tokens(x, torch.arange(n).expand(x.shape[0], -1), (1, n), 1)
        found = self.merge(tokens)
        left = reduce(tokens, found)
        places = torch.arange(left.num_patches).expand(x.shape[0], -1)
        mean, size = means(left.patches, left.size, places[:, 2:], Merge(places[:, :2], places[:, :2] // 2))
        best = x[:, :, 0].argsort(dim=1, descending=True, stable=True)[:, :5].sort(dim=1).values
        return found.keep, found.merge.src, found.merge.dst, best, mean, size


@pytest.mark.parametrize(("n", "r"), [(17, 3), (90, 40), (300, 40)])  # few that merge, half of them, many
@pytest.mark.parametrize("free", [False, True])
def test_equals_are_taken_in_their_order_in_every_number_type(n, r, free):
    """Tokens along one axis or another: most are as similar to several as to the one that comes first."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    axes = torch.randint(0, 8, (3, 1 + n), generator=torch.Generator().manual_seed(n))
    x = torch.cat([torch.eye(4), -torch.eye(4)])[axes]
    module = Pairing(r).eval()
    expected, made = module(x), program(module, (x,), free)
    quicken(made)
    targets = {node.target for node in made.graph.nodes}
    assert not targets & {aten.argsort.stable, aten.sort.default, aten.amax.default, aten.argmax.default}
    with torch.no_grad(), silent(), sdpa_kernel(SDPBackend.MATH):
        model = engine.read(made)
    for operator in model.get_ordered_ops():
        engine.as_asked(operator)
    assert not {operator.get_type_name() for operator in model.get_ordered_ops()} & {"Mod", "Sort"}
    for kind in ("f32", "bf16"):
        run = engine.core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": kind})
        for count in (3, 1) if free else (3,):
            found = [torch.from_numpy(run([x[:count].numpy()])[i].copy()) for i in range(len(expected))]
            for given, right in zip(found[:4], expected[:4], strict=True):
                assert torch.equal(given.long(), right[:count])
            for given, right in zip(found[4:], expected[4:], strict=True):
                assert torch.allclose(given, right[:count], atol=1e-5 if kind == "f32" else 2e-2)
