"""Where files lie: a folder or a zip, read by name. Regular files only, and never more bytes of one than asked for."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol
from zipfile import BadZipFile, ZipFile, ZipInfo, is_zipfile

from saccade.errors import UserError

MAX_DEPTH = 3
MAX_ENTRIES = 20_000_000  # files and folders below one path: the whole ImageNet has 14 million
MAX_VISITS = 8  # of one folder, through links
SETTLED = 2 * 10**9  # ns after which a file that changes again gets another time stamp on any file system
KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}


class TooLong(Exception):
    """A file has more bytes than were asked for; ``size`` where that is known."""

    def __init__(self, size: int | None = None) -> None:
        super().__init__("too long" if size is None else f"{size:,} bytes")
        self.size = size


class NoFile(ValueError):
    """A pipe, a socket or a device where a file should be."""


class Store(Protocol):
    """Files by their ``/``-separated name below one path. Picklable; reads are safe from any thread or process."""

    def names(self) -> list[str]:
        """All files, hidden ones too, in no order. Raises UserError if they cannot be listed."""
        ...

    def size(self, name: str) -> int:
        """Bytes in the file, -1 where that cannot be told (a broken link): reading it then says why."""
        ...

    def read(self, name: str, limit: int) -> bytes:
        """The file's bytes. Raises TooLong where there are more than ``limit``, nearly anything for a broken file."""
        ...

    def digest(self, name: str, limit: int) -> bytes:
        """16 bytes that tell the file's content from any other's; also of one that ``read`` raises for."""
        ...


class Stamp(NamedTuple):
    """What the file system says of a file; a change of content changes it once the file is ``SETTLED``."""

    size: int
    modified: int  # ns
    changed: int  #  ns, which no program can set
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> Stamp | None:
        """The stamp of a file; None where there is none."""
        try:
            found = path.stat()
        except (OSError, ValueError):
            return None
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)

    def settled(self) -> bool:
        """Whether the file is old enough for a later change to change its stamp."""
        return time.time_ns() - max(self.modified, self.changed) > SETTLED


class _Hashed:
    """Digests of files, each read once for as long as its file stays as it is."""

    def __init__(self) -> None:
        self._digests: dict[tuple[str, int], tuple[Stamp, bytes]] = {}

    def stamp(self, name: str) -> Stamp | None:
        raise NotImplementedError

    def read(self, name: str, limit: int) -> bytes:
        raise NotImplementedError

    def digest(self, name: str, limit: int) -> bytes:
        stamp = self.stamp(name)
        known = self._digests.get((name, limit))
        if stamp is not None and known is not None and known[0] == stamp:
            return known[1]
        settled = stamp is not None and stamp.settled()  # before it is read
        try:
            found = hashlib.blake2b(self.read(name, limit), digest_size=16, person=b"read")
        except Exception as error:  # zipfile alone raises six kinds
            found = hashlib.blake2b(f"{type(error).__name__} {stamp and stamp.size}".encode(), digest_size=16)
        digest = found.digest()
        if stamp is not None and settled:
            self._digests[name, limit] = stamp, digest
        return digest


class Folder(_Hashed):
    """A directory."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def names(self) -> list[str]:
        """Links are followed, but never into a folder that they lie in."""
        found: list[str] = []
        visits: Counter[tuple[int, int]] = Counter()
        entries = 0
        waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (_identity(self.path),))]
        while waiting:
            inside, above = waiting.pop()
            for entry in self._listed(inside):
                entries += 1
                if entries > MAX_ENTRIES:
                    raise UserError(
                        f"over {MAX_ENTRIES:,} files and folders below {self.path}: give a folder further in"
                    )
                name = inside + entry.name
                if not _leads_to_folder(entry):
                    found.append(name)
                elif len(above) <= MAX_DEPTH and not entry.name.startswith("."):  # no layout is deeper
                    folder = _identity(self.path / name)
                    visits[folder] += 1
                    if folder in above:
                        continue
                    if visits[folder] > MAX_VISITS:
                        raise UserError(f"over {MAX_VISITS} links lead to {self.path / name}: take some of them away")
                    waiting.append((f"{name}/", (*above, folder)))
        return found

    def _listed(self, inside: str) -> list[os.DirEntry]:
        folder = self.path / inside
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except OSError as error:
            raise UserError(f"{folder} cannot be listed ({error.strerror}): make it readable") from error

    def size(self, name: str) -> int:
        """Bytes; -1 where there is no such file."""
        stamp = self.stamp(name)
        return -1 if stamp is None else stamp.size

    def stamp(self, name: str) -> Stamp | None:
        """Of the file; None where there is none."""
        return Stamp.of(self.path / name)

    def read(self, name: str, limit: int) -> bytes:
        """The whole file. Raises TooLong for more than ``limit`` bytes, NoFile, OSError."""
        return read_regular(self.path / name, limit)


class Zip(_Hashed):
    """A zip archive. Nothing is extracted; each thread of each process reads through a handle of its own."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self._handles = threading.local()

    def __reduce__(self) -> tuple:
        return Zip, (self.path,)

    def names(self) -> list[str]:
        """Raises UserError for an archive that is damaged, or whose names are not what a folder's could be."""
        infos = self._zip().filelist
        if len(infos) > MAX_ENTRIES:
            raise UserError(f"over {MAX_ENTRIES:,} files in {self.path}: pack fewer")
        names = [info.filename for info in infos if not info.filename.endswith("/")]
        for name in names:
            if not name:
                raise UserError(f"{self.path} holds a file without a name: pack it again")
            if "\\" in name:
                raise UserError(f"{self.path} holds {name!r}, with backslashes between folders: pack it again with /")
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise UserError(f"{self.path} holds {name!r}, which leads out of it: pack it again")
        if len(set(names)) < len(names):
            (name, _), *_ = Counter(names).most_common(1)
            raise UserError(f"{self.path} holds {name!r} more than once: pack it again")
        return names

    def size(self, name: str) -> int:
        """Bytes, unpacked."""
        return self._zip().getinfo(name).file_size

    def stamp(self, name: str) -> Stamp | None:
        """Of the archive; None where it is gone."""
        return Stamp.of(self.path)

    def read(self, name: str, limit: int) -> bytes:
        """The whole file. Raises TooLong for more than ``limit`` bytes, ValueError for a link."""
        archive = self._zip()
        info = archive.getinfo(name)
        if info.file_size > limit:
            raise TooLong(info.file_size)
        if _is_link(info):
            raise ValueError("a link in a zip: pack what it points to")
        with archive.open(info) as file:
            data = file.read(info.file_size + 1)
        if len(data) != info.file_size:
            raise BadZipFile(f"{len(data):,} bytes where {info.file_size:,} are announced")
        return data

    def _zip(self) -> ZipFile:
        # A handle that came through a fork shares its file offset with the parent's.
        if getattr(self._handles, "process", None) != os.getpid():
            try:
                self._handles.zip, self._handles.process = ZipFile(self.path), os.getpid()
            except Exception as error:  # damaged ones raise nearly anything
                what = f"{self.path} is not a readable zip ({_line(error)}): pack or download it again"
                raise UserError(what) from error
        return self._handles.zip


def open_store(path: Path) -> Store:
    """A folder or zip. Raises UserError for anything else."""
    if path.is_dir():
        return Folder(path)
    if not os.path.lexists(path):
        raise UserError(f"{path} does not exist, and is neither a folder nor a zip: give one")
    if path.is_file() and is_zipfile(path):  # a pipe is not even opened
        return Zip(path)
    raise UserError(f"{path} is neither a folder nor a whole zip")


def read_regular(path: Path, limit: int) -> bytes:
    """A file's bytes. Raises TooLong for more than ``limit``, NoFile, OSError."""
    _check_regular(path.stat().st_mode)  # opening a device may do something
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        found = os.fstat(file.fileno())
        _check_regular(found.st_mode)
        if found.st_size > limit:
            raise TooLong(found.st_size)
        data = file.read(found.st_size + 1)
        if len(data) > found.st_size:  # it grows, or is one of those that have no size, as in /proc
            data += file.read(limit + 1 - len(data))
    if len(data) > limit:
        raise TooLong
    return data


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NoFile(f"{KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file")


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be listed ({error.strerror}): make it readable") from error
    return found.st_dev, found.st_ino


def _leads_to_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_link(info: ZipInfo) -> bool:
    return info.create_system == 3 and stat.S_ISLNK(info.external_attr >> 16)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
