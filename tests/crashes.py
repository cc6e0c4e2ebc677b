"""Die at the first, second, third … thing that a piece of work does to a file system, and look at what is there then.

python tests/crashes.py WORK FOLDER [MOST]

Each time in a process of its own: everything audited that changes files (open for writing, rename, mkdir, unlink, …),
every fsync, and half a file of weights. Prints how many points there were and were tried. ``test_crash_points.py``
runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree", "os.link"}
DEAD = 77


class Dying:
    """Counts what is done below a folder, and ends the process, without a word, at the ``last`` of it."""

    def __init__(self, below: Path, last: int) -> None:
        self.below, self.last, self.count = str(below), last, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.last:
            os._exit(DEAD)

    def audited(self, event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str) and not (args[2] or 0) & WRITING:
            return
        if (event == "open" or event in CHANGES) and self.below in str(args[0]):
            self()

    def install(self) -> None:
        fsync, write = os.fsync, safetensors.torch.serialize_file

        def synced(handle: int) -> None:
            self()
            fsync(handle)

        def written(tensors: dict, file: str | Path, *rest, **more) -> None:
            if self.below in str(file):
                Path(file).touch()
                self()
                write(tensors, file, *rest, **more)
                if self.count + 1 == self.last:  # half of it is there
                    os.truncate(file, os.path.getsize(file) // 2)
                self()
            write(tensors, file, *rest, **more)

        os.fsync, safetensors.torch.serialize_file = synced, written
        sys.addaudithook(self.audited)


def child(work: Callable[[], object]) -> int:
    """The exit status of a forked process that does this and nothing else."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def points(work: Callable[[], object], below: Path) -> int:
    """How many there are in a piece of work."""
    file = below.parent / "points"

    def count() -> None:
        dying = Dying(below, -1)
        dying.install()
        work()
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(handle, str(dying.count).encode())

    assert child(count) == 0, "the work fails by itself"
    return int(file.read_text())


def enumerate_points(
    before: Callable[[], object], work: Callable[[], object], after: Callable[[], object], below: Path, most: int
) -> dict[str, int]:
    """Prepare, die at one point, look; for every point, or ``most`` of them, evenly spread. ``after`` raises."""
    before()
    total = points(work, below)
    chosen = range(1, total + 1) if total <= most else [1 + i * (total - 1) // (most - 1) for i in range(most)]
    for last in chosen:
        before()

        def dying(last: int = last) -> None:
            Dying(below, last).install()
            work()

        status = child(dying)
        assert status in (DEAD, 0), f"point {last} of {total}: exit {status}"
        try:
            after()
        except BaseException as error:
            listing = sorted(str(p.relative_to(below)) for p in below.rglob("*"))
            raise AssertionError(f"point {last} of {total}: {error}; there is {listing}") from error
    return {"points": total, "tried": len(chosen)}


def main(work: str, folder: Path, most: int = 10**9) -> None:
    torch.set_num_threads(1)
    import crash_works

    root = folder / "root"
    before, act, after = crash_works.WORKS[work](root)

    def clean() -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        before()

    print(json.dumps(enumerate_points(clean, act, after, root, most)))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
