"""Splits of an image set by the names that people give them, and a share of a set to hold out where there are none."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from saccade.errors import UserError
from saccade.storage.image_names import CHECK, KINDS, TEST, _word, kind_of

ORDER = tuple(KINDS)
USUAL = "val, valid, validation, dev, eval, held-out or test"


def held_out(known: Iterable[str], *kinds: str) -> str | None:
    """The split to look at where none is asked for: the first to check on, else to test on; None where none is."""
    wanted = kinds or (CHECK, TEST)
    found = [name for name in known if kind_of(name) in wanted]
    return min(
        found, key=lambda name: (wanted.index(kind_of(name) or ""), ORDER.index(_word(name)), name), default=None
    )


def choose_split(path: Path, known: Iterable[str], split: str | None) -> str:
    """The split that is asked for, also under another common name of its kind; None: the held-out one.

    Raises UserError where there is no such split, or more than one of its kind.
    """
    known = sorted(known)
    listed = ", ".join(known)
    if split is None:
        if (found := held_out(known)) is None:
            raise UserError(f"no held-out split ({USUAL}) in {path}: name one of {listed}")
        return found
    if split in known:
        return split
    alike = [name for name in known if kind_of(split) is not None and kind_of(name) == kind_of(split)]
    if len(alike) != 1:
        raise UserError(f"no split {split!r} in {path}: name one of {listed}")
    return alike[0]


def divide(names: Sequence[str], share: float, labels: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Places of the names to train on, and of about ``share`` of them to check on.

    A name decides for itself, so that adding images moves hardly any of the others; but of every class (of all, where
    ``labels`` is None) at least one is trained on, and one checked on where there are two or more.
    """
    members: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for i, name in enumerate(names):
        members[0 if labels is None else labels[i]].append((_place(name), i))
    out: set[int] = set()
    for ranked in map(sorted, members.values()):
        count = sum(place < share for place, _ in ranked)
        out.update(i for _, i in ranked[: min(max(count, 1), len(ranked) - 1)])
    return [i for i in range(len(names)) if i not in out], sorted(out)


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
