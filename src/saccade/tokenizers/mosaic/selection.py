"""Which nodes of a quadtree are split: the greedy loop as a sort and a cut (Quadformer, arXiv 2304.00287, Algorithm 1).

The paper splits the best node on the frontier, K times. Rank the nodes by score. A node can only be split after all of
its ancestors: the worst one on its path from the root holds it up, then the worst one after that, and so on down to the
node itself. These *bottlenecks* are the distinct suffix minima of the ranks on the path, and the loop splits nodes in
the lexicographic order of these tuples: its K steps are the K largest. The proof is the test against the loop itself.

Ties: of equal scores the coarser node wins, then the first image's, then the upper left one. The same on every device.

Scores are lists over the splittable levels, the coarsest first, of [B, h, w]; NaN counts as the highest. Nodes are
numbered in this order, row by row; S is their number and D that of the levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.constant_cache import constant
from saccade.errors import UserError
from saccade.methods.common.arguments import whole
from saccade.tokenizers.mosaic.geometry import Geometry

BITS = 62  # of an int64 that a key may fill


@dataclass(frozen=True)
class Budget:
    """How many tokens there are: exactly one of the three is given."""

    tokens: int | None  #     in every image
    per_batch: int | None  #  in an image, on average over the batch
    threshold: tuple[float, ...] | None  # what a block must score to be split; blocks of twice the finest size first

    @classmethod
    def of(
        cls, tokens: int | None, per_batch: int | None, threshold: float | tuple[float, ...] | None, levels: int
    ) -> Budget:
        """From the knobs, for so many levels that can be split. UserError unless exactly one makes sense."""
        counts = {"tokens": tokens, "per_batch": per_batch}
        named = [k for k, v in {**counts, "threshold": threshold}.items() if v is not None]
        if len(named) != 1:
            raise UserError(
                f"quadtree: give one of tokens, per_batch and threshold, not {' and '.join(named) or 'none'}"
            )
        for knob, value in counts.items():
            if value is not None:
                whole("quadtree", knob, value, 1, 10**6)
        if threshold is None:
            return cls(tokens, per_batch, None)
        floors = threshold if isinstance(threshold, tuple) else (threshold,) * levels
        if len(floors) != levels or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in floors):
            raise UserError(
                f"quadtree: threshold={threshold!r} is not one number, or {levels}, one a size but the finest"
            )
        return cls(None, None, tuple(map(float, floors)))

    def splits(self, g: Geometry) -> int | None:
        """Splits of every image, where that is known before looking. UserError for a number that cannot be had."""
        if self.tokens is not None:
            return g.splits_for(self.tokens)
        if self.per_batch is not None:
            count = g.splits_for(self.per_batch, "per_batch")
            return count if count in (0, g.splits) else None
        return None if g.splits else 0

    def choose(self, scores: Sequence[Tensor], g: Geometry) -> Tensor:
        """The nodes to split, [B, S] bool."""
        if self.tokens is not None:
            return split_most(scores, g.splits_for(self.tokens))
        if self.per_batch is not None:
            return split_shared(scores, g.splits_for(self.per_batch, "per_batch") * scores[0].shape[0])
        assert self.threshold is not None
        return split_above(scores, [self.threshold[level - 1] for level in g.splittable])


def split_most(scores: Sequence[Tensor], count: int) -> Tensor:
    """The ``count`` first splits of every image, [B, S] bool. No loop over splits, no host sync."""
    return _largest(expansion_key(scores), count)


def split_shared(scores: Sequence[Tensor], count: int) -> Tensor:
    """The ``count`` first splits of the whole batch, wherever they fall, [B, S] bool."""
    key = expansion_key(scores, shared=True)
    images, nodes = key[0].shape
    return _largest([part.reshape(1, -1) for part in key], count).view(images, nodes)


def split_above(scores: Sequence[Tensor], floors: Sequence[float]) -> Tensor:
    """Nodes that score at least their level's floor, as do all their ancestors, [B, S] bool (APT, arXiv 2510.18091).

    These are the nodes whose worst bottleneck is not below the floor: the same order, cut at a value.
    """
    passed = torch.cat([(~(score < floor)).flatten(1) for score, floor in zip(scores, floors, strict=True)], dim=1)
    return over_path(F.pad(passed, (0, 1), value=True), scores).all(1)


def over_path(values: Tensor, scores: Sequence[Tensor]) -> Tensor:
    """Values of nodes, and one for no node, [B, S + 1] -> those of every node's path, itself last, [B, D, S]."""
    paths = _paths(tuple((s.shape[1], s.shape[2]) for s in scores), values.device)  # [D, S]
    return values.gather(1, paths.reshape(1, -1).expand(values.shape[0], -1)).unflatten(1, paths.shape)


def expansion_key(scores: Sequence[Tensor], *, shared: bool = False) -> list[Tensor]:
    """Bottlenecks of every node, the worst first: D ranks [B, S] int64, a better one for each that a node lacks.

    Args:
        shared: rank the nodes of all images together, else those of each image by themselves.
    """
    flat = torch.cat([score.flatten(1) for score in scores], dim=1)
    images, nodes = flat.shape
    rows = flat.reshape(1, -1) if shared else flat
    if shared and images > 1:  # of equal scores, coarse nodes of all images come before fine ones of any
        level = _levels(tuple(s.shape[1] * s.shape[2] for s in scores), flat.device).expand(images, -1).reshape(1, -1)
        order = level.argsort(dim=1, stable=True)
        order = order.gather(1, rows.gather(1, order).argsort(dim=1, descending=True, stable=True))
    else:
        order = rows.argsort(dim=1, descending=True, stable=True)
    best = rows.shape[1]  # ranks count up to here; a node that is not there is better than all
    places = torch.arange(best - 1, -1, -1, device=flat.device).expand_as(order)
    rank = torch.full((rows.shape[0], best + 1), best, device=flat.device).scatter(1, order, places)
    if shared:
        rank = F.pad(rank[:, :best].reshape(images, nodes), (0, 1), value=best)
    path = over_path(rank, scores).unbind(1)

    key = [path[0]]
    for own in path[1:]:  # what is better than this node holds nothing up any more
        key = [torch.minimum(k, own) for k in key] + [own]
        key = key[:1] + [torch.where(b == a, best, b) for a, b in pairwise(key)]
    return key


def _largest(key: list[Tensor], count: int) -> Tensor:
    """The ``count`` largest tuples of each row, D times [B, S] -> [B, S] bool. All tuples of a row differ."""
    images, nodes = key[0].shape
    width = nodes.bit_length()
    together = max(1, BITS // width)  # ranks that fit into one integer
    packed = []
    for start in range(0, len(key), together):
        whole = key[start]
        for part in key[start + 1 : start + together]:
            whole = (whole << width) | part
        packed.append(whole)
    if len(packed) == 1:
        chosen = packed[0].topk(count, dim=1, sorted=False).indices
    else:  # the least significant first, so that stable sorts add up
        order = packed.pop().argsort(dim=1, descending=True, stable=True)
        for whole in reversed(packed):
            order = order.gather(1, whole.gather(1, order).argsort(dim=1, descending=True, stable=True))
        chosen = order[:, :count]
    return torch.zeros(images, nodes, dtype=torch.bool, device=chosen.device).scatter(1, chosen, True)


# --- tables: node -> nodes ------------------------------------------------------------------------------------------


@constant
def _paths(shapes: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Ancestor of every node at every level, itself at its own and S at finer ones and where there is none, [D, S].

    Turned round for every node, so that it stands last: a path without an ancestor begins with S.
    """
    nodes = sum(h * w for h, w in shapes)
    starts = np.cumsum([0, *(h * w for h, w in shapes)])
    found = np.full((len(shapes), nodes), nodes, dtype=np.int64)
    for level, (h, w) in enumerate(shapes):
        y, x = (a.reshape(-1) for a in np.meshgrid(np.arange(h), np.arange(w), indexing="ij"))
        for up in range(level + 1):
            (ph, pw), row = shapes[level - up], len(shapes) - 1 - up
            there = ((y >> up) < ph) & ((x >> up) < pw)
            number = starts[level - up] + (y >> up) * pw + (x >> up)
            found[row, starts[level] : starts[level + 1]] = np.where(there, number, nodes)
    return found


@constant
def _levels(counts: tuple[int, ...]) -> np.ndarray:
    """Level of every node, the coarsest 0, [S]."""
    return np.repeat(np.arange(len(counts)), counts)
