"""Checks of knobs, and schedules: what a method's factory does before it builds anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from saccade.errors import UserError


def one_of(method: str, knob: str, value: str, known: Iterable[str]) -> str:
    """Check a knob that takes one of some words; UserError names them."""
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{method}: {knob}={value!r} is not one of {', '.join(known)}")
    return value


def switch(method: str, knob: str, value: bool) -> bool:
    """Check a knob that is on or off."""
    if not isinstance(value, bool):
        raise UserError(f"{method}: {knob}={value!r} is not True or False")
    return value


def whole(method: str, knob: str, value: int, low: int, high: int) -> int:
    """Check a knob that takes a whole number; UserError names the value and the limits."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{method}: {knob}={value!r} is not a whole number in [{low}, {high}]")
    return value


def schedule(method: str, r: int | tuple[int, ...], inflection: float, depth: int) -> list[int]:
    """Tokens to merge away in each block, as ToMe's reference has it: each rounded down, so that some may be lost.

    Args:
        r: the same for every block, or a list, padded with zeros.
        inflection: r changes linearly over the blocks; -1: from 2r to 0, 0: not at all, 1: from 0 to 2r.
    """
    _check_inflection(method, inflection)
    if isinstance(r, tuple):
        if len(r) > depth:
            raise UserError(f"{method}: {len(r)} values of r for {depth} blocks")
        found: list = [*r, *[0] * (depth - len(r))]
    elif isinstance(r, bool) or not isinstance(r, int):
        raise UserError(f"{method}: r={r!r} is not a whole number of tokens, or a list of them")
    else:
        low = int(r * (1 - inflection))
        step = (2 * r - 2 * low) / max(depth - 1, 1)
        found = [int(low + step * block) for block in range(depth)]
    if any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in found):
        raise UserError(f"{method}: r={r!r} must be whole numbers of tokens, 0 or more")
    return found


def exact_schedule(method: str, total: int, inflection: float, depth: int) -> list[int]:
    """As ``schedule``, but of all blocks together, and exactly: each block within one of the line, Σ = total."""
    whole(method, "total", total, 0, 10**6)
    _check_inflection(method, inflection)
    mean, last = total / depth, max(depth - 1, 1)
    line = [mean * (1 + inflection * (2 * block / last - 1)) for block in range(depth)] if depth > 1 else [mean]
    return whole_parts(line, total)


def whole_parts(line: Sequence[float], total: int) -> list[int]:
    """Whole numbers, each within one of the number of ``line`` in its place; together ``total``, as the line's are."""
    sums = [round(sum(line[:place])) for place in range(len(line))] + [total]
    return [after - before for before, after in pairwise(sums)]


def _check_inflection(method: str, inflection: float) -> None:
    if not -1 <= inflection <= 1:
        raise UserError(f"{method}: inflection={inflection!r} is not in [-1, 1]")


def fraction(method: str, knob: str, value: float, low: float = 0.0, high: float = 1.0) -> float:
    """Check a knob's range; UserError names the value and the limits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"{method}: {knob}={value!r} is not a number in [{low:g}, {high:g}]")
    return float(value)


def blocks(method: str, at: int | Iterable[int] | None, default: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Check block indices (0-based, as in ``vit.blocks``); None: the default."""
    if at is None:
        return default
    chosen = (at,) if isinstance(at, int) else tuple(at)
    for block in chosen:
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < depth:
            raise UserError(f"{method}: block {block!r} is not one of 0 … {depth - 1}")
    return tuple(sorted(set(chosen)))
