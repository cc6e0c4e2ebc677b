"""The softmax over keys that are kept: exact, with a gradient for those that are not."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_softmax(scores: Tensor, keep_mask: Tensor) -> Tensor:
    """Softmax over the keys that are alive, exactly, with a gradient for those that are not.

    scores [..., K]; alive 0/1, broadcastable. A dead key's weight is what it would get, capped by that of the best live
    one, times its zero. ε-smoothed forms leak at large scores (DynamicViT's does, arXiv 2106.02034).
    """
    best = scores.masked_fill(keep_mask == 0, -torch.inf).amax(dim=-1, keepdim=True).detach()
    best = best.masked_fill(best == -torch.inf, 0.0)  # no key is left
    below = scores - best
    weights = torch.where(below > 0, 0.0, below).exp() * keep_mask.to(
        scores.dtype
    )  # a clamp has no gradient at the best
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
