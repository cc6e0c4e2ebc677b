"""``patchmerger``: a few learned queries each make one token of all (PatchMerger, arXiv 2202.12015). To be trained."""

from __future__ import annotations

from torch import nn

from saccade.core.init import draw, init_module
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import SoftReduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import whole
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import mixture


class Merge(Reducer):
    """softmax over tokens of (queries · normed tokens) weighs the normed tokens."""

    site = "block"
    counted = True

    def __init__(self, tokens: int, scale: float, dim: int, seed: int) -> None:
        super().__init__()
        self.tokens, self.scale, self.dim = tokens, scale, dim
        self.norm = init_module(lambda: nn.LayerNorm(dim))
        self.queries = nn.Parameter(draw((tokens, dim), 1.0, seed))

    def count(self, n: int) -> int:
        return min(n, self.tokens)

    def macs(self, n: int) -> int:
        return 2 * n * self.tokens * self.dim

    def forward(self, tokens: Tokens) -> SoftReduction:
        values = self.norm(tokens.patches)
        return SoftReduction(mixture(tokens, values @ self.queries.T * self.scale), values)


# No menu: untrained, it destroys what the model knows. `tune` tries the settings that weights were trained for.
@register("patchmerger", sources={"code": "tokens scale"})
def patchmerger(
    backbone: Backbone,
    tokens: int = 8,
    at: int | None = None,
    scale: float = 1.0,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Replace all patch tokens by a few learned mixtures of them (arXiv 2202.12015); it has to be trained.

    Args:
        tokens: mixtures, 1 to 10,000; where there are no more patch tokens than that it does nothing.
        at: the 0-based block before which it stands; None: half of the depth.
        scale: of the scores, above 0; D ** -0.5 makes the first mixtures softer.
        gmacs: find ``tokens`` for this many GMACs per image (at its own size) instead.
        speed: find ``tokens`` for this many times fewer MACs instead.
    """
    whole("patchmerger", "tokens", tokens, 1, 10_000)
    if isinstance(scale, bool) or not 0 < scale <= 1e6:
        raise UserError(f"patchmerger: scale={scale!r} is not a number above 0")
    block = whole("patchmerger", "at", backbone.depth // 2 if at is None else at, 0, backbone.depth - 1)

    def build(tokens: int) -> Method:
        return Method([(block, Merge(tokens, float(scale), backbone.dim, seed=block))])

    if gmacs is None and speed is None:
        return build(tokens)
    n = backbone.num_patches
    return fit("patchmerger", backbone, lambda i: build(n - i), n - 1, gmacs, speed)
