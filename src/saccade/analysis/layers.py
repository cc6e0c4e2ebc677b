"""What is inside: the tokens at every block under a setting, seen through the plan, and spread over a common grid.

The loop asks its plan at each site of each block whether to reduce; a plan that remembers what it was asked about sees
all token sets, with their owner maps, and nothing of the model is touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from saccade.core.packing import padded
from saccade.core.plan import Plan
from saccade.core.tokens import Tokens
from saccade.evaluation.defined import require_finite
from saccade.execution.loop import encode
from saccade.model import AdaptiveViT


@dataclass(frozen=True)
class Seen:
    """Tokens before and after the reductions of one site of one block."""

    block: int
    site: str
    before: Tokens
    after: Tokens


class Watched(Plan):
    """A plan that keeps what it is asked about; for one forward pass."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.methods)
        self.seen: list[Seen] = []

    def works_at(self, block: int) -> bool:
        return True  # every block is looked at

    def is_identity(self, block: int, n: int) -> bool:
        return False  # and every reduction in it is run

    def reduce(self, block: int, site: str, tokens: Tokens, sparse: bool = True) -> tuple[Tokens, int]:
        after, cost = super().reduce(block, site, tokens, sparse)
        if after.hidden is not None:  # a gradient is asked of the answer, not of the policy
            after = replace(after, hidden=replace(after.hidden, keep=after.hidden.keep.detach()))
        before = padded(tokens)
        self.seen.append(Seen(block, site, before, before if after is tokens else padded(after)))
        return after, cost


def watch(model: AdaptiveViT, images: Tensor, *, sparse: bool = True) -> tuple[list[Seen], Tokens]:
    """All that the plan sees of images [B, C, h, w], and the tokens after the whole last block.

    Raises UserError where these are not finite: what is made of them would be a figure of nothing.
    """
    start = model.tokenizer(model.vit, images).with_dropped_features()
    plan = Watched(model.plan)
    tokens, _ = encode(model.vit, start, plan, whole=True, sparse=sparse, execution=model.execution)
    require_finite(tokens.x.detach(), model.setting, "tokens")
    return plan.seen, tokens


def levels(model: AdaptiveViT, images: Tensor) -> list[Tokens]:
    """The tokens at the input of every block that runs and after the last one."""
    seen, last = watch(model, images)
    return [*(s.before for s in seen if s.site == "block"), last]


def cell_map(tokens: Tokens, grid: tuple[int, int]) -> Tensor:
    """Patch features on a grid, [B, D, gh, gw]: a cell has its token's, or a dropped one's last; then averages."""
    assert tokens.dropped_features is not None
    cells = tokens.cell_features().transpose(1, 2).unflatten(2, tokens.grid)
    return cells if tokens.grid == grid else F.adaptive_avg_pool2d(cells, grid)
