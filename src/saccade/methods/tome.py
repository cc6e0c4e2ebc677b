"""``tome``: merge the r most similar pairs of tokens in every block (ToMe, arXiv 2210.09461)."""

from __future__ import annotations

import torch

from saccade.decide import best_edges
from saccade.errors import UserError
from saccade.plan import Backbone, Method, Reducer, register
from saccade.reduction import Reduction
from saccade.tokens import Tokens


class BipartiteMerge(Reducer):
    """Alternate tokens into A and B; each A token proposes its most similar B token; the best r proposals merge."""

    read = frozenset({"key"})

    def __init__(self, r: int, head_dim: int) -> None:
        super().__init__()
        self.r, self.head_dim = r, head_dim

    def count(self, n: int) -> int:
        return n - min(self.r, n // 2)

    def macs(self, n: int) -> int:
        return (n // 2) * (n - n // 2) * self.head_dim

    def forward(self, tokens: Tokens) -> Reduction:
        assert tokens.key is not None
        n, prefix = tokens.num_patches, tokens.num_prefix
        # A are the even places of the whole sequence, prefix included, as in the paper; then the new order is [A | B].
        first_a, first_b = prefix % 2, 1 - prefix % 2
        merged, unmerged, partner = best_edges(tokens.key[:, first_a::2], tokens.key[:, first_b::2], n - self.count(n))
        unmerged = unmerged.sort(dim=1).values
        every_b = torch.arange(first_b, n, 2, device=merged.device).expand(merged.shape[0], -1)
        keep = torch.cat([2 * unmerged + first_a, every_b], dim=1)
        return Reduction(keep, src=2 * merged + first_a, dst=unmerged.shape[1] + partner)


def resolve(r: int | tuple[int, ...] | tuple[int, float], inflection: float, depth: int) -> list[int]:
    """One r per block: a list padded with zeros, or r that changes linearly by ``inflection`` (-1: from 2r to 0)."""
    if isinstance(r, tuple):
        given = list(r)
        if len(given) > depth:
            raise UserError(f"tome: {len(given)} values of r for {depth} blocks")
        schedule: list = given + [0] * (depth - len(given))
    elif isinstance(r, bool) or not isinstance(r, int):
        raise UserError(f"tome: r={r!r} is not a whole number of tokens, or a list of them")
    else:
        low = int(r * (1 - inflection))
        step = (2 * r - 2 * low) / max(depth - 1, 1)
        schedule = [int(low + step * block) for block in range(depth)]
    if any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in schedule):
        raise UserError(f"tome: r={r!r} must be whole numbers of tokens, 0 or more")
    return schedule


def _menu(backbone: Backbone) -> list[str]:
    patches = backbone.input_size[0] // backbone.patch_size[0] * (backbone.input_size[1] // backbone.patch_size[1])
    rates = sorted({max(1, round(share * patches / backbone.depth)) for share in (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)})
    return [f"tome(r={r})" for r in rates]


@register("tome", menu=_menu)
def tome(backbone: Backbone, r: int | tuple = 13, inflection: float = 0.0) -> Method:
    """Token merging: average the r most similar pairs in every block (arXiv 2210.09461).

    Args:
        r: patch tokens merged away in each block, or a list with one number per block.
        inflection: -1 merges 2r in the first block falling to 0 in the last, +1 the reverse, 0 the same everywhere.
    """
    if not -1 <= inflection <= 1:
        raise UserError(f"tome: inflection={inflection!r} is not in [-1, 1]")
    schedule = resolve(r, inflection, backbone.depth)
    return Method((i, BipartiteMerge(v, backbone.head_dim)) for i, v in enumerate(schedule) if v)
