"""Checkpoints: folders that are there whole or not at all, whenever the process dies; safetensors and JSON only."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade.errors import UserError

TENSORS, FACTS = "state.safetensors", "state.json"


def publish(folder: Path, kind: str, step: int, fill: Callable[[Path], None]) -> Path:
    """Make ``folder/kind-step`` by having ``fill`` write into a hidden folder that is renamed when it is complete.

    Then, and only then, older ones of the kind go, each under a hidden name first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part, target = folder / f".{secrets.token_hex(6)}.part", folder / f"{kind}-{step:08d}"
    fill(part)
    if target.exists():
        _discard(target)
    os.replace(part, target)
    for old in _of_kind(folder, kind):
        if old != target:
            _discard(old)
    return target


def newest(folder: Path, kind: str) -> Path | None:
    """The latest checkpoint of a kind."""
    found = _of_kind(folder, kind)
    return found[-1] if found else None


def sweep(folder: Path) -> None:
    """Remove what a killed process left half done."""
    for part in folder.glob(".*.part") if folder.is_dir() else ():
        shutil.rmtree(part, ignore_errors=True)


def write_state(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Fill a folder with tensors and facts."""
    folder.mkdir()
    apart = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    save_file(apart, folder / TENSORS)  # settings of one method share what they learn, and safetensors refuses that
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name in (TENSORS, FACTS):  # on the disk before the rename is
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``write_state`` wrote. Raises UserError where it is damaged."""
    try:
        return load_file(folder / TENSORS), json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"checkpoint {str(folder)!r} cannot be read ({line}): remove it to go on from another"
        ) from None


def _of_kind(folder: Path, kind: str) -> list[Path]:
    names = re.compile(rf"{re.escape(kind)}-\d{{8,}}")
    return sorted(path for path in folder.glob(f"{kind}-*") if names.fullmatch(path.name))


def _discard(path: Path) -> None:
    gone = path.with_name(f".{secrets.token_hex(6)}.part")
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)
