"""Reductions: where each patch token goes, for good — and ``reduce``, the only code that moves tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.tokens import READINGS, Tokens


@dataclass(frozen=True)
class Reduction:
    """Hard reduction: each patch token is kept, merged into a kept one, fused into one new token, or dropped.

    Indices are int64 and count patch tokens (prefix tokens are never touched). A token that is in none of
    ``keep``, ``src`` and ``rest`` is dropped.
    """

    keep: Tensor  #                       [B, M]  tokens that stay, in their new order
    src: Tensor | None = None  #          [B, R]  tokens merged away …
    dst: Tensor | None = None  #          [B, R]  … each into this slot of ``keep`` (0 … M-1; several may share one)
    moved: Tensor | None = None  #        [B, R]  0/1, straight-through: which of ``src`` merge after all; None: all
    weight: Tensor | None = None  #       [B, N]  how much a token counts in a merge; None: its size
    rest: Tensor | None = None  #         [B, Q]  tokens that become one new last token …
    rest_weight: Tensor | None = None  #  [B, Q]  … Σ rest_weight · x (not divided by the sum of the weights)
    norm: Tensor | None = None  #         [B, M]  length that each merged token is brought to; None: that of the mean
    proportional: bool = True  #          False: from here on attention counts a merged token once (Tokens.proportional)
    valid: Tensor | None = None  #        [B, M] bool  slots of ``keep`` that are real; others pad; None: all that were
    gate: Tensor | None = None  #         [B, N]  0/1, straight-through: what stays, as a mask, for masked execution
    notes: Mapping[str, Tensor] | None = None  # to be remembered from here on (``Tokens.notes``)


@dataclass(frozen=True)
class SoftReduction:
    """Soft reduction: M new tokens, each a mixture of all tokens."""

    weights: Tensor  #                 [B, M, N]
    values: Tensor | None = None  #    [B, N, D]  what is mixed; None: the tokens as they are
    remember: bool = False  #          keep the tokens that were mixed in ``Tokens.before`` …
    onto: Tokens | None = None  #      … to which a later mixture, of one row for each of them, is added


def reduce(tokens: Tokens, reduction: Reduction | SoftReduction | None) -> Tokens:
    """Carry a reduction out on everything a token has: features, readings, size, validity, owner."""
    if reduction is None:
        return tokens
    if isinstance(reduction, SoftReduction):
        reduced = _mix(tokens, reduction)
    else:
        reduced = _move(_noted(tokens, reduction), reduction)
    if tokens.left is None:
        return reduced
    newly_dropped = (reduced.owner < 0) & (tokens.owner >= 0)
    left = torch.where(newly_dropped.unsqueeze(-1), tokens.cells(tokens.patches), tokens.left)
    return replace(reduced, left=left)


def hide(tokens: Tokens, r: Reduction) -> Tokens:
    """Masked execution of a reduction with a gate: tokens stay where they are, and some take no part any more.

    What is merged is moved as always, but among all tokens; nothing can be fused. What is dropped keeps its cells.
    """
    assert r.gate is not None and r.rest is None and r.norm is None
    alive, tokens = tokens.alive, _noted(tokens, r)
    if r.src is not None and r.dst is not None:
        every = torch.arange(tokens.num_patches, device=r.keep.device).expand(len(r.keep), -1)
        in_place = Reduction(every, r.src, r.keep.gather(1, r.dst), r.moved, r.weight, proportional=r.proportional)
        tokens = _move(replace(tokens, alive=None), in_place)
    return replace(tokens, alive=r.gate if alive is None else alive * r.gate)


def _noted(tokens: Tokens, r: Reduction) -> Tokens:
    return tokens if r.notes is None else replace(tokens, notes={**tokens.notes, **r.notes})


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
    value = None if tokens.value is None else tokens.value.gather(1, r.keep)  # of a merged token: of the one that stays
    size, valid, mask, alive = tokens.size, tokens.valid, tokens.mask, tokens.alive
    merging = replace(r, rest=None)
    slot = torch.full((images, tokens.num_patches), -1, dtype=torch.int64, device=x.device)
    places = torch.arange(r.keep.shape[1], device=x.device).expand_as(r.keep)
    slot = slot.scatter(1, r.keep, places if r.valid is None else places.masked_fill(~r.valid, -1))

    if r.src is not None and r.dst is not None:
        if size is None:
            size = x.new_ones(images, tokens.num_patches, dtype=torch.float32)
        weight = size if r.weight is None else r.weight
        total = _sums(weight, merging)
        share = weight.gather(1, r.src) / total.gather(1, r.dst)
        share = share if r.moved is None else share * r.moved
        x = _join(x, r.dst + prefix, rows(tokens.x, r.src + prefix), share)
        x = x if r.norm is None else _stretch(x, r.dst, r.norm, prefix)
        if key is not None and tokens.key is not None:
            key = _join(key, r.dst, rows(tokens.key, r.src), share)
        into = r.dst if r.moved is None else torch.where(r.moved > 0, r.dst, slot.gather(1, r.src))
        slot = slot.scatter(1, r.src, into)
        size = total if weight is size else _sums(size, merging)
    elif size is not None:
        size = size.gather(1, r.keep)
    if valid is not None:
        valid = valid.gather(1, r.keep)
    if r.valid is not None:
        valid = r.valid if valid is None else valid & r.valid
    # a merged token takes part where any of its parts does (a clamp would stop the gradient at 1, which most are)
    mask, alive = (None if a is None else torch.where((n := _sums(a, merging)) > 1, 1.0, n) for a in (mask, alive))

    if r.rest is not None and r.rest_weight is not None:
        weight = r.rest_weight.unsqueeze(-1)  # [B, Q, 1]
        x = torch.cat([x, (weight * rows(tokens.x, r.rest + prefix)).sum(1, keepdim=True).to(x.dtype)], dim=1)
        if key is not None and tokens.key is not None:
            total = weight.sum(1, keepdim=True).clamp(min=1e-12)  # nobody may have looked at any of them
            mean = (weight * rows(tokens.key, r.rest)).sum(1, keepdim=True) / total
            key = torch.cat([key, mean.to(key.dtype)], dim=1)
        if value is not None and tokens.value is not None:
            value = torch.cat([value, tokens.value.gather(1, r.rest).mean(1, keepdim=True)], dim=1)
        # The fused token is an ordinary one from here on (EViT): it counts once, and is always valid.
        size, valid, mask, alive = (
            None if a is None else torch.cat([a, torch.ones_like(a[:, :1])], dim=1) for a in (size, valid, mask, alive)
        )
        slot = slot.scatter(1, r.rest, r.keep.shape[1])

    scores = {name: _sums(getattr(tokens, name), r) for name in ("cls_attn", "received")}
    state = {"size": size, "valid": valid, "mask": mask, "alive": alive, "key": key, "value": value, **scores}
    proportional = tokens.proportional and r.proportional
    return replace(tokens, x=x, owner=_forward(tokens.owner, slot), proportional=proportional, **state)


def _sums(a: Any, r: Reduction) -> Any:
    """Add up a quantity that is a mass (size, attention) over what each new token stands for: [B, N] -> [B, M(+1)]."""
    if a is None:
        return None
    new = a.gather(1, r.keep)
    if r.src is not None and r.dst is not None:
        given = a.gather(1, r.src)
        new = new.scatter_add(1, r.dst, given if r.moved is None else given * r.moved)
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


def _stretch(x: Tensor, dst: Tensor, norm: Tensor, prefix: int) -> Tensor:
    """Bring the merged rows of x to a length each; all others are multiplied by exactly 1."""
    merged = torch.zeros_like(norm).scatter(1, dst, torch.ones_like(dst, dtype=norm.dtype)) > 0
    scale = torch.where(merged, norm / x[:, prefix:].float().norm(dim=-1).clamp(min=1e-6), 1.0)
    return torch.cat([x[:, :prefix], x[:, prefix:] * scale.unsqueeze(-1).to(x.dtype)], dim=1)


def _mix(tokens: Tokens, soft: SoftReduction) -> Tokens:
    values = tokens.patches if soft.values is None else soft.values
    new = soft.weights.to(tokens.x.dtype) @ values.to(tokens.x.dtype)
    if soft.onto is not None:  # back to what there was, each with its own mixture of what there is now
        x = torch.cat([tokens.x[:, : tokens.num_prefix], soft.onto.patches + new], dim=1)
        owner = torch.where(tokens.owner >= 0, soft.onto.owner, -1)
        return replace(soft.onto, x=x, owner=owner, left=tokens.left, notes=tokens.notes)
    x = torch.cat([tokens.x[:, : tokens.num_prefix], new], dim=1)
    owner = _forward(tokens.owner, soft.weights.argmax(1))  # a cell follows the mixture its token gave most to
    none: dict[str, Any] = dict.fromkeys(("size", "valid", "mask", "alive", *READINGS))
    return replace(tokens, x=x, owner=owner, before=tokens if soft.remember else tokens.before, **none)


def _forward(owner: Tensor, slot: Tensor) -> Tensor:
    """Send every cell's owner [B, G] where its token went: slot [B, N] -> owner [B, G]."""
    return torch.where(owner >= 0, slot.gather(1, owner.clamp(min=0)), -1)
