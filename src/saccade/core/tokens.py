"""The token set that travels through the blocks, and the shape letters used everywhere.

    B images · P prefix tokens (class, distillation, registers) · N patch tokens · M patch tokens after a reduction
    R merged away · D width · d head width · H heads · G cells of the finest grid, G = gh * gw

``x`` is laid out ``[ prefix | patches ]``; reducers see patches only, so prefix tokens are protected by construction.
``size`` is a token's multiplicity in attention (patches merged into it); its *area* is the number of cells it owns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.lazy import changed, lazy

READINGS = frozenset({"key", "cls_attn", "attn_received", "value_norm"})  # of one block's attention, for its reducers
DROPPED = "dropped_features"  # in ``Tokens.state``: the last features of dropped cells, [B, G, D]


@lazy()
@dataclass(frozen=True)
class AttentionStats:
    """What one block's attention says of each patch token, until its MLP; None: not read."""

    key: Tensor | None = None  #            [B, N, d]  mean key over heads
    cls_attn: Tensor | None = None  #       [B, N] fp32  class attention, mean over heads
    attn_received: Tensor | None = None  #  [B, N] fp32  mean attention received
    value_norm: Tensor | None = None  #     [B, N] fp32  length of each value, all heads together
    gate_mask: Tensor | None = None  #      [B, N]  0/1, straight-through: takes part in this block; None: all do

    def of_patches(self, prefix: int) -> AttentionStats:
        """The readings without those of the prefix tokens, which stand first."""
        known = {name: value[:, prefix:] for name in READINGS if (value := getattr(self, name)) is not None}
        return AttentionStats(**known)


NO_STATS = AttentionStats()


@dataclass(frozen=True)
class Hidden:
    """Dropping as a mask, differentiable: the tokens stay where they are."""

    keep: Tensor  #                   [B, N]  0/1, straight-through: not dropped
    update: Tensor | None = None  #   [B, N]  0/1: what blocks go on updating, dropped or not; None: what is kept

    @classmethod
    def of(cls, keep: Tensor | None, update: Tensor | None = None) -> Hidden | None:
        """These masks; None where there are none."""
        return None if keep is None else cls(keep, update)


@lazy("owner")
@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch, and what each of them stands for."""

    x: Tensor  #                      [B, P+N, D]  prefix tokens first
    owner: Tensor  #                  [B, G] int64  cell -> index of the patch token that stands for it, -1: dropped
    grid: tuple[int, int]  #          (gh, gw)  the finest cells
    num_prefix: int  #                P
    size: Tensor | None = None  #     [B, N] fp32  patches merged into each; None: one each
    anchor: Tensor | None = None  #   [B, N] int64  the cell whose rotation each keeps; None: that of all its cells
    proportional: bool | Tensor = True  # attention counts a token ``size`` times; False: once (an average still
    #                                 does); [B] where images differ
    valid: Tensor | None = None  #    [B, N] bool  False: padding of a ragged batch; None: all valid
    hidden: Hidden | None = None  #   dropped tokens that are still there, where dropping is a mask; None: none are
    stats: AttentionStats = field(default_factory=lambda: NO_STATS)  # of this block's attention, until its MLP
    state: Mapping[str, Any] = field(default_factory=dict)  # what is remembered from block to block, by name: tensors
    #                                 of images, prefix tokens or cells [B, ...], which no reduction moves; or Tokens

    @property
    def length(self) -> int:
        """P + N, prefix and patch tokens of each image (padding included)."""
        return self.x.shape[1]

    @property
    def num_patches(self) -> int:
        """N, the patch tokens of each image (padding included)."""
        return self.x.shape[1] - self.num_prefix

    @property
    def plain(self) -> bool:
        """Whether all of a rectangle of tokens are there and count alike: what an ordinary ViT sees."""
        return self.complete and (self.size is None or self.proportional is False)

    @property
    def complete(self) -> bool:
        """Whether all of a rectangle of tokens are there and take part: nothing is masked, padded or packed."""
        return self.valid is None and self.hidden is None and self.stats.gate_mask is None

    @property
    def keep_mask(self) -> Tensor | None:
        """0/1 [B, N], straight-through: patch tokens that are not dropped, where dropping is a mask; None: all."""
        return None if self.hidden is None else self.hidden.keep

    @property
    def update_mask(self) -> Tensor | None:
        """0/1 [B, N]: patch tokens that blocks go on updating, dropped or not; None: those that are kept."""
        return None if self.hidden is None else self.hidden.update

    @property
    def dropped_features(self) -> Tensor | None:
        """Last features of dropped cells, [B, G, D]; None: no dense map is wanted."""
        return self.state.get(DROPPED)

    def with_dropped_features(self) -> Tokens:
        """The same tokens, whose reductions leave the features of what they drop, for a dense map."""
        none = self.x.new_zeros(*self.owner.shape, self.x.shape[-1])
        return changed(self, state={**self.state, DROPPED: none})

    def takes_part(self) -> Tensor | None:
        """0/1 [B, N], straight-through: patch tokens that this block computes; None: all (padding included)."""
        given = [m for m in (self.keep_mask, self.stats.gate_mask) if m is not None]
        return given[0] if len(given) == 1 else given[0] * given[1] if given else None

    def is_updated(self) -> Tensor | None:
        """0/1 [B, N], straight-through: patch tokens that this block adds to; None: all (padding included)."""
        if self.update_mask is None:
            return self.takes_part()
        gate = self.stats.gate_mask
        return self.update_mask if gate is None else self.update_mask * gate

    def query_mask(self) -> Tensor | None:
        """0/1 [B, P+N]: tokens whose queries count where attention received is read; None: all."""
        part = self.takes_part()
        if self.valid is not None:
            part = self.valid if part is None else part * self.valid
        return None if part is None else self.pad_prefix(part.detach().float(), 1.0)

    @property
    def patches(self) -> Tensor:
        """The patch tokens, [B, N, D]."""
        return self.x[:, self.num_prefix :]

    def attention_size(self) -> Tensor | None:
        """How many times attention counts each patch token, [B, N]; None: all once."""
        if self.size is None or isinstance(self.proportional, bool):
            return self.size if self.proportional is True else None
        return torch.where(self.proportional.unsqueeze(1), self.size, 1.0)

    def key_bias(self) -> Tensor | None:
        """What to add to every attention score of a key, [B, P+N] fp32; None when all keys count alike.

        ``log(size)`` makes a merged token count as often as the patches in it (proportional attention, ToMe §3.2);
        ``-inf`` hides padding and tokens that take no part.
        """
        size = self.attention_size()
        if self.complete:
            return None if size is None else self.pad_prefix(size.log())
        hiding = [m for m in (self.valid, self.stats.gate_mask, self.keep_mask) if m is not None]
        none = self.x.new_zeros(self.x.shape[0], self.num_patches, dtype=torch.float32) if size is None else None
        bias = size.log() if none is None else none  # type: ignore[union-attr]
        for present in hiding:
            bias = bias.masked_fill(present == 0, -torch.inf)
        if self.num_prefix == 0:  # where nothing of an image takes part it attends to all, and not to NaN
            bias = bias.masked_fill((bias == -torch.inf).all(1, keepdim=True), 0.0)
        return self.pad_prefix(bias)

    def pad_prefix(self, values: Tensor, prefix: float = 0.0) -> Tensor:
        """Values of the patch tokens [B, N] -> of all tokens [B, P+N]."""
        return F.pad(values, (self.num_prefix, 0), value=prefix)

    def with_stats(self, **readings: Tensor | None) -> Tokens:
        """These tokens with other readings of attention, by name; those not named stay."""
        return changed(self, stats=changed(self.stats, **readings))

    def without(self, names: frozenset[str]) -> Tokens:
        """These tokens without some of the readings of attention."""
        if self.stats is NO_STATS:
            return self
        if self.stats.gate_mask is None and names >= READINGS:
            return changed(self, stats=NO_STATS)
        return self.with_stats(**dict.fromkeys(names))

    def reading(self, name: str) -> Tensor:
        """A reading of this block's attention, by its name in ``AttentionStats``, [B, N] or [B, N, d].

        Raises LookupError where a reducer asks for what it does not list in ``read``.
        """
        found: Tensor | None = getattr(self.stats, name)
        if found is None:
            raise LookupError(f"{name} of attention was not read: list it in the reducer's `read`")
        return found

    def weights(self) -> Tensor | None:
        """How much each patch token counts in an average over patches, [B, N]; None when all count alike."""
        if self.size is None and self.valid is None and self.keep_mask is None:
            return None
        ones = self.x.new_ones(self.x.shape[0], self.num_patches, dtype=torch.float32)
        size = ones if self.size is None else self.size
        for present in (self.valid, self.keep_mask):
            size = size if present is None else size * present
        return size

    def area(self) -> Tensor:
        """Cells owned by each patch token, [B, N] int64; Σ area + dropped cells = G."""
        counts = self.owner.new_zeros(self.owner.shape[0], self.num_patches + 1)
        counts = counts.scatter_add(1, self.owner + 1, torch.ones_like(self.owner))
        return counts[:, 1:]

    def cell_features(self) -> Tensor:
        """Features of every cell, [B, G, D]: its token's, or the last ones of what was dropped (0: not recorded)."""
        left = self.dropped_features
        cells = self.scatter_to_grid(self.patches, 0.0 if left is None else left)
        if left is None or self.keep_mask is None or self.update_mask is None:
            return cells  # where dropping is a mask, what is dropped stayed as it was
        kept = self.scatter_to_grid(self.keep_mask.unsqueeze(-1).to(cells.dtype))
        return left + kept * (cells - left)

    def scatter_to_grid(self, values: Tensor, dropped: Tensor | float = 0.0) -> Tensor:
        """Spread values of patch tokens [B, N, C] over the grid, [B, G, C]; dropped cells take ``dropped``."""
        index = self.owner.clamp(min=0).unsqueeze(-1).expand(-1, -1, values.shape[-1])
        spread = values.gather(1, index)
        return torch.where(self.owner.unsqueeze(-1) >= 0, spread, dropped)
