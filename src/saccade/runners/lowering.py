"""Operators that engines lack, in terms of operators that all of them have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Parts:
    """Writes what one node computes as other nodes, in front of it."""

    def __init__(self, graph: Graph) -> None:
        self._call = graph.call_function

    def shifted_left(self, x: Node, by: int) -> Node:
        """``x << by`` of whole numbers."""
        return self._call(aten.mul.Tensor, (x, 1 << by))

    def shifted_right(self, x: Node, by: int) -> Node:
        """``x >> by`` of whole numbers, rounded down."""
        return self._call(aten.floor_divide.default, (x, 1 << by))

    def searchsorted(self, row: Node, x: Node, *, right: bool = False, **_: Any) -> Node:
        """How many of each row's sorted values [..., K] are below (``right``: or equal to) each of x [..., N]."""
        row, x = self._call(aten.unsqueeze.default, (row, -2)), self._call(aten.unsqueeze.default, (x, -1))
        below = self._call(aten.le.Tensor if right else aten.lt.Tensor, (row, x))
        return self._call(aten.sum.dim_IntList, (below, [-1]))

    def scatter_reduce(
        self, x: Node, dim: int, index: Node, source: Node, how: str, *, include_self: bool = True
    ) -> Node:
        """The largest or smallest of what x [B, M] has and what falls there: source [B, R], index [B, R]."""
        known = x.meta["val"]
        assert (dim, include_self, known.ndim) == (1, True, 2) and how in ("amax", "amin")
        places = self._call(aten.arange.default, (known.shape[1],))
        places = self._call(aten.view.default, (places, [1, -1, 1]))
        hit = self._call(aten.eq.Tensor, (self._call(aten.unsqueeze.default, (index, 1)), places))
        none = self._call(aten.full.default, ([], nothing(known, how)), {"dtype": known.dtype})
        each = self._call(aten.where.self, (hit, self._call(aten.unsqueeze.default, (source, 1)), none))
        most = self._call(getattr(aten, how).default, (each, [-1]))
        return self._call(aten.maximum.default if how == "amax" else aten.minimum.default, (x, most))

    def diagonal(self, x: Node, offset: int, first: int, second: int) -> Node:
        """Of square matrices x [B, n, n] -> [B, n]."""
        known = x.meta["val"]
        assert (offset, first, second, known.ndim) == (0, 1, 2, 3)
        eye = self._call(aten.eye.default, (known.shape[2],), {"dtype": torch.bool})
        none = self._call(aten.full.default, ([], 0), {"dtype": known.dtype})
        return self._call(aten.sum.dim_IntList, (self._call(aten.where.self, (eye, x, none)), [2]))


def nothing(like: Tensor, how: str) -> float:
    """What is never the largest (``amax``), or never the smallest, of numbers of a tensor's type."""
    sign = -1 if how == "amax" else 1
    return sign * (math.inf if like.is_floating_point() else torch.iinfo(like.dtype).max)


RULES: dict[Any, Callable[..., Node]] = {
    aten.__lshift__.Scalar: Parts.shifted_left,
    aten.__rshift__.Scalar: Parts.shifted_right,
    aten.searchsorted.Tensor: Parts.searchsorted,
    aten.scatter_reduce.two: Parts.scatter_reduce,
    aten.diagonal.default: Parts.diagonal,
}


def lower(program: ExportedProgram, lacking: tuple[Any, ...]) -> None:
    """Replace operators of a program, which the engine that it is made for is lacking, by what they are made of."""
    graph = program.graph_module.graph
    for node in [node for node in graph.nodes if node.target in lacking]:
        with graph.inserting_before(node):
            new = RULES[node.target](Parts(graph), *node.args, **node.kwargs)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    program.graph_module.recompile()


def numbers(program: ExportedProgram) -> Iterator[float]:
    """The plain numbers that a program's operators are given."""
    for node in program.graph.nodes:
        yield from (value for value in tree_leaves((node.args, node.kwargs)) if isinstance(value, (int, float)))
