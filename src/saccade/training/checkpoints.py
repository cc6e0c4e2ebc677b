"""Checkpoints: folders that are there whole or not at all, whenever the process dies; safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade.errors import UserError
from saccade.storage.files import discard, part_beside, read_at_most, reported, to_disk
from saccade.storage.weights import READ_ERRORS, digest

TENSORS, FACTS = "state.safetensors", "state.json"
MOST_FACTS = 64 << 20  # bytes
SEAL = "seal"  # in the facts: a checksum of the tensors' file and of all other facts


def publish(folder: Path, kind: str, step: int, fill: Callable[[Path], None], *, keep: int = 1) -> Path:
    """Make ``folder/kind-step`` by having ``fill`` write into a hidden folder that is renamed when it is complete.

    Then, and only then, older ones of the kind go, but for the ``keep`` latest, each under a hidden name first. Raises
    UserError for a disk that is full and the like; what was there is there still.
    """
    with reported("write a checkpoint in", folder):
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{kind}-{step:08d}"
        part = part_beside(folder / "state")
        try:
            fill(part)
            to_disk(part)
            if target.exists():
                _discard(target)
            os.replace(part, target)
            to_disk(folder)
        finally:
            discard(part)
        for old in _of_kind(folder, kind)[:-keep]:
            if old != target:
                _discard(old)
        return target


def newest(folder: Path, kind: str) -> Path | None:
    """The latest checkpoint of a kind."""
    found = _of_kind(folder, kind)
    return found[-1] if found else None


def read_last(folder: Path, say: Callable[[str], object]) -> tuple[Path | None, dict[str, Tensor], dict[str, Any]]:
    """The latest checkpoint that can be read, its tensors and facts; a damaged one is passed over, and said.

    Raises UserError where there are some and all are damaged.
    """
    wrong: UserError | None = None
    for path in reversed(_of_kind(folder, "last")):
        try:
            tensors, facts = read_state(path)
        except UserError as error:
            wrong = wrong or error
            continue
        if wrong is not None:
            say(f"{wrong}: going on from {path.name}, the one before it")
            for damaged in _of_kind(folder, "last"):
                if damaged > path:
                    _discard(damaged)
        return path, tensors, facts
    if wrong is not None:
        raise wrong
    return None, {}, {}


def write_state(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Fill a folder with tensors and facts, sealed together: a damaged number in either is no number of this run."""
    folder.mkdir()
    apart = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    save_file(apart, folder / TENSORS)  # settings of one method share what they learn, and safetensors refuses that
    sealed = {**facts, SEAL: _seal(folder / TENSORS, facts)}
    (folder / FACTS).write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")
    for name in (TENSORS, FACTS):  # on the disk before the rename is
        to_disk(folder / name)


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``write_state`` wrote. Raises UserError where it is damaged."""
    try:
        facts = json.loads(read_at_most(folder / FACTS, MOST_FACTS))
        step = facts["step"] if isinstance(facts, dict) else None
        if type(step) is not int or step < 0 or not isinstance(facts.get("config", {}), dict):
            raise ValueError(f"{FACTS} names no step, or no config")
        seal = facts.pop(SEAL, None)
        if seal is not None and _seal(folder / TENSORS, facts) != seal:  # checkpoints of earlier versions have none
            raise ValueError(f"{TENSORS} or {FACTS} was changed: the checksum is another")
        return load_file(folder / TENSORS), facts
    except (KeyError, *READ_ERRORS) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {str(folder)!r} cannot be read ({line}): remove it to go on from another"
        ) from None


def _seal(file: Path, facts: dict[str, Any]) -> str:
    text = json.dumps(json.loads(json.dumps(facts)), sort_keys=True)  # as it is read back
    return hashlib.sha256(f"{digest(file)}\n{text}".encode()).hexdigest()


def _of_kind(folder: Path, kind: str) -> list[Path]:
    names = re.compile(rf"{re.escape(kind)}-\d{{8,}}")
    return sorted(path for path in folder.glob(f"{kind}-*") if names.fullmatch(path.name))


def _discard(path: Path) -> None:
    gone = part_beside(path.with_name("state"))
    os.replace(path, gone)
    discard(gone)
