"""``random_plus``: patches, heads and branches left out blindly — the control for all that learn what to leave out.

AdaViT's baselines (arXiv 2111.15668): "Random" is this policy on a trained model, "Random+" a model fine-tuned with it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from saccade.core.gates import Gates
from saccade.core.plan import Backbone, Gater, Method
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.methods.common.arguments import blocks, fraction, one_of, whole
from saccade.methods.common.matching import scramble

AXES = ("patch", "head", "block")


class Blind(Gater):
    """In training every part of every image runs with a probability; in evaluation the same share of parts, always the
    same ones: a batch equals its images one by one."""

    def __init__(self, usage: float, axes: tuple[str, ...], heads: int, branches: tuple[bool, bool], seed: int) -> None:
        super().__init__()
        self.usage, self.axes, self.heads, self.branches, self.seed = usage, axes, heads, branches, seed

    def forward(self, tokens: Tokens) -> Gates:
        patch = self._some(tokens, tokens.num_patches, 0) if "patch" in self.axes else None
        head = self._some(tokens, self.heads, 1) if "head" in self.axes else None
        attn = mlp = None
        if "block" in self.axes:
            attn, mlp = self._both(tokens).unbind(1)
        return Gates(patch, head, attn, mlp)

    def _some(self, tokens: Tokens, count: int, stream: int) -> Tensor:
        images, device = tokens.x.shape[0], tokens.x.device
        if self.training:
            return (torch.rand(images, count, device=device) < self.usage).float()
        order = scramble(torch.arange(count, device=device), self.seed + stream).argsort(stable=True)
        on = torch.zeros(count, device=device).index_fill(0, order[: round(self.usage * count)], 1.0)
        return on.expand(images, -1)

    def _both(self, tokens: Tokens) -> Tensor:
        if self.training:
            return self._some(tokens, 2, 2)
        return torch.tensor(self.branches, dtype=torch.float32, device=tokens.x.device).expand(tokens.x.shape[0], -1)


@register("random_plus", baseline=True)
def random_plus(
    backbone: Backbone,
    usage: float = 0.7,
    axes: str | tuple[str, ...] = AXES,
    at: int | Iterable[int] | None = None,
    seed: int = 0,
) -> Method:
    """Leave out patches, heads and branches at random: the control for every method that gates (arXiv 2111.15668).

    Args:
        usage: share of each axis that runs.
        axes: what is left out: 'patch', 'head', 'block' (attention and MLP branch), or several of them.
        at: 0-based blocks; None: all but the first, and but the last where only the class token is read after it.
        seed: of the choice.
    """
    usage = fraction("random_plus", "usage", usage)
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in axes:
        one_of("random_plus", "axes", axis, AXES)
    whole("random_plus", "seed", seed, 0, 2**31 - 1)
    default = tuple(range(1, backbone.depth - (backbone.pool == "token" and backbone.depth > 2)))
    chosen = blocks("random_plus", at, default, backbone.depth)
    if usage == 1 or not axes:
        return Method(())
    order = scramble(torch.arange(2 * len(chosen), device="cpu"), seed).argsort(stable=True)
    on = torch.zeros(2 * len(chosen), dtype=torch.bool)
    on[order[: round(usage * len(on))]] = True
    branches = on.view(-1, 2).tolist()
    steps = zip(chosen, branches, strict=True)
    return Method((i, Blind(usage, axes, backbone.heads, tuple(both), seed + 1000 * i)) for i, both in steps)
