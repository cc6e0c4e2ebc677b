"""Sorts in forms that OpenVINO's processor plugin runs faster, and that give the same order, equals included.

There a sort of a few hundred scores takes as long as a matrix product of a small model's block.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

PAIRS = 2**19  # of a row's values, up to which they are all compared to rank them
CHOSEN = 2**12  # of a row's values times those that are taken out one by one, up to which that is faster
SLICE, SPLIT = aten.slice.Tensor, aten.split_with_sizes.default


class Orders:
    """Writes what one sort gives as other nodes, in front of it; None: it is best as it is."""

    def __init__(self, graph: Graph) -> None:
        self._call = graph.call_function
        self._in_order: set[Node] = set()  # parts of an order that are sorted already

    def argsort(self, node: Node, x: Any, *, dim: int = -1, descending: bool = False, **_: Any) -> Node | None:
        """The order of each row, x [B, n]; of equals the first comes first."""
        if not _sorted_here(x, dim):
            return None
        parts = Parts.of(node)
        part = None if parts is None else parts.sorted_again()
        length = x.meta["val"].shape[1]
        places: Any = self._call(aten.unsqueeze.default, (self._call(aten.arange.default, (length,)), 0))
        if parts is not None and part is not None and 0 < part.start * length <= CHOSEN:
            self._chosen(x, descending, self._call(aten.expand_as.default, (places, x)), parts, part)
            return None  # nothing is asked of the order itself any more
        rank = self._rank(x, descending)
        if parts is not None and part is not None:
            rank = self._grouped(rank, part)
            self._in_order |= {taken.node for taken in parts.taken if taken.places == part}
        return self._placed(rank, self._call(aten.expand_as.default, (places, rank)))

    def in_order(self, x: Any, dim: int = -1, descending: bool = False) -> Node | None:
        """The values of each row, x [B, n], in order."""
        if not isinstance(x, Node) or not _sorted_here(x, dim):
            return None
        return x if x in self._in_order else self._placed(self._rank(x, descending), x)

    def _rank(self, x: Any, descending: bool) -> Node:
        """How many of its row come before each value: x [B, n] -> [B, n]."""
        own, other = self._call(aten.unsqueeze.default, (x, 2)), self._call(aten.unsqueeze.default, (x, 1))
        places = self._call(aten.arange.default, (x.meta["val"].shape[1],))
        row, column = (self._call(aten.unsqueeze.default, (places, axis)) for axis in (0, 1))
        ahead, level = (aten.gt.Tensor, aten.ge.Tensor) if descending else (aten.lt.Tensor, aten.le.Tensor)
        parts = (self._call(level, (other, own)), self._call(ahead, (other, own)))
        before = self._call(aten.where.self, (self._call(aten.lt.Tensor, (row, column)), *parts))
        return self._call(aten.sum.dim_IntList, (before, [2]))

    def _grouped(self, rank: Node, part: range) -> Node:
        """Ranks [B, n], of which those in a part that begins or ends the row go by place."""
        last = (part.start or part.stop) - 1  # rank before the second part
        second = self._call(aten.clamp.default, (self._call(aten.sub.Tensor, (rank, last)), 0, 1))
        if part.start:
            count = self._call(aten.add.Tensor, (self._call(aten.cumsum.default, (second, 1)), last))
            first = self._call(aten.clamp.default, (rank, None, last))
            return self._call(aten.maximum.default, (self._call(aten.mul.Tensor, (count, second)), first))
        count = self._call(aten.cumsum.default, (self._call(aten.rsub.Scalar, (second, 1)), 1))
        count = self._call(aten.sub.Tensor, (count, 1))
        return self._call(aten.maximum.default, (self._call(aten.mul.Tensor, (rank, second)), count))

    def _placed(self, rank: Node, values: Node) -> Node:
        """Values [B, n] at their ranks."""
        return self._call(aten.scatter.src, (self._call(aten.zeros_like.default, (values,)), 1, rank, values))

    def _chosen(self, x: Any, descending: bool, places: Node, parts: Parts, rest: range) -> None:
        """The few first of each row, x [B, n], and the rest by place, put where an order gave them.

        Args:
            places: 0 to n - 1 of each row, [B, n].
            rest: the places in the order of those that are not among the first.
        """
        first = self._call(operator.getitem, (self._call(aten.topk.default, (x, rest.start, 1, descending)), 1))
        stays = self._call(aten.scatter.value, (self._call(aten.full_like.default, (places, 1)), 1, first, 0))
        slots = self._call(aten.mul.Tensor, (self._call(aten.cumsum.default, (stays, 1)), stays))  # 0: of the first
        length = 1 + len(rest)
        for taken in parts.taken:
            if taken.places == rest:
                none = self._call(aten.zeros_like.default, (self._call(SLICE, (places, 1, 0, length)),))
                whole = self._call(aten.scatter.src, (none, 1, slots, taken.of(self._call, places)))
                new = self._call(operator.getitem, (self._call(SPLIT, (whole, [1, len(rest)], 1)), 1))
                self._in_order.add(new)
            else:
                new = taken.of(self._call, first)
                if taken.places != range(rest.start):
                    new = self._call(SLICE, (new, 1, taken.places.start, taken.places.stop))
            new.meta = new.meta or dict(taken.node.meta)
            taken.node.replace_all_uses_with(new)


@dataclass(frozen=True)
class Taken:
    """A part of an order [B, n], or of a multiple of it to which one number is added."""

    node: Any
    places: range
    sum: Any

    def of(self, call: Any, order: Node) -> Node:
        """What is taken, of other places than those of the order."""
        return order if self.sum is None else call(self.sum.target, (self.sum.args[0], order), self.sum.kwargs)

    @property
    def only_sorted(self) -> bool:
        """Whether it is used in rising order alone."""
        sorts = [u for u in self.node.users if u.target is aten.sort.default and u.args[1:] == (1,) and not u.kwargs]
        values = all(item.args[1] == 0 or not item.users for sort in sorts for item in sort.users)
        return bool(sorts) and len(sorts) == len(self.node.users) and values


@dataclass(frozen=True)
class Parts:
    """All that is taken of an order [B, n]."""

    length: int
    taken: tuple[Taken, ...]

    @classmethod
    def of(cls, order: Node) -> Parts | None:
        """None where more is asked of an order than parts of its rows."""
        length = order.meta["val"].shape[1]
        taken: list[Taken] = []
        users: list[tuple[Any, Any]] = [(user, None) for user in order.users]
        for user, total in users:
            if user.target is aten.add.Tensor and total is None and _is_one(user.args[0]):
                if user.kwargs.get("alpha", 1) <= 0:
                    return None
                users += [(next_user, user) for next_user in user.users]
            elif user.target is SLICE and user.args[1] == 1 and len(user.args) == 4:
                taken.append(Taken(user, range(length)[user.args[2] : user.args[3]], total))
            elif user.target is SPLIT and user.args[2] == 1:
                ends = list(accumulate(user.args[1]))
                places = [range(end - size, end) for end, size in zip(ends, user.args[1], strict=True)]
                taken += [Taken(item, places[item.args[1]], total) for item in user.users]
            else:
                return None
        return cls(length, tuple(taken))

    def sorted_again(self) -> range | None:
        """The part that begins or ends the row and is only asked for in order, by place."""
        again = {taken.places for taken in self.taken if taken.only_sorted}
        if len(again) != 1:
            return None
        (part,) = again
        others = [taken.places for taken in self.taken if not taken.only_sorted]
        apart = all(places.stop <= part.start or part.stop <= places.start for places in others)
        return part if apart and (part.start == 0) != (part.stop == self.length) else None


def _is_one(x: Any) -> bool:
    """Whether it is one number, the same for all, that a program knows from the beginning."""
    return x.op in ("placeholder", "get_attr") and x.meta["val"].numel() == 1 if isinstance(x, Node) else True


def _sorted_here(x: Any, dim: Any) -> bool:
    """Whether rows x [B, n] are sorted, and all their pairs few enough to be compared."""
    known = x.meta["val"]
    few = known.ndim == 2 and isinstance(known.shape[1], int) and known.shape[1] ** 2 <= PAIRS
    return few and dim in (1, -1)
