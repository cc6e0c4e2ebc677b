"""What is used of timm's modules, whose own attributes ``nn.Module`` hides from type checkers.

A protocol says what timm adds, and the class below it is a module that has it: a type, never made. What torch or timm
hands over as a plain ``nn.Module`` becomes one by ``cast``; ``backbones.vit.backbone_of`` looks whether it is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, overload

from timm.layers import Attention
from torch import Tensor, nn


class BlockParts(Protocol):
    """Of a ViT's block: attention and MLP, each a residual branch on [B, N, D]."""

    norm1: nn.Module
    attn: Attention
    ls1: nn.Module  #        a scale for each channel, or an identity
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module


class TimmBlock(BlockParts, nn.Module):
    """A block as timm makes it."""


class TimmBlocks(nn.Module):
    """The blocks in order; called, it runs all of them."""

    def __len__(self) -> int:
        """How many."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[TimmBlock]:
        """From the first to the last."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> TimmBlock: ...
    @overload
    def __getitem__(self, place: slice) -> TimmBlocks: ...
    def __getitem__(self, place: int | slice) -> TimmBlock | TimmBlocks:
        """One of them, or some."""
        raise NotImplementedError


class PatchEmbedParts(Protocol):
    """Of a patch embedding: a convolution whose stride is its kernel. Sizes: height and width, pixels or cells."""

    proj: nn.Conv2d
    norm: nn.Module
    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid_size: tuple[int, int]
    num_patches: int
    flatten: bool
    strict_img_size: bool

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Take images of another size."""


class TimmPatchEmbed(PatchEmbedParts, nn.Module):
    """A patch embedding as timm makes it: images [B, C, H, W] -> [B, N, D]."""


class PoolParts(Protocol):
    """Of attention pooling: learned queries ask all tokens."""

    latent_len: int  # queries
    num_heads: int
    head_dim: int
    kv: nn.Linear


class TimmPool(PoolParts, nn.Module):
    """Attention pooling as timm makes it: [B, N, D] -> [B, D]."""


class ViTParts(Protocol):
    """Of a ``VisionTransformer`` of width D on G cells."""

    patch_embed: TimmPatchEmbed
    cls_token: nn.Parameter | None  # [1, 1, D]
    pos_embed: nn.Parameter | None  # [1, prefix + G, D]; without the prefix where ``no_embed_class``
    blocks: TimmBlocks
    norm_pre: nn.Module
    norm: nn.Module
    fc_norm: nn.Module
    head: nn.Module
    head_drop: nn.Module
    pos_drop: nn.Module
    patch_drop: nn.Module
    attn_pool: TimmPool | None
    num_classes: int
    embed_dim: int
    num_features: int
    head_hidden_size: int
    num_prefix_tokens: int
    num_reg_tokens: int
    global_pool: str
    no_embed_class: bool
    pool_include_prefix: bool
    dynamic_img_size: bool
    grad_checkpointing: bool
    pretrained_cfg: dict[str, Any]
    feature_info: list[dict[str, Any]]

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches [B, N, D] -> tokens, with the prefix and positions."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, D] -> logits, or the features before them."""

    def get_classifier(self) -> nn.Module:
        """The last layer, or the two of a distilled model."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another head; none for 0 classes."""

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Take images of another size, or other patches."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass rather than keep what they made."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that no decay is for."""


class ViT(ViTParts, nn.Module):
    """A ``VisionTransformer`` as timm makes it: images [B, C, H, W] -> logits [B, classes]."""
