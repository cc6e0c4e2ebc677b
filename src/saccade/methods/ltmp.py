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
from saccade.core.merging import rows
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.record import Trace
from saccade.core.reduction import Merge as Merged
from saccade.core.reduction import Reduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import blocks, fraction
from saccade.methods.common.budget import aim
from saccade.methods.common.matching import alternating, cosines
from saccade.methods.common.sampling import keep_where, present, there, with_best

WIDTH = 0.1  # of the sigmoid whose gradient the thresholds get, as published
PARTS = "ltmp.parts"  # in ``Tokens.state``: attention that each cell's token received before this block merged, [B, G]


class Merge(Reducer):
    """Merge the tokens of A into their most similar ones of B, where they are similar enough (ToMe's matching).

    Padding and what is dropped already have no place in the order, so that masked and ragged execution agree.
    """

    read = frozenset({"key", "attn_received"})
    ragged = True
    part = "merge"

    def __init__(self, start: float, width: int) -> None:
        super().__init__()
        self.width = width
        self.threshold = nn.Parameter(torch.full((1,), start, dtype=torch.float32))

    def count(self, n: int) -> int | None:
        return None

    def macs(self, n: int) -> int:
        return (n // 2) * (n - n // 2) * self.width

    def forward(self, tokens: Tokens) -> Reduction | None:
        if tokens.num_patches < 2:
            return None
        key, here = tokens.reading("key"), present(tokens)
        order = here.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        a, b = (order[:, first::2] for first in alternating(tokens.num_prefix))
        asks, answers = here.gather(1, a), here.gather(1, b)
        best, partner = cosines(rows(key, a), rows(key, b), (asks, answers)).max(dim=-1)
        limit = self.threshold.float()
        limit = limit + (limit.clamp(0, 1) - limit).detach()  # outside it has a gradient still, and so a way back
        moved = straight_through((best.masked_fill(~asks, -torch.inf) - limit) / WIDTH)
        gate = torch.ones_like(here, dtype=moved.dtype).scatter(1, a, 1 - moved)
        chosen, order = here & (gate > 0), torch.cat([a, b], dim=1)
        slots = chosen.gather(1, order).cumsum(1) - 1
        dst = slots[:, a.shape[1] :].gather(1, partner).clamp(min=0)
        kept = keep_where(chosen, gate if self.training else None, order)
        parts = tokens.reading("attn_received").detach().gather(1, tokens.owner.clamp(min=0))
        return replace(kept, merge=Merged(a, dst, gate=moved), state={PARTS: parts})


class Prune(Reducer):
    """Drop the tokens that receive less attention than a share of the mean over tokens.

    Of a token that this block merged the part counts that received most.
    """

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
        score = there(tokens, self._received(tokens).float() * count)  # 1 on average over all tokens
        gate = with_best(straight_through((score - self.threshold.float()) / WIDTH), score)
        return replace(keep_where(gate > 0, gate if self.training else None), state={PARTS: None})

    @torch.no_grad()
    def _received(self, tokens: Tokens) -> Tensor:
        received, parts = tokens.reading("attn_received"), tokens.state.get(PARTS)
        if parts is None:
            return received
        n = tokens.num_patches
        least = received.new_full((received.shape[0], n + 1), -torch.inf)  # dropped cells go to the front
        return least.scatter_reduce(1, tokens.owner + 1, parts, "amax")[:, 1:]


class Thresholds(Method):
    """Learns what costs a share of the MACs."""

    def __init__(
        self, steps: Iterable[tuple[int, Reducer]], share: float, weight: float, gmacs: float | None = None
    ) -> None:
        super().__init__(steps)
        self.share, self.weight, self.gmacs = share, weight, gmacs

    def loss(self, trace: Trace) -> dict[str, Tensor]:
        """``weight`` times (share of the MACs that is wanted - share aimed at)² (paper, eq. 9); with ``gmacs`` that of
        them in the MACs of all tokens."""
        if trace.images == 0 or all(block.kept is None for block in trace.blocks):
            return {}
        whole = trace.macs(nominal=True).mean()
        share = self.share if self.gmacs is None else self.gmacs * 1e9 / whole
        return {"budget": (self.weight * (trace.target_macs().mean() / whole - share).square()).float()}


# No menu: untrained, it keeps nearly everything. `tune` tries the settings that weights were trained for.
@register("ltmp", sources={"code": "share weight merge"})
def ltmp(
    backbone: Backbone,
    share: float = 0.75,
    at: int | Iterable[int] | None = None,
    weight: float = 10.0,
    start: float = 0.1,
    merge: float | None = 0.9,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Merge what is similar, drop what is not attended to, by learned thresholds (LTMP, TMLR 2023); to be trained.

    Args:
        share: of the MACs of the dense model that training aims at.
        at: 0-based blocks that merge and drop; None: all, but the last where only the class token is read after it.
        weight: of the loss that holds training to the share.
        start: threshold of dropping before anything is learned, as a share of the mean attention that a token receives.
        merge: threshold of merging before anything is learned, a cosine similarity of keys; None: nothing is merged.
        gmacs: what training aims at instead of ``share``, mean 10^9 MACs of an image.
        speed: the same as times fewer MACs.
    """
    if gmacs is not None or speed is not None:
        wanted = aim("ltmp", 1.0, gmacs, speed)
        share = share if speed is None else wanted
    fraction("ltmp", "share", share, 1e-6 if speed else 0.001)
    if isinstance(weight, bool) or not 0 <= weight <= 1e6:
        raise UserError(f"ltmp: weight={weight!r} is not a number from 0 up to a million")
    fraction("ltmp", "start", start)
    if merge is not None:
        fraction("ltmp", "merge", merge)
    default = tuple(range(backbone.depth - (backbone.pool == "token")))
    steps: list[tuple[int, Reducer]] = []
    for i in blocks("ltmp", at, default, backbone.depth):
        if merge is not None:
            steps.append((i, Merge(merge, backbone.head_dim)))
        steps.append((i, Prune(start)))
    return Thresholds(steps, share, weight, gmacs)
