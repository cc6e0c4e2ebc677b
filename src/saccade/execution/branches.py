"""The two branches of a block around attention and MLP: where timm's kinds of blocks norm, scale and drop paths."""

from __future__ import annotations

from typing import Any

from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor

from saccade.core.hooks import applied


def attention_input(block: Any, x: Tensor) -> Tensor:
    """What attention is given of the tokens."""
    return x if type(block) is EvaBlockPostNorm else block.norm1(x)


def attended_of(block: Any, y: Tensor) -> Tensor:
    """What attention's output adds to the tokens."""
    if type(block) is Block:
        return applied(y, block.ls1, block.drop_path1)
    return applied(_scaled(block, y, "norm1", "gamma_1"), block.drop_path1)


def mlp_input(block: Any, x: Tensor) -> Tensor:
    """What the MLP is given of the tokens."""
    return x if type(block) is EvaBlockPostNorm else block.norm2(x)


def mlp_output(block: Any, y: Tensor) -> Tensor:
    """What the MLP's output adds to the tokens."""
    if type(block) is Block:
        return applied(y, block.ls2, block.drop_path2)
    return applied(_scaled(block, y, "norm2", "gamma_2"), block.drop_path2)


def _scaled(block: Any, y: Tensor, norm: str, scale: str) -> Tensor:
    if type(block) is EvaBlock:
        gamma = getattr(block, scale)
        return y if gamma is None else gamma * y
    return getattr(block, norm)(y)
