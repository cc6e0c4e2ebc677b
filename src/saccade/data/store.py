"""Where image files lie: a folder or a zip, read by name."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile, ZipFile

from saccade.errors import UserError

MAX_DEPTH = 3


class Store(Protocol):
    """Files by their ``/``-separated name below one path. Picklable; reads are safe from any thread or process."""

    def names(self) -> list[str]:
        """All files, hidden ones too, in no order. Raises UserError if they cannot be listed."""
        ...

    def size(self, name: str) -> int:
        """Bytes in the file, -1 where that cannot be told (a broken link): reading it then says why."""
        ...

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises nearly anything for a broken file."""
        ...


class Folder:
    """A directory."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        found = []
        for folder, below, files in os.walk(self.path, followlinks=True, onerror=_refuse):
            inside = Path(folder).relative_to(self.path)
            found += [(inside / file).as_posix() for file in files]
            # No layout is deeper; links may form a loop.
            below[:] = [name for name in below if len(inside.parts) < MAX_DEPTH and not name.startswith(".")]
        return found

    def size(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_size
        except OSError:
            return -1

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class Zip:
    """A zip archive. Nothing is extracted; each thread of each process reads through a handle of its own."""

    def __init__(self, path: Path):
        self.path = path
        self._handles = threading.local()

    def __reduce__(self) -> tuple:
        return Zip, (self.path,)

    def names(self) -> list[str]:
        try:
            return [info.filename for info in self._zip().NameToInfo.values() if not info.is_dir()]
        except (BadZipFile, OSError) as error:
            raise UserError(f"{self.path} is not a readable zip ({error}): pack or download it again") from error

    def size(self, name: str) -> int:
        return self._zip().getinfo(name).file_size

    def read(self, name: str) -> bytes:
        return self._zip().read(name)

    def _zip(self) -> ZipFile:
        # A handle that came through a fork shares its file offset with the parent's.
        if getattr(self._handles, "process", None) != os.getpid():
            self._handles.zip, self._handles.process = ZipFile(self.path), os.getpid()
        return self._handles.zip


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed ({error.strerror}): make it readable") from error
