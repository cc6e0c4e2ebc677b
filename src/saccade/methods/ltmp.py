"""``ltmp``: one threshold for each block, learned, below which tokens are dropped (LTMP, TMLR 2023).

Bonnaerens and Dambre learn two thresholds a block, one for merging and one for pruning; this is the one for pruning. As
many tokens stay as an image needs, and a batch of several images is packed, where the paper's runs one by one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from saccade.choose import keep_where, there, with_best
from saccade.errors import UserError
from saccade.gates import straight_through
from saccade.plan import Backbone, Method, Reducer, blocks, fraction, register
from saccade.reduction import Reduction
from saccade.tokens import Tokens
from saccade.trace import Trace

WIDTH = 0.1  # of the sigmoid whose gradient the threshold gets, as published


class Prune(Reducer):
    """Drop the tokens that receive less attention than a share of the mean over tokens."""

    read = frozenset({"received"})

    def __init__(self, start: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.full((1,), start))

    def count(self, n: int) -> int | None:
        return None

    def forward(self, tokens: Tokens) -> Reduction:
        assert tokens.received is not None
        present = tokens.valid if tokens.alive is None else tokens.alive > 0
        count = tokens.num_patches if present is None else present.sum(1, keepdim=True)
        received = tokens.received.detach().float() * (tokens.num_prefix + count)  # 1 on average over all tokens
        score = there(tokens, received)
        gate = with_best(straight_through((score - self.threshold.float()) / WIDTH), score)
        if not self.training:
            return keep_where(gate > 0)
        every = torch.arange(tokens.num_patches, device=score.device).expand(len(score), -1)
        return Reduction(every, gate=gate)


class Thresholds(Method):
    """Learns what costs a share of the MACs."""

    def __init__(self, steps: Iterable[tuple[int, Reducer]], share: float, weight: float) -> None:
        super().__init__(steps)
        self.share, self.weight = share, weight

    def loss(self, trace: Trace) -> dict[str, Tensor]:
        """``weight`` times (share of the MACs that is wanted - share aimed at)² (paper, eq. 9)."""
        if trace.images == 0 or all(block.kept is None for block in trace.blocks):
            return {}
        ratio = trace.wanted().mean() / trace.macs(nominal=True).mean()
        return {"budget": (self.weight * (ratio - self.share).square()).float()}


# No menu: untrained, it keeps nearly everything. `tune` tries the settings that weights were trained for.
@register("ltmp")
def ltmp(
    backbone: Backbone,
    share: float = 0.75,
    at: int | Iterable[int] | None = None,
    weight: float = 10.0,
    start: float = 0.1,
) -> Method:
    """Drop tokens that receive less attention than a learned threshold (LTMP, TMLR 2023); it has to be trained.

    Args:
        share: of the MACs of the dense model that training aims at.
        at: 0-based blocks that drop; None: all, but the last where only the class token is read after it.
        weight: of the loss that holds training to the share.
        start: threshold before anything is learned, as a share of the mean attention that a token receives.
    """
    share = fraction("ltmp", "share", share, 0.001)
    if isinstance(weight, bool) or not 0 <= weight <= 1e6:
        raise UserError(f"ltmp: weight={weight!r} is not a number from 0 up to a million")
    fraction("ltmp", "start", start)
    default = tuple(range(backbone.depth - (backbone.pool == "token")))
    return Thresholds([(i, Prune(start)) for i in blocks("ltmp", at, default, backbone.depth)], share, weight)
