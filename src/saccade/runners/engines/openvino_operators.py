"""Operators of a program in forms that OpenVINO's processor plugin runs faster, and that give the same numbers.

There steps of a slice, and a sum of rows into others, go element by element; a mean over heads, and a length, change
number type or layout twice; and at a small batch each operator takes some microseconds, however little it computes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Graph, Node

from saccade.runners.engines.openvino_orders import Orders, aten

FLAT = (aten.reshape.default, aten.view.default)
HEADS = 8  # whose mean is taken by additions: one operator of the plugin has no more inputs


class Forms(Orders):
    """Writes what one node computes as other nodes, in front of it; None: it is best as it is."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._best: dict[Node, Node] = {}  # of products [B, n, m]: the place [B, 1, n] of each row's largest
        self._sums: dict[Node, tuple[Any, Node, Any]] = {}  # what ``_added`` gave, and of what
        self._split: dict[tuple[Any, ...], list[Node]] = {}  # columns of rows, by the rows and the columns' widths

    def item(self, node: Node, of: Any, index: int) -> Node | None:
        """The values of each row in order, of a sort that gives them and the order; columns that were put together."""
        if not isinstance(of, Node) or of.kwargs:
            return None
        given: Any = of.args
        if of.target is aten.split_with_sizes.default and len(of.args) == 3 and of.args[2] == 2:
            columns = self._columns(given[0], list(given[1]))
            return None if columns is None else columns[index]
        return self.in_order(*given) if of.target is aten.sort.default and index == 0 else None

    def slice(self, node: Node, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Node | None:
        """Rows at every so many places."""
        length = x.meta["val"].shape[dim]
        if step == 1 or not all(isinstance(n, int | None) for n in (length, start, end)):
            return None
        places = range(length)[start:end:step]
        if x.target is aten.slice.Tensor and x.args[1] == dim and len(x.args) == 4 and (x.args[2] or 0) >= 0:
            first = x.args[2] or 0
            places = range(places.start + first, places.stop + first, step)
            x = x.args[0]
        index = self._call(aten.arange.start_step, (places.start, places.stop, places.step))
        return self._call(aten.index_select.default, (x, dim, index))

    def scatter_add(self, node: Node, x: Any, dim: int, index: Any, source: Any) -> Node | None:
        """Rows [B, R, C] added to rows x [B, M, C] at places [B, R], which stand as many times as rows are wide."""
        if x.meta["val"].ndim != 3 or dim != 1 or index.target is not aten.expand_as.default:
            return None
        column: Any = index.args[0]
        if column.target is not aten.unsqueeze.default or column.args[1] not in (2, -1):
            return None
        return self._added(x, column.args[0], source)

    def mean(self, node: Node, x: Any, dims: Any = None, keepdim: bool = False, **more: Any) -> Node | None:
        """The mean over a few heads, x [B, H, N, d] -> [B, N, d].

        Each is halved by a row of numbers first: an operator whose first input is constant copies none of the others.
        """
        known = x.meta["val"]
        if known.ndim != 4 or list(dims or ()) != [1] or keepdim or more or not known.shape[1] <= HEADS:
            return None
        half = self._call(aten.full.default, ([known.shape[3]], 0.5))
        heads = (self._call(aten.select.int, (x, 1, i)) for i in range(known.shape[1]))
        total, *others = (self._call(aten.mul.Tensor, (half, head)) for head in heads)
        for other in others:
            total = self._call(aten.add.Tensor, (total, other))
        return self._call(aten.mul.Tensor, (total, 2 / known.shape[1]))

    def div(self, node: Node, x: Any, length: Any) -> Node | None:
        """Rows brought to length 1, x [..., d], as a norm by root mean square, which is one operator there."""
        norm: Any = length.args[0] if isinstance(length, Node) and length.target is aten.clamp_min.default else None
        if norm is None or norm.target is not aten.linalg_vector_norm.default:
            return None
        (of, *how), least, width = norm.args, float(length.args[1]), x.meta["val"].shape[-1]
        if of is not x or how != [2, [-1], True] or norm.kwargs or not isinstance(width, int):
            return None
        part = x.args[1:] if x.target is aten.slice.Tensor and x.args[1] == 1 and x.meta["val"].ndim == 3 else None
        x = x if part is None else x.args[0]
        square = self._call(aten.mean.dim, (self._call(aten.pow.Tensor_Scalar, (x, 2)), [-1], True))
        inverse = self._call(aten.rsqrt.default, (self._call(aten.add.Tensor, (square, least**2 / width)),))
        scale = self._call(aten.full.default, ([width], width**-0.5))
        whole = self._call(aten.mul.Tensor, (self._call(aten.mul.Tensor, (x, inverse)), scale))
        return whole if part is None else self._call(aten.slice.Tensor, (whole, *part))

    def amax(self, node: Node, x: Any, dims: Any, keepdim: bool = False) -> Node | None:
        """The largest product of each row, x = a @ b [B, n, m] -> [B, n], where its place is asked for too.

        One operator gives both, and compares whole rows of the other product, b' @ a'.
        """
        if x.target is not aten.matmul.default or list(dims) != [-1] or keepdim or x.meta["val"].ndim != 3:
            return None
        if not any(user.target is aten.argmax.default for rows in _rows_of(x) for user in rows.users):
            return None
        turned = [y.args[0] if y.target is aten.mT.default else self._call(aten.mT.default, (y,)) for y in x.args]
        found = self._call(aten.topk.default, (self._call(aten.matmul.default, (turned[1], turned[0])), 1, 1))
        self._best[x] = self._call(operator.getitem, (found, 1))
        return self._call(aten.squeeze.dim, (self._call(operator.getitem, (found, 0)), 1))

    def argmax(self, node: Node, x: Any, dim: Any = None, keepdim: bool = False) -> Node | None:
        """The place of the largest of some rows of products, whose places ``amax`` knows; of equals the first."""
        if x.target is not aten.embedding.default or dim not in (-1, 2) or keepdim:
            return None
        of, index = x.args
        best = self._best.get(of.args[0]) if of.target in FLAT else None
        if best is None:
            return None
        flat = self._call(aten.reshape.default, (best, [-1, 1]))
        return self._call(aten.squeeze.dim, (self._call(aten.embedding.default, (flat, index)), 2))

    def _added(self, x: Any, places: Node, source: Any) -> Node:
        """Rows [B, R, C] added to rows x [B, M, C] at places [B, R]."""
        images = self._call(aten.arange.default, (self._call(aten.sym_size.int, (x, 0)),))
        images = self._call(aten.unsqueeze.default, (images, 1))
        new = self._call(aten.index_put.default, (x, [images, places], source, True))
        self._sums[new] = x, places, source
        return new

    def _columns(self, x: Any, widths: list[int]) -> list[Node] | None:
        """The columns that rows x [..., C] were put together from, moved and added by themselves; None: of no such."""
        key = (x, *widths)
        if key not in self._split:
            found = self._separated(x, widths)
            if found is None:
                return None
            self._split[key] = found
        return self._split[key]

    def _separated(self, x: Any, widths: list[int]) -> list[Node] | None:
        """``_columns``, one step back."""
        if x in self._sums:
            kept, places, source = self._sums[x]
            of, more = self._columns(kept, widths), self._columns(source, widths)
            if of is None or more is None:
                return None
            return [self._added(a, places, b) for a, b in zip(of, more, strict=True)]
        if x.target is aten.cat.default:
            parts, known = x.args[0], [y.meta["val"].shape[-1] for y in x.args[0]]
            return list(parts) if x.args[1:] == (2,) and known == widths else None
        if x.target in FLAT and len(x.args[1]) == 2:
            of = self._columns(x.args[0], widths)
            return of and [self._call(x.target, (y, [-1, w])) for y, w in zip(of, widths, strict=True)]
        if x.target is aten.embedding.default:
            of = self._columns(x.args[0], widths)
            return of and [self._call(x.target, (y, x.args[1])) for y in of]
        if x.target is operator.getitem and x.args[0].target is aten.split_with_sizes.default:
            whole, sizes, dim = x.args[0].args
            of = self._columns(whole, widths) if dim == 1 else None
            split = of and [self._call(aten.split_with_sizes.default, (y, sizes, 1)) for y in of]
            return split and [self._call(operator.getitem, (y, x.args[1])) for y in split]
        return None


def _rows_of(x: Any) -> list[Node]:
    """Rows that are taken of x [B, n, m], laid out as [B * n, m]."""
    flat = [user for user in x.users if user.target in FLAT and len(user.args[1]) == 2]
    return [rows for node in flat for rows in node.users if rows.target is aten.embedding.default]


FORMS: dict[Any, Callable[..., Node | None]] = {
    aten.argsort.stable: Forms.argsort,
    operator.getitem: Forms.item,
    aten.slice.Tensor: Forms.slice,
    aten.scatter_add.default: Forms.scatter_add,
    aten.mean.dim: Forms.mean,
    aten.div.Tensor: Forms.div,
    aten.amax.default: Forms.amax,
    aten.argmax.default: Forms.argmax,
}


def quicken(program: ExportedProgram) -> None:
    """Give the operators of a program, as far as there are some, their faster forms."""
    graph = program.graph_module.graph
    for node in [node for node in graph.nodes if node.target is aten.slice.Tensor and _takes_all(*node.args)]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    forms = Forms(graph)
    for node in [node for node in graph.nodes if node.target in FORMS]:
        with graph.inserting_before(node):
            new = FORMS[node.target](forms, node, *node.args, **node.kwargs)
        if new is not None:
            new.meta = new.meta or dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _takes_all(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> bool:
    return start in (None, 0) and (end is None or end == 2**63 - 1) and step == 1
