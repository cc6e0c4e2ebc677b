"""Which token answers for which object, and the loss that follows: DETR's (arXiv 2005.12872) with OWL-ViT's weights.

Targets are [B, M, 5], as ``detection_data.pad`` makes them: (x1, y1, x2, y2) in shares of the image, and the label, -1
for padding. Predictions and the L1 distance use (cx, cy, w, h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from saccade.errors import UserError

TINY = 1e-8


@dataclass(frozen=True)
class Weights:
    """Shares of the three parts, in matching and in the loss; OWL-ViT's own (its public configuration)."""

    focal: float = 1.0
    l1: float = 1.0
    giou: float = 1.0
    alpha: float = 0.3  # of the focal loss: how much an object counts against what is none
    gamma: float = 2.0


def corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) [..., 4] -> (x1, y1, x2, y2)."""
    return box_convert(boxes, "cxcywh", "xyxy")


def centres(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) [..., 4] -> (cx, cy, w, h)."""
    return box_convert(boxes, "xyxy", "cxcywh")


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Tensor, weights: Weights) -> Tensor:
    """The token that answers for each object, [B, M] int64; -1 for padding, and where tokens are fewer than objects.

    The assignment of the least total cost, one token an object: focal cost of the object's class, L1 of the boxes and
    -gIoU, weighted. Costs are made for the whole batch at once and leave the device once; assigning runs on the CPU.

    Args:
        logits: [B, N, K].
        boxes: [B, N, 4], (cx, cy, w, h).
        targets: [B, M, 5], as ``pad`` makes them.
    """
    assign = _solver()
    wanted, labels = targets[..., :4], targets[..., 4].long()
    p = logits.float().sigmoid()
    found = (1 - p) ** weights.gamma * weights.alpha * -(p + TINY).log()
    nothing = p**weights.gamma * (1 - weights.alpha) * -(1 - p + TINY).log()
    index = labels.clamp(min=0).unsqueeze(1).expand(-1, logits.shape[1], -1)
    cost = weights.focal * (found - nothing).gather(2, index)  # [B, N, M]
    cost = cost + weights.l1 * torch.cdist(boxes.float(), centres(wanted), p=1)
    shape = (*cost.shape, 4)
    pairs = corners(boxes.float()).unsqueeze(2).expand(shape), wanted.unsqueeze(1).expand(shape)
    cost = cost + weights.giou * (generalized_box_iou_loss(*pairs) - 1)
    costs = cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy()  # a loss that is not finite is told where it is summed
    tokens = np.full(labels.shape, -1, dtype=np.int64)
    for i, present in enumerate((labels >= 0).cpu().numpy()):
        rows, columns = assign(costs[i][:, present])
        tokens[i, np.flatnonzero(present)[columns]] = rows
    return torch.from_numpy(tokens).to(logits.device)


def terms(logits: Tensor, boxes: Tensor, targets: Tensor, weights: Weights) -> dict[str, Tensor]:
    """Loss of each part, weighted, summed over images, each image's divided by its number of objects.

    Focal loss over all tokens and classes, of which an object's own at its matched token is one; L1 and 1 - gIoU of
    the matched boxes. Arguments as for ``match``.
    """
    tokens = match(logits, boxes, targets, weights)
    image, object_ = torch.nonzero(tokens >= 0, as_tuple=True)
    token, rows = tokens[image, object_], targets[image, object_]
    count = (targets[..., 4] >= 0).sum(1).clamp(min=1).to(torch.float32)
    truth = torch.zeros_like(logits, dtype=torch.float32)
    truth[image, token, rows[:, 4].long()] = 1.0
    focal = sigmoid_focal_loss(logits.float(), truth, weights.alpha, weights.gamma)
    chosen, wanted = boxes.float()[image, token], rows[:, :4]
    l1 = (chosen - centres(wanted)).abs().sum(1)
    giou = generalized_box_iou_loss(corners(chosen), wanted)
    return {
        "focal": weights.focal * (focal.sum((1, 2)) / count).sum(),
        "l1": weights.l1 * (l1 / count[image]).sum(),
        "giou": weights.giou * (giou / count[image]).sum(),
    }


def _solver() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("matching boxes needs SciPy: pip install 'saccade[tasks]'") from None
    return linear_sum_assignment
