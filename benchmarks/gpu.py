"""What token reduction gives on a GPU: *kept* and speed-up, eager, as CUDA graphs and compiled, in bf16.

    python benchmarks/gpu.py [--models vit_small_patch16_224 vit_base_patch16_224] [--batch 1 32 256] [--out FOLDER]
    python benchmarks/gpu.py --compile [--settings …]

Random weights and images; speed-ups are over the dense model in the same runner and in the same interleaved run, whose
attention is PyTorch's fused one. *Kept* is the time of the same token counts by slicing ÷ time. Eager and CUDA graphs
take turns in one process. What is compiled takes a process for each setting, which compile side by side and then, one
after the other, time dense, setting and ideal. Prints rows as Markdown and appends them to ``rows.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

import saccade
from saccade.evaluation import interleaved
from saccade.evaluation.interleaved import LEAST_RUNS, MOST_RUNS
from saccade.evaluation.speed import Speed, bench
from saccade.runners.runner import Runner

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
BATCHES = (1, 32, 256)
SETTINGS = ("evit(0.7)", "dynamicvit(0.7)", "tome(r=13)", "imagepiece() | evit(0.8)", "diffrate(speed=2)")
DTYPE = "bf16"
READY = "ready"
HEAD = ["model", "batch", "setting", "runner", "ms", "MAC ratio", "over dense here", "over dense eager", "kept"]


def measured(model: str, batch: int, settings: Sequence[str], engines: Sequence[str], seconds: float) -> list[Speed]:
    """Rows of dense and these settings, in each of the engines, in one interleaved run."""
    torch.manual_seed(0)
    opened = saccade.create_model(model).to("cuda")
    kinds = [Runner(DTYPE, engine) for engine in engines]
    return [*bench(opened, settings, batch=[batch], runner=kinds, ideal=True, seconds=seconds)]


def compiled(cases: Sequence[tuple[str, int, str]], seconds: float) -> list[tuple[str, list[dict[str, Any]]]]:
    """The same of what is compiled: all compile at once, then each is timed alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    started = []
    for model, batch, setting in cases:
        words = [sys.executable, __file__, "--worker", "--models", model, "--batch", str(batch)]
        command = [*words, "--settings", setting, "--seconds", str(seconds)]
        started.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        )
    found = []
    came = [until_ready(process) for process in started]
    for (model, _, setting), process, is_ready in zip(cases, started, came, strict=True):
        said, _ = process.communicate("go\n" if is_ready else None)
        if is_ready and process.returncode == 0:
            found.append((model, json.loads(said.strip().splitlines()[-1])))
        else:
            print(f"{model}, {setting}: no row, exit code {process.returncode}", file=sys.stderr, flush=True)
    return found


def until_ready(process: subprocess.Popen[str]) -> bool:
    """Whether a worker comes to its timing."""
    assert process.stdout is not None
    return any(line.strip() == READY for line in iter(process.stdout.readline, ""))


def work(model: str, batch: int, setting: str, seconds: float) -> None:
    """A worker: compile, say so, wait for its turn, and print its rows."""
    in_turn = interleaved.in_turn

    def waited(
        ways: Any, more: Any, clock: interleaved.Clock = time.perf_counter, own_threads: Any = None
    ) -> dict[str, list[float]]:
        print(READY, flush=True)
        input()
        start = clock()  # that of ``more`` ran while this waited
        enough = lambda runs: runs < LEAST_RUNS or (clock() - start < seconds and runs < MOST_RUNS)  # noqa: E731
        return in_turn(ways, enough, clock, own_threads or {})

    interleaved.in_turn = waited
    rows = measured(model, batch, [setting], ["compile"], seconds)
    print(json.dumps([row.to_dict() for row in rows]))


def shown(model: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table in Markdown."""
    dense = {row["runner"]: row["p50_ms"] for row in rows if row["setting"] == "dense"}
    first = next(iter(dense.values()))
    lines = []
    for row in rows:
        ms, kept = row["p50_ms"], row["kept"]
        cells = [model, str(row["batch"]), f"`{row['setting']}`".replace("|", "\\|"), row["runner"], f"{ms:.3f}"]
        cells += [f"{row['mac_ratio']:.2f}", f"{dense[row['runner']] / ms:.2f}", f"{first / ms:.2f}"]
        lines.append("| " + " | ".join([*cells, "" if kept is None else f"{kept:.2f}"]) + " |")
    return lines


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--engines", nargs="+", default=["eager", "cudagraph"])
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for each model and batch")
    parser.add_argument("--compile", action="store_true", help="time what is compiled instead")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU that PyTorch sees")
    if arguments.worker:
        work(arguments.models[0], arguments.batch[0], arguments.settings[0], arguments.seconds)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "rows.json"
    known = json.loads(file.read_text()) if file.exists() else []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}, medians\n")
    print(f"| {' | '.join(HEAD)} |\n|" + "---|" * len(HEAD), flush=True)

    def keep(model: str, rows: Sequence[dict[str, Any]]) -> None:
        known.extend({"model": model, **row} for row in rows)
        file.write_text(json.dumps(known))
        print("\n".join(shown(model, rows)), flush=True)

    if arguments.compile:
        cases = [*product(arguments.models, arguments.batch, arguments.settings)]
        for model, rows in compiled(cases, arguments.seconds):
            keep(model, rows)
        return
    for model, batch in product(arguments.models, arguments.batch):
        found = measured(model, batch, arguments.settings, arguments.engines, arguments.seconds)
        keep(model, [row.to_dict() for row in found])


if __name__ == "__main__":
    main()
