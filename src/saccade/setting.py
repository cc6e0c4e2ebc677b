"""Settings: ``quadtree(100) | tome(r=8)`` — one line that is argument, config value, checkpoint metadata and table row.

Names and literal knobs only: parsing builds nothing and runs no code.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from math import inf
from typing import Any

from saccade.errors import UserError

LONGEST = 1000  # characters


@dataclass(frozen=True)
class Call:
    """One part of a setting, ``name(*args, **kwargs)``."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        knobs = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.kwargs]
        return f"{self.name}({', '.join(knobs)})"


@dataclass(frozen=True)
class Setting:
    """A sequence of calls; the empty one is the unreduced model, printed ``dense``."""

    calls: tuple[Call, ...] = ()

    def __str__(self) -> str:
        return " | ".join(map(str, self.calls)) or "dense"

    @classmethod
    def parse(cls, text: str | Setting) -> Setting:
        """Read a setting; ``""`` and ``"dense"`` are the empty one. Raises UserError with the offending part."""
        if isinstance(text, Setting):
            return text
        if len(text) > LONGEST:
            raise UserError(f"a setting of {len(text)} characters is over the limit of {LONGEST}")
        if text.strip() in ("", "dense"):
            return cls()
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise UserError(f"cannot read the setting {text!r}: write it like 'grid(16) | tome(r=8)'") from None
        try:
            return cls(tuple(_call(node, text) for node in _parts(tree)))
        except RecursionError:
            raise UserError("this setting is nested too deeply: write it like 'grid(16) | tome(r=8)'") from None


def _parts(node: ast.expr) -> list[ast.expr]:
    parts: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        parts.append(node.right)
        node = node.left
    return [node, *reversed(parts)]


def _call(node: ast.expr, text: str) -> Call:
    if isinstance(node, ast.Name):
        return Call(node.id)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise UserError(f"cannot read {ast.unparse(node)!r} in the setting {text!r}: write it like 'name(knob=value)'")
    try:
        args = tuple(_frozen(ast.literal_eval(a)) for a in node.args)
        kwargs = tuple((str(k.arg), _frozen(ast.literal_eval(k.value))) for k in node.keywords)
        hash((args, kwargs))
    except (ValueError, TypeError):
        raise UserError(
            f"knobs of {ast.unparse(node)!r} must be plain numbers, strings, tuples, lists or None"
        ) from None
    if any(k == "None" for k, _ in kwargs):
        raise UserError(f"'**' has no meaning in a setting: {ast.unparse(node)!r}")
    if len(dict(kwargs)) < len(kwargs):
        raise UserError(f"a knob is given twice in {ast.unparse(node)!r}")
    return Call(node.func.id, args, kwargs)


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if not isinstance(value, (bool, int, float, str, type(None))) or value in (inf, -inf):
        raise ValueError  # it would not print as it was read
    return value
