"""Reductions: where each patch token goes, for good — and ``reduce``, the only code that moves tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.tokens import Tokens


@dataclass(frozen=True)
class Reduction:
    """Hard reduction: each patch token is kept, merged into a kept one, fused into one new token, or dropped.

    Indices are int64 and count patch tokens (prefix tokens are never touched). A token that is in none of
    ``keep``, ``src`` and ``rest`` is dropped.
    """

    keep: Tensor  #                       [B, M]  tokens that stay, in their new order
    src: Tensor | None = None  #          [B, R]  tokens merged away …
    dst: Tensor | None = None  #          [B, R]  … each into this slot of ``keep`` (0 … M-1; several may share one)
    weight: Tensor | None = None  #       [B, N]  how much a token counts in a merge; None: its size
    rest: Tensor | None = None  #         [B, Q]  tokens that become one new last token …
    rest_weight: Tensor | None = None  #  [B, Q]  … Σ rest_weight · x (not divided by the sum of the weights)


@dataclass(frozen=True)
class SoftReduction:
    """Soft reduction: M new tokens, each a mixture of all tokens."""

    weights: Tensor  # [B, M, N]


def reduce(tokens: Tokens, reduction: Reduction | SoftReduction | None) -> Tokens:
    """Carry a reduction out on everything a token has: features, readings, size, validity, owner."""
    if reduction is None:
        return tokens
    reduced = _mix(tokens, reduction) if isinstance(reduction, SoftReduction) else _move(tokens, reduction)
    if tokens.left is None:
        return reduced
    newly_dropped = (reduced.owner < 0) & (tokens.owner >= 0)
    left = torch.where(newly_dropped.unsqueeze(-1), tokens.cells(tokens.patches), tokens.left)
    return replace(reduced, left=left)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: x [B, L, C], index [B, K] -> [B, K, C]."""
    return x.reshape(-1, x.shape[-1]).index_select(0, _flat(index, x.shape[1])).reshape(*index.shape, x.shape[-1])


def _flat(index: Tensor, length: int) -> Tensor:
    """Indices [B, K] into rows of images of ``length`` rows -> indices [B*K] into the flattened batch."""
    first = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * length
    return (index + first).reshape(-1)


def _move(tokens: Tokens, r: Reduction) -> Tokens:
    images, prefix = tokens.x.shape[0], tokens.num_prefix
    untouched = torch.arange(prefix, device=r.keep.device).expand(images, prefix)
    x = rows(tokens.x, torch.cat([untouched, r.keep + prefix], dim=1))
    key = None if tokens.key is None else rows(tokens.key, r.keep)
    size, valid, mask = tokens.size, tokens.valid, tokens.mask
    merging = replace(r, rest=None)
    slot = torch.full((images, tokens.num_patches), -1, dtype=torch.int64, device=x.device)
    slot = slot.scatter(1, r.keep, torch.arange(r.keep.shape[1], device=x.device).expand_as(r.keep))

    if r.src is not None and r.dst is not None:
        if size is None:
            size = x.new_ones(images, tokens.num_patches, dtype=torch.float32)
        weight = size if r.weight is None else r.weight
        total = _sums(weight, merging)
        share = weight.gather(1, r.src) / total.gather(1, r.dst)
        x = _join(x, r.dst + prefix, rows(tokens.x, r.src + prefix), share)
        if key is not None and tokens.key is not None:
            key = _join(key, r.dst, rows(tokens.key, r.src), share)
        slot = slot.scatter(1, r.src, r.dst)
        size = total if weight is size else _sums(size, merging)
    elif size is not None:
        size = size.gather(1, r.keep)
    if valid is not None:
        valid = valid.gather(1, r.keep)
    if mask is not None:  # a merged token takes part where any of its parts does
        mask = _sums(mask, merging).clamp(max=1)

    if r.rest is not None and r.rest_weight is not None:
        weight = r.rest_weight.unsqueeze(-1)  # [B, Q, 1]
        x = torch.cat([x, (weight * rows(tokens.x, r.rest + prefix)).sum(1, keepdim=True).to(x.dtype)], dim=1)
        if key is not None and tokens.key is not None:
            total = weight.sum(1, keepdim=True).clamp(min=1e-12)  # nobody may have looked at any of them
            mean = (weight * rows(tokens.key, r.rest)).sum(1, keepdim=True) / total
            key = torch.cat([key, mean.to(key.dtype)], dim=1)
        # The fused token is an ordinary one from here on (EViT): it counts once, and is always valid.
        size, valid, mask = (
            None if a is None else torch.cat([a, torch.ones_like(a[:, :1])], dim=1) for a in (size, valid, mask)
        )
        slot = slot.scatter(1, r.rest, r.keep.shape[1])

    scores = {name: _sums(getattr(tokens, name), r) for name in ("cls_attn", "received")}
    state = {"size": size, "valid": valid, "mask": mask, "key": key, **scores}
    return replace(tokens, x=x, owner=_forward(tokens.owner, slot), **state)


def _sums(a: Any, r: Reduction) -> Any:
    """Add up a quantity that is a mass (size, attention) over what each new token stands for: [B, N] -> [B, M(+1)]."""
    if a is None:
        return None
    new = a.gather(1, r.keep)
    if r.src is not None and r.dst is not None:
        new = new.scatter_add(1, r.dst, a.gather(1, r.src))
    if r.rest is not None:
        new = torch.cat([new, a.gather(1, r.rest).sum(1, keepdim=True)], dim=1)
    return new


def _join(kept: Tensor, dst: Tensor, moved: Tensor, share: Tensor) -> Tensor:
    """Pull each destination row towards its sources: exactly their weighted mean, touching R rows instead of all M.

    Works in place on ``kept`` [B, M, C], a fresh gather of the caller's, which spares a copy of the whole batch.
    """
    pull = (share.unsqueeze(-1) * (moved - rows(kept, dst))).to(kept.dtype)
    flat = kept.view(-1, kept.shape[-1])
    return flat.index_add_(0, _flat(dst, kept.shape[1]), pull.view(-1, pull.shape[-1])).view(kept.shape)


def _mix(tokens: Tokens, soft: SoftReduction) -> Tokens:
    x = torch.cat([tokens.x[:, : tokens.num_prefix], soft.weights.to(tokens.x.dtype) @ tokens.patches], dim=1)
    owner = _forward(tokens.owner, soft.weights.argmax(1))  # a cell follows the mixture its token gave most to
    none: dict[str, Any] = dict.fromkeys(("size", "valid", "mask", "key", "cls_attn", "received"))
    return replace(tokens, x=x, owner=owner, **none)


def _forward(owner: Tensor, slot: Tensor) -> Tensor:
    """Send every cell's owner [B, G] where its token went: slot [B, N] -> owner [B, G]."""
    return torch.where(owner >= 0, slot.gather(1, owner.clamp(min=0)), -1)
