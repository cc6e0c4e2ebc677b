"""Reductions: where each patch token goes, for good — and ``reduce``, the only code that moves tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.core.lazy import changed, unread
from saccade.core.merging import Merge, behind, copies_cost_more, few_means, means, rows
from saccade.core.provenance import Moved, anchors, follow
from saccade.core.slicing import First
from saccade.core.tokens import DROPPED, NO_STATS, AttentionStats, Hidden, Tokens


@dataclass(frozen=True)
class Fuse:
    """Tokens that become one new last token, Σ weight · x (not divided by the sum of the weights)."""

    index: Tensor  #   [B, Q]
    weight: Tensor  #  [B, Q]


@dataclass(frozen=True)
class Reduction:
    """Hard reduction: each patch token is kept, merged into a kept one, fused into one new token, or dropped.

    Indices are int64 and count patch tokens (prefix tokens are never touched). A token that is in none of
    ``keep``, ``merge.src`` and ``fuse.index`` is dropped.
    """

    keep: Tensor  #                    [B, M]  tokens that stay, in their new order
    merge: Merge | None = None
    fuse: Fuse | None = None
    valid: Tensor | None = None  #     [B, M] bool  slots of ``keep`` that are real; others pad; None: all that were
    gate: Tensor | None = None  #      [B, N]  0/1, straight-through: what stays, as a mask, for masked execution
    freeze: bool = True  #             what the gate drops stays as it is; False: blocks update it, though not read
    state: Mapping[str, Any] | None = None  # to be remembered from here on (``Tokens.state``); None there: forgotten


@dataclass(frozen=True)
class SoftReduction:
    """Soft reduction: M new tokens, each a mixture of all tokens."""

    weights: Tensor  #                 [B, M, N]
    values: Tensor | None = None  #    [B, N, D]  what is mixed; None: the tokens as they are
    state: Mapping[str, Any] | None = None  # to be remembered from here on (``Tokens.state``)
    onto: Tokens | None = None  #      earlier tokens, one for each row of ``weights``, that the mixture is added to


def reduce(tokens: Tokens, reduction: Reduction | SoftReduction | First | None) -> Tokens:
    """Carry a reduction out on everything a token has: features, readings, size, validity, owner."""
    if reduction is None:
        return tokens
    reduced = reduction.of(tokens) if isinstance(reduction, First) else _carried_out(tokens, reduction)
    if (left := tokens.state.get(DROPPED)) is None:
        return reduced
    newly_dropped = (reduced.owner < 0) & (tokens.owner >= 0)
    left = torch.where(newly_dropped.unsqueeze(-1), tokens.cell_features(), left)
    return changed(reduced, state={**reduced.state, DROPPED: left})


def _carried_out(tokens: Tokens, reduction: Reduction | SoftReduction) -> Tokens:
    noted = _noted(tokens, reduction)
    return _mix(noted, reduction) if isinstance(reduction, SoftReduction) else _move(noted, reduction)


def hide(tokens: Tokens, r: Reduction) -> Tokens:
    """Masked execution of a reduction with a gate: all tokens stay, and some take no part any more.

    What is merged is moved as always, and ``keep`` must then list all tokens, which come in its order; nothing can be
    fused. What is dropped keeps its cells.
    """
    assert r.gate is not None and r.fuse is None
    before, update, tokens = tokens.keep_mask, tokens.update_mask, _noted(tokens, r)
    if (left := tokens.dropped_features) is not None:  # as they are now, whatever becomes of them
        newly = r.gate == 0 if before is None else (r.gate == 0) & (before > 0)
        cells = tokens.scatter_to_grid(newly.unsqueeze(-1), False)
        left = torch.where(cells, tokens.scatter_to_grid(tokens.patches), left)
        tokens = changed(tokens, state={**tokens.state, DROPPED: left})
    gate = r.gate
    if r.merge is not None:
        assert r.merge.values is None and r.keep.shape[1] == tokens.num_patches
        tokens = _move(changed(tokens, hidden=None), Reduction(r.keep, r.merge))
        gate = gate.gather(1, r.keep)
        before, update = (None if mask is None else mask.gather(1, r.keep) for mask in (before, update))
    if r.freeze:
        update = None if update is None else update * gate
    elif update is None:
        update = torch.ones_like(gate) if before is None else before
    return changed(tokens, hidden=Hidden(gate if before is None else before * gate, update))


def _noted(tokens: Tokens, r: Reduction | SoftReduction) -> Tokens:
    return tokens if r.state is None else changed(tokens, state={**tokens.state, **r.state})


def _move(tokens: Tokens, r: Reduction) -> Tokens:
    x, key, size = _kept_and_merged(tokens, r)
    parts, valid, masks = [x], _there(tokens.valid, r), tokens.hidden
    if masks is not None:
        masks = Hidden.of(_in_any_part(masks.keep, r), _in_any_part(masks.update, r))
    if r.fuse is not None:  # an ordinary token from here on (EViT): it counts once, and is always valid
        parts.append(_weighted(tokens.patches, r.fuse).to(x.dtype))
        size, valid = _with_one(size), _with_one(valid)
        masks = None if masks is None else Hidden.of(_with_one(masks.keep), _with_one(masks.update))
    proportional = tokens.proportional if r.merge is None or r.merge.proportional else False
    stats = tokens.stats if tokens.stats is NO_STATS else _moved_stats(tokens.stats, key, r)
    owner = Moved(unread(tokens), r, tokens.num_patches)
    x = torch.cat(parts, dim=1) if len(parts) > 1 else x
    of_token = {"size": size, "anchor": anchors(tokens.anchor, r), "valid": valid, "hidden": masks, "stats": stats}
    return changed(tokens, x=x, owner=owner, proportional=proportional, **of_token)


def _there(valid: Tensor | None, r: Reduction) -> Tensor | None:
    """Which of the tokens that stay are no padding."""
    if valid is None:
        return r.valid
    kept = valid.gather(1, r.keep)
    return kept if r.valid is None else kept & r.valid


def _moved_stats(stats: AttentionStats, key: Tensor | None, r: Reduction) -> AttentionStats:
    """What attention said of the tokens that stay, whose keys are there already; a mass is that of all parts."""
    masses = {"cls_attn": _sums(stats.cls_attn, r), "attn_received": _sums(stats.attn_received, r)}
    value = None if stats.value_norm is None else stats.value_norm.gather(1, r.keep)  # a merged token's: the kept one's
    gate_mask = _in_any_part(stats.gate_mask, r)
    if r.fuse is not None:
        key, value = _fused_key(key, stats.key, r.fuse), _fused_value(value, stats.value_norm, r.fuse)
        masses = {name: _with_sum(mass, getattr(stats, name), r.fuse) for name, mass in masses.items()}
        gate_mask = _with_one(gate_mask)
    return AttentionStats(key, value_norm=value, gate_mask=gate_mask, **masses)


def _kept_and_merged(tokens: Tokens, r: Reduction) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Features of the prefix and of the tokens that stay, [B, P+M, D]; keys and sizes of the latter."""
    size, key, prefix = tokens.size, tokens.stats.key, tokens.num_prefix
    if r.merge is None:
        kept = None if key is None else rows(key, r.keep)
        return rows(tokens.x, behind(prefix, r.keep)), kept, None if size is None else size.gather(1, r.keep)
    plain = r.merge.weight is None and r.merge.gate is None and r.merge.size_share is None
    if plain and r.merge.values is None and copies_cost_more(tokens.x):
        x, total = few_means(tokens.x, size, r.keep, r.merge, prefix)
        return x, None if key is None else few_means(key, size, r.keep, r.merge, 0)[0], total
    first, patches = tokens.x.split_with_sizes([prefix, tokens.num_patches], dim=1)
    if not plain:
        x, key, size = _pulled(tokens, patches, r.keep, r.merge)
    else:
        x, total = means(patches, size, r.keep, r.merge)
        key, size = None if key is None else means(key, size, r.keep, r.merge)[0], total
    x = x if r.merge.values is None else r.merge.values.to(x.dtype)
    return torch.cat([first, x], dim=1) if prefix else x, key, size


def _pulled(tokens: Tokens, patches: Tensor, keep: Tensor, merge: Merge) -> tuple[Tensor, Tensor | None, Tensor]:
    """As ``means``, by other weights than the sizes, or to other sizes, or where a merge may be masked out.

    Gives features, keys and sizes.

    Each destination is pulled towards its sources, so that a weight of zero does no harm where nothing merges.
    """
    size, r = tokens.size, Reduction(keep, merge)
    if size is None:
        size = patches.new_ones(patches.shape[:2], dtype=torch.float32)
    weight = size if merge.weight is None else merge.weight
    total = _sums(weight, r)
    share = weight.gather(1, merge.src) / total.gather(1, merge.dst)
    share = (share if merge.gate is None else share * merge.gate).unsqueeze(2)

    def pull(values: Tensor) -> Tensor:
        kept = rows(values, keep)
        change = (share * (rows(values, merge.src) - rows(kept, merge.dst))).to(kept.dtype)
        return kept.scatter_add(1, merge.dst.unsqueeze(2).expand_as(change), change)

    key = None if tokens.stats.key is None else pull(tokens.stats.key)
    if merge.size_share is not None:
        given = replace(merge, gate=merge.size_share if merge.gate is None else merge.size_share * merge.gate)
        return pull(patches), key, _sums(size, Reduction(keep, given))
    return pull(patches), key, total if weight is size else _sums(size, r)


def _sums(a: Any, r: Reduction) -> Any:
    """Add up a quantity that is a mass (size, attention) over what each kept token stands for: [B, N] -> [B, M]."""
    if a is None:
        return None
    new = a.gather(1, r.keep)
    if r.merge is None:
        return new
    given = a.gather(1, r.merge.src)
    return new.scatter_add(1, r.merge.dst, given if r.merge.gate is None else given * r.merge.gate)


def _in_any_part(mask: Tensor | None, r: Reduction) -> Tensor | None:
    """A merged token takes part where any of its parts does."""
    if mask is None:
        return None
    some = _sums(mask, r)
    return torch.where(some > 1, 1.0, some)  # a clamp would stop the gradient at 1, which most are


def _weighted(values: Tensor, fuse: Fuse) -> Tensor:
    """Σ weight · values over what is fused: [B, N, C] -> [B, 1, C]."""
    return (fuse.weight.unsqueeze(-1) * rows(values, fuse.index)).sum(1, keepdim=True)


def _fused_key(kept: Tensor | None, key: Tensor | None, fuse: Fuse) -> Tensor | None:
    """Keys with that of the fused token: the mean by weight."""
    if kept is None or key is None:
        return None
    total = fuse.weight.sum(1)[:, None, None].clamp(min=1e-12)  # their attention may sum to zero
    return torch.cat([kept, (_weighted(key, fuse) / total).to(kept.dtype)], dim=1)


def _fused_value(kept: Tensor | None, norm: Tensor | None, fuse: Fuse) -> Tensor | None:
    """Lengths of values with that of the fused token: the mean."""
    if kept is None or norm is None:
        return None
    return torch.cat([kept, norm.gather(1, fuse.index).mean(1, keepdim=True)], dim=1)


def _with_sum(kept: Tensor | None, mass: Tensor | None, fuse: Fuse) -> Tensor | None:
    """A mass with that of the fused token: the sum."""
    if kept is None or mass is None:
        return None
    return torch.cat([kept, mass.gather(1, fuse.index).sum(1, keepdim=True)], dim=1)


def _with_one(values: Tensor | None) -> Tensor | None:
    """Sizes, masks with a 1 for the fused token."""
    return None if values is None else torch.cat([values, torch.ones_like(values[:, :1])], dim=1)


def _mix(tokens: Tokens, soft: SoftReduction) -> Tokens:
    values = tokens.patches if soft.values is None else soft.values
    new = soft.weights.to(tokens.x.dtype) @ values.to(tokens.x.dtype)
    if soft.onto is not None:  # back to what there was, each with its own mixture of what there is now
        x = torch.cat([tokens.x[:, : tokens.num_prefix], soft.onto.patches + new], dim=1)
        owner = torch.where(tokens.owner >= 0, soft.onto.owner, -1)
        return changed(soft.onto, x=x, owner=owner, state=tokens.state)
    x = torch.cat([tokens.x[:, : tokens.num_prefix], new], dim=1)
    owner = follow(tokens.owner, soft.weights.argmax(1))  # a cell follows the mixture its token gave most to
    anchor = None if tokens.anchor is None else tokens.anchor.gather(1, soft.weights.argmax(2))
    return changed(tokens, x=x, owner=owner, size=None, anchor=anchor, valid=None, hidden=None, stats=NO_STATS)
