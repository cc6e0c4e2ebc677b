"""What an encoder is for: one vector an image, and maps of features from chosen blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.packing import padded
from saccade.core.plan import Plan
from saccade.core.timm_types import ViT
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.execution.stops import Stops

if TYPE_CHECKING:
    from saccade.core.record import Trace

POOLS = ("own", "token", "mean", "map")
FORMATS = ("NCHW", "NLC")


def check_pool(vit: ViT, pool: str) -> None:
    """Raises UserError for a way of pooling that is not known, or that this ViT has not learned."""
    if pool not in POOLS:
        raise UserError(f"pool={pool!r} is not one of {', '.join(POOLS)}")
    if pool == "token" and vit.cls_token is None:
        raise UserError("this ViT has no class token: pool by 'mean', or 'own', as it was trained")
    if pool == "map" and vit.attn_pool is None:
        raise UserError("this ViT has learned no pooling by attention: pool by 'token', 'mean' or 'own'")


def _blocks(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Numbers of blocks, in order, of what timm calls indices. Raises UserError for one that does not run."""
    some = range(depth) if indices is None else range(depth - indices, depth) if isinstance(indices, int) else indices
    found = sorted({i + depth if i < 0 and not isinstance(some, range) else i for i in some})
    if not found or found[0] < 0 or found[-1] >= depth:
        raise UserError(f"indices={indices!r}: this setting runs blocks 0 to {depth - 1}, {depth} in all")
    return found


class Embeds(nn.Module):
    """Embeddings and intermediate features of a model under its setting."""

    vit: ViT
    plan: Plan

    def embed(self, images: Tensor, pool: str = "own", *, normalise: bool = False) -> Tensor:
        """images [B, C, h, w], normalised -> embeddings [B, D], whatever head there is.

        Args:
            pool: "own", what the ViT's classifier reads or would read; "token", the class token; "mean", of patches
                that are there, each as often as patches were merged into it, and of neither class token nor registers;
                "map", by the attention that the ViT pools with.
            normalise: to length 1, for cosines as inner products.

        Raises:
            UserError: a pooling that the ViT has not.
        """
        check_pool(self.vit, pool)
        found = self.pooled(self.forward_tokens(images)[0], pool)
        return F.normalize(found, dim=-1) if normalise else found

    def pooled(self, tokens: Tokens, pool: str = "own") -> Tensor:
        """Tokens after the last block -> [B, D], as ``embed`` pools them."""
        vit, tokens = self.vit, padded(tokens)
        x = vit.norm(tokens.x)
        if pool == "token":
            return vit.fc_norm(x[:, 0])
        if pool != "mean":  # a ViT that pools by a map has no other way of its own
            return self.pooled_head(x, tokens, pre_logits=True)
        patches, weights = x[:, tokens.num_prefix :], tokens.weights()
        if weights is None:
            return vit.fc_norm(patches.mean(1))
        share = (weights / weights.sum(1, keepdim=True)).to(x.dtype)
        return vit.fc_norm((share.unsqueeze(-1) * patches).sum(1))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """timm's method of that name, under the setting: each cell of the grid has the features of its token after
        that block, and a dropped one those that it had last.

        Args:
            images: [B, C, h, w], normalised.
            indices: numbers of blocks; the last this many; None: all.
            return_prefix_tokens: pairs of map and prefix tokens [B, P, D].
            norm: by the ViT's last norm.
            stop_early: not used: the blocks after the last one that is asked for run in any case.
            output_fmt: "NCHW", maps [B, D, gh, gw], or "NLC", [B, G, D].
            intermediates_only: without the tokens after the last block, normed, [B, P+N, D].
            output_dict: by name, as timm calls them.

        Raises:
            UserError: another format; a block that there is not, or that the setting does not run.
        """
        if output_fmt not in FORMATS:
            raise UserError(f"output_fmt={output_fmt!r} is not one of {', '.join(FORMATS)}")
        depth = self.plan.depth(len(self.vit.blocks))
        wanted = _blocks(indices, depth)
        stops = Stops(self.plan, wanted)
        last, _ = self._forward_tokens(images, whole=True, dense=True, plan=stops)
        after = {**stops.after, depth - 1: last}
        maps, prefixes = zip(*(self._spread(after[block], norm, output_fmt) for block in wanted), strict=True)
        final = self.vit.norm(padded(last).x)
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": list(maps)}
            if return_prefix_tokens and last.num_prefix:
                named["image_intermediates_prefix"] = list(prefixes)
            return named if intermediates_only else {**named, "image_features": final}
        given = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens and last.num_prefix else list(maps)
        return given if intermediates_only else (final, given)

    def _spread(self, tokens: Tokens, norm: bool, layout: str) -> tuple[Tensor, Tensor]:
        """Features of the cells, and of the prefix."""
        tokens = padded(tokens)
        prefix = tokens.num_prefix
        x = torch.cat([tokens.x[:, :prefix], tokens.cell_features()], dim=1)
        x = self.vit.norm(x) if norm else x
        cells = x[:, prefix:]
        return (cells.transpose(1, 2).unflatten(2, tokens.grid) if layout == "NCHW" else cells), x[:, :prefix]

    if TYPE_CHECKING:  # what the model gives to these

        def forward_tokens(self, images: Tensor) -> tuple[Tokens, Trace]: ...
        def pooled_head(self, x: Tensor, tokens: Tokens, pre_logits: bool = False) -> Tensor: ...
        def _forward_tokens(
            self, images: Tensor, *, whole: bool, dense: bool = False, plan: Plan | None = None
        ) -> tuple[Tokens, Trace]: ...
