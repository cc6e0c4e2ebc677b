"""What a forward gives: logits, tokens and a trace; it stands for its logits wherever torch wants a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from saccade.core.gates import Gates
from saccade.core.record import BlockCost, BlockTrace, Trace
from saccade.core.tokens import AttentionStats, Hidden, Tokens


@dataclass(frozen=True)
class Output:
    """What a forward pass gives.

    ``cross_entropy(out, y)``, ``out.argmax(1)`` and ``out.softmax(-1)`` read the logits; so does every function of
    torch, and every method of a tensor, that is given the whole.
    """

    logits: Tensor  # [B, K]
    tokens: Tokens  # of the last block; prefix tokens only, where pooling reads nothing else
    trace: Trace  #   what ran

    def with_logits(self, logits: Tensor) -> Output:
        """The same tokens and trace with other logits."""
        return replace(self, logits=logits)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: tuple[type, ...], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return function(*map(_logits, args), **{name: _logits(value) for name, value in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        """A tensor's attribute or method, of the logits."""
        if name.startswith("_") or name in Output.__dataclass_fields__ or not hasattr(Tensor, name):
            known = ", ".join(Output.__dataclass_fields__)
            raise AttributeError(f"an Output has no {name!r}: it has {known}, and what a tensor has, of its logits")
        return getattr(self.logits, name)

    def __getitem__(self, place: Any) -> Tensor:
        return self.logits[place]

    def __len__(self) -> int:
        return len(self.logits)


class LazyOutput(Output):
    """Logits that are there; tokens and trace are those of another forward, run when they are read."""

    def __init__(self, logits: Tensor, again: Callable[[], Output]) -> None:
        object.__setattr__(self, "logits", logits)
        object.__setattr__(self, "_again", again)

    @cached_property
    def _whole(self) -> Output:
        with torch.no_grad():
            return self._again()  # type: ignore[attr-defined]

    @property
    def tokens(self) -> Tokens:  # type: ignore[override]
        """Of a plain forward, which runs when they are read."""
        return self._whole.tokens

    @property
    def trace(self) -> Trace:  # type: ignore[override]
        """Of a plain forward, which runs when it is read."""
        return self._whole.trace

    def with_logits(self, logits: Tensor) -> Output:
        """The same tokens and trace, run when they are read, with other logits."""
        return LazyOutput(logits, lambda: self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(logits={tuple(self.logits.shape)})"


def _logits(value: Any) -> Any:
    if isinstance(value, Output):
        return value.logits
    if type(value) in (list, tuple):
        return type(value)(map(_logits, value))
    return value


def _register(kind: type) -> None:
    """Let torch see the tensors inside a dataclass: what a bare model gives can be exported and vmapped."""
    names = [field.name for field in fields(kind)]

    def flatten(value: Any) -> tuple[list[Any], None]:
        return [getattr(value, name) for name in names], None

    def unflatten(children: Any, context: None) -> Any:
        return kind(**dict(zip(names, children, strict=True)))

    def with_keys(value: Any) -> tuple[list[tuple[Any, Any]], None]:
        return [(pytree.GetAttrKey(name), getattr(value, name)) for name in names], None

    pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        flatten_with_keys_fn=with_keys,
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
    )


for _kind in (Output, Tokens, Hidden, AttentionStats, Trace, BlockTrace, BlockCost, Gates):
    _register(_kind)
