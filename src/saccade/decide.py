"""Decisions that several methods share: keep the best of a score, and pair the most similar tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.errors import UserError
from saccade.plan import Backbone, Reducer
from saccade.reduction import Reduction
from saccade.tokens import Tokens

SCORES = {"class": "cls_attn", "received": "received"}


def check_score(method: str, score: str, backbone: Backbone) -> str:
    """The reading behind a ``score`` knob; UserError where the model has no class token to ask."""
    if score not in SCORES:
        raise UserError(f"{method}: score={score!r} is not one of {', '.join(SCORES)}")
    if score == "class" and not backbone.has_class_token:
        raise UserError(f"{method} needs class attention and this model has no class token: add score='received'")
    return SCORES[score]


def share_of(share: float, n: int) -> int:
    """⌈share · n⌉, at least 1; rounded first, so that 0.55 of 100 is 55 and not 56."""
    return max(1, math.ceil(round(share * n, 9)))


class KeepAttended(Reducer):
    """Keep the ⌈keep · n⌉ tokens of the highest attention; the rest are dropped, or fused into one new token."""

    def __init__(self, keep: float, reading: str, fuse: bool = False) -> None:
        super().__init__()
        self.keep, self.reading, self.fuse = keep, reading, fuse
        self.read = frozenset({reading})

    def count(self, n: int) -> int:
        return min(n, share_of(self.keep, n) + self.fuse)  # fusing a single token would change nothing

    def forward(self, tokens: Tokens) -> Reduction:
        score: Tensor = getattr(tokens, self.reading)
        seen = score if tokens.valid is None else score.masked_fill(~tokens.valid, -1.0)
        order = seen.detach().argsort(dim=1, descending=True, stable=True)
        kept = share_of(self.keep, tokens.num_patches)
        keep, rest = order[:, :kept].sort(dim=1).values, order[:, kept:]
        return Reduction(keep, rest=rest, rest_weight=score.gather(1, rest)) if self.fuse else Reduction(keep)


def best_edges(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each token of A proposes its most similar token of B; the r best proposals win (ToMe §3.1).

    Cosine similarity in fp32; a zero feature is similar to nothing (0); among equals the first of A wins. No gradient
    flows through the choice.

    Args:
        a: features [B, |A|, d]; b: features [B, |B|, d].

    Returns:
        ranks within A of those that merge [B, r] and of those that do not [B, |A| - r], and the ranks within B that
        the former merge into [B, r].
    """
    with torch.no_grad():
        a, b = (F.normalize(x.float(), dim=-1, eps=1e-6) for x in (a, b))
        best, partner = (a @ b.transpose(1, 2)).max(dim=-1)  # [B, |A|]
        order = best.argsort(dim=1, descending=True, stable=True)
        merged = order[:, :r]
        return merged, order[:, r:], partner.gather(1, merged)
