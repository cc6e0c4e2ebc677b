"""Clusters of tokens: distances, nearest centres, and the reduction that gathers each cluster in its centre.

All clusters of all images at once; choices in fp32, without gradient. Padding of a ragged batch is a cluster by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.merging import Merge
from saccade.core.reduction import Reduction


@torch.no_grad()
def squared_distances(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Between all tokens, [B, N, D] -> [B, N, N] fp32: exactly symmetric and 0 on the diagonal; N²D MACs.

    Padding is at 0 from padding, and farther from tokens than any two of them are from each other.
    """
    x = x.float()
    x = x - x.mean(1, keepdim=True)  # what all have in common would cost digits
    gram = x @ x.transpose(1, 2)
    square = gram.diagonal(dim1=1, dim2=2)
    found = square.unsqueeze(2) + square.unsqueeze(1) - gram - gram.transpose(1, 2)
    itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    found = found.clamp(min=0).masked_fill(itself, 0.0)
    if valid is None:
        return found
    far = 2 * found.amax((1, 2), keepdim=True) + 1
    other = valid.unsqueeze(2) != valid.unsqueeze(1)
    neither = ~(valid.unsqueeze(2) | valid.unsqueeze(1))
    return torch.where(other, far, found).masked_fill(neither, 0.0)


@torch.no_grad()
def squared_distances_to(x: Tensor, centres: Tensor) -> Tensor:
    """Of tokens [B, N, D] to points [B, M, D] -> [B, N, M] fp32; NMD MACs."""
    x, centres = x.float(), centres.float()
    middle = x.mean(1, keepdim=True)
    x, centres = x - middle, centres - middle
    square = x.square().sum(-1).unsqueeze(2) + centres.square().sum(-1).unsqueeze(1)
    return (square - 2 * x @ centres.transpose(1, 2)).clamp(min=0)


@torch.no_grad()
def highest(score: Tensor, m: int, valid: Tensor | None = None) -> Tensor:
    """Places of the m highest of a score [B, N], best first, among equals the first; [B, m].

    Of padding the first place comes before all tokens, so that it can be a cluster, and the others after them.
    """
    if valid is not None:
        first = ~valid & ((~valid).cumsum(1) == 1)
        score = score.masked_fill(~valid, -torch.inf).masked_fill(first, torch.inf)
    return score.argsort(dim=1, descending=True, stable=True)[:, :m]


@torch.no_grad()
def nearest(distance: Tensor, centres: Tensor) -> Tensor:
    """The nearest of M clusters for each token, among equals the first; a centre is always its own cluster's.

    Args:
        distance: [B, N, M]; centres: places of the tokens that stand for the clusters, [B, M].

    Returns:
        [B, N] in 0 … M-1; no cluster is empty.
    """
    own = torch.arange(centres.shape[1], device=centres.device).expand_as(centres)
    return distance.argmin(dim=2).scatter(1, centres, own)


@torch.no_grad()
def cheapest(cost: Tensor, cluster: Tensor, centres: Tensor) -> Tensor:
    """The token of least cost in each of M clusters: cost [B, N] ≥ 0, cluster [B, N], centres [B, M] -> places [B, M].

    A centre stays unless another is better by 1e-4 of the cost: of two members none is, and noise must not decide.
    """
    n = cost.shape[1]
    cost = cost.scatter(1, centres, cost.gather(1, centres) * (1 - 1e-4))
    least = cost.new_full(centres.shape, torch.inf).scatter_reduce(1, cluster, cost, "amin")
    place = torch.arange(n, device=cost.device).expand_as(cluster)
    place = torch.where(cost == least.gather(1, cluster), place, n)
    found = place.new_full(centres.shape, n).scatter_reduce(1, cluster, place, "amin")
    return torch.where(found < n, found, centres)  # nothing is the least of what is not a number


def gathered(centres: Tensor, cluster: Tensor, weight: Tensor | None = None, proportional: bool = True) -> Reduction:
    """Each cluster becomes one token in the place of its centre; the new order is that of the places.

    Args:
        centres: [B, M] places of tokens; cluster: [B, N] in 0 … M-1.
        weight: [B, N] how much a token counts in its cluster's mean; None: its size.
        proportional: whether attention counts the new tokens by size (``Merge.proportional``).
    """
    keep, order = centres.sort(dim=1)
    cluster = order.argsort(dim=1).gather(1, cluster)
    stays = torch.zeros_like(cluster).scatter(1, keep, 1)
    src = stays.argsort(dim=1, stable=True)[:, : cluster.shape[1] - keep.shape[1]]
    return Reduction(keep, Merge(src, cluster.gather(1, src), weight=weight, proportional=proportional))


def of_centres(centres: Tensor, n: int) -> Tensor:
    """Weights [B, N] by which a new token has the features of its cluster's centre, not the members' mean."""
    return torch.zeros(centres.shape[0], n, device=centres.device).scatter(1, centres, 1.0)
