"""``ats``: sample tokens by how much they add to the class token, as many as each image needs (ATS).

Fayyaz et al., ECCV 2022, arXiv 2111.15667. Nothing is learned. The distribution of the scores is read at fixed levels;
where few tokens hold most of it, several levels meet the same token, and fewer tokens stay.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Reduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import blocks, fraction, one_of
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import ceil_share, check_score
from saccade.methods.common.sampling import keep_where, there, with_best

LEVELS = ("text", "code")


class Sample(Reducer):
    """Keep the tokens nearest to ⌈keep · n⌉ levels of the cumulative score, attention · length of the value."""

    ragged = True

    def __init__(self, keep: float, reading: str, levels: str = "text") -> None:
        super().__init__()
        self.keep, self.reading, self.levels = keep, reading, levels
        self.read = frozenset({reading, "value_norm"})

    def count(self, n: int) -> int | None:
        return None

    @torch.no_grad()
    def forward(self, tokens: Tokens) -> Reduction:
        score = there(tokens, tokens.reading(self.reading).float() * tokens.reading("value_norm"))
        chosen = sample(score, levels(tokens, self.keep), self.levels == "code")
        return keep_where(with_best(chosen * (score > -torch.inf), score) > 0)


class Most(Sample):
    """As many tokens as there are levels: for a price that no image is above."""

    def count(self, n: int) -> int:
        return ceil_share(self.keep, n)


def levels(tokens: Tokens, keep: float) -> Tensor:
    """⌈keep · n⌉ equally spaced levels in (0, 1) for the n tokens of each image, [B, L]; the last one is repeated."""
    most = ceil_share(keep, tokens.num_patches)
    place = torch.arange(most, device=tokens.x.device, dtype=torch.float64).expand(tokens.x.shape[0], -1)
    if tokens.valid is None:
        return (place + 0.5) / most
    count = (keep * tokens.valid.sum(1, keepdim=True).double() - 1e-9).ceil().clamp(min=1.0)
    return (torch.minimum(place, count - 1) + 0.5) / count


def sample(score: Tensor, wanted: Tensor, spanned: bool = False) -> Tensor:
    """0/1 [B, N] of the tokens nearest to some levels [B, L] of the sorted scores' cumulative share (paper, §3.2).

    score [B, N], 0 and more, -inf: no token; among equals the first. spanned: as the released code, the shares run from
    0 to 1, and the levels from the smallest share above 0 to 1.
    """
    order = score.argsort(dim=1, stable=True)
    cdf = score.gather(1, order).clamp(min=0.0).double().cumsum(1)
    none = (score == -torch.inf).sum(1, keepdim=True)  # these are sorted first
    if spanned:
        cdf, wanted = _spanned(cdf, wanted, none)
    else:
        cdf = cdf / cdf[:, -1:].clamp(min=1e-30)
    above = torch.searchsorted(cdf, wanted.contiguous()).clamp(max=score.shape[1] - 1)
    below = torch.maximum(above - 1, none).minimum(above)
    nearer = (cdf.gather(1, below) - wanted).abs() < (cdf.gather(1, above) - wanted).abs()
    return torch.zeros_like(score).scatter(1, order.gather(1, torch.where(nearer, below, above)), 1.0)


def _spanned(cdf: Tensor, wanted: Tensor, none: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative scores [B, N], the first ``none`` [B, 1] of which are no tokens', from 0 to 1; levels likewise."""
    lowest = cdf.gather(1, none.clamp(max=cdf.shape[1] - 1))
    cdf = ((cdf - lowest) / (cdf[:, -1:] - lowest).clamp(min=1e-30)).clamp(min=0.0)
    start = cdf.masked_fill(cdf <= 0, torch.inf).amin(1, keepdim=True).clamp(max=1.0)
    first, last = wanted[:, :1], wanted[:, -1:]
    along = (wanted - first) / (last - first).clamp(min=1e-30)
    return cdf, start + (1 - start) * along


def _menu(backbone: Backbone) -> list[str]:
    knob = "" if backbone.has_class_token else ", score='received'"
    return [f"ats({k}{knob})" for k in (1.0, 0.8, 0.6)]


@register("ats", sources={"paper": "score levels", "code": "keep"}, menu=_menu)
def ats(
    backbone: Backbone,
    keep: float = 1.0,
    at: int | Iterable[int] | None = None,
    score: str = "class",
    levels: str = "text",
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Sample the patch tokens that matter to the class token, as many as each image needs (arXiv 2111.15667).

    What is dropped is not asked any more; the paper leaves it out of the queries of the same block, which is the same.

    Args:
        keep: levels that are sampled at, as a share of the patch tokens, in (0, 1]: the most that stay.
        at: 0-based blocks that drop; None: all from a quarter of the depth on, but the last where only the class token
            is read.
        score: 'class' attention, or mean attention 'received', for models without a class token.
        levels: of the cumulative score: by the paper's 'text', (k - ½) / K; or by its 'code', from the smallest share
            above 0 to 1, of shares that start at 0.
        gmacs: find ``keep`` for at most this many GMACs per image (at its own size) instead; most images cost less.
        speed: find ``keep`` for at least this many times fewer MACs instead.
    """
    keep = fraction("ats", "keep", keep, 0.001)
    reading = check_score("ats", score, backbone)
    default = tuple(range(max(1, backbone.depth // 4), backbone.depth - (backbone.pool == "token")))
    one_of("ats", "levels", levels, LEVELS)
    chosen = blocks("ats", at, default, backbone.depth)

    def build(keep: float, kind: type[Sample] = Sample) -> Method:
        return Method((i, kind(keep, reading, levels)) for i in chosen)

    if gmacs is None and speed is None:
        return build(keep)
    return fit("ats", backbone, lambda i: build(1 - i / 1000), 999, gmacs, speed, lambda i: build(1 - i / 1000, Most))
