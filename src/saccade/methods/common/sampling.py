"""Choices that differ from image to image: noisy while they are learned, ragged where they are carried out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saccade.core.reduction import Reduction
from saccade.core.tokens import Tokens


def choose(logits: Tensor, noise: float, tau: float = 1.0, threshold: float = 0.5) -> Tensor:
    """0/1 of each logit, in fp32, straight-through: exactly 0 or 1, with the gradient of a sigmoid.

    Args:
        noise: how much of a draw it is. 1: 1 with probability ``sigmoid(logits)`` whatever tau is (binary Gumbel noise,
            arXiv 1611.00712, from torch's global generator). 0: 1 where ``sigmoid(logits) > threshold``. Between: a
            draw by ``sigmoid(logits / noise)``, for training that ends as evaluation goes on.
        tau: the gradient is y (1 - y) / tau of ``y = sigmoid(logits / tau)``, noise included.
    """
    logits = logits if logits.dtype == torch.float32 else logits.float()
    if not noise and not (torch.is_grad_enabled() and logits.requires_grad):
        return (logits > logit(threshold)).float()
    if noise:
        drawn = logits + noise * torch.rand_like(logits).clamp(1e-7, 1 - 1e-7).logit()  # the difference of two Gumbels
        hard = drawn > 0
    else:
        drawn, hard = logits, logits > logit(threshold)
    soft = (drawn / tau).sigmoid()
    return hard.float() + (soft - soft.detach())


def logit(share: float) -> float:
    """The logit of a probability; ±inf at the ends."""
    return math.log(share / (1 - share)) if 0 < share < 1 else math.copysign(math.inf, share - 0.5)


def present(tokens: Tokens) -> Tensor:
    """Patch tokens that are neither padding nor dropped already, [B, N] bool."""
    return there(tokens, tokens.x.new_zeros(tokens.x.shape[0], tokens.num_patches)) == 0


def there(tokens: Tokens, score: Tensor) -> Tensor:
    """The score [B, N] of patch tokens, -inf for padding and for what is dropped already."""
    for known in (tokens.valid, tokens.keep_mask):
        score = score if known is None else score.masked_fill(known == 0, -torch.inf)
    return score


def mean_of(x: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over tokens, which count as much as they weigh [B, N] (None: all alike): x [B, N, D] -> [B, D]."""
    if weights is None:
        return x.mean(1)
    share = weights / weights.sum(1, keepdim=True).clamp(min=1e-6)  # all may be gone
    return (share.unsqueeze(-1).to(x.dtype) * x).sum(1)


def with_best(chosen: Tensor, score: Tensor) -> Tensor:
    """Also choose each image's token of the highest score, so that there is one: [B, N] 0/1 (gradients go through)."""
    best = torch.zeros_like(score).scatter(1, score.detach().argmax(dim=1, keepdim=True), 1.0)
    return chosen + best * (1 - chosen.detach())


def keep_where(chosen: Tensor, gate: Tensor | None = None, order: Tensor | None = None) -> Reduction:
    """Keep the tokens where ``chosen`` [B, N] bool is true, another number in every image; in their order, or in this.

    Waits for the device: the most that an image keeps decides how long the batch is. In a graph all have a place, so
    that shapes stay fixed; and in training, where it is given the same choice as a straight-through ``gate``.
    """
    lost = ~chosen.any(1, keepdim=True)  # of what is not a number nothing is chosen: the first token stays
    chosen = torch.cat([chosen[:, :1] | lost, chosen[:, 1:]], dim=1)
    static = gate is not None or torch.compiler.is_compiling() or not len(chosen)
    most = chosen.shape[1] if static else int(chosen.sum(1).max())
    listed = chosen if order is None else chosen.gather(1, order)
    keep = listed.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    keep = keep if order is None else order.gather(1, keep)
    return Reduction(keep, valid=chosen.gather(1, keep), gate=gate)
