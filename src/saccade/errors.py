"""The one error a user can cause."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 2000  # characters of a message


class UserError(Exception):
    """A mistake in what the user gave: one line that names the value, the limit and the remedy (exit code 2)."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """Text for a terminal: names from elsewhere may hold line breaks, control characters, or a whole file."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 500]} … {line[-490:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'grid'?)"`` for a near miss of a known name, else a list of what is known."""
    known = sorted(known)
    return near_miss(name, known) or f" (known: {', '.join(known)})"


def near_miss(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'grid'?)"`` for a near miss of a known name, else nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
