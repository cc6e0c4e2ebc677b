"""Fields of frozen values that are computed when they are read, and copies that do not read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class Recipe(Protocol):
    """Something that a tensor can be made of."""

    def made(self) -> Tensor:
        """The tensor."""


class Lazy:
    """A field that takes a tensor or a ``Recipe`` of one, and gives the tensor; made on first reading."""

    def __init__(self, name: str) -> None:
        self.slot = f"_{name}"

    def __get__(self, of: Any, kind: type | None = None) -> Any:
        if of is None:
            return self
        found = getattr(of, self.slot)
        if found is not None and not isinstance(found, Tensor):
            found = found.made()
            object.__setattr__(of, self.slot, found)
        return found

    def __set__(self, of: Any, value: Tensor | Recipe | None) -> None:
        object.__setattr__(of, self.slot, value)  # `of` is frozen; older compilers do not trace its `__dict__`


def lazy(*names: str) -> Callable[[type[Value]], type[Value]]:
    """A dataclass some of whose fields are ``Lazy``; ``held`` says of each field which attribute holds it."""

    def add(kind: Any) -> Any:
        for name in names:
            setattr(kind, name, Lazy(name))
        held = ((f.name, getattr(kind, f.name, None)) for f in fields(kind))
        kind.held = {name: found.slot if isinstance(found, Lazy) else name for name, found in held}
        return kind

    return add


def unread(value: Any, field: str = "owner") -> Any:
    """A lazy field as it is: a tensor, or the recipe of one."""
    return getattr(value, f"_{field}")


def changed(value: Value, /, **changes: Any) -> Value:
    """``dataclasses.replace`` that reads no lazy field."""
    kind = type(value)
    if torch.compiler.is_dynamo_compiling():
        return turned(value, kind, **changes)
    new, held = object.__new__(kind), kind.held  # type: ignore[attr-defined]
    own = new.__dict__
    own.update(value.__dict__)  # all at once: a forward does this a hundred times
    for name, change in changes.items():
        own[held[name]] = change
    return new


def turned(value: Any, kind: type[Value], /, **changes: Any) -> Value:
    """``changed``, to a value of another kind that has at least the fields which are not given."""
    new, held = object.__new__(kind), kind.held  # type: ignore[attr-defined]
    for name, slot in held.items():
        if name not in changes:
            object.__setattr__(new, slot, getattr(value, slot))
    for name, change in changes.items():
        object.__setattr__(new, held[name], change)
    return new
