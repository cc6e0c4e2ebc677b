"""The softmax over keys that are kept: exact, with a gradient for those that are not."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 60.0  # e^60 stays finite in fp32, and so do its products with gradients


def masked_softmax(scores: Tensor, keep_mask: Tensor, cap: float = 0.0) -> Tensor:
    """Softmax over the keys that are kept, exactly, with a gradient for those that are not.

    ε-smoothed forms leak at large scores (DynamicViT's does, arXiv 2106.02034).

    Args:
        scores: [..., K].
        keep_mask: 0/1, broadcastable; a dropped key's weight is what it would get, times its zero.
        cap: by how much the score of a dropped key may exceed the best kept one's; what is above counts as this.
            0: it would get no more than the best; ``LARGEST``: all that it would get, as far as fp32 holds it.
    """
    wide = scores if scores.dtype in (torch.float32, torch.float64) or not cap else scores.float()
    best = wide.masked_fill(keep_mask == 0, -torch.inf).amax(dim=-1, keepdim=True).detach()
    best = best.masked_fill(best == -torch.inf, 0.0)  # no key is left
    above = wide - best
    weights = torch.where(above > cap, cap, above).exp() * keep_mask.to(wide.dtype)  # a clamp has no gradient at cap
    shares = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    return shares if shares.dtype == scores.dtype else shares.to(scores.dtype)
