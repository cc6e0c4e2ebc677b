"""Fields of frozen values that are computed when they are read, and copies that do not read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Recipe(Protocol):
    """Something that a tensor can be made of."""

    def made(self) -> Tensor: ...


class Lazy:
    """A field that takes a tensor or a ``Recipe`` of one, and gives the tensor; made on first reading."""

    def __init__(self, name: str) -> None:
        self.slot = f"_{name}"

    def __get__(self, of: Any, kind: type | None = None) -> Any:
        if of is None:
            return self
        found = of.__dict__[self.slot]
        if found is not None and not isinstance(found, Tensor):
            found = of.__dict__[self.slot] = found.made()
        return found

    def __set__(self, of: Any, value: Tensor | Recipe | None) -> None:
        of.__dict__[self.slot] = value


def lazy(field: str) -> Callable[[type[Value]], type[Value]]:
    """A dataclass one of whose fields is ``Lazy``."""

    def add(kind: type[Value]) -> type[Value]:
        setattr(kind, field, Lazy(field))
        return kind

    return add


def unread(value: Any, field: str = "owner") -> Any:
    """A lazy field as it is: a tensor, or the recipe of one."""
    return value.__dict__[f"_{field}"]


def changed(value: Value, /, **changes: Any) -> Value:
    """``dataclasses.replace`` that reads no lazy field, and takes a tenth of the time."""
    kind, new = type(value), object.__new__(type(value))
    fields = dict(value.__dict__)
    for name, change in changes.items():
        fields[f"_{name}" if isinstance(getattr(kind, name, None), Lazy) else name] = change
    new.__dict__.update(fields)
    return new
