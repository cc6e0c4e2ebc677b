"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saccade.errors import UserError


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path``, moved over it when the block ends well and removed when it does not.

    Raises UserError where nothing can be written there.
    """
    target = Path(path)
    check_folder(target.parent)
    if target.is_dir():
        raise UserError(f"cannot write {str(target)!r}: it is a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part{target.suffix}")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def check_folder(path: str | os.PathLike) -> None:
    """Raises UserError unless ``path`` is a folder to write in, or one can be made there; makes nothing."""
    folder = Path(path).absolute()
    found = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if not found.is_dir():
        raise UserError(f"cannot write below {str(path)!r}: {str(found)!r} is not a folder")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"cannot write below {str(path)!r}: {str(found)!r} is read-only")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text; a reader sees the old file or the whole new one."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write indented JSON, the same way."""
    write_text(path, json.dumps(value, indent=2) + "\n")
