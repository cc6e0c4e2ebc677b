"""``cut``: keep the first patch tokens by a slice — what fewer tokens cost where nothing is decided or moved.

A control of speed, not of accuracy: with the counts of another setting it is the least that one could take
(``saccade bench --ideal``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.registry import register
from saccade.core.slicing import First
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import blocks, one_of, whole
from saccade.methods.common.budget import fit
from saccade.setting import Call


class KeepFirst(Reducer):
    """Keep so many tokens, the first of the sequence, between attention and MLP."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def count(self, n: int) -> int:
        return min(n, self.tokens)

    def forward(self, tokens: Tokens) -> First:
        return First(self.count(tokens.num_patches))


class EnterFirst(KeepFirst):
    """The same before a block."""

    site = "block"


SITES = {"attn": KeepFirst, "block": EnterFirst}


@register("cut", baseline=True)
def cut(
    backbone: Backbone,
    tokens: int | tuple[int, ...] | None = None,
    at: int | Iterable[int] | None = None,
    site: str = "attn",
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Keep the first patch tokens in reading order, by a slice: a control of speed that looks at nothing.

    Args:
        tokens: patch tokens left at each of the blocks, or a list with one number for each; None: half of those of
            the model's own size.
        at: 0-based blocks, in order; None: at a quarter of the depth.
        site: 'attn', between attention and MLP, or 'block', before the block.
        gmacs: find ``tokens``, the same for all blocks, for this many GMACs per image (at its own size) instead.
        speed: find ``tokens`` for this many times fewer MACs instead.
    """
    kind = SITES[one_of("cut", "site", site, SITES)]
    chosen = blocks("cut", at, backbone.stages()[:1], backbone.depth)
    if at is not None and not isinstance(at, int) and chosen != tuple(at):
        raise UserError(f"cut: at={list(at)} must name each block once, in order")
    counts = max(1, backbone.num_patches // 2) if tokens is None else tokens
    each = counts if isinstance(counts, tuple) else (whole("cut", "tokens", counts, 1, 10**6),) * len(chosen)
    if len(each) != len(chosen):
        raise UserError(f"cut: {len(each)} values of tokens for {len(chosen)} blocks ({', '.join(map(str, chosen))})")
    for count in each:
        whole("cut", "tokens", count, 1, 10**6)

    if gmacs is None and speed is None:
        return Method((i, kind(count)) for i, count in zip(chosen, each, strict=True))
    most = backbone.num_patches
    return fit("cut", backbone, lambda i: Method((at, kind(most - i)) for at in chosen), most - 1, gmacs, speed)


def calls(site: str, counts: Sequence[tuple[int, int]]) -> tuple[Call, ...]:
    """The part of a setting that leaves these counts, (block, patch tokens), at a site; none where there are none."""
    if not counts:
        return ()
    at, tokens = zip(*counts, strict=True) if len(counts) > 1 else counts[0]
    knobs = (("at", at), *([] if site == "attn" else [("site", site)]))
    return (Call("cut", (tokens,), knobs),)
