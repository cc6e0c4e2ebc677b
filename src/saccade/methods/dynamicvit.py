"""``dynamicvit``: small networks learn which patch tokens to drop (DynamicViT, NeurIPS 2021, arXiv 2106.02034).

To be trained, as published: attention alone leaves out what is dropped, though a token always sees itself; all tokens
go through every block; a decision is multiplied with those before it, and learns from those after it. Two choices
differ from the released code: masked attention is exact (its ε-smoothed softmax is not), and ``threshold`` keeps the
counts per image that training has learned, where the paper falls back to one count for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.init import init_module
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.record import Trace
from saccade.core.reduction import Reduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import blocks, fraction
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import floor_share
from saccade.methods.common.sampling import choose, keep_where, logit, mean_of, there, with_best

START = 0.95  # share that is kept before anything is learned


def outer(dim: int) -> nn.Sequential:
    """From a token's own half and the mean half to one logit."""
    half, quarter = dim // 2, dim // 4
    layers = (nn.Linear(dim, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 1))
    return nn.Sequential(*layers)


class Predictor(nn.Module):
    """One logit for each token, from itself and from the mean over those that are left (paper, eq. 1 to 5).

    A softmax over keep and drop is a sigmoid of their difference, so there is one output and not two.
    """

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        self.dim = dim
        self.norm = nn.LayerNorm(dim)
        self.inner = init_module(lambda: nn.Linear(dim, dim), seed)
        layers: Any = init_module(lambda: outer(dim), seed + 1)
        nn.init.constant_(layers[-1].bias, logit(START))
        self.outer: Any = layers

    def macs(self, n: int) -> int:
        """For n tokens."""
        half, quarter = self.dim // 2, self.dim // 4
        return n * (self.dim * self.dim + self.dim * half + half * quarter + quarter)

    def forward(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """x [B, N, D], how much each counts in the mean [B, N] (None: all alike) -> [B, N]."""
        own, shared = F.gelu(self.inner(self.norm(x))).split([self.dim // 2, self.dim - self.dim // 2], dim=-1)
        mean = mean_of(shared, weights).unsqueeze(1)
        return self.outer(torch.cat([own, mean.expand_as(shared)], dim=-1)).squeeze(-1)


class Drop(Reducer):
    """Keep a fixed share of the tokens, those of the highest logits; or all whose probability is above a threshold."""

    site = "block"
    counted = True

    def __init__(
        self, keep: float, stage: int, patches: int, dim: int, seed: int, tau: float, threshold: float | None
    ) -> None:
        """``stage`` counts from 0; ``patches``: of an image of the model's own size."""
        super().__init__()
        self.keep, self.stage, self.patches, self.tau, self.threshold = keep, stage, patches, tau, threshold
        self.ragged = threshold is not None
        self.predictor = Predictor(dim, seed)

    def planned(self, n: int) -> int:
        """⌊keepⁱ · N⌋ after i stages, as published; where N is not known any more, the number nearest to keep · n."""
        if self.stage == 0:
            return max(1, floor_share(self.keep, n))
        if n == max(1, floor_share(self.keep**self.stage, self.patches)):
            return max(1, floor_share(self.keep ** (self.stage + 1), self.patches))
        return max(1, round(self.keep * n))

    def count(self, n: int) -> int | None:
        return self.planned(n) if self.threshold is None else None

    def macs(self, n: int) -> int:
        return self.predictor.macs(n)

    def score(self, tokens: Tokens) -> Tensor:
        """The logit of keeping each token, [B, N] fp32."""
        found: Tensor = self.predictor(tokens.patches, tokens.weights()).float()
        return found

    def forward(self, tokens: Tokens) -> Reduction:
        logits = self.score(tokens)
        score = there(tokens, logits)
        if self.threshold is not None and not self.training:
            return keep_where(with_best(choose(score, 0.0, threshold=self.threshold), score) > 0)
        order = score.detach().argsort(dim=1, descending=True, stable=True)
        keep = order[:, : self.planned(tokens.num_patches)].sort(dim=1).values
        return Reduction(keep, gate=self.drawn(logits, score), freeze=False) if self.training else Reduction(keep)

    def drawn(self, logits: Tensor, score: Tensor) -> Tensor:
        """A draw for every token, those that are dropped already too: so an earlier decision learns from this one."""
        gate = choose(logits, 1.0, self.tau)
        some = ((gate > 0) & (score > -torch.inf)).any(1, keepdim=True)
        return torch.where(some, gate, with_best(gate, score))


class DynamicViT(Method):
    """Drops at some blocks; learns to keep ``keep ** stage`` of an image's patches on average."""

    def __init__(self, steps: Iterable[tuple[int, Reducer]], keep: float, ratio: float) -> None:
        super().__init__(steps)
        self.keep, self.ratio = keep, ratio

    def loss(self, trace: Trace) -> dict[str, Tensor]:
        """``ratio`` times the mean over images and stages of (share kept - share wanted)²."""
        shares = [(i, trace.blocks[at].kept) for i, at in enumerate(self.at) if at < len(trace.blocks)]
        misses = [(share - self.keep ** (i + 1)) ** 2 for i, share in shares if share is not None]
        if not misses:
            return {}
        return {"ratio": self.ratio * torch.stack(misses).sum() / max(1, trace.images * len(misses))}


# No menu: untrained, it keeps tokens at random. `tune` tries the settings that weights were trained for.
@register("dynamicvit", sources={"paper": "keep at threshold", "code": "ratio tau"})
def dynamicvit(
    backbone: Backbone,
    keep: float = 0.7,
    at: int | Iterable[int] | None = None,
    threshold: float | tuple[float, ...] | None = None,
    ratio: float = 2.0,
    tau: float = 1.0,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Drop the patch tokens that a small network at each stage gives up (arXiv 2106.02034); it has to be trained.

    Args:
        keep: share of patch tokens kept at each of the blocks, in (0, 1]; what training aims at.
        at: 0-based blocks before which tokens are dropped; None: a quarter, a half and three quarters of the depth.
        threshold: keep the tokens whose probability is above it, as many as each image needs (at least one);
            one for all blocks or one for each; None: the same number in every image. Training is the same for all.
        ratio: weight of the loss that holds training to ``keep``.
        tau: temperature of the draws in training.
        gmacs: find ``keep`` for this many GMACs per image (at its own size) instead, by fixed counts.
        speed: find ``keep`` for this many times fewer MACs instead.
    """
    keep = fraction("dynamicvit", "keep", keep, 0.001)
    for knob, value, least in (("ratio", ratio, 0.0), ("tau", tau, 0.001)):
        if isinstance(value, bool) or not least <= value <= 1e6:
            raise UserError(f"dynamicvit: {knob}={value!r} is not a number from {least:g} up to a million")
    stages = blocks("dynamicvit", at, backbone.stages(), backbone.depth)
    each = tuple(threshold) if isinstance(threshold, (tuple, list)) else (threshold,) * len(stages)
    if len(each) != len(stages):
        raise UserError(f"dynamicvit: {len(each)} thresholds for {len(stages)} blocks; give one, or one for each")
    for limit in each:
        if limit is not None:
            fraction("dynamicvit", "threshold", limit)

    def build(keep: float, each: Sequence[float | None]) -> Method:
        n, dim = backbone.num_patches, backbone.dim
        places = enumerate(zip(stages, each, strict=True))
        return DynamicViT([(at, Drop(keep, i, n, dim, 10 * at, tau, limit)) for i, (at, limit) in places], keep, ratio)

    def by_count(i: int) -> Method:
        return build(1 - i / 1000, [None] * len(stages))

    if gmacs is None and speed is None:
        return build(keep, each)
    return fit("dynamicvit", backbone, lambda i: build(1 - i / 1000, each), 999, gmacs, speed, by_count)
