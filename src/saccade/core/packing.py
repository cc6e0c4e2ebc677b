"""Ragged batches, packed: the rows that count of all images in one matrix, so that nothing is computed for padding.

Norms, projections and the MLP work row by row and do not care; attention runs image by image
(``execution/attention.py``). ``benchmarks/ragged.py`` measures it against padding to the longest image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.constant_cache import constant
from saccade.core.lazy import changed, lazy, turned
from saccade.core.tokens import Hidden, Tokens

if TYPE_CHECKING:
    from saccade.core.gates import Gates

MAX_LIVE_SHARE = 0.95  # share of live rows above which padding is the simpler way to the same time


@dataclass(frozen=True)
class Rows:
    """Which rows of a padded batch [B, L] are there; those of an image are neighbours."""

    index: Tensor  #               [T] int64  their places in [B * L], ascending
    lengths: tuple[int, ...]  #    rows of each image; their sum is T
    shape: tuple[int, int]  #      (B, L)

    @classmethod
    def of(cls, present: Tensor) -> Rows:
        """present [B, L] bool. Waits for the device: how many there are decides what will be computed."""
        images, length = present.shape
        index = present.reshape(-1).nonzero().squeeze(1)
        return cls(index, tuple(present.sum(1).tolist()), (images, length))

    def pack(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]"""
        return x.reshape(-1, *x.shape[2:]).index_select(0, self.index)

    def unpack(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [B, L, ...], zeros where nothing is."""
        images, length = self.shape
        empty = packed.new_zeros(images * length, *packed.shape[1:])
        return empty.index_copy(0, self.index, packed).unflatten(0, self.shape)

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        """x [B, L, D] with update [T, D] added to these rows; the others stay bit by bit."""
        return x.reshape(-1, x.shape[-1]).index_add(0, self.index, update.to(x.dtype)).view(x.shape)

    def counts(self) -> Tensor:
        """Rows of each image, [B] on the device of the rows."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.index.device)

    def count(self) -> int | Tensor:
        """Rows of each image: one number where all have as many, else [B]."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else self.counts()


@lazy("owner")
@dataclass(frozen=True, kw_only=True)
class PackedTokens(Tokens):
    """Tokens whose ``x`` [T, D] holds only some rows of a batch; all else is of the whole rectangle."""

    rows: Rows

    @property
    def length(self) -> int:
        """P + N, prefix and patch tokens of each image (padding included)."""
        return self.rows.shape[1]

    @property
    def num_patches(self) -> int:
        """N, the patch tokens of each image (padding included)."""
        return self.rows.shape[1] - self.num_prefix

    @property
    def complete(self) -> bool:
        """Never: this is no rectangle."""
        return False

    def key_bias(self) -> Tensor | None:
        """As of the rectangle, packed [T]: what is packed is there, so that only sizes are left."""
        size = self.attention_size()
        return None if size is None else self.rows.pack(self.pad_prefix(size.log()))


def rows_of(tokens: Tokens) -> Rows | None:
    """Which rows of the rectangle ``x`` holds; None: all of them, [B, P+N, D]."""
    return tokens.rows if isinstance(tokens, PackedTokens) else None


def packed(tokens: Tokens) -> Tokens:
    """The same tokens with only live rows in ``x`` [T, D], where enough of them are padding."""
    if isinstance(tokens, PackedTokens) or tokens.valid is None or tokens.x.shape[0] == 0:
        return tokens
    if torch.compiler.is_compiling() or not _loops(tokens.x):
        return tokens
    rows = Rows.of(tokens.pad_prefix(tokens.valid, 1.0) > 0)
    if len(rows.index) > MAX_LIVE_SHARE * tokens.x.shape[0] * tokens.x.shape[1]:
        return tokens
    return turned(tokens, PackedTokens, x=rows.pack(tokens.x), rows=rows)


def padded(tokens: Tokens) -> Tokens:
    """The same tokens as a rectangle, x [B, P+N, D]; padding holds zeros."""
    return turned(tokens, Tokens, x=tokens.rows.unpack(tokens.x)) if isinstance(tokens, PackedTokens) else tokens


def gathered(tokens: Tokens, gates: Gates) -> tuple[Tokens, Tensor]:
    """Only the prefix and the patch tokens that take part, and where they stand among all rows [B * (P+N)].

    Where the gates know places [B, k], as many in every image, the tokens are a rectangle and nothing waits for the
    device; otherwise they are packed.
    """
    places = gates.patch_indices
    if places is None:
        assert gates.patch is not None
        present = gates.patch > 0 if tokens.valid is None else (gates.patch > 0) & tokens.valid
        rows = Rows.of(tokens.pad_prefix(present.float(), 1.0) > 0)
        return turned(tokens, PackedTokens, x=rows.pack(tokens.x), rows=rows), rows.index
    (images, length, width), prefix = tokens.x.shape, tokens.num_prefix
    if torch.compiler.is_compiling():
        first = torch.arange(prefix, device=places.device).expand(images, -1)
    else:
        first = _first(images, prefix, places.device)
    index = torch.cat([first, places + prefix], dim=1)
    if images != 1 or torch.compiler.is_compiling():
        index = index + length * torch.arange(images, device=places.device).unsqueeze(1)
    names = ("size", "valid", "keep_mask", "update_mask")
    own = {name: None if (value := getattr(tokens, name)) is None else value.gather(1, places) for name in names}
    hidden = Hidden.of(own.pop("keep_mask"), own.pop("update_mask"))
    return changed(tokens, x=F.embedding(index, tokens.x.reshape(-1, width)), hidden=hidden, **own), index.flatten()


@constant
def _first(images: int, prefix: int) -> np.ndarray:
    """Places of the prefix tokens, [B, P]."""
    return np.tile(np.arange(prefix), (images, 1))


def scattered(tokens: Tokens, all_of_them: Tokens, index: Tensor) -> Tokens:
    """What ``gathered`` took, back among all of them; those that rested stay bit by bit."""
    whole, x = all_of_them.x, tokens.x.flatten(0, -2)
    x = x if x.dtype == whole.dtype else x.to(whole.dtype)
    return changed(all_of_them, x=whole.flatten(0, 1).index_copy(0, index, x).view(whole.shape))


def _loops(x: Tensor) -> bool:
    """Whether packing is the fast way: on a CPU always, on CUDA where its kernel for ragged batches takes the type."""
    return x.device.type == "cpu" or x.dtype in (torch.float16, torch.bfloat16)
