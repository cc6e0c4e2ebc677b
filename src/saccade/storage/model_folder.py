"""The two files of a model folder, and the one moment at which a folder that was there changes.

``config.json`` names the weights by their checksum. So its arrival is what commits a save, and a reader who sees the
two files while they are replaced, or after the writer was killed, knows which weights belong to the config that it has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.torch import save_file
from torch import Tensor

from saccade.errors import UserError
from saccade.storage.files import check_folder, discard, part_beside, reported, shortened, sweep, to_disk
from saccade.storage.folder_config import CONFIG, Seal, read_bytes
from saccade.storage.foreign import check_not_foreign
from saccade.storage.locks import owning
from saccade.storage.weights import digest

WEIGHTS = "model.safetensors"
WAIT = 30.0  # seconds for another process that saves into the same folder


def write(folder: str | os.PathLike, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights and config, whole or not at all. Raises UserError as ``saving.save`` does."""
    with reported("save a model in", folder):
        target = Path(os.path.realpath(folder))  # a link stays one
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_dir():
            make(target, state, config)
        else:
            with owning(target, wait=WAIT):
                replace(target, state, config)
        sweep(target.parent, f".{target.name[:40]}.")


def make(target: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """A new folder, filled under a hidden name."""
    fresh = part_beside(target)
    fresh.mkdir()  # not mkdtemp, whose folders only their owner may read
    try:
        seal = _write_weights(state, fresh / WEIGHTS)
        _write_config(config, seal, fresh / CONFIG)
        to_disk(fresh)
        os.replace(fresh, target)
        to_disk(target.parent)
    finally:
        discard(fresh)


def replace(target: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Our two files in a folder that is there; what else is in it stays.

    The new weights wait under a name made of their checksum, where ``load`` finds them from the moment the config
    names them; only then do they take the place of the old ones. Killed anywhere, the folder is the old or the new one.
    """
    check_ours(target)
    part, waiting = part_beside(target / WEIGHTS), None
    try:
        seal = _write_weights(state, part)
        waiting = _waiting(target, seal)
        os.replace(part, waiting)
        part = part_beside(target / CONFIG)
        _write_config(config, seal, part)
        to_disk(target)
        os.replace(part, target / CONFIG)  # from here on it is the new folder
    except BaseException:
        if waiting is not None:
            discard(waiting)
        raise
    finally:
        discard(part)
    to_disk(target)
    os.replace(waiting, target / WEIGHTS)
    to_disk(target)
    sweep(target, owned=True)
    for left in target.glob(f".{WEIGHTS}.*"):  # of a process that was killed before this
        discard(left)


def check_place(folder: str | os.PathLike) -> None:
    """Raises UserError where no model could be saved: before the work is done."""
    check_folder(folder)
    check_ours(Path(folder))


def check_ours(folder: Path) -> None:
    """Raises UserError where a folder holds images, or a config or weights that are not a Saccade model's."""
    check_not_foreign(folder)
    remedy = "remove them, or give another folder"
    if (folder / CONFIG).exists():
        try:
            found = json.loads(read_bytes(folder / CONFIG))
        except (ValueError, RecursionError):
            found = None
        if not (isinstance(found, dict) and isinstance(found.get("saccade"), dict)):
            raise UserError(f"{shortened(folder)} holds a {CONFIG} that is not a Saccade model's: {remedy}")
    elif (folder / WEIGHTS).exists():
        raise UserError(f"{shortened(folder)} holds a {WEIGHTS} that is not a Saccade model's: {remedy}")


def _write_weights(state: dict[str, Tensor], file: Path) -> dict[str, Any]:
    save_file(state, file, metadata={"format": "pt"})
    file.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
    to_disk(file)
    return {"sha256": digest(file), "bytes": file.stat().st_size}


def _write_config(config: dict[str, Any], seal: dict[str, Any], file: Path) -> None:
    whole = {**config, "saccade": {**config["saccade"], "weights": seal}}
    file.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    to_disk(file)


def _waiting(folder: Path, seal: dict[str, Any]) -> Path:
    return folder / f".{WEIGHTS}.{seal['sha256'][:16]}"


def _umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


@dataclass(frozen=True)
class WeightsFile:
    """The file that a config belongs to. It is held open: no other file can have its place on the disk meanwhile."""

    file: Path
    held: BinaryIO | None  # None: it is not that file, or cannot be told

    def unchanged(self) -> bool:
        """Whether what lies under the name now is the file that was looked at, and that one is the config's."""
        with suppress(OSError):
            return self.held is not None and os.path.samestat(os.fstat(self.held.fileno()), os.stat(self.file))
        return False


@contextmanager
def weights_file(folder: Path, seal: Seal | None) -> Iterator[WeightsFile]:
    """The file with the checksum that a config names; one that has another is read too: what is wrong may show."""
    file = folder / WEIGHTS
    for found in (file,) if seal is None else (file, _waiting(folder, seal.model_dump())):  # None: a folder of before
        if (held := _held(found, seal)) is not None:
            with held:
                yield WeightsFile(found, held)
            return
    yield WeightsFile(file, None)


def _held(file: Path, seal: Seal | None) -> BinaryIO | None:
    """The file, open, if it has this checksum."""
    with suppress(OSError, ValueError), ExitStack() as stack:
        if file.is_file():  # a pipe is not even opened
            held = stack.enter_context(open(file, "rb"))
            size = os.fstat(held.fileno()).st_size
            if seal is None or (size == seal.bytes and file_digest(held, "sha256").hexdigest() == seal.sha256):
                stack.pop_all()
                return held
    return None


def seen(folder: Path) -> tuple[object, ...]:
    """By which a folder that was replaced in the meantime is known."""
    found: list[object] = []
    for name in (CONFIG, WEIGHTS):
        try:
            facts = os.stat(folder / name)
            found += [facts.st_ino, facts.st_size, facts.st_mtime_ns]
        except (OSError, ValueError):
            found.append(None)
    return tuple(found)
