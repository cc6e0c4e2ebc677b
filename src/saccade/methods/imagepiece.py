"""``imagepiece``: re-tokenize — merge what carries no meaning, let the next blocks judge again, then prune.

ImagePiece (AAAI 2025, arXiv 2412.16491), whose code was never released, as a training-free re-tokenizer for any ViT.
The layers and what 0.08 is a fraction of are not in the paper's text: the defaults are a fit to its published speeds
and token counts, not the authors' word. Similarity, weights and proportional attention are ToMe's where the paper is
silent. Every such reading is a knob. Judging again is the next block's own attention; nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.merging import Merge, rows
from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.reduction import Reduction
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import blocks, fraction, one_of, switch
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import (
    METRICS,
    KeepAttended,
    best_proposals,
    check_score,
    feature_of,
    floor_share,
    leave,
    products,
    scrambled,
    units,
)

SPLITS = ("alternate", "random", "halves")
OF = ("tokens", "bottom", "first")
PER = ("token", "patch")


@dataclass(frozen=True)
class Interpretation:
    """How the paper is read where it leaves a choice; the knobs of ``imagepiece`` say what they mean."""

    metric: str = "key"
    weighted: bool = True
    proportional: bool = True
    score: str = "cls_attn"  # a reading of attention
    per: str = "token"
    of: str = "tokens"
    split: str = "alternate"


class Retokenize(Reducer):
    """Merge, among the ⌊p · n⌋ least attended tokens only, the ⌊merge · n⌋ most similar pairs."""

    def __init__(self, p: float, merge: float, reading: Interpretation, width: int, first: int) -> None:
        super().__init__()
        self.p, self.merge, self.reading, self.width, self.first = p, merge, reading, width, first
        self.read = frozenset({reading.score, "key"} if reading.metric == "key" else {reading.score})

    def _sizes(self, n: int) -> tuple[int, int]:
        """(bottom, r): tokens judged meaningless, and pairs among them that merge."""
        bottom = floor_share(self.p, n)
        whole = {"tokens": n, "bottom": bottom, "first": self.first}[self.reading.of]
        return bottom, min(floor_share(self.merge, whole), (bottom + 1) // 2 if bottom > 1 else 0)

    def count(self, n: int) -> int:
        return n - self._sizes(n)[1]

    def macs(self, n: int) -> int:
        bottom = self._sizes(n)[0]
        return (bottom // 2) * (bottom - bottom // 2) * self.width

    def forward(self, tokens: Tokens) -> Reduction:
        reading, n = self.reading, tokens.num_patches
        bottom, r = self._sizes(n)
        score = tokens.reading(reading.score)
        if reading.per == "patch" and tokens.size is not None:
            score = score / tokens.size
        if tokens.valid is not None:
            score = score.masked_fill(~tokens.valid, torch.inf)
        least = self._ranked(score.argsort(dim=1, stable=True)[:, :bottom])  # least attended first
        a, b = self._sides(least)
        similar = products(*self._sides(units(rows(feature_of(tokens, reading.metric), least))))
        merged, _, partner = best_proposals(similar, r)
        src = a.gather(1, merged)
        keep, dst = leave(n, src, b.gather(1, partner))
        weight = None if reading.weighted else torch.ones_like(score)
        return Reduction(keep, Merge(src, dst, weight=weight, proportional=reading.proportional))

    def _ranked(self, bottom: Tensor) -> Tensor:
        """The bottom tokens [B, K] in the order in which they part into sides."""
        if self.reading.split != "random":
            return bottom
        # the same ranks for every image: a batch equals its images one by one
        return bottom[:, scrambled(bottom.shape[1], 0, bottom.device).argsort(stable=True)]

    def _sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of what the bottom tokens have [B, K, ...]; A has one more where K is odd."""
        if self.reading.split == "halves":
            half = -(-values.shape[1] // 2)
            return values[:, :half], values[:, half:]
        return values[:, 0::2], values[:, 1::2]


def _menu(backbone: Backbone) -> list[str]:
    knob = "" if backbone.has_class_token else ", score='received'"
    rates = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    merges = [f"imagepiece(merge={m}{knob})" for m in (0.08, 0.12)]
    return merges + [f"imagepiece(keep={k}{knob})" for k in rates]


@register("imagepiece", sources={"paper": "p merge split score", "fit": "merge_at prune_at of"}, menu=_menu)
def imagepiece(
    backbone: Backbone,
    p: float = 0.3,
    merge: float = 0.08,
    keep: float = 1.0,
    merge_at: int | Iterable[int] | None = None,
    prune_at: int | Iterable[int] | None = None,
    metric: str = "key",
    weighted: bool = True,
    score: str = "class",
    fuse: bool = False,
    proportional: bool = True,
    per: str = "token",
    of: str = "tokens",
    split: str = "alternate",
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Merge the least attended tokens with each other, judge again, then prune (arXiv 2412.16491).

    Args:
        p: share of patch tokens, the least attended, that may merge.
        merge: share of patch tokens merged away in each merging block (at most half of p).
        keep: share kept in each pruning block; 1 never prunes, the published system is ``imagepiece(keep=0.8)``.
        merge_at: 0-based blocks that merge; None: all before the last pruning block that do not prune. Without block
            0, where the class token does not know yet what matters, it was better in docs/results-imagepiece.md.
        prune_at: 0-based blocks that prune; None: at a quarter, a half and three quarters of the depth.
        metric: similarity of the mean 'key' over heads, or of the features 'x'.
        weighted: weigh merged tokens by the patches in them; False: a plain mean.
        score: 'class' attention, or mean attention 'received', for models without a class token.
        fuse: add one token, the attention-weighted sum of those pruned, as EViT does; False: drop them.
        proportional: attention counts a merged token as often as it has patches, in the score too; False: once.
        per: judge a 'token' by all attention that it gets, or by the share of it that falls to each 'patch' in it.
        of: what ``merge`` is a share of: the 'tokens' there are, the 'bottom' ones, or the 'first', those of a whole
            image (of the model's own size).
        split: the bottom tokens part into two sides by rank: 'alternate', in 'halves', or at 'random'.
        gmacs: find ``keep`` for this many GMACs per image (at its own size); ``merge``, where that is enough.
        speed: the same for this many times fewer MACs.
    """
    p, merge = fraction("imagepiece", "p", p), fraction("imagepiece", "merge", merge)
    keep = fraction("imagepiece", "keep", keep, 0.001)
    for knob, word, known in (("metric", metric, METRICS), ("per", per, PER), ("of", of, OF), ("split", split, SPLITS)):
        one_of("imagepiece", knob, word, known)
    for knob, on in (("weighted", weighted), ("fuse", fuse), ("proportional", proportional)):
        switch("imagepiece", knob, on)
    reading = Interpretation(metric, weighted, proportional, check_score("imagepiece", score, backbone), per, of, split)
    prunes = blocks("imagepiece", prune_at, backbone.stages(), backbone.depth)
    between = tuple(i for i in range(max(prunes, default=0)) if i not in prunes)
    merges = blocks("imagepiece", merge_at, between, backbone.depth)
    width = backbone.head_dim if metric == "key" else backbone.dim

    def build(merge: float, keep: float) -> Method:
        pruning = [(i, KeepAttended(keep, reading.score, fuse)) for i in prunes]  # first, where a block does both
        merging = [(i, Retokenize(p, merge, reading, width, backbone.num_patches)) for i in merges]
        return Method([*pruning, *merging])

    if gmacs is None and speed is None:
        return build(merge, keep)

    def at_strength(i: int) -> Method:
        """Merging grows to ``merge`` in 1000 steps; then 999 prune."""
        return build(merge * min(i, 1000) / 1000, min(1.0, 2 - i / 1000))

    return fit("imagepiece", backbone, at_strength, 1999, gmacs, speed)
