"""A plan that keeps the tokens between blocks."""

from __future__ import annotations

from collections.abc import Iterable

from saccade.core.plan import Plan
from saccade.core.tokens import Tokens


class Stops(Plan):
    """A plan that keeps the tokens that chosen blocks leave, by the number of the block; for one forward.

    Those of the last block that runs are what ``encode`` gives.
    """

    def __init__(self, plan: Plan, blocks: Iterable[int]) -> None:
        super().__init__(plan.methods)
        self.after: dict[int, Tokens] = {}
        self._next = frozenset(block + 1 for block in blocks)

    def works_at(self, block: int) -> bool:
        return block in self._next or super().works_at(block)

    def reduce(self, block: int, site: str, tokens: Tokens, sparse: bool = True) -> tuple[Tokens, int]:
        if site == "block" and block in self._next:
            self.after[block - 1] = tokens
        return super().reduce(block, site, tokens, sparse)
