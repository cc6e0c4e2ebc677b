"""``tokenlearner``: learned attention maps make a few tokens of all (TokenLearner, NeurIPS 2021, arXiv 2106.11297).

To be trained. Class and other prefix tokens go past it, where the published models have none.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from saccade.core.init import init_module
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import SoftReduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import one_of, whole
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import mixture

HIDDEN = 64  # of the MLPs
VERSIONS = ("1.1", "1.0")
POOLS = ("sum", "mean")
UNMIXED = "tokenlearner.unmixed"  # the tokens that were mixed, for a ``Fuse``


def mlp(dim: int, tokens: int, bias: bool = True) -> nn.Sequential:
    """Two layers over channels."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, tokens, bias=bias))


class Learn(Reducer):
    """S new tokens, each a mixture of all; the features that are mixed are not normed.

    Version 1.1: weights are the softmax, over places, of an MLP.
    """

    site = "block"
    part = "learn"
    counted = True

    def __init__(self, tokens: int, dim: int, fused: bool, seed: int) -> None:
        super().__init__()
        self.tokens, self.dim, self.fused = tokens, dim, fused
        self.maps: nn.Module = self.make_maps(seed)

    def make_maps(self, seed: int) -> nn.Module:
        """What scores every place for each new token."""
        return init_module(lambda: mlp(self.dim, self.tokens, bias=False), seed)  # the softmax would cancel it

    def count(self, n: int) -> int:
        return min(n, self.tokens)

    def macs(self, n: int) -> int:
        """The maps, the mixing, and of a later ``Fuse``, whose costs are those of the tokens here."""
        fuse = self.tokens**2 * self.dim + n * HIDDEN * (self.dim + self.tokens) + n * self.tokens * self.dim
        return self.macs_of_maps(n) + n * self.tokens * self.dim + self.fused * fuse

    def macs_of_maps(self, n: int) -> int:
        """MACs of the weights, for n tokens."""
        return n * HIDDEN * (self.dim + self.tokens)

    def weights(self, tokens: Tokens) -> Tensor:
        """[B, S, N]."""
        return mixture(tokens, self.maps(tokens.patches))

    def forward(self, tokens: Tokens) -> SoftReduction:
        return SoftReduction(self.weights(tokens), state={UNMIXED: tokens} if self.fused else None)


class LearnByConvolution(Learn):
    """Version 1.0: weights are the sigmoid of four 3 × 3 convolutions over the grid; a sum or a mean over places."""

    def __init__(self, tokens: int, dim: int, fused: bool, seed: int, pool: str) -> None:
        super().__init__(tokens, dim, fused, seed)
        self.pool = pool
        self.norm = nn.LayerNorm(dim)

    def make_maps(self, seed: int) -> nn.Module:
        def layers() -> nn.Sequential:
            widths = [self.dim, *[self.tokens] * 4]
            convs = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths)]
            return nn.Sequential(convs[0], nn.GELU(), convs[1], nn.GELU(), convs[2], nn.GELU(), convs[3])

        return init_module(layers, seed)

    def macs_of_maps(self, n: int) -> int:
        """MACs of the weights, for n tokens."""
        return 9 * n * self.tokens * (self.dim + 3 * self.tokens)

    def weights(self, tokens: Tokens) -> Tensor:
        if tokens.num_patches != tokens.grid[0] * tokens.grid[1]:
            raise UserError(
                f"tokenlearner: version='1.0' convolves a whole grid and {tokens.num_patches} tokens of "
                f"{tokens.grid[0]}x{tokens.grid[1]} are left; put it before what reduces them, or take version='1.1'"
            )
        image = self.norm(tokens.patches).transpose(1, 2).unflatten(2, tokens.grid)
        maps = self.maps(image).sigmoid().flatten(2)
        return maps / maps.shape[2] if self.pool == "mean" else maps


class Fuse(Reducer):
    """TokenFuser: put the tokens from before ``Learn`` back, each with its own mixture of what the new ones became.

    Nothing where ``Learn`` had nothing to do.
    """

    site = "block"
    part = "fuse"
    counted = True

    def __init__(self, tokens: int, dim: int, seed: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.norm, self.norm_mixed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mix = init_module(lambda: nn.Linear(tokens, tokens), seed)
        nn.init.zeros_(self.mix.weight)  # so that at first nothing is added
        self.maps = init_module(lambda: mlp(dim, tokens), seed + 1)

    def count(self, n: int) -> int | None:
        return None  # back to as many as there were

    def forward(self, tokens: Tokens) -> SoftReduction | None:
        unmixed: Tokens | None = tokens.state.get(UNMIXED)
        if unmixed is None:
            return None
        if tokens.num_patches != self.tokens:
            raise UserError(
                f"tokenlearner: fuse_at puts back {self.tokens} tokens and {tokens.num_patches} are left; no other "
                "method may reduce them in between"
            )
        mixed = self.mix(self.norm(tokens.patches).transpose(1, 2)).transpose(1, 2)
        share = self.maps(unmixed.patches).sigmoid()  # [B, N, S]
        return SoftReduction(share, self.norm_mixed(mixed), state={UNMIXED: None}, onto=unmixed)


# No menu: untrained, it destroys what the model knows. `tune` tries the settings that weights were trained for.
@register("tokenlearner", sources={"code": "version pool"})
def tokenlearner(
    backbone: Backbone,
    tokens: int = 8,
    at: int | None = None,
    version: str = "1.1",
    pool: str = "sum",
    fuse_at: int | None = None,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Replace all patch tokens by a few learned mixtures of them (arXiv 2106.11297); it has to be trained.

    Args:
        tokens: mixtures, 1 to 10,000; where there are no more patch tokens than that it does nothing.
        at: the 0-based block before which it stands; None: three quarters of the depth.
        version: '1.1', an MLP and a softmax over places, or '1.0', convolutions and sigmoids (needs a whole grid).
        pool: for version '1.0', a 'sum' or a 'mean' over places.
        fuse_at: the 0-based block before which all tokens come back (TokenFuser), for dense tasks; None: they do not.
        gmacs: find ``tokens`` for this many GMACs per image (at its own size) instead; not with ``fuse_at``.
        speed: find ``tokens`` for this many times fewer MACs instead.
    """
    whole("tokenlearner", "tokens", tokens, 1, 10_000)
    one_of("tokenlearner", "version", version, VERSIONS)
    one_of("tokenlearner", "pool", pool, POOLS)
    block = whole("tokenlearner", "at", backbone.depth * 3 // 4 if at is None else at, 0, backbone.depth - 1)
    dim, fused = backbone.dim, fuse_at is not None

    def learn(tokens: int) -> Reducer:
        if version == "1.1":
            return Learn(tokens, dim, fused, seed=block)
        return LearnByConvolution(tokens, dim, fused, block, pool)

    if gmacs is not None or speed is not None:
        if fused:
            raise UserError("tokenlearner: with fuse_at all tokens come back: give tokens, not gmacs or speed")
        n = backbone.num_patches
        return fit("tokenlearner", backbone, lambda i: Method([(block, learn(n - i))]), n - 1, gmacs, speed)
    steps: list[tuple[int, Reducer]] = [(block, learn(tokens))]
    if fuse_at is not None:
        if whole("tokenlearner", "fuse_at", fuse_at, 0, backbone.depth - 1) <= block:
            raise UserError(f"tokenlearner: fuse_at={fuse_at} is not behind at={block}")
        steps.append((fuse_at, Fuse(tokens, dim, seed=fuse_at)))
    return Method(steps)
