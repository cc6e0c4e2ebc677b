"""Settings: ``quadtree(100) | tome(r=8)`` — one line that is argument, config value, checkpoint metadata and table row.

Names and literal knobs only: parsing builds nothing and runs no code.

A line with ranges stands for several settings, and ``expand`` lists them: ``grid(8..40)`` counts by one,
``tome(r=2..16..2)`` by two, ``evit(0.3..0.9..0.1)`` by a tenth; both ends belong to it, and several ranges multiply.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files
from itertools import product
from math import inf, prod
from typing import Any

from saccade.errors import UserError

LONGEST = 1000  # characters
MOST = 1000  # values that the ranges of one part are looked through for
MOST_SETTINGS = 200  # that one line may stand for

_NUMBER = r"-?\d+(?:\.\d+)?"
_TEXT = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
_RANGE = rf"(?<![\w.])({_NUMBER})\.\.({_NUMBER})(?:\.\.({_NUMBER}))?(?![\w.])"
_TOKEN = re.compile(rf"{_TEXT}|\||{_RANGE}")  # what is quoted is passed over whole


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
            if any(token[1] for token in _TOKEN.finditer(text)):
                raise UserError(f"a range stands for several settings and one is needed here: {text!r}") from None
            raise UserError(f"cannot read the setting {text!r}: write it like 'grid(16) | tome(r=8)'") from None
        try:
            found = cls(tuple(call for node in _parts(tree) for call in _written_out(_call(node, text))))
            written = str(found)
        except RecursionError:
            raise UserError("this setting is nested too deeply: write it like 'grid(16) | tome(r=8)'") from None
        if len(written) > LONGEST:  # a folder would keep it so, and not be read
            raise UserError(f"a setting of {len(written)} characters, written out, is over the limit of {LONGEST}")
        return found


@dataclass(frozen=True)
class Preset:
    """A published system: the setting that its name stands for, and what it is."""

    setting: str
    about: str


@cache
def presets() -> dict[str, Preset]:
    """Published systems by name, from ``presets.toml``."""
    found = tomllib.loads((files("saccade") / "presets.toml").read_text(encoding="utf-8"))
    return {name: Preset(**facts) for name, facts in found.items()}


def _written_out(call: Call) -> tuple[Call, ...]:
    """The call, or those that a preset's name stands for."""
    if (preset := presets().get(call.name)) is None:
        return (call,)
    if call.args or call.kwargs:
        raise UserError(f"{call.name}() takes no knobs: change them in what it stands for, {preset.setting!r}")
    return Setting.parse(preset.setting).calls


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


def expand(text: str, sensible: Callable[[Call], bool] = lambda call: True) -> list[str]:
    """The settings that a line with ranges ``a..b`` or ``a..b..step`` stands for, in order; without ranges, the line.

    Both ends belong to a range, which may fall. Without a step it counts by one, from one whole number to another.

    Args:
        sensible: whether a call that a range made is worth having; the others are passed over.

    Raises:
        UserError: a range without a step where one is needed, with nothing sensible in it, or with too much.
    """
    if len(text) > LONGEST:
        raise UserError(f"a setting of {len(text)} characters is over the limit of {LONGEST}")
    choices, ranged = [], False
    for part in _split(text):
        ranges = [token for token in _TOKEN.finditer(part) if token[1]]
        choices.append(_expanded(part, ranges, sensible) if ranges else [part.strip()])
        ranged = ranged or bool(ranges)
    if not ranged:
        return [text]
    count = prod(map(len, choices))
    if count > MOST_SETTINGS:
        raise UserError(f"{text!r} stands for {count} settings, over the limit of {MOST_SETTINGS}: give larger steps")
    return list(dict.fromkeys(str(Setting.parse(" | ".join(chosen))) for chosen in product(*choices)))


def _split(text: str) -> Iterator[str]:
    """The parts between the bars."""
    start = 0
    for token in _TOKEN.finditer(text):
        if token[0] == "|":
            yield text[start : token.start()]
            start = token.end()
    yield text[start:]


def _expanded(part: str, ranges: list[re.Match[str]], sensible: Callable[[Call], bool]) -> list[str]:
    values = [_values(found) for found in ranges]
    if (count := prod(map(len, values))) > MOST:
        raise UserError(
            f"the ranges of {part.strip()!r} hold {count} values, over the limit of {MOST}: give larger steps"
        )
    cuts = [0, *(place for found in ranges for place in found.span()), len(part)]
    between = [part[a:b] for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
    written = [
        between[0] + "".join(str(v) + rest for v, rest in zip(chosen, between[1:], strict=True))
        for chosen in product(*values)
    ]
    kept = [line.strip() for line in written if all(map(sensible, Setting.parse(line).calls))]
    if not kept:
        raise UserError(f"no value in the range of {part.strip()!r} makes sense here; name one: {written[0].strip()}")
    return kept


def _values(found: re.Match[str]) -> list[int | float]:
    """The numbers of one range."""
    first, last = Decimal(found[1]), Decimal(found[2])
    whole = not any("." in end for end in found.groups() if end)
    if found[3] is None and not whole:
        raise UserError(f"the range {found[0]!r} needs a step: write it like {found[0]}..0.1")
    step = Decimal(found[3] or 1)
    if step <= 0:
        raise UserError(f"the range {found[0]!r} has a step of {step}: give one above 0; the ends tell the direction")
    count = int(abs(last - first) / step) + 1
    if count > MOST:
        raise UserError(f"the range {found[0]!r} holds {count} values, over the limit of {MOST}: give a larger step")
    step = step if last >= first else -step
    return [int(v) if whole else float(v) for v in (first + k * step for k in range(count))]
