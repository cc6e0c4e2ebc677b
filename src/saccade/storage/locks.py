"""Whose a folder is: one process at a time writes in it, and what is somebody else's stays."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saccade.errors import UserError
from saccade.storage.files import check_folder, reported, shortened

try:
    import fcntl
except ImportError:  # pragma: no cover  (Windows: its own rule that open files cannot be replaced has to do)
    fcntl = None  # type: ignore[assignment]

LOCK = ".saccade.lock"


@contextmanager
def owning(folder: str | os.PathLike, *, wait: float = 0.0) -> Iterator[Path]:
    """Be the one process that writes in ``folder``, which is made where it is not there.

    The system frees the lock of a process that dies, however it dies. A folder that was made and stays empty goes.

    Args:
        wait: seconds to wait for another owner.

    Raises:
        UserError: another process owns it, or nothing can be written there.
    """
    path = Path(folder)
    check_folder(path)
    made = [place for place in (path, *path.parents) if not place.exists()]  # the innermost first
    with reported("write in", folder):
        handle = _locked(path, time.monotonic() + wait)
    try:
        yield path
    finally:
        with suppress(OSError):
            os.unlink(path / LOCK)  # while it is locked: see _locked
        os.close(handle)
        with suppress(OSError):  # one that is not empty ends it
            for place in made:
                place.rmdir()


def _locked(folder: Path, until: float) -> int:
    """A handle of the lock file, locked; it says which process has it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # whoever made the folder has just removed it
            continue
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):  # else its owner has just removed it
                    with suppress(OSError):  # on a full disk it is a lock all the same, of an unknown process
                        os.ftruncate(handle, 0)
                        os.pwrite(handle, str(os.getpid()).encode(), 0)
                    return handle
        except OSError as error:
            owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return handle  # this file system has no locks
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(handle)
                raise
            if time.monotonic() > until:
                os.close(handle)
                told = f"{shortened(folder)} is being written by process {owner}"
                raise UserError(f"{told}: wait until it ends, or give another place") from None
        os.close(handle)
        time.sleep(0.02)
