"""``avit``: each token halts when it has had enough blocks (A-ViT, CVPR 2022, arXiv 2112.07658).

Yin et al. read a halting score from the first channel of every token after each block, and need no parameters for it;
the backbone is trained to use that channel. To be trained. What halts is dropped here, and packed away in evaluation,
where the released code computes it on. Four things differ from that code. A halted token has no output at all. The mean
that is held to the prior is one over patch tokens and images (it left out the first image and not the class token), of
halting probabilities, which add up to 1 for every token, and so does the prior. The choice to go on has a gradient
through attention. And the class token is computed to the end of the network, though nothing that comes after its own
halt counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.plan import Backbone, Method, Reducer
from saccade.core.record import Trace
from saccade.core.reduction import Reduction
from saccade.core.registry import register
from saccade.core.timm_types import ViT
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import blocks
from saccade.methods.common.budget import Used, gated, strength
from saccade.methods.common.sampling import keep_where, there, with_best

EPSILON = 0.01  # a token halts when no more than this is left of its probability
SPREAD = 1.0  # of the prior, in blocks
LEFT, OUTPUT = "avit.left", "avit.output"  # notes


class Halt(Reducer):
    """Spend a part of what each token has left, and drop those that have spent all.

    What is left after each block, [B, P+G, blocks] from 1 down to exactly 0, is noted for prefix tokens and for cells,
    so that it follows patch tokens wherever other methods put them: a merged one has the mean of its cells. Beside it,
    the sum of each prefix token's outputs so far, by the parts spent, [B, P, D].
    """

    site = "block"
    ragged = True

    def __init__(self, gamma: float, beta: float) -> None:
        super().__init__()
        self.gamma, self.beta = gamma, beta

    def count(self, n: int) -> int | None:
        return None

    def forward(self, tokens: Tokens) -> Reduction:
        prefix, x = tokens.num_prefix, tokens.x.float()
        images, cells = tokens.owner.shape
        noted = tokens.state.get(LEFT, x.new_zeros(images, prefix + cells, 0))
        before = noted[..., -1] if noted.shape[-1] else x.new_ones(images, prefix + cells)
        of_tokens = torch.cat([before[:, :prefix], _mean_of_cells(tokens, before[:, prefix:])], dim=1)
        goal = of_tokens - (self.gamma * x[..., 0] + self.beta).sigmoid()
        after = goal.where(goal > EPSILON, 0.0)  # the last part is all that is left

        spent = (of_tokens - after)[:, :prefix, None]
        output = tokens.state.get(OUTPUT, 0.0) + spent * x[:, :prefix]
        of_cells = tokens.scatter_to_grid(after[:, prefix:, None], dropped=before[:, prefix:, None])
        left = torch.cat([noted, torch.cat([after[:, :prefix, None], of_cells], dim=1)], dim=-1)

        goal = goal[:, prefix:]
        score = there(tokens, goal.detach())
        gate = with_best((score > EPSILON).float() + (goal - goal.detach()), score)
        found = keep_where(gate > 0, gate if self.training else None)
        return Reduction(found.keep, valid=found.valid, gate=found.gate, state={LEFT: left, OUTPUT: output})


def _mean_of_cells(tokens: Tokens, values: Tensor) -> Tensor:
    """Mean of values [B, G] over each patch token's cells, [B, N]; 1 where it has none (padding, some mixtures)."""
    sums = values.new_zeros(values.shape[0], tokens.num_patches + 1).scatter_add(1, tokens.owner + 1, values)[:, 1:]
    area = tokens.area()
    return torch.where(area > 0, sums / area.clamp(min=1), 1.0)


class AViT(Method):
    """Classifies the sum of the class token's outputs by the parts spent; learns to spend early, and at a depth."""

    def __init__(self, steps: Iterable[tuple[int, Reducer]], ponder: float, prior: float, target: float) -> None:
        super().__init__(steps)
        self.ponder, self.prior, self.target = ponder, prior, target

    def head(self, vit: ViT, tokens: Tokens) -> Tensor | None:
        if OUTPUT not in tokens.state or vit.global_pool != "token":
            return None
        x, prefix = tokens.x, tokens.num_prefix
        left = tokens.state[LEFT][:, :prefix, -1:]  # is spent on the last block
        mixed = (tokens.state[OUTPUT] + left * x[:, :prefix].float()).to(x.dtype)
        return vit.forward_head(vit.norm(mixed))

    def loss(self, trace: Trace) -> dict[str, Tensor]:
        """Blocks computed and the part that the last one got (ACT's ponder cost), mean over patches; and the KL
        divergence of the mean halting distribution from a Gaussian around the target; times their weights."""
        if LEFT not in trace.state or trace.images == 0 or all(block.kept is None for block in trace.blocks):
            return {}
        left = trace.state[LEFT][:, -trace.first.shape[1] :]  # [B, G, …]
        owned = trace.blocks[-1].owner >= 0  # not dropped by another method
        share = (owned / owned.sum().clamp(min=1)).unsqueeze(-1)
        depth = len(trace.blocks)
        ends = left.new_tensor([*(i for i in self.at if i < depth), depth])  # blocks computed, at each chance to halt

        running = left > 0
        blocks = ends[0] + (running * ends.diff()).sum(-1, keepdim=True)
        last = left.where(running, 1.0).amin(-1, keepdim=True)
        spent = -F.pad(F.pad(left, (1, 0), value=1.0), (0, 1)).diff(dim=-1)
        mean = (share * spent).sum((0, 1))
        prior = (-(ends - self.target).square() / (2 * SPREAD**2)).log_softmax(0)
        divergence = (mean * (mean.clamp(min=1e-8).log() - prior)).sum()
        return {"ponder": self.ponder * (share * (blocks + last)).sum(), "halting": self.prior * divergence}


# No menu: untrained, nothing has to halt. `tune` tries the settings that weights were trained for.
@register("avit", sources={"code": "ponder prior target gamma beta"})
def avit(
    backbone: Backbone,
    at: int | Iterable[int] | None = None,
    ponder: float = 5e-4,
    prior: float = 1e-3,
    target: float | None = None,
    gamma: float = 10.0,
    beta: float | None = None,
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Let each token halt at its own depth (A-ViT, arXiv 2112.07658); it has to be trained.

    Where the model pools otherwise than by its class token, its own head reads what has not halted.

    Args:
        at: 0-based blocks before which tokens may halt; None: all but the first.
        ponder: weight of the mean number of blocks that a token goes through.
        prior: weight of the divergence from the prior, a Gaussian over the blocks.
        target: the block, counted from 1, that it is centred on; None: two thirds of the depth (8 of 12, as published).
        gamma: slope of the halting score, ``sigmoid(gamma · first channel + beta)``.
        beta: its offset; None: as published, -30 up to a width of 192 and -75 above. The first channel has to reach 3,
            or 7.5, before a token halts, which it hardly does before training: the wider the model, the longer its
            features.
        gmacs: centre the prior where this many GMACs per image (at its own size) are spent, should every token halt
            there, and not on ``target``.
        speed: the same for this many times fewer MACs.
    """
    last = float(backbone.depth)
    if gmacs is not None or speed is not None:
        target = _halt(backbone, strength("avit", backbone, partial(_price, backbone), 1000, gmacs, speed))
    target = last * 2 / 3 if target is None else target
    beta = (-30.0 if backbone.dim <= 192 else -75.0) if beta is None else beta
    ranges = {"ponder": (ponder, 0.0, 1e6), "prior": (prior, 0.0, 1e6), "target": (target, 1.0, last)}
    ranges |= {"gamma": (gamma, -1e6, 1e6), "beta": (beta, -1e6, 1e6)}
    for knob, (value, low, high) in ranges.items():
        if isinstance(value, bool) or not low <= value <= high:
            raise UserError(f"avit: {knob}={value!r} is not a number in [{low:g}, {high:g}]")
    chosen = blocks("avit", at, tuple(range(1, backbone.depth)), backbone.depth)
    return AViT([(i, Halt(gamma, beta)) for i in chosen], ponder, prior, target)


def _halt(backbone: Backbone, i: int) -> float:
    """Blocks that tokens go through, from all to one."""
    return backbone.depth - (backbone.depth - 1) * i / 1000


def _price(backbone: Backbone, i: int) -> float:
    """MACs of an image all of whose tokens halt there: the part of a block is that share of the tokens."""
    halt, n = _halt(backbone, i), backbone.num_patches
    used = {block: Used(n * min(1.0, max(0.0, halt - block))) for block in range(backbone.depth)}
    return gated(backbone, used, short=True)
