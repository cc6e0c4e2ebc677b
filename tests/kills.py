"""Kill -9 a training run N times at random moments; prints what survived. Run by test_resume.py, in its own process.

python tests/kills.py FOLDER IMAGES N STEPS
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import lightning_fabric  # noqa: F401  (once, not in every child)
import torch

import saccade
from saccade.training import train as script
from saccade.training.checkpoints import newest, read_state

CONFIG = {
    "model": {
        "args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "drop_path_rate": 0.1}
    },
    "sampling": {"settings": ["dense", "evit(0.5)"]},
    "optim": {"ema": 0.9},
    "run": {
        "batch": 8,
        "save_every": 1,
        "log_every": 1,
        "check_every": 0.5,
        "threads": 1,
        "device": "cpu",
    },
}


def config(images: str, steps: int) -> dict:
    run = {**CONFIG["run"], "steps": steps}
    return {**CONFIG, "run": run, "data": {"path": images, "workers": 0, "check_limit": 8, "holdout": 0.2}}


def look(folder: Path) -> int:
    """Everything that a reader may open must be whole; the step of the last checkpoint (0: none yet)."""
    step = 0
    for path in sorted((folder / "checkpoints").glob("*-*")):
        if path.name.startswith("best"):
            saccade.load(path)
            continue
        tensors, facts = read_state(path)
        assert tensors and facts["step"] == int(path.name.rpartition("-")[2]), path
    if (last := newest(folder / "checkpoints", "last")) is not None:
        step = read_state(last)[1]["step"]
    for name in ("config.json", "checkpoints/last/config.json"):
        if (folder / name).is_file():
            json.loads((folder / name).read_text())
    if (folder / "model").exists():
        saccade.load(folder / "model")
    if (folder / "report.html").exists():
        assert (folder / "report.html").read_text().rstrip().endswith("</html>")
    return step


def main(folder: Path, images: str, kills: int, steps: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(0)
    whole, began = folder / "whole", time.perf_counter()
    if os.fork() == 0:
        script.train(config(images, steps), out=whole)
        os._exit(0)
    os.wait()
    long = time.perf_counter() - began
    expected, _ = read_state(newest(whole / "checkpoints", "last"))
    out, done, seen = folder / "killed", 0, []
    ends = 0
    while done < kills:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            script.train(config(images, steps), out=out, resume=True)
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.7 * long))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        seen.append(look(out))
        done += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):  # it got to the end: compare, and begin again
            assert os.WEXITSTATUS(status) == 0, "the run failed by itself"
            tensors, _ = read_state(newest(out / "checkpoints", "last"))
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[k], expected[k]) for k in tensors), "resumed differs from uninterrupted"
            ends += 1
            shutil.rmtree(out)
    print(json.dumps({"killed": done, "finished_equal": ends, "steps_seen": sorted(set(seen))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
