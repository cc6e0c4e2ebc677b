"""``random_plus``: patches, heads and branches left out blindly — the control for all that learn what to leave out.

AdaViT's baselines (arXiv 2111.15668): "Random" is this policy on a trained model, "Random+" a model fine-tuned with it.
Each image has its own draw, in evaluation too; there every image has the same number of parts, where the released code
draws each part.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from saccade.core.fingerprint import FINGERPRINT
from saccade.core.gates import Gates
from saccade.core.plan import Backbone, Gater, Method
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import blocks, fraction, one_of, whole
from saccade.methods.common.budget import Used, gated, strength
from saccade.methods.common.matching import scramble, scrambled

AXES = ("patch", "head", "block")


class Blind(Gater):
    """In training every part of every image runs with a probability. In evaluation the same share of parts runs in each
    image, drawn for it by its pixels: a batch equals its images one by one.

    place: which of the blocks that draw it is, and of how many: branches are drawn among those of all.
    """

    draws = True

    def __init__(self, usage: float, axes: tuple[str, ...], heads: int, place: tuple[int, int], seed: int) -> None:
        super().__init__()
        self.usage, self.axes, self.heads, self.place, self.seed = usage, axes, heads, place, seed

    def forward(self, tokens: Tokens) -> Gates:
        nth, blocks = self.place
        patch = self._some(tokens, tokens.num_patches, 2 * nth + 1) if "patch" in self.axes else None
        head = self._some(tokens, self.heads, 2 * nth + 2) if "head" in self.axes else None
        attn = mlp = None
        if "block" in self.axes:
            count, first = (2, 0) if self.training else (2 * blocks, 2 * nth)
            attn, mlp = self._some(tokens, count, 0)[:, first : first + 2].unbind(1)
        return Gates(patch, head, attn, mlp)

    def _some(self, tokens: Tokens, count: int, stream: int) -> Tensor:
        """0/1 [B, count]; stream: of draws that have nothing to do with each other."""
        images, device = tokens.x.shape[0], tokens.x.device
        if self.training:
            return (torch.rand(images, count, device=device) < self.usage).float()
        own = tokens.state.get(FINGERPRINT)
        own = torch.zeros(images, dtype=torch.int64, device=device) if own is None else own
        places = scramble(own, self.seed + 1000 * stream).unsqueeze(1) ^ scrambled(count, 0, device)
        order = scramble(places, 0).argsort(dim=1, stable=True)
        return torch.zeros(images, count, device=device).scatter(1, order[:, : round(self.usage * count)], 1.0)


@register("random_plus", sources={"paper": "axes"}, baseline=True)
def random_plus(
    backbone: Backbone,
    usage: float = 0.7,
    axes: str | tuple[str, ...] = AXES,
    at: int | Iterable[int] | None = None,
    seed: int = 0,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Leave out patches, heads and branches at random: the control for every method that gates (arXiv 2111.15668).

    Args:
        usage: share of each axis that runs.
        axes: what is left out: 'patch', 'head', 'block' (attention and MLP branch), or several of them.
        at: 0-based blocks; None: all but the first, and but the last where only the class token is read after it.
        seed: of the choice.
        gmacs: find ``usage`` for this many GMACs instead, mean over draws, all that is off left out.
        speed: find it for this many times fewer MACs instead.
    """
    usage = fraction("random_plus", "usage", usage)
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in axes:
        one_of("random_plus", "axes", axis, AXES)
    whole("random_plus", "seed", seed, 0, 2**31 - 1)
    default = tuple(range(1, backbone.depth - (backbone.pool == "token" and backbone.depth > 2)))
    chosen = blocks("random_plus", at, default, backbone.depth)
    if gmacs is not None or speed is not None:
        usage = 1 - strength("random_plus", backbone, partial(_price, backbone, chosen, axes), 999, gmacs, speed) / 1000
    if usage == 1 or not axes:
        return Method(())
    return Method((i, Blind(usage, axes, backbone.heads, (nth, len(chosen)), seed)) for nth, i in enumerate(chosen))


def _price(backbone: Backbone, at: tuple[int, ...], axes: tuple[str, ...], i: int) -> float:
    """MACs that an image is expected to run at a usage of 1 - i / 1000, of whole parts."""

    def some(axis: str, count: int) -> float:
        return round((1 - i / 1000) * count) / count if axis in axes and count else 1.0

    n = backbone.num_patches
    used = Used(n * some("patch", n), some("head", backbone.heads), some("block", 2 * len(at)))
    return gated(backbone, dict.fromkeys(at, used))
