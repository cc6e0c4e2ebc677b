"""The plainest reduction: the first tokens stay, by a slice; nothing is chosen, and no row is gathered."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from saccade.core.lazy import Recipe, changed, unread
from saccade.core.tokens import NO_STATS, AttentionStats, Hidden, Tokens


@dataclass(frozen=True)
class First:
    """The first M patch tokens stay, in their order; the others are dropped."""

    count: int  # M

    def of(self, tokens: Tokens) -> Tokens:
        """The tokens that stay, with all that they have."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[:, : self.count]

        stats = tokens.stats
        if stats is not NO_STATS:
            stats = AttentionStats(**{f.name: cut(getattr(stats, f.name)) for f in fields(AttentionStats)})
        return changed(
            tokens,
            x=tokens.x[:, : tokens.num_prefix + self.count],
            owner=Owned(unread(tokens), self.count),
            size=cut(tokens.size),
            anchor=cut(tokens.anchor),
            valid=cut(tokens.valid),
            hidden=Hidden.of(cut(tokens.keep_mask), cut(tokens.update_mask)),
            stats=stats,
        )


@dataclass(frozen=True)
class Owned:
    """The owner map before a slice, and how many tokens it leaves."""

    before: Tensor | Recipe
    count: int

    def made(self) -> Tensor:
        """The map after the slice, [B, G]: cells of what was cut off are dropped."""
        before = self.before if isinstance(self.before, Tensor) else self.before.made()
        return torch.where(before < self.count, before, -1)
