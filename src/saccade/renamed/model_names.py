"""What models had under other names, or had themselves and have in their head now: it works, and warns."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from saccade.core.record import Trace
    from saccade.core.tokens import Tokens

HEAD = "task_head"
ON_HEAD = {"decoder", "classes", "void", "heads", "ask", "space", "words"}  # of Segmenter, Detector and TextImage


class OldWeightNames(nn.Module):
    """Loads state dicts in which the parts of a head stood beside the ViT: ``decoder.*``, ``heads.*``, ``space.*``."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for part, _ in () if (head := _head(self)) is None else head.named_children():
            for key in [key for key in state_dict if key.startswith(f"{prefix}{part}.")]:
                state_dict[f"{prefix}{HEAD}.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *others)


class OldNames(OldWeightNames):
    """The old names of an ``AdaptiveViT``."""

    def dense(self, images: Tensor) -> Tensor:
        """The old name of ``feature_map``."""
        _renamed("dense", "feature_map")
        return self.feature_map(images)

    def encode(self, images: Tensor, *, sparse: bool | None = None) -> tuple[Tokens, Trace]:
        """The old name of ``forward_tokens``."""
        _renamed("encode", "forward_tokens")
        return self.forward_tokens(images, sparse=sparse)

    def head(self, tokens: Tokens) -> Tensor:
        """The old name of ``forward_head``."""
        _renamed("head", "forward_head")
        return self.forward_head(tokens)

    def __getattr__(self, name: str) -> Any:
        if name in ON_HEAD and hasattr(head := _head(self), name):
            _renamed(name, f"{HEAD}.{name}")
            return getattr(head, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ON_HEAD and hasattr(head := _head(self), name):
            _renamed(name, f"{HEAD}.{name}")
            setattr(head, name, value)
        else:
            super().__setattr__(name, value)


def _head(module: nn.Module) -> nn.Module | None:
    return module.__dict__.get("_modules", {}).get(HEAD)


def _renamed(old: str, new: str) -> None:
    warnings.warn(f"AdaptiveViT.{old} is {new} now", DeprecationWarning, stacklevel=3)
