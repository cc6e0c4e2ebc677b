"""Images that a table or an annotation names, below a folder or in a zip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from saccade.data import ImageSet
from saccade.data.store import open_store
from saccade.errors import UserError


def open_listed(names: Sequence[str], where: str | Path, by: str | Path) -> ImageSet:
    """The images that the file ``by`` lists, below the folder or zip ``where``.

    Raises UserError where none is listed, a name leads out of ``where``, or the first is not there.
    """
    store = open_store(Path(where))
    outside = next((n for n in names if n.startswith("/") or ".." in PurePosixPath(n).parts), None)
    if outside is not None or not names:
        raise UserError(f"{str(by)!r} lists {outside or 'no images'}: names must lie below {str(where)!r}")
    try:
        missing = store.size(names[0]) < 0
    except KeyError:
        missing = True
    if missing:
        raise UserError(f"{names[0]!r} of {str(by)!r} is not in {str(where)!r}: give what its names are relative to")
    return ImageSet(Path(where), None, list(names), None, None, store)
