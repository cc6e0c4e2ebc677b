"""End at the first, second, third … thing that a piece of work does to a file system, and look at what is there then.

python tests/crashes.py WORKS FOLDER [MOST]

Each time in a process of its own: everything audited that changes files (open for writing, rename, mkdir, unlink, …),
every fsync, and half a file of weights. There are three ``WAYS`` to end. For each of the works (``crash_works.py``)
this prints how many points there were and were tried. ``test_crash_points.py`` runs it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from saccade.errors import UserError

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
FREEING = {"os.remove", "os.rmdir"}  # what no full disk refuses
# kill: the process is gone, what it wrote is there. power: half of what was written and not synced is lost too.
# full: the system refuses this one thing; the process has to say so, and goes on to clean up.
WAYS = ("kill", "power", "full")
DEAD = 77


class Ending:
    """Counts what is done below a folder, and ends the work, one way or another, at the ``last`` of it."""

    def __init__(self, below: Path, last: int, way: str) -> None:
        self.below, self.last, self.way, self.count = str(below), last, way, 0
        self.unsynced: dict[str, int] = {}  # file -> bytes of it that were there before and are not lost

    def __call__(self, what: str) -> None:
        self.count += 1
        if self.count != self.last or (self.way == "full" and what.split()[0] in FREEING):
            return
        os.write(2, f"{self.way} at {what}\n".encode())
        if self.way == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)
        if self.way == "power":
            self.lose()
        os._exit(DEAD)

    def lose(self) -> None:
        for file, kept in self.unsynced.items():
            if os.path.isfile(file) and os.path.getsize(file) > kept:
                os.truncate(file, kept + (os.path.getsize(file) - kept) // 2)

    def audited(self, event: str, args: tuple) -> None:
        if event == "open" and not (isinstance(args[0], str) and (args[2] or 0) & WRITING):
            return
        if not ((event == "open" or event in CHANGES) and self.below in str(args[0])):
            return
        self(f"{event} {args[0]}")
        if event == "open" and not args[2] & os.O_PATH:
            fresh = args[2] & os.O_TRUNC or not os.path.exists(args[0])
            self.unsynced.setdefault(args[0], 0 if fresh else os.path.getsize(args[0]))
        elif event == "os.rename":
            self.unsynced = dict(self.moved(str(args[0]), str(args[1])))

    def moved(self, old: str, new: str) -> Iterator[tuple[str, int]]:
        for file, kept in self.unsynced.items():
            if file == old or file.startswith(f"{old}/"):
                yield new + file[len(old) :], kept
            elif file != new:
                yield file, kept

    def install(self) -> None:
        fsync, write = os.fsync, safetensors.torch.serialize_file

        def synced(handle: int) -> None:
            file = os.readlink(f"/proc/self/fd/{handle}")
            if self.below in file:
                self(f"fsync {file}")
            fsync(handle)
            self.unsynced.pop(file, None)

        def written(tensors: dict, file: str | Path, *rest, **more) -> None:
            if self.below in str(file):
                try:
                    self(f"open {file}")
                    write(tensors, file, *rest, **more)
                    self.unsynced[str(file)] = 0
                    if self.count + 1 == self.last:  # half of it is there
                        os.truncate(file, os.path.getsize(file) // 2)
                    self(f"write {file}")
                except OSError as error:
                    raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None
            write(tensors, file, *rest, **more)

        os.fsync, safetensors.torch.serialize_file = synced, written
        for module in list(sys.modules.values()):  # those that took the function by its name
            if getattr(module, "serialize_file", None) is write:
                module.serialize_file = written  # type: ignore[attr-defined]
        sys.addaudithook(self.audited)


def child(work: Callable[[], object], *, refused: bool = False) -> int:
    """The exit status of a forked process that does this and nothing else.

    refused: the library's own error is a good end.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
        except UserError:
            if not refused:
                traceback.print_exc()
                os._exit(1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def points(work: Callable[[], object], below: Path) -> int:
    """How many there are in a piece of work."""
    file = below.parent / "points"

    def count() -> None:
        ending = Ending(below, -1, "kill")
        ending.install()
        work()
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(handle, str(ending.count).encode())

    assert child(count) == 0, "the work fails by itself"
    return int(file.read_text())


def trials(total: int, most: int) -> Iterator[tuple[int, str]]:
    """Every point in every way; or ``most`` points, evenly spread, each in one way."""
    if total <= most:
        yield from ((last, way) for last in range(1, total + 1) for way in WAYS)
    else:
        yield from ((1 + (2 * i + 1) * total // (2 * most), WAYS[(i + total) % len(WAYS)]) for i in range(most))


def enumerate_points(
    before: Callable[[], object], work: Callable[[], object], after: Callable[[], object], below: Path, most: int
) -> dict[str, int]:
    """Prepare, end at one point, look; ``after`` raises where something is wrong."""
    before()
    total, tried = points(work, below), 0
    for last, way in trials(total, most):
        before()

        def ending(last: int = last, way: str = way) -> None:
            Ending(below, last, way).install()
            work()

        status = child(ending, refused=way == "full")
        there = sorted(str(p.relative_to(below)) for p in below.rglob("*"))
        told = f"{way} at point {last} of {total}"
        assert status in (DEAD, 0), f"{told}: exit {status}; there is {there}"
        assert child(after) == 0, f"{told}: wrong afterwards, see above; there was {there}"
        tried += 1
    return {"points": total, "tried": tried}


def main(work: str, folder: Path, most: int = 10**9) -> None:
    import crash_works

    root = folder / "root"
    root.mkdir(parents=True)
    before, act, after = crash_works.WORKS[work](root)

    def clean() -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        before()

    print(json.dumps({"work": work, **enumerate_points(clean, act, after, root, most)}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    for name in sys.argv[1].split(","):
        main(name, Path(sys.argv[2]) / name, *map(int, sys.argv[3:]))
