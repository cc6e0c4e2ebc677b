"""``random``: drop patch tokens blindly — the baseline that every selection has to beat."""

from __future__ import annotations

from collections.abc import Iterable

from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Reduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import blocks, fraction
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import ceil_share, scrambled


class KeepRandom(Reducer):
    """Keep ⌈keep · n⌉ tokens at random places, the same for every image: a batch equals its images one by one."""

    def __init__(self, keep: float, seed: int) -> None:
        super().__init__()
        self.keep, self.seed = keep, seed

    def count(self, n: int) -> int:
        return ceil_share(self.keep, n)

    def forward(self, tokens: Tokens) -> Reduction:
        n = tokens.num_patches
        noise = scrambled(n, self.seed, tokens.x.device)
        keep = noise.argsort(stable=True)[: self.count(n)].sort().values
        return Reduction(keep.expand(tokens.x.shape[0], -1))


@register("random", menu=lambda backbone: [f"random({k})" for k in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)], baseline=True)
def random(
    backbone: Backbone,
    keep: float = 0.7,
    at: int | Iterable[int] | None = None,
    seed: int = 0,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Drop patch tokens at random places: the control for every method that selects.

    Args:
        keep: share of patch tokens kept at each of the blocks, in (0, 1].
        at: 0-based blocks that drop; None: at a quarter, a half and three quarters of the depth.
        seed: of the places.
        gmacs: find ``keep`` for this many GMACs per image (at its own size) instead.
        speed: find ``keep`` for this many times fewer MACs instead.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise UserError(f"random: seed={seed!r} is not a whole number in [0, 2**31)")
    at = blocks("random", at, backbone.stages(), backbone.depth)
    keep = fraction("random", "keep", keep, 0.001)

    def build(keep: float) -> Method:
        return Method((i, KeepRandom(keep, seed + 1000 * i)) for i in at)

    if gmacs is None and speed is None:
        return build(keep)
    return fit("random", backbone, lambda i: build(1 - i / 1000), 999, gmacs, speed)
