"""``kth``: keep every k-th token, whatever is in it — a control for all that choose."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from saccade.core.merging import Merge
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Reduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import blocks, switch, whole
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import cosines


class KeepEvery(Reducer):
    """Keep the tokens at places 0, k, 2k, …; drop the others, or merge each into the most similar of those kept."""

    def __init__(self, k: int, merge: bool, width: int) -> None:
        super().__init__()
        self.k, self.merge, self.width = k, merge, width
        self.read = frozenset({"key"} if merge else ())

    def count(self, n: int) -> int:
        return -(-n // self.k)

    def macs(self, n: int) -> int:
        return self.count(n) * (n - self.count(n)) * self.width if self.merge else 0

    def forward(self, tokens: Tokens) -> Reduction:
        place = torch.arange(tokens.num_patches, device=tokens.x.device)
        kept, others = place[:: self.k], place[place % self.k > 0]
        keep, src = (p.expand(tokens.x.shape[0], -1) for p in (kept, others))
        if not self.merge:
            return Reduction(keep)
        key = tokens.reading("key")
        valid = None if tokens.valid is None else (tokens.valid[:, others], tokens.valid[:, kept])
        dst = cosines(key[:, others], key[:, kept], valid).argmax(2)
        return Reduction(keep, Merge(src, dst))


def _menu(backbone: Backbone) -> list[str]:
    return [f"kth(2, at={block})" for block in reversed(backbone.stages())] + ["kth(4)"]


@register("kth", menu=_menu, baseline=True)
def kth(
    backbone: Backbone,
    k: int = 2,
    at: int | Iterable[int] | None = None,
    merge: bool = False,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Keep every k-th patch token in reading order: a control that looks at nothing.

    Args:
        k: 1 keeps all of them.
        at: 0-based blocks; None: at a quarter of the depth.
        merge: the others merge into the most similar ones kept (ToMe's k-th matching, but none is lost); False: drop.
        gmacs: find ``k`` for this many GMACs per image (at its own size) instead.
        speed: find ``k`` for this many times fewer MACs instead.
    """
    whole("kth", "k", k, 1, 10**6)
    switch("kth", "merge", merge)
    at = blocks("kth", at, backbone.stages()[:1], backbone.depth)

    def build(k: int) -> Method:
        return Method((i, KeepEvery(k, merge, backbone.head_dim)) for i in at)

    if gmacs is None and speed is None:
        return build(k)
    return fit("kth", backbone, lambda i: build(i + 1), backbone.num_patches, gmacs, speed)
