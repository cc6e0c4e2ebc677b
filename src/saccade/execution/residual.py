"""Residual branches under gates: masked in training, skipped in inference, one definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.core.packing import Rows, rows_of
from saccade.core.tokens import Tokens

# (x, key bias, heads, rows) -> update of x; with rows, x is packed
Branch = Callable[[Tensor, Tensor | None, Tensor | None, Rows | None], Tensor]
Ran = tuple[Tensor, int | Tensor]


def residual(
    tokens: Tokens,
    branch: Branch,
    bias: Tensor | None = None,
    on: Tensor | None = None,
    heads: Tensor | None = None,
    skipped: str = "nothing",
) -> Ran:
    """``x + branch(x)`` for the images that are on [B] and the tokens that are updated, x elsewhere.

    ``bias`` is the tokens' key bias, for a branch that attends. skipped: what of that which is off is not computed:
    "nothing" (all is, and multiplied), whole "images", or single "rows" too. Returns the new x, as ``tokens.x`` is
    laid out, and how many tokens were computed for each image that ran (one number, or one for each image [B]).
    """
    if on is None and tokens.complete:
        return tokens.x + branch(tokens.x, bias, heads, None), tokens.x.shape[1]
    part, rows = tokens.is_updated(), rows_of(tokens)
    if on is None and part is None:
        update = branch(tokens.x, bias, heads, rows)
        return tokens.x + update, tokens.x.shape[1] if rows is None else rows.count()
    if skipped == "rows" and (part is not None or tokens.valid is not None):
        return _rows(tokens, branch, bias, on, heads)
    if skipped != "nothing" and on is not None:
        return _images(tokens, branch, bias, on, heads)
    update = branch(tokens.x, bias, heads, None)
    if part is not None:
        update = update * tokens.pad_prefix(part, 1.0).unsqueeze(-1).to(update.dtype)
    if on is not None:
        update = update * on[:, None, None].to(update.dtype)
    return tokens.x + update, tokens.x.shape[1]


def live_keys(tokens: Tokens) -> Tensor | None:
    """How much each key counts, 0/1 times its size, where dropping is learned through attention; else None.

    [B, P+N]; or [B, P+N, P+N], for each query, where blocks go on updating what is dropped: a token sees itself.
    """
    part = tokens.takes_part()
    if part is None or tokens.keep_mask is None or not tokens.keep_mask.requires_grad:
        return None
    for other in (tokens.attention_size(), tokens.valid):
        part = part if other is None else part * other
    keys = tokens.pad_prefix(part, 1.0)
    if tokens.update_mask is None:
        return keys
    size = tokens.attention_size()
    own = torch.where(tokens.update_mask > 0, torch.ones_like(part) if size is None else size, part)
    itself = torch.eye(keys.shape[1], dtype=torch.bool, device=keys.device)
    return torch.where(itself, tokens.pad_prefix(own, 1.0).unsqueeze(1), keys.unsqueeze(1))


def _rows(tokens: Tokens, branch: Branch, bias: Tensor | None, on: Tensor | None, heads: Tensor | None) -> Ran:
    """Only the rows that are on, packed."""
    x, there = tokens.x, torch.ones(tokens.x.shape[:2], dtype=torch.bool, device=tokens.x.device)
    for present in (tokens.takes_part(), tokens.valid):
        if present is not None:
            there = there & (tokens.pad_prefix(present, 1.0) > 0)
    if on is not None:
        there = there & (on > 0).unsqueeze(1)
    rows = Rows.of(there)
    if not len(rows.index):
        return x, 0
    counts = tokens.size is not None and tokens.proportional is not False
    bias = rows.pack(bias) if bias is not None and counts else None  # what else it hides is not there
    return rows.add(x, branch(rows.pack(x), bias, heads, rows)), rows.count()


def _images(tokens: Tokens, branch: Branch, bias: Tensor | None, on: Tensor, heads: Tensor | None) -> Ran:
    """Only the images that are on, all of their tokens."""
    images, part = (on > 0).nonzero().squeeze(1), tokens.is_updated()
    if not len(images):
        return tokens.x, 0
    x, bias, heads, part = (
        value if value is None or len(images) == len(value) else value.index_select(0, images)
        for value in (tokens.x, bias, heads, part)
    )
    assert x is not None
    update = branch(x, bias, heads, None).to(x.dtype)
    if part is not None:
        update = update * tokens.pad_prefix(part, 1.0).unsqueeze(-1).to(update.dtype)
    whole = len(images) == len(tokens.x)
    return tokens.x + update if whole else tokens.x.index_add(0, images, update), tokens.x.shape[1]
