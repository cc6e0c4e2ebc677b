"""Reductions: where each patch token goes, for good — and ``reduce``, the only code that moves tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.constant_cache import constant
from saccade.core.lazy import changed, unread
from saccade.core.provenance import Moved, follow
from saccade.core.tokens import READINGS, Tokens


@dataclass(frozen=True)
class Reduction:
    """Hard reduction: each patch token is kept, merged into a kept one, fused into one new token, or dropped.

    Indices are int64 and count patch tokens (prefix tokens are never touched). A token that is in none of
    ``keep``, ``src`` and ``rest`` is dropped.
    """

    keep: Tensor  #                       [B, M]  tokens that stay, in their new order
    src: Tensor | None = None  #          [B, R]  tokens merged away …
    dst: Tensor | None = None  #          [B, R]  … each into this slot of ``keep`` (0 … M-1; several may share one)
    merge_gate: Tensor | None = None  #   [B, R]  0/1, straight-through: which of ``src`` merge after all; None: all
    weight: Tensor | None = None  #       [B, N]  how much a token counts in a merge; None: its size
    fuse: Tensor | None = None  #         [B, Q]  tokens that become one new last token …
    fuse_weight: Tensor | None = None  #  [B, Q]  … Σ fuse_weight · x (not divided by the sum of the weights)
    target_norm: Tensor | None = None  #  [B, M]  length that each merged token is brought to; None: that of the mean
    proportional: bool = True  #          False: from here on attention counts a merged token once (Tokens.proportional)
    valid: Tensor | None = None  #        [B, M] bool  slots of ``keep`` that are real; others pad; None: all that were
    gate: Tensor | None = None  #         [B, N]  0/1, straight-through: what stays, as a mask, for masked execution
    state: Mapping[str, Tensor] | None = None  # to be remembered from here on (``Tokens.state``)


@dataclass(frozen=True)
class SoftReduction:
    """Soft reduction: M new tokens, each a mixture of all tokens."""

    weights: Tensor  #                 [B, M, N]
    values: Tensor | None = None  #    [B, N, D]  what is mixed; None: the tokens as they are
    remember: bool = False  #          keep the tokens that were mixed in ``Tokens.unmixed`` …
    onto: Tokens | None = None  #      … to which a later mixture, of one row for each of them, is added


def reduce(tokens: Tokens, reduction: Reduction | SoftReduction | None) -> Tokens:
    """Carry a reduction out on everything a token has: features, readings, size, validity, owner."""
    if reduction is None:
        return tokens
    if isinstance(reduction, SoftReduction):
        reduced = _mix(tokens, reduction)
    else:
        reduced = _move(_noted(tokens, reduction), reduction)
    if tokens.dropped_features is None:
        return reduced
    newly_dropped = (reduced.owner < 0) & (tokens.owner >= 0)
    left = torch.where(newly_dropped.unsqueeze(-1), tokens.scatter_to_grid(tokens.patches), tokens.dropped_features)
    return changed(reduced, dropped_features=left)


def hide(tokens: Tokens, r: Reduction) -> Tokens:
    """Masked execution of a reduction with a gate: tokens stay where they are, and some take no part any more.

    What is merged is moved as always, but among all tokens; nothing can be fused. What is dropped keeps its cells.
    """
    assert r.gate is not None and r.fuse is None and r.target_norm is None
    alive, tokens = tokens.keep_mask, _noted(tokens, r)
    if r.src is not None and r.dst is not None:
        every = torch.arange(tokens.num_patches, device=r.keep.device).expand(len(r.keep), -1)
        in_place = Reduction(every, r.src, r.keep.gather(1, r.dst), r.merge_gate, r.weight, proportional=r.proportional)
        tokens = _move(changed(tokens, keep_mask=None), in_place)
    return changed(tokens, keep_mask=r.gate if alive is None else alive * r.gate)


def _noted(tokens: Tokens, r: Reduction) -> Tokens:
    return tokens if r.state is None else changed(tokens, state={**tokens.state, **r.state})


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: x [B, L, C], index [B, K] -> [B, K, C]."""
    images, length, width = x.shape
    if torch.compiler.is_compiling():
        index = index + length * torch.arange(images, device=index.device).unsqueeze(1)
    elif images != 1:
        index = index + length * _counting(images, index.device)
    return F.embedding(index, x.reshape(-1, width))  # copies whole rows; a gather by element takes five times as long


@constant
def _counting(images: int) -> np.ndarray:
    """0, 1, … [images, 1]."""
    return np.arange(images)[:, None]


def _move(tokens: Tokens, r: Reduction) -> Tokens:
    prefix, n = tokens.num_prefix, tokens.num_patches
    first, patches = tokens.x.split([prefix, n], dim=1)
    size, key, valid = tokens.size, tokens.key, tokens.valid
    value = (
        None if tokens.value_norm is None else tokens.value_norm.gather(1, r.keep)
    )  # of a merged token: of the one that stays
    merging = r if r.fuse is None else replace(r, fuse=None)

    if r.src is None or r.dst is None:
        x, key = rows(patches, r.keep), None if key is None else rows(key, r.keep)
        size = None if size is None else size.gather(1, r.keep)
    elif r.weight is None and r.merge_gate is None:
        x, total = _means(patches, size, merging)
        key = None if key is None else _means(key, size, merging)[0]
        size = total
    else:
        x, key, size = _pulled(tokens, patches, merging)
    x = x if r.target_norm is None or r.dst is None else _stretch(x, r.dst, r.target_norm)
    if valid is not None:
        valid = valid.gather(1, r.keep)
    if r.valid is not None:
        valid = r.valid if valid is None else valid & r.valid
    # a merged token takes part where any of its parts does (a clamp would stop the gradient at 1, which most are)
    mask, alive = (
        None if a is None else torch.where((some := _sums(a, merging)) > 1, 1.0, some)
        for a in (tokens.gate_mask, tokens.keep_mask)
    )
    parts = [first, x]
    if r.fuse is not None and r.fuse_weight is not None:
        weight = r.fuse_weight.unsqueeze(-1)  # [B, Q, 1]
        parts.append((weight * rows(patches, r.fuse)).sum(1, keepdim=True).to(x.dtype))
        if key is not None and tokens.key is not None:
            total = weight.sum(1, keepdim=True).clamp(min=1e-12)  # their attention may sum to zero
            mean = (weight * rows(tokens.key, r.fuse)).sum(1, keepdim=True) / total
            key = torch.cat([key, mean.to(key.dtype)], dim=1)
        if value is not None and tokens.value_norm is not None:
            value = torch.cat([value, tokens.value_norm.gather(1, r.fuse).mean(1, keepdim=True)], dim=1)
        # The fused token is an ordinary one from here on (EViT): it counts once, and is always valid.
        size, valid, mask, alive = (
            None if a is None else torch.cat([a, torch.ones_like(a[:, :1])], dim=1) for a in (size, valid, mask, alive)
        )

    scores = {name: _sums(getattr(tokens, name), r) for name in ("cls_attn", "attn_received")}
    state = {
        "size": size,
        "valid": valid,
        "gate_mask": mask,
        "keep_mask": alive,
        "key": key,
        "value_norm": value,
        **scores,
    }
    proportional = tokens.proportional if r.proportional else False
    owner = Moved(unread(tokens), r, n)
    return changed(tokens, x=torch.cat(parts, dim=1), owner=owner, proportional=proportional, **state)


def _means(x: Tensor, size: Tensor | None, r: Reduction) -> tuple[Tensor, Tensor]:
    """Merged tokens are the means of their parts by size: x [B, N, C] -> [B, M, C], and the new sizes [B, M] fp32.

    Features times size and size itself travel as one tensor, in fp32: one gather, one sum, one division.
    """
    assert r.src is not None and r.dst is not None
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if size is None:
        carried = torch.cat([wide, wide.new_ones(*wide.shape[:2], 1)], dim=2)
    else:
        weight = (size if size.dtype == wide.dtype else size.to(wide.dtype)).unsqueeze(2)
        carried = torch.cat([wide * weight, weight], dim=2)
    kept, merged = rows(carried, torch.cat([r.keep, r.src], dim=1)).split([r.keep.shape[1], r.src.shape[1]], dim=1)
    sums = kept.scatter_add(1, r.dst.unsqueeze(2).expand_as(merged), merged)
    features, total = sums.split([x.shape[2], 1], dim=2)
    mean = features / total
    return mean if wide is x else mean.to(x.dtype), total.squeeze(2)


def _pulled(tokens: Tokens, patches: Tensor, r: Reduction) -> tuple[Tensor, Tensor | None, Tensor]:
    """As ``_means``, by other weights than the sizes or where a merge may be masked out: features, keys, sizes.

    Each destination is pulled towards its sources, so that a weight of zero does no harm where nothing merges.
    """
    assert r.src is not None and r.dst is not None
    size = tokens.size
    if size is None:
        size = patches.new_ones(patches.shape[:2], dtype=torch.float32)
    weight = size if r.weight is None else r.weight
    total = _sums(weight, r)
    share = weight.gather(1, r.src) / total.gather(1, r.dst)
    share = (share if r.merge_gate is None else share * r.merge_gate).unsqueeze(2)

    def pull(values: Tensor) -> Tensor:
        assert r.src is not None and r.dst is not None
        kept = rows(values, r.keep)
        change = (share * (rows(values, r.src) - rows(kept, r.dst))).to(kept.dtype)
        return kept.scatter_add(1, r.dst.unsqueeze(2).expand_as(change), change)

    key = None if tokens.key is None else pull(tokens.key)
    return pull(patches), key, total if weight is size else _sums(size, r)


def _sums(a: Any, r: Reduction) -> Any:
    """Add up a quantity that is a mass (size, attention) over what each new token stands for: [B, N] -> [B, M(+1)]."""
    if a is None:
        return None
    new = a.gather(1, r.keep)
    if r.src is not None and r.dst is not None:
        given = a.gather(1, r.src)
        new = new.scatter_add(1, r.dst, given if r.merge_gate is None else given * r.merge_gate)
    if r.fuse is not None:
        new = torch.cat([new, a.gather(1, r.fuse).sum(1, keepdim=True)], dim=1)
    return new


def _stretch(x: Tensor, dst: Tensor, norm: Tensor) -> Tensor:
    """Bring the merged rows of x [B, M, D] to a length each; all others are multiplied by exactly 1."""
    merged = torch.zeros_like(norm).scatter(1, dst, torch.ones_like(dst, dtype=norm.dtype)) > 0
    scale = torch.where(merged, norm / x.float().norm(dim=-1).clamp(min=1e-6), 1.0)
    return x * scale.unsqueeze(-1).to(x.dtype)


def _mix(tokens: Tokens, soft: SoftReduction) -> Tokens:
    values = tokens.patches if soft.values is None else soft.values
    new = soft.weights.to(tokens.x.dtype) @ values.to(tokens.x.dtype)
    if soft.onto is not None:  # back to what there was, each with its own mixture of what there is now
        x = torch.cat([tokens.x[:, : tokens.num_prefix], soft.onto.patches + new], dim=1)
        owner = torch.where(tokens.owner >= 0, soft.onto.owner, -1)
        return changed(soft.onto, x=x, owner=owner, dropped_features=tokens.dropped_features, state=tokens.state)
    x = torch.cat([tokens.x[:, : tokens.num_prefix], new], dim=1)
    owner = follow(tokens.owner, soft.weights.argmax(1))  # a cell follows the mixture its token gave most to
    none: dict[str, Any] = dict.fromkeys(("size", "valid", "gate_mask", "keep_mask", *READINGS))
    return changed(tokens, x=x, owner=owner, unmixed=tokens if soft.remember else tokens.unmixed, **none)
