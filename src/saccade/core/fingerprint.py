"""A number of each image's own, for what is drawn by chance for an image and has to be the same in every batch."""

from __future__ import annotations

import torch
from torch import Tensor

FINGERPRINT = "fingerprint"  # in ``Tokens.state``, [B] int64; there where a gater of the plan says ``draws``
STEPS, MOST = 4096, 2**20  # of a pixel, in units of its standard deviation
FACTOR = 0x9E3779B1


def fingerprint(images: Tensor) -> Tensor:
    """images [B, C, h, w] -> [B] int64 in [0, 2^32): by whole numbers, whose sum does not depend on the batch."""
    values = (images.detach().float().flatten(1) * STEPS).round().clamp(-MOST, MOST).to(torch.int64) + MOST
    places = torch.arange(values.shape[1], device=images.device)
    weights = ((places + 1) * FACTOR & 0xFFFFFFFF) >> 16  # 16 bits: 2^18 pixels stay within 64
    return (values * weights).sum(1) & 0xFFFFFFFF
