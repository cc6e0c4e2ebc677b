"""Errors of one setting among many: named and left out, where they are the setting's own."""

from __future__ import annotations

from saccade.errors import UserError


def is_systems(error: BaseException) -> bool:
    """Whether an error is of the machine and not of one setting: no memory, no disk. It would not be the last."""
    return not isinstance(error, Exception) or isinstance(error, (MemoryError, OSError))


def described(error: BaseException) -> str:
    """One line: what kind of error, and its first words."""
    words = (str(error).strip().splitlines() or [""])[0][:200]
    return words if isinstance(error, UserError) and words else f"{type(error).__name__}: {words}"
