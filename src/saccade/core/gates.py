"""Gates: which parts of one block run for each image — masked in training, skipped in inference, one definition.

A token that is neither attended to nor updated is absent. Masked execution computes everything and multiplies;
sparse execution gathers the rows that are on, computes those, and adds them back. They are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.lazy import lazy, unread


@dataclass(frozen=True)
class Places:
    """The mask [B, n] of some places [B, k], made where it is multiplied with."""

    places: Tensor
    n: int

    def made(self) -> Tensor:
        """The mask, fp32."""
        mask = torch.zeros(len(self.places), self.n, device=self.places.device, dtype=torch.float32)
        return mask.scatter(1, self.places, 1.0)


@lazy("patch")
@dataclass(frozen=True)
class Gates:
    """0/1 decisions for one block, float (straight-through in training); None: everything runs."""

    patch: Tensor | None = None  # [B, N]  patch tokens that attend, are attended to, and are updated
    head: Tensor | None = None  #  [B, H]  attention heads
    attn: Tensor | None = None  #  [B]     the attention branch
    mlp: Tensor | None = None  #   [B]     the MLP branch
    partial: bool = False  #               a head that is off passes its own values on; False: nothing
    mlp_heads: bool = False  #             a head that is off takes its channels out of the MLP's input too
    inner: bool = False  #                 masked, heads multiply queries, keys and values too, and a patch that is off
    #                                      attends to itself alone: the same output with another gradient
    patch_indices: Tensor | None = (
        None  # [B, k] the patches of ``patch``, where every image has as many: nothing is counted
    )

    @property
    def whole_rows(self) -> bool:
        """Whether a token that takes part does so in both branches: then one gather serves the whole block."""
        return self.some_rows and self.all_run

    @property
    def some_rows(self) -> bool:
        """Whether patches are gated."""
        return unread(self, "patch") is not None

    @property
    def all_run(self) -> bool:
        """Whether both branches run for all images."""
        return self.attn is None and self.mlp is None

    @property
    def static(self) -> bool:
        """Whether skipping has the same shapes for all images, so that a graph can do it."""
        return self.patch_indices is not None and self.whole_rows and self.head is None


def straight_through(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Hard 0/1 of ``sigmoid(logits) > threshold`` whose gradient is the sigmoid's."""
    soft = logits.sigmoid()
    return (soft > threshold).to(soft.dtype) + (soft - soft.detach())  # in this order: exactly 0 or 1
