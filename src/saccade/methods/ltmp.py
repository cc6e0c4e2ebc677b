"""``ltmp``: two thresholds for each block, learned: merge above the one, drop below the other (LTMP, TMLR 2023).

Bonnaerens and Dambre merge the pairs whose keys are more similar than a threshold, then drop the tokens that receive
less attention than another, both between attention and MLP. As many tokens stay as an image needs, and a batch of
several images is packed, where the paper's runs one by one. Here importance is a share of the mean over tokens, so that
one threshold means the same in a long and in a short sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from saccade.core.gates import straight_through
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.record import Trace
from saccade.core.reduction import Merge as Merged
from saccade.core.reduction import Reduction, rows
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import blocks, fraction
from saccade.methods.common.matching import cosines
from saccade.methods.common.sampling import keep_where, present, there, with_best

WIDTH = 0.1  # of the sigmoid whose gradient the thresholds get, as published
STRIDES = (1, 2, 4)  # of the places that A and B take turns in, block after block: what ToMe's reordering comes to


class Merge(Reducer):
    """Merge the tokens of A into their most similar ones of B, where they are similar enough (ToMe's matching).

    Padding and what is dropped already have no place in the order, so that masked and ragged execution agree.
    """

    read = frozenset({"key"})
    ragged = True
    part = "merge"

    def __init__(self, start: float, stride: int, width: int) -> None:
        super().__init__()
        self.stride, self.width = stride, width
        self.threshold = nn.Parameter(torch.full((1,), start, dtype=torch.float32))

    def sides(self, n: int) -> tuple[list[int], list[int]]:
        """Places of A and of B among n."""
        odd = [i // self.stride % 2 for i in range(n)]
        return [i for i in range(n) if not odd[i]], [i for i in range(n) if odd[i]]

    def count(self, n: int) -> int | None:
        return None

    def macs(self, n: int) -> int:
        a, b = self.sides(n)
        return len(a) * len(b) * self.width

    def forward(self, tokens: Tokens) -> Reduction | None:
        key = tokens.reading("key")
        side_a, side_b = self.sides(tokens.num_patches)
        if not side_b:
            return None
        here = present(tokens)
        order = here.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        a, b = order[:, side_a], order[:, side_b]
        asks, answers = here.gather(1, a), here.gather(1, b)
        best, partner = cosines(rows(key, a), rows(key, b), (asks, answers)).max(dim=-1)
        limit = self.threshold.float()
        limit = limit + (limit.clamp(0, 1) - limit).detach()  # outside it has a gradient still, and so a way back
        moved = straight_through((best.masked_fill(~asks, -torch.inf) - limit) / WIDTH)
        gate = torch.ones_like(here, dtype=moved.dtype).scatter(1, a, 1 - moved)
        chosen = here & (gate > 0)
        into = b.gather(1, partner)
        dst = (chosen.cumsum(1) - 1).gather(1, into).clamp(min=0)
        kept = keep_where(chosen, gate if self.training else None)
        return replace(kept, merge=Merged(a, dst, gate=moved))


class Prune(Reducer):
    """Drop the tokens that receive less attention than a share of the mean over tokens."""

    read = frozenset({"attn_received"})
    ragged = True
    part = "prune"

    def __init__(self, start: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.full((1,), start, dtype=torch.float32))

    def count(self, n: int) -> int | None:
        return None

    def forward(self, tokens: Tokens) -> Reduction:
        count = tokens.num_prefix + present(tokens).sum(1, keepdim=True)
        score = there(tokens, tokens.reading("attn_received").detach().float() * count)  # 1 on average over all tokens
        gate = with_best(straight_through((score - self.threshold.float()) / WIDTH), score)
        return keep_where(gate > 0, gate if self.training else None)


class Thresholds(Method):
    """Learns what costs a share of the MACs."""

    def __init__(self, steps: Iterable[tuple[int, Reducer]], share: float, weight: float) -> None:
        super().__init__(steps)
        self.share, self.weight = share, weight

    def loss(self, trace: Trace) -> dict[str, Tensor]:
        """``weight`` times (share of the MACs that is wanted - share aimed at)² (paper, eq. 9)."""
        if trace.images == 0 or all(block.kept is None for block in trace.blocks):
            return {}
        ratio = trace.target_macs().mean() / trace.macs(nominal=True).mean()
        return {"budget": (self.weight * (ratio - self.share).square()).float()}


# No menu: untrained, it keeps nearly everything. `tune` tries the settings that weights were trained for.
@register("ltmp")
def ltmp(
    backbone: Backbone,
    share: float = 0.75,
    at: int | Iterable[int] | None = None,
    weight: float = 10.0,
    start: float = 0.1,
    merge: float | None = 0.9,
) -> Method:
    """Merge what is similar, drop what is not attended to, by learned thresholds (LTMP, TMLR 2023); to be trained.

    Args:
        share: of the MACs of the dense model that training aims at.
        at: 0-based blocks that merge and drop; None: all, but the last where only the class token is read after it.
        weight: of the loss that holds training to the share.
        start: threshold of dropping before anything is learned, as a share of the mean attention that a token receives.
        merge: threshold of merging before anything is learned, a cosine similarity of keys; None: nothing is merged.
    """
    share = fraction("ltmp", "share", share, 0.001)
    if isinstance(weight, bool) or not 0 <= weight <= 1e6:
        raise UserError(f"ltmp: weight={weight!r} is not a number from 0 up to a million")
    fraction("ltmp", "start", start)
    if merge is not None:
        fraction("ltmp", "merge", merge)
    default = tuple(range(backbone.depth - (backbone.pool == "token")))
    steps: list[tuple[int, Reducer]] = []
    for i in blocks("ltmp", at, default, backbone.depth):
        if merge is not None:
            steps.append((i, Merge(merge, STRIDES[i % len(STRIDES)], backbone.head_dim)))
        steps.append((i, Prune(start)))
    return Thresholds(steps, share, weight)
