"""Operators of a program in forms that OpenVINO's processor plugin runs faster, and that give the same numbers.

There a sort of a few hundred scores takes as long as a matrix product of a small model's block; steps of a slice, and a
sum of rows into others, go element by element; a mean over heads, and a length, change number type or layout twice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

aten = torch.ops.aten

PAIRS = 2**19  # of a row's values, up to which they are all compared to rank them
HEADS = 8  # whose mean is taken by additions: one operator of the plugin has no more inputs


class Forms:
    """Writes what one node computes as other nodes, in front of it; None: it is best as it is."""

    def __init__(self, graph: Graph) -> None:
        self._call = graph.call_function

    def argsort(self, x: Node, *, dim: int = -1, descending: bool = False, **_: Any) -> Node | None:
        """The order of each row, x [B, n]; of equals the first comes first."""
        if not _sorted_here(x, dim):
            return None
        rank, places = self._rank(x, descending), self._call(aten.arange.default, (x.meta["val"].shape[1],))
        places = self._call(aten.unsqueeze.default, (places, 0))
        return self._placed(rank, self._call(aten.expand_as.default, (places, rank)))

    def item(self, of: Any, index: int) -> Node | None:
        """The values of each row in order, of a sort that gives them and the order."""
        if not isinstance(of, Node) or of.target is not aten.sort.default or index != 0 or of.kwargs:
            return None
        x, dim, descending = (*of.args, -1, False)[:3] if len(of.args) != 2 else (*of.args, False)
        if not isinstance(x, Node) or not _sorted_here(x, dim):
            return None
        return self._placed(self._rank(x, bool(descending)), x)

    def slice(self, x: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Node | None:
        """Rows at every so many places."""
        length = x.meta["val"].shape[dim]
        if step == 1 or not all(isinstance(n, int | None) for n in (length, start, end)):
            return None
        places = range(length)[start:end:step]
        index = self._call(aten.arange.start_step, (places.start, places.stop, places.step))
        return self._call(aten.index_select.default, (x, dim, index))

    def scatter_add(self, x: Node, dim: int, index: Node, source: Node) -> Node | None:
        """Rows [B, R, C] added to rows x [B, M, C] at places [B, R], which stand as many times as rows are wide."""
        if x.meta["val"].ndim != 3 or dim != 1 or index.target is not aten.expand_as.default:
            return None
        column = index.args[0]
        if not isinstance(column, Node) or column.target is not aten.unsqueeze.default or column.args[1] not in (2, -1):
            return None
        images = self._call(aten.arange.default, (self._call(aten.sym_size.int, (x, 0)),))
        images = self._call(aten.unsqueeze.default, (images, 1))
        return self._call(aten.index_put.default, (x, [images, column.args[0]], source, True))

    def mean(self, x: Node, dims: Any = None, keepdim: bool = False, **more: Any) -> Node | None:
        """The mean over a few heads, x [B, H, N, d] -> [B, N, d]."""
        known = x.meta["val"]
        if known.ndim != 4 or list(dims or ()) != [1] or keepdim or more or not known.shape[1] <= HEADS:
            return None
        total, *heads = (self._call(aten.select.int, (x, 1, i)) for i in range(known.shape[1]))
        for head in heads:
            total = self._call(aten.add.Tensor, (total, head))
        return self._call(aten.mul.Tensor, (total, 1 / known.shape[1]))

    def div(self, x: Node, length: Any) -> Node | None:
        """Rows brought to length 1, x [..., d], as a norm by root mean square, which is one operator there."""
        norm = length.args[0] if isinstance(length, Node) and length.target is aten.clamp_min.default else None
        if not isinstance(norm, Node) or norm.target is not aten.linalg_vector_norm.default:
            return None
        (of, *how), least, width = norm.args, float(length.args[1]), x.meta["val"].shape[-1]  # type: ignore[union-attr]
        if of is not x or how != [2, [-1], True] or norm.kwargs or not isinstance(width, int):
            return None
        square = self._call(aten.mean.dim, (self._call(aten.pow.Tensor_Scalar, (x, 2)), [-1], True))
        inverse = self._call(aten.rsqrt.default, (self._call(aten.add.Tensor, (square, least**2 / width)),))
        scale = self._call(aten.full.default, ([width], width**-0.5))
        return self._call(aten.mul.Tensor, (self._call(aten.mul.Tensor, (x, inverse)), scale))

    def _rank(self, x: Node, descending: bool) -> Node:
        """How many of its row come before each value: x [B, n] -> [B, n]."""
        own, other = self._call(aten.unsqueeze.default, (x, 2)), self._call(aten.unsqueeze.default, (x, 1))
        places = self._call(aten.arange.default, (x.meta["val"].shape[1],))
        row, column = (self._call(aten.unsqueeze.default, (places, axis)) for axis in (0, 1))
        ahead, level = (aten.gt.Tensor, aten.ge.Tensor) if descending else (aten.lt.Tensor, aten.le.Tensor)
        parts = (self._call(level, (other, own)), self._call(ahead, (other, own)))
        before = self._call(aten.where.self, (self._call(aten.lt.Tensor, (row, column)), *parts))
        return self._call(aten.sum.dim_IntList, (before, [2]))

    def _placed(self, rank: Node, values: Node) -> Node:
        """Values [B, n] at their ranks."""
        return self._call(aten.scatter.src, (self._call(aten.zeros_like.default, (values,)), 1, rank, values))


FORMS: dict[Any, Callable[..., Node | None]] = {
    aten.argsort.stable: Forms.argsort,
    operator.getitem: Forms.item,
    aten.slice.Tensor: Forms.slice,
    aten.scatter_add.default: Forms.scatter_add,
    aten.mean.dim: Forms.mean,
    aten.div.Tensor: Forms.div,
}


def quicken(program: ExportedProgram) -> None:
    """Give the operators of a program, as far as there are some, their faster forms."""
    graph = program.graph_module.graph
    for node in [node for node in graph.nodes if node.target in FORMS]:
        with graph.inserting_before(node):
            new = FORMS[node.target](Forms(graph), *node.args, **node.kwargs)
        if new is not None:
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _sorted_here(x: Node, dim: Any) -> bool:
    """Whether rows x [B, n] are sorted, and all their pairs few enough to be compared."""
    known = x.meta["val"]
    few = known.ndim == 2 and isinstance(known.shape[1], int) and known.shape[1] ** 2 <= PAIRS
    return few and dim in (1, -1)
