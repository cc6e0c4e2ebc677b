"""What stands for an operator that an engine lacks gives what the operator gives, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from saccade.runners.lowering import RULES, lower, numbers


class Lacking(nn.Module):
    """Every operator of the table, on rows x [B, 6], places [B, 6] below 4, and values [B, 3]."""

    def forward(self, x, places, values):
        row = x.sort(1).values
        start = torch.full((x.shape[0], 4), -0.5)
        return (
            places << 3,
            (places - 2) >> 1,
            torch.searchsorted(row, values),
            torch.searchsorted(row, values, right=True),
            start.scatter_reduce(1, places, x, "amax"),
            start.scatter_reduce(1, places, x, "amin"),
            torch.full((x.shape[0], 4), 2).scatter_reduce(1, places, places, "amin"),
            (x.unsqueeze(1) * x.unsqueeze(2)).diagonal(dim1=1, dim2=2),
        )


@pytest.mark.parametrize("free", [False, True])
def test_what_stands_for_them_gives_the_same(free):
    torch.manual_seed(0)
    x, places = torch.randn(2, 6).round(decimals=1), torch.randint(0, 4, (2, 6))  # some are equal
    given = (x, places, x[:, ::2].clone())
    shapes = [{0: Dim("batch")}] * 3 if free else None
    program = torch.export.export(Lacking(), given, dynamic_shapes=shapes)
    assert {node.target for node in program.graph.nodes} >= RULES.keys()
    expected = program.module()(*given)
    lower(program, tuple(RULES))
    assert not {node.target for node in program.graph.nodes} & RULES.keys()
    if free:
        program = program.run_decompositions()  # what engines do first
    for found, right in zip(program.module()(*given), expected, strict=True):
        assert torch.equal(found, right) and found.dtype == right.dtype


def test_the_numbers_of_a_program():
    class Large(nn.Module):
        def forward(self, x):
            return x * 2**40 & 0xFFFF

    program = torch.export.export(Large(), (torch.arange(3),))
    assert {2**40, 0xFFFF} <= {*numbers(program)}
