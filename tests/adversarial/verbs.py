"""Every verb that writes, as people type it, on a model and images small enough for a test.

``python verbs.py full ROOT VERBS DISK BYTES…`` runs them on a disk that fills up, ``python verbs.py shared ROOT VERBS
ROUNDS`` two at a time on one folder; each prints a line of JSON for each run. A process of its own: it forks, and the
disk is mounted for it alone.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import saccade
from crash_works import few, replace
from data_helpers import encode, picture, write_folder
from kills import look
from saccade.cli import main
from saccade.evaluation import search_run
from saccade.storage import locks

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 3}
TRAIN = ["run.steps=2", "run.batch=8", "run.device=cpu", "run.threads=1", "data.workers=0", "run.save_every=1"]
TRAIN += ["data.holdout=0.3", "optim.warmup=0", "augment.mixup=0", "augment.cutmix=0"]
OWNERS = ("eval", "tune", "train", "analyze")  # the others only put a file or a model in its place


@dataclass(frozen=True)
class Verb:
    """A command whose output lies in ``out``; what must be there when it has succeeded."""

    name: str
    line: list[str]
    made: str


def lay(root: Path) -> None:
    """A model, images and a photo below ``root``."""
    torch.manual_seed(0)
    saccade.save(saccade.create_model("vit_tiny_patch16_224", **SMALL), root / "model")
    files = {f"images/{c}/{i}.png": encode(picture(36, 32, seed=i)) for c in "abc" for i in range(10)}
    write_folder(root, {**files, "photo.png": encode(picture(64, 48))})


def verbs(root: Path, out: Path) -> list[Verb]:
    """The commands, with their output at ``out``."""
    model, images, photo = str(root / "model"), str(root / "images"), str(root / "photo.png")
    tune = ["--target", "1.2x", "--no-compiled", "--seconds", "0", "--batch", "2", "--schedules", "0"]
    return [
        Verb("eval", ["eval", model, images, "-s", "evit(0.5)", "--out", str(out)], "scores.json"),
        Verb("tune", ["tune", model, images, *tune, "--out", str(out)], "model/config.json"),
        Verb("train", ["train", "finetune", f"model.name={model}", f"data.path={images}", *TRAIN, "--out", str(out)],
             "model/config.json"),
        Verb("view", ["view", model, photo, "-s", "evit(0.5)", "--out", str(out / "view.png")], "view.png"),
        Verb("convert", ["convert", model, "--patch", "8:16", "--out", str(out)], "config.json"),
        Verb("analyze", ["analyze", model, images, "--out", str(out)], "report.html"),
    ]  # fmt: skip


def run(line: list[str]) -> tuple[int, str]:
    """Exit code and standard error of one command, in this process."""
    said, told = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(told), redirect_stderr(said):
            main(line)
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    except BaseException as error:
        return 1, f"Traceback {type(error).__name__}: {error}"
    return 0, said.getvalue()


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def leftovers(folder: Path) -> list[str]:
    """What looks like a file in the making."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if ".part" in p.name)


def report(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def full(root: Path, names: list[str], disk: Path, sizes: list[int]) -> None:
    """Each verb with so many bytes left on ``disk``, then with room again: the same command goes through.

    Where nothing at all is left, ``tune`` and ``train`` meet results of before, which stay as they are.
    """
    lay(root)
    replace(search_run, "candidates", few)
    for verb in (v for v in verbs(root, disk / "out") if v.name in names):
        for left in sizes:
            more = ["--resume"] if verb.name == "train" else []
            if earlier := verb.name in ("tune", "train") and left == 0:
                run(verb.line)
            before = contents(disk / "out")
            fill(disk, left)
            code, said = run([*verb.line, *more])
            intact = contents(disk / "out") == before if earlier else verb.name != "train" or look(disk / "out") >= 0
            rest = leftovers(disk)
            (disk / "filler").unlink()
            again, then = run([*verb.line, *more])
            made = (disk / "out" / verb.made).exists()
            facts = {"verb": verb.name, "left": left, "code": code, "said": last_line(said), "rest": rest}
            facts |= {"earlier": earlier, "intact": intact}
            report(**facts, traceback="Traceback" in said, again=again, then=last_line(then), made=made)
            empty(disk)


def contents(folder: Path) -> dict[str, bytes]:
    """All files by name, but for what measurements and decoded images are kept in."""
    files = (p for p in folder.rglob("*") if p.is_file() and "cache" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes free."""
    found = os.statvfs(disk)
    with open(disk / "filler", "wb") as file:
        for size in (max(0, found.f_bavail * found.f_frsize - left), 4096, 4096):
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, max(1, size))
            except OSError:
                break
            if os.statvfs(disk).f_bavail * found.f_frsize <= left:
                break


def empty(disk: Path) -> None:
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def shared(root: Path, names: list[str], rounds: int) -> None:
    """Each verb twice at the same time with one folder; whoever owns it first goes on when the other has ended."""
    lay(root)
    for verb in (v for v in verbs(root, root / "out") if v.name in names):
        for number in range(rounds):
            ends = [root / f"{verb.name}-{number}-{k}" for k in range(2)]
            children = [start(verb, ends[k], ends[1 - k]) for k in range(2)]
            codes = []
            for child in children:
                _, status = os.waitpid(child, 0)
                codes.append(os.waitstatus_to_exitcode(status))
            said = [end.read_text() for end in ends]
            if verb.made.endswith("config.json") and 0 in codes:
                saccade.load((root / "out" / verb.made).parent)
            made = (root / "out" / verb.made).exists()
            facts = {"verb": verb.name, "owns": verb.name in OWNERS, "codes": codes}
            facts["said"] = [last_line(s) for s in said]
            report(**facts, traceback=any("Traceback" in s for s in said), made=made, rest=leftovers(root / "out"))
            if verb.name in ("train", "convert") or number == rounds - 1:
                shutil.rmtree(root / "out", ignore_errors=True)


def start(verb: Verb, said: Path, other: Path) -> int:
    """A child that runs a verb, its standard error in a file; with the lock of the folder it waits for another's."""
    child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if verb.name in OWNERS:
            meet(other)
        code, text = run(verb.line)
        said.write_text(text)
    except BaseException as error:
        said.write_text(f"Traceback {error!r}")
        code = 1
    os._exit(code)


def meet(other: Path) -> None:
    """Hold the next lock until the other process has ended: two that did not meet would show nothing."""
    lock = locks._locked

    def locked(folder: Path, until: float) -> int:
        handle, patience = lock(folder, until), time.monotonic() + 120
        while not other.exists() and time.monotonic() < patience:
            time.sleep(0.02)
        return handle

    locks._locked = locked


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, names = Path(sys.argv[2]), sys.argv[3].split(",")
    if sys.argv[1] == "full":
        full(root, names, Path(sys.argv[4]), [int(size) for size in sys.argv[5:]])
    else:
        shared(root, names, int(sys.argv[4]))
