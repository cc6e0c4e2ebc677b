"""Images of a ragged batch by how many tokens each has: a decision about one must not depend on the others.

A share of the tokens, a number of pairs, the places of A and B: most reducers count tokens, and padding would count
too. So they are asked about the images that have equally many, without padding, and the answers are put side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.gates import Gates
from saccade.core.lazy import changed
from saccade.core.merging import rows
from saccade.core.packing import padded
from saccade.core.tokens import NO_STATS, AttentionStats, Hidden, Tokens

FILLS = {"size": 1.0, "keep_mask": 1.0, "update_mask": 1.0, "gate_mask": 1.0}  # of what is padded; 0 else
STATS = tuple(f.name for f in fields(AttentionStats))
OF_TOKENS = ("size", "anchor", "keep_mask", "update_mask", *STATS)  # what a token has beside its features


def _of_token(tokens: Tokens, name: str) -> Tensor | None:
    found: Tensor | None = getattr(tokens.stats if name in STATS else tokens, name)
    return found


def _with(tokens: Tokens, of_token: dict[str, Tensor | None], **others: Any) -> Tokens:
    """Tokens with other values, by the names of ``OF_TOKENS``."""
    stats = {name: of_token[name] for name in STATS}
    known = any(value is not None for value in stats.values())
    beside = {
        "size": of_token["size"],
        "anchor": of_token["anchor"],
        "hidden": Hidden.of(of_token["keep_mask"], of_token["update_mask"]),
    }
    return changed(tokens, **beside, **others, stats=AttentionStats(**stats) if known else NO_STATS)


@dataclass(frozen=True)
class Group:
    """Images with equally many tokens."""

    images: Tensor  # [g] int64  their places in the batch
    order: Tensor  #  [g, n] int64  places of their tokens among all N
    tokens: Tokens  # of these images, without padding


def is_ragged(tokens: Tokens) -> bool:
    """Whether images have different numbers of tokens, in a batch of which single images may be looked at."""
    return tokens.valid is not None and len(tokens.valid) > 0 and not torch.compiler.is_compiling()


def groups(tokens: Tokens) -> list[Group]:
    """The images of a ragged batch by their number of tokens. Waits for the device."""
    valid, tokens = tokens.valid, padded(tokens)
    assert valid is not None
    counts = valid.sum(1).tolist()
    every = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    found = []
    for n in sorted(set(counts)):
        images = torch.tensor([i for i, count in enumerate(counts) if count == n], device=every.device)
        order = every.index_select(0, images)[:, :n]
        found.append(Group(images, order, _compact(_of_images(tokens, images), order)))
    return found


def joined(parts: list[Tokens], found: list[Group]) -> Tokens:
    """Tokens of the groups' images, whatever became of them, as one batch in the order that it had."""
    back = torch.cat([group.images for group in found]).argsort()
    most = max(part.num_patches for part in parts)

    def side_by_side(values: list[Tensor]) -> Tensor:
        return torch.cat(values).index_select(0, back)

    def of_tokens(name: str) -> Tensor | None:
        values = [_of_token(part, name) for part in parts]
        if all(value is None for value in values):
            return None
        known = [torch.ones_like(p.x[:, p.num_prefix :, 0], dtype=torch.float32) if v is None else v
                 for p, v in zip(parts, values, strict=True)]  # fmt: skip
        return side_by_side([_longer(value, most, FILLS.get(name, 0.0)) for value in known])

    first = parts[0]
    there = [torch.ones(p.x.shape[0], p.num_patches, device=p.x.device) if p.valid is None else p.valid for p in parts]
    valid = side_by_side([_longer(v.float(), most, 0.0) for v in there]) > 0
    names = [name for name in first.state if all(name in part.state for part in parts)]
    return _with(
        first,
        {name: of_tokens(name) for name in OF_TOKENS},
        x=side_by_side([_longer(p.x, first.num_prefix + most, 0.0) for p in parts]),
        owner=side_by_side([p.owner for p in parts]),
        valid=None if all(p.num_patches == most and p.valid is None for p in parts) else valid,
        state={name: _noted([p.state[name] for p in parts], found, back) for name in names},
        proportional=_proportional(parts, back),
    )


def _noted(values: list[Any], found: list[Group], back: Tensor) -> Any:
    """What each group remembers under a name, of all images."""
    if values[0] is None:
        return None
    if isinstance(values[0], Tokens):
        return joined(values, found)
    return torch.cat(values).index_select(0, back)


def _proportional(parts: list[Tokens], back: Tensor) -> bool | Tensor:
    """``Tokens.proportional`` of the joined images: one answer where all agree."""
    given = [p.proportional for p in parts]
    if all(value is given[0] for value in given) and isinstance(given[0], bool):
        return given[0]
    each = [
        torch.full((len(p.x),), value, device=back.device) if isinstance(value, bool) else value
        for p, value in zip(parts, given, strict=True)
    ]
    return torch.cat(each).index_select(0, back)


def gates_by_group(tokens: Tokens, decide: Callable[[Tokens], Gates]) -> Gates:
    """A gater's gates, decided group by group."""
    found = groups(tokens)
    made = [decide(group.tokens) for group in found]
    back = torch.cat([group.images for group in found]).argsort()

    def one(name: str) -> Tensor | None:
        values = [getattr(gates, name) for gates in made]
        return None if values[0] is None else torch.cat(values).index_select(0, back)

    patch = None
    if made[0].patch is not None:
        spread = [g.patch.new_zeros(len(f.images), tokens.num_patches).scatter(1, f.order, g.patch)
                  for f, g in zip(found, made, strict=True) if g.patch is not None]  # fmt: skip
        patch = torch.cat(spread).index_select(0, back)
    return changed(made[0], patch=patch, head=one("head"), attn=one("attn"), mlp=one("mlp"), patch_indices=None)


def _of_images(tokens: Tokens, images: Tensor) -> Tokens:
    def some(value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return value
        return _of_images(value, images) if isinstance(value, Tokens) else value.index_select(0, images)

    return _with(
        tokens,
        {name: some(_of_token(tokens, name)) for name in OF_TOKENS},
        x=some(tokens.x),
        owner=some(tokens.owner),
        valid=some(tokens.valid),
        proportional=some(tokens.proportional),
        state={name: some(value) for name, value in tokens.state.items()},
    )


def _compact(tokens: Tokens, order: Tensor) -> Tokens:
    """Only the tokens in some places, in this order [g, n]."""
    prefix = tokens.num_prefix
    x = torch.cat([tokens.x[:, :prefix], rows(tokens.patches, order)], dim=1)
    slot = torch.full((len(order), tokens.num_patches), -1, dtype=torch.int64, device=order.device)
    slot = slot.scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    owner = torch.where(tokens.owner >= 0, slot.gather(1, tokens.owner.clamp(min=0)), -1)
    kept: dict[str, Tensor | None] = {}
    for name in OF_TOKENS:
        value = _of_token(tokens, name)
        kept[name] = None if value is None else rows(value, order) if value.ndim == 3 else value.gather(1, order)
    return _with(tokens, kept, x=x, owner=owner, valid=None)


def _longer(values: Tensor, length: int, fill: float) -> Tensor:
    """[g, n, ...] -> [g, length, ...]"""
    extra = length - values.shape[1]
    return values if not extra else F.pad(values, (*[0, 0] * (values.ndim - 2), 0, extra), value=fill)
