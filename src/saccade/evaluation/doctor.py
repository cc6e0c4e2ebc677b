"""``doctor``: what this machine has to run a model with, and what would make it faster."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib import import_module, metadata

import torch

from saccade.errors import UserError
from saccade.execution.policy import Execution, cache_file
from saccade.runners.allocator import steady_allocator
from saccade.runners.engine import Engine, missing
from saccade.runners.runner import COMPILE, CUDAGRAPH, DTYPES, ENGINES, IN_TORCH, NOUNS
from saccade.terminal.results import Result
from saccade.terminal.text_table import Column, Table

FLAGS = {"avx2": "AVX2", "avx512_f": "AVX-512", "avx512_vnni": "VNNI", "avx512_bf16": "bf16", "amx_bf16": "AMX bf16"}
PACKAGES = ("saccade", "torch", "torchvision", "timm")


@dataclass(frozen=True)
class Fact:
    """One thing that was looked at."""

    what: str
    found: str
    advice: str = ""  # what would help


class Facts(Result):
    """What ``doctor`` found, a row each."""

    def __init__(self, rows: list[Fact]) -> None:
        self.rows = rows

    def table(self) -> Table:
        """As the command prints it."""
        columns = [Column("", rank=0), Column("here", rank=0, prose=True), Column("what helps", prose=True)]
        return Table("This machine", columns, [[f.what, f.found, f.advice] for f in self.rows])


def doctor() -> Facts:
    """Device, instructions, threads, allocator, versions, engines and their number types, and what ``autotune`` knows.

    Nothing is timed and no model is opened.
    """
    return Facts([*_devices(), _threads(), _allocator(), _versions(), *_engines(), _autotuned()])


def _devices() -> list[Fact]:
    can = torch.cpu.get_capabilities()
    flags = [word for flag, word in FLAGS.items() if can.get(flag)]
    bf16 = "" if can.get("avx512_bf16") or can.get("amx_bf16") else "bf16 is emulated here, and slower than fp32"
    name = str(can.get("cpu_name") or platform.processor() or platform.machine())
    found = [Fact("processor", f"{name}: {', '.join(flags) or 'no vector instructions known'}", bf16)]
    for i in range(torch.cuda.device_count()):
        found.append(Fact(f"cuda:{i}", torch.cuda.get_device_name(i)))
    return found if len(found) > 1 else [*found, Fact("GPU", "none that PyTorch sees")]


def _threads() -> Fact:
    can, used = torch.cpu.get_capabilities(), torch.get_num_threads()
    cores = int(can.get("num_physical_cores") or used)
    advice = f"as many threads as cores are the usual best: --threads {cores}" if used > cores else ""
    return Fact("threads", f"{used} of {cores} cores", advice)


def _allocator() -> Fact:
    if steady_allocator():
        return Fact("allocator", "keeps freed memory (asked for by every deployed model and every timing)")
    return Fact("allocator", "the system's", "batches of 8 to 16 images, or a preloaded jemalloc or tcmalloc")


def _versions() -> Fact:
    said = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return Fact("versions", f"Python {platform.python_version()}, {said}")


def _engines() -> list[Fact]:
    found = [Fact(name, ", ".join(DTYPES)) for name in ("PyTorch, eager", NOUNS[COMPILE])]
    if torch.cuda.is_available():
        found.append(Fact(NOUNS[CUDAGRAPH], ", ".join(DTYPES)))
    for name in ENGINES[len(IN_TORCH) :]:
        engine: Engine = import_module(f"saccade.runners.engines.{name}")  # type: ignore[assignment]
        if command := missing(engine):
            found.append(Fact(NOUNS[name], "not installed", command))
            continue
        own = [f"{package} {metadata.version(package)}" for package in engine.PACKAGES[:1]]
        found.append(Fact(NOUNS[name], ", ".join([*own, *engine.dtypes()])))
    return found


def _autotuned() -> Fact:
    try:
        known = Execution.from_cache().measured
    except UserError:
        return Fact("autotune", f"nothing is measured: no table in {cache_file()}", "saccade autotune MODEL")
    return Fact("autotune", f"{len(known)} choices are measured, in {cache_file()}: {json.dumps(sorted(known))[:200]}")
