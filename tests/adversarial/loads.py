"""Load a model folder again and again while other processes save two models into it in turn.

``python loads.py FOLDER LOADS READERS WRITERS``: prints a line of JSON for each reader: how often it found which. The
writers never pause. A process of its own: it forks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import saccade
from oracles import make_images, make_vit
from saccade.model import AdaptiveViT

TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}
NAMES = ("tome(r=1)", "tome(r=2)")


def models() -> dict[str, AdaptiveViT]:
    return {name: AdaptiveViT(make_vit(seed=i, **TINY), name) for i, name in enumerate(NAMES)}


def said(model: AdaptiveViT) -> torch.Tensor:
    with torch.no_grad():
        return model(make_images(model.vit)).logits


def write(folder: Path, made: dict[str, AdaptiveViT]) -> None:
    while True:
        for model in made.values():
            model.save(folder)


def read(folder: Path, made: dict[str, AdaptiveViT], loads: int) -> None:
    expected, counts = {name: said(model) for name, model in made.items()}, dict.fromkeys(NAMES, 0)
    for _ in range(loads):
        found = saccade.load(folder)
        name = str(found.setting)
        assert torch.equal(said(found), expected[name]), "the config of one and the weights of the other"
        counts[name] += 1
    print(json.dumps(counts), flush=True)


def main(folder: Path, loads: int, readers: int, writers: int) -> int:
    torch.set_num_threads(1)
    made = models()
    made[NAMES[0]].save(folder)
    busy = [fork(lambda: write(folder, made)) for _ in range(writers)]
    try:
        reading = [fork(lambda: read(folder, made, loads)) for _ in range(readers)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in reading]
        early = [pid for pid in busy if os.waitpid(pid, os.WNOHANG)[0]]
        busy = [pid for pid in busy if pid not in early]
    finally:
        for pid in busy:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return int(any(codes) or bool(early))


def fork(work) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
