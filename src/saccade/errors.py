"""The one error a user can cause."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: one line that names the value, the limit and the remedy (exit code 2)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'tome'?)"`` for a near miss of a known name, else a list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"
