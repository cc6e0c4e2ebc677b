"""Files that are there whole or not at all, on the disk, and never in place of somebody else's."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from saccade.errors import UserError

SIGNATURE = "saccade"
NAME_MAX, PATH_MAX = 255, 4095  # bytes, on every system that we know of
STALE = 24 * 3600  # seconds without a write, after which what an unknown process was writing is abandoned
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
_PART = re.compile(r"\..*?\.(?:([0-9a-f]{6})\.(\d+)\.)?[0-9a-f]{8,}\.part(\..*)?|\.[0-9a-f]{12,}\.part(\..*)?")
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space, or give another place",
    errno.EDQUOT: "the quota is used up: free some space, or give another place",
    errno.EFBIG: "the file would be larger than this system or user may write: give another place",
    errno.ENAMETOOLONG: f"the name is too long, over {NAME_MAX} bytes: give a shorter one",
    errno.EACCES: "there is no permission: give another place",
    errno.EPERM: "there is no permission: give another place",
    errno.EROFS: "it is read-only: give another place",
    errno.ENOTDIR: "a part of the path is not a folder: give another place",
}


@contextmanager
def reported(doing: str, path: str | os.PathLike) -> Iterator[None]:
    """Turns what the system answers into a UserError, ``cannot {doing} {path}: …``: full, read-only, too long, …"""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := system_reason(error)) is None:
            raise
        raise UserError(f"cannot {doing} {shortened(path)}: {reason}") from error


def system_reason(error: BaseException) -> str | None:
    """What the system objected to, and the remedy, in a line; None for an error that is not the system's."""
    known = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors tells it
    if not isinstance(error, OSError) and not known:
        return None
    number = error.errno if isinstance(error, OSError) else int(known[1])  # type: ignore[index]
    line = " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
    return _REMEDIES.get(number or 0, line)


def shortened(path: str | os.PathLike) -> str:
    """A path as it is shown in a message: a very long one without its middle."""
    text = str(path)
    return repr(text if len(text) <= 200 else f"{text[:90]}…{text[-90:]}")


@contextmanager
def replacing(path: str | os.PathLike, ours: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A temporary path beside ``path``, moved over it when the block ends well and removed when it does not.

    What is moved is on the disk before. What killed processes left of it goes.

    Args:
        ours: whether a file that is there may be replaced; None: any may.

    Raises:
        UserError: nothing can be written there, the disk is full, or what is there is somebody else's.
    """
    target = Path(path)
    check_folder(target.parent)
    check_target(target, ours)
    with reported("write", path):
        target = Path(os.path.realpath(target))  # a link stays one
        target.parent.mkdir(parents=True, exist_ok=True)
        part = part_beside(target)
        try:
            yield part
            to_disk(part)
            os.replace(part, target)
            to_disk(target.parent)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        sweep(target.parent, f".{_stem(target)}.")


def check_target(path: str | os.PathLike, ours: Callable[[Path], bool] | None = None) -> None:
    """Raises UserError unless ``path`` is free, or a file that may be replaced."""
    target = Path(path)
    check_name(target)
    if target.is_dir():
        raise UserError(f"cannot write {shortened(path)}: it is a folder")
    if not target.exists():
        return
    if not stat.S_ISREG(target.stat().st_mode):
        raise UserError(f"cannot write {shortened(path)}: it is a device, a pipe or the like, not a file")
    if ours is not None and target.stat().st_size and not ours(target):
        raise UserError(f"{shortened(path)} is there and was not written by saccade: remove it, or give another name")


def check_name(path: str | os.PathLike) -> None:
    """Raises UserError for a path that no system takes."""
    text = os.fspath(path)
    if "\0" in text:
        raise UserError(f"cannot write {shortened(path)}: a path has no zero byte")
    longest = max((len(os.fsencode(name)) for name in Path(text).parts), default=0)
    if longest > NAME_MAX or len(os.fsencode(os.path.abspath(text))) > PATH_MAX:
        raise UserError(f"cannot write {shortened(path)}: {_REMEDIES[errno.ENAMETOOLONG]}")


def check_folder(path: str | os.PathLike) -> None:
    """Raises UserError unless ``path`` is a folder to write in, or one can be made there; makes nothing."""
    check_name(path)
    folder = Path(path).absolute()
    found = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if not found.is_dir():
        raise UserError(f"cannot write below {shortened(path)}: {shortened(found)} is not a folder")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"cannot write below {shortened(path)}: {shortened(found)} is read-only")


def to_disk(path: Path) -> None:
    """Return when a file, or the names in a folder, would survive the machine losing power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some systems sync no folders
            raise
    finally:
        os.close(handle)


def part_beside(target: Path) -> Path:
    """A hidden name beside ``target`` for what is not finished. It tells who writes it, so that others can clean up."""
    token = f"{_HOST}.{os.getpid()}.{secrets.token_hex(4)}"
    return target.with_name(f".{_stem(target)}.{token}.part{target.suffix[:20]}")


def sweep(folder: Path, prefix: str = ".", *, owned: bool = False) -> None:
    """Remove what killed processes left unfinished in ``folder``, of names that begin with ``prefix``.

    Args:
        owned: this process alone writes here, so that all that is unfinished is abandoned.
    """
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _PART.fullmatch(entry.name) if entry.name.startswith(prefix) else None
            if found and (owned or _abandoned(entry, found[1], found[2])):
                discard(Path(entry.path))


def discard(path: Path) -> None:
    """Remove a file or folder, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _abandoned(entry: os.DirEntry[str], host: str | None, process: str | None) -> bool:
    if host == _HOST and process:
        return not alive(int(process))
    with suppress(OSError):
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE
    return False


def _stem(target: Path) -> str:
    """Of a name, as much as leaves room for what is added."""
    return target.name[:40]


def write_picture(path: str | os.PathLike, picture: Image.Image) -> None:
    """Write a PNG in place of nothing, or of one that we wrote. Raises UserError."""
    signed = PngInfo()
    signed.add_text("Software", SIGNATURE)
    with replacing(path, is_our_picture) as part:
        picture.save(part, "PNG", pnginfo=signed)


def is_our_picture(path: Path) -> bool:
    """Whether a file is a PNG that ``write_picture`` wrote."""
    with open(path, "rb") as file:
        head = file.read(4096)
    return head.startswith(b"\x89PNG") and b"tEXtSoftware\0" + SIGNATURE.encode() in head


def check_picture(path: str | os.PathLike) -> None:
    """Raises UserError where ``write_picture`` would: before the work."""
    check_folder(Path(path).parent)
    check_target(path, is_our_picture)


def read_at_most(path: Path, limit: int) -> bytes:
    """The bytes of a regular file. Raises OSError where it is none or cannot be read, ValueError where it is longer."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is no file")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path.name} is over {limit >> 20} MiB")
    return data


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text; a reader sees the old file or the whole new one. Names that are not UTF-8 are escaped."""
    write_texts({path: text})


def write_texts(texts: Mapping[str | os.PathLike, str]) -> None:
    """Write several, the same way; none takes its place before all are on the disk."""
    with staged(texts):
        pass


@contextmanager
def staged(texts: Mapping[str | os.PathLike, str]) -> Iterator[None]:
    """Texts by path, on the disk when the block begins, and in their places when it has ended well: where the disk is
    full, or the block fails, all of what was there is there still. Raises UserError."""
    with ExitStack() as stack:
        parts = [(stack.enter_context(replacing(path)), path, text) for path, text in texts.items()]
        for part, path, text in parts:
            with reported("write", path):
                part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
                to_disk(part)
        yield


def json_text(value: Any) -> str:
    """Indented JSON."""
    return json.dumps(value, indent=2) + "\n"


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write indented JSON, as ``write_text`` does."""
    write_text(path, json_text(value))
