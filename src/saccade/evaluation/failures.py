"""Errors of one setting among many: named and left out, where they are the setting's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from saccade.errors import UserError

NAMED = 2  # settings that a line names, of many that fail for one reason


def is_systems(error: BaseException) -> bool:
    """Whether an error is of the machine and not of one setting: no memory, no disk. It would not be the last."""
    return not isinstance(error, Exception) or isinstance(error, (MemoryError, OSError))


def described(error: BaseException) -> str:
    """One line: what kind of error, and its first words."""
    words = (str(error).strip().splitlines() or [""])[0][:200]
    return words if isinstance(error, UserError) and words else f"{type(error).__name__}: {words}"


def by_reason(failed: Mapping[str, str]) -> list[str]:
    """A line for each reason: ``evit(0.7), tome(r=8) and 26 others: not timed, to keep within the time``."""
    names: dict[str, list[str]] = {}
    for name, reason in failed.items():
        names.setdefault(reason, []).append(name)
    return [f"{_some(those)}: {reason}" for reason, those in names.items()]


def _some(names: Sequence[str]) -> str:
    if len(names) <= NAMED + 1:
        return ", ".join(names)
    return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} others"
