"""Gates: which parts of one block run for each image — masked in training, skipped in inference, one definition.

A token that nobody attends to and that gets no update is absent. Masked execution computes everything and multiplies;
sparse execution gathers the images and tokens that are on, computes those, and adds them back. They are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.tokens import Tokens

Branch = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]  # (x, key bias, heads) -> update of x


@dataclass(frozen=True)
class Gates:
    """0/1 decisions for one block, float (straight-through in training); None: everything runs."""

    patch: Tensor | None = None  # [B, N]  patch tokens that attend, are attended to, and are updated
    head: Tensor | None = None  #  [B, H]  attention heads
    attn: Tensor | None = None  #  [B]     the attention branch
    mlp: Tensor | None = None  #   [B]     the MLP branch


def straight_through(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Hard 0/1 of ``sigmoid(logits) > threshold`` whose gradient is the sigmoid's."""
    soft = logits.sigmoid()
    return (soft > threshold).to(soft.dtype) - soft.detach() + soft


def residual(
    tokens: Tokens,
    branch: Branch,
    bias: Tensor | None = None,
    on: Tensor | None = None,
    heads: Tensor | None = None,
    *,
    sparse: bool = False,
) -> tuple[Tensor, int]:
    """``x + branch(x)`` for the images that are on [B] and the tokens that take part (``tokens.mask``), x elsewhere.

    ``bias`` is the tokens' key bias, for a branch that attends. Returns the new x [B, L, D] and how many tokens were
    computed for each image that ran.
    """
    if on is None and tokens.mask is None:
        return tokens.x + branch(tokens.x, bias, heads), tokens.x.shape[1]
    return (_sparse if sparse else _masked)(tokens, branch, bias, on, heads)


Ran = tuple[Tensor, int]


def _masked(tokens: Tokens, branch: Branch, bias: Tensor | None, on: Tensor | None, heads: Tensor | None) -> Ran:
    update = branch(tokens.x, bias, heads)
    if tokens.mask is not None:
        update = update * tokens.of_all(tokens.mask, 1.0).unsqueeze(-1).to(update.dtype)
    if on is not None:
        update = update * on[:, None, None].to(update.dtype)
    return tokens.x + update, tokens.x.shape[1]


def _sparse(tokens: Tokens, branch: Branch, bias: Tensor | None, on: Tensor | None, heads: Tensor | None) -> Ran:
    """Only the images that are on; of them only the tokens that take part, padded to the longest of these images."""
    x = tokens.x
    images = torch.arange(x.shape[0], device=x.device) if on is None else on.nonzero().squeeze(1)
    if images.numel() == 0:
        return x, 0
    live, heads = x[images], None if heads is None else heads[images]
    bias = None if bias is None else bias[images]
    if tokens.mask is None:
        return x.index_add(0, images, branch(live, bias, heads)), x.shape[1]
    takes_part = tokens.of_all(tokens.mask, 1.0)[images] > 0  # [b, L]
    longest = int(takes_part.sum(1).max())
    index = (~takes_part).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]  # those taking part first, in order
    real = takes_part.gather(1, index)
    if bias is not None:  # it already hides the tokens that fill up the shorter images
        bias = None if tokens.size is None and tokens.valid is None and bool(real.all()) else bias.gather(1, index)
    spread = index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    update = branch(live.gather(1, spread), bias, heads) * real.unsqueeze(-1)
    return x.index_add(0, images, torch.zeros_like(live).scatter(1, spread, update.to(x.dtype))), longest
