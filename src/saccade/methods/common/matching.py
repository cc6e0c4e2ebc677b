"""Decisions that several methods share: keep the best of a score, and pair the most similar tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from saccade.core.constant_cache import constant
from saccade.core.merging import Merge, rows
from saccade.core.plan import Backbone, Reducer
from saccade.core.reduction import Fuse, Reduction
from saccade.core.softmax import masked_softmax
from saccade.core.tokens import Tokens
from saccade.errors import UserError

SCORES = {"class": "cls_attn", "received": "attn_received"}
METRICS = ("key", "x")


def check_score(method: str, score: str, backbone: Backbone) -> str:
    """The reading behind a ``score`` knob; UserError where the model has no class token to ask."""
    if score not in SCORES:
        raise UserError(f"{method}: score={score!r} is not one of {', '.join(SCORES)}")
    if score == "class" and not backbone.has_class_token:
        raise UserError(f"{method} needs class attention and this model has no class token: add score='received'")
    return SCORES[score]


def ceil_share(share: float, n: int) -> int:
    """⌈share · n⌉, at least 1; rounded first, so that 0.55 of 100 is 55 and not 56."""
    return max(1, math.ceil(round(share * n, 9)))


def floor_share(share: float, n: int) -> int:
    """⌊share · n⌋; rounded first, so that 0.29 of 100 is 29 and not 28."""
    return math.floor(round(share * n, 9))


def scramble(x: Tensor, seed: int) -> Tensor:
    """A 32-bit integer hash (murmur3's finaliser): the same on every device and in an exported graph."""
    x = (x + 1) * 0x9E3779B1 + seed * 0x85EBCA77 & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return x ^ (x >> 16)


@constant
def scrambled(n: int, seed: int) -> Tensor:
    """``scramble`` of 0 … n - 1: a constant of a graph, as not every engine has numbers of 64 bits."""
    return scramble(torch.arange(n), seed)


class KeepAttended(Reducer):
    """Keep the ⌈keep · n⌉ tokens of the highest attention; the rest are dropped, or fused into one new token."""

    def __init__(self, keep: float, reading: str, fuse: bool = False) -> None:
        super().__init__()
        self.keep, self.reading, self.fuse = keep, reading, fuse
        self.read = frozenset({reading})

    def count(self, n: int) -> int:
        return min(n, ceil_share(self.keep, n) + self.fuse)  # fusing a single token would change nothing

    def forward(self, tokens: Tokens) -> Reduction:
        score = tokens.reading(self.reading)
        seen = score if tokens.valid is None else score.masked_fill(~tokens.valid, -1.0)
        order = seen.argsort(dim=1, descending=True, stable=True)
        kept = ceil_share(self.keep, tokens.num_patches)
        keep = order[:, :kept].sort(dim=1).values
        if not self.fuse:
            return Reduction(keep)
        rest = order[:, kept:]
        return Reduction(keep, fuse=Fuse(rest, score.gather(1, rest)))


def alternating(prefix: int) -> tuple[int, int]:
    """The first patch token of A and of B, the even and the odd places of a sequence that prefix tokens lead (ToMe).

    After a merge the order is [A by place | B by place], of what is left, so that the next block pairs others.
    """
    return prefix % 2, 1 - prefix % 2


class BipartiteMerge(Reducer):
    """Alternate tokens into A and B; each A token proposes its most similar B token; the best r proposals merge.

    ToMe's bipartite soft matching (arXiv 2210.09461, §3.1), which several methods build on.
    """

    def __init__(self, r: int, width: int, metric: str = "key", proportional: bool = True) -> None:
        super().__init__()
        self.r, self.width, self.metric, self.proportional = r, width, metric, proportional
        self.read = frozenset({"key"} if metric == "key" else ())

    def count(self, n: int) -> int:
        return n - min(self.r, n // 2)

    def macs(self, n: int) -> int:
        return (n // 2) * (n - n // 2) * self.width

    def forward(self, tokens: Tokens) -> Reduction:
        n, prefix, feature = tokens.num_patches, tokens.num_prefix, units(feature_of(tokens, self.metric))
        # A are the even places of the whole sequence, prefix included, as in the paper; then the new order is [A | B],
        # so that the next block pairs other tokens.
        first_a, first_b = alternating(prefix)
        valid = None if tokens.valid is None else (tokens.valid[:, first_a::2], tokens.valid[:, first_b::2])
        similar = products(feature[:, first_a::2], feature[:, first_b::2], valid)
        order, r = similar.amax(-1).argsort(dim=1, descending=True, stable=True), n - self.count(n)
        places = torch.add(_number(first_a, order.device), order, alpha=2)
        merged, unmerged = places.split_with_sizes([r, order.shape[1] - r], dim=1)
        into = rows(similar, order[:, :r]).argmax(-1)  # asked of those alone that merge
        every_b = _every_second(first_b, n, merged.device).expand(merged.shape[0], -1)
        keep = torch.cat([unmerged.sort(dim=1).values, every_b], dim=1)
        return Reduction(keep, Merge(merged, into + unmerged.shape[1], proportional=self.proportional))


@constant
def _number(value: int) -> np.ndarray:
    return np.array(value)


@constant
def _every_second(first: int, n: int) -> np.ndarray:
    return np.arange(first, n, 2)


def feature_of(tokens: Tokens, metric: str) -> Tensor:
    """What similarity is measured on: the mean ``key`` over heads [B, N, d], or the features ``x`` [B, N, D]."""
    return tokens.patches if metric == "x" else tokens.reading("key")


def cosines(a: Tensor, b: Tensor, valid: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Cosine similarities, fp32: a [B, |A|, d], b [B, |B|, d] -> [B, |A|, |B|]; see ``products``.

    A zero feature is similar to nothing (0).
    """
    return products(units(a), units(b), valid)


def units(x: Tensor) -> Tensor:
    """Features [..., d] brought to length 1 in fp32; a zero stays zero. No gradient flows through choices."""
    x = x.detach() if x.requires_grad else x
    x = x if x.dtype == torch.float32 else x.float()
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-6)


def products(a: Tensor, b: Tensor, valid: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Similarities of features that ``units`` gave: a [B, |A|, d], b [B, |B|, d] -> [B, |A|, |B|].

    Padding (where ``valid`` [B, |A|], [B, |B|] is False) is most similar to padding (2) and least to tokens (-2): it is
    merged away first, and with tokens only where nothing else is left.
    """
    similar = a @ b.mT
    if valid is None:
        return similar
    of_a, of_b = valid[0].unsqueeze(2), valid[1].unsqueeze(1)
    return similar.masked_fill(of_a != of_b, -2.0).masked_fill(~(of_a | of_b), 2.0)


def best_proposals(similar: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each token of A proposes its most similar token of B; the r best proposals win; among equals the first of A.

    Args:
        similar: [B, |A|, |B|].

    Returns:
        ranks within A of those that merge [B, r] and of those that do not [B, |A| - r], and the ranks within B that
        the former merge into [B, r].
    """
    order = similar.amax(-1).argsort(dim=1, descending=True, stable=True)
    merged, others = order.split_with_sizes([r, order.shape[1] - r], dim=1)
    return merged, others, rows(similar, merged).argmax(-1)


def best_edges(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """``best_proposals`` by the cosine similarity of features a [B, |A|, d] and b [B, |B|, d]."""
    return best_proposals(cosines(a, b), r)


def leave(n: int, src: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """``keep`` and ``dst`` of a ``Reduction`` in which ``src`` [B, R] merge into tokens ``into`` [B, R] of n.

    All others keep their order: keep [B, n - R], and the places in it of ``into``, which must not be in ``src``.
    """
    gone = torch.zeros(src.shape[0], n, dtype=torch.int64, device=src.device).scatter(1, src, 1)
    keep = gone.argsort(dim=1, stable=True)[:, : n - src.shape[1]]
    return keep, into - gone.cumsum(dim=1).gather(1, into)


def mixture(tokens: Tokens, scores: Tensor) -> Tensor:
    """Weights of a ``SoftReduction``: softmax over tokens of scores [B, N, M] -> [B, M, N] fp32.

    A token counts as often as it does in attention, and padding not at all: what other methods did before is respected.
    """
    scores, bias = scores.float().transpose(1, 2), tokens.key_bias()
    if tokens.keep_mask is not None and tokens.keep_mask.requires_grad:  # dropping is learned
        counts = (tokens if tokens.proportional else replace(tokens, size=None)).weights()
        assert counts is not None
        return masked_softmax(scores, counts.unsqueeze(1))
    return (scores if bias is None else scores + bias[:, None, tokens.num_prefix :]).softmax(-1)
