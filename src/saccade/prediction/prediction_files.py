"""Predictions as lines of text, JSON or CSV, as a file of embeddings, as a folder with token maps."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from saccade.data import ImageError
from saccade.errors import UserError
from saccade.prediction.predictions import Prediction
from saccade.storage.files import check_folder, check_target, is_our_picture, replacing, write_picture, write_text
from saccade.storage.foreign import check_not_foreign
from saccade.storage.signs import PREDICT, is_ours
from saccade.terminal.text_table import width_of

COLUMNS = ("image", "label", "class", "index", "probability", "gmacs", "error")
KINDS = (".npz", ".safetensors")
Show = Callable[[Prediction], None]


def printer(as_json: bool, as_csv: bool, top: int) -> Show:
    """What prints a prediction on standard output: as text on a terminal, else as a line of JSON, or of CSV."""
    if as_csv:
        return csv_lines(sys.stdout, top)
    if as_json or not sys.stdout.isatty():
        return lambda found: print(json.dumps(found.to_dict()), flush=True)
    width = width_of(sys.stdout)
    return lambda found: print(found.line(width), flush=True)


def csv_lines(file: IO[str], top: int) -> Show:
    """What writes CSV: the best class, then label_2, probability_2 and so on; of an encoder the embedding.

    The heading is written with the first image that could be read, and those before it wait for that.
    """
    writer, waiting = csv.writer(file, lineterminator="\n"), list[Prediction]()
    heading: list[str] = []

    def write(found: Prediction) -> None:
        waiting.append(found)
        if not heading:
            if found.error is not None:
                return
            heading.extend(columns(found, top))
            writer.writerow(heading)
        writer.writerows([cells(found, heading) for found in waiting])
        waiting.clear()
        file.flush()

    return write


def columns(found: Prediction, top: int) -> list[str]:
    """The heading of a table that this prediction is a row of."""
    if found.vector is not None:
        return ["image", "gmacs", "error", *(f"embedding_{i}" for i in range(len(found.vector)))]
    return [*COLUMNS, *(f"{name}_{i}" for i in range(2, top + 1) for name in ("label", "probability"))]


def cells(found: Prediction, heading: list[str]) -> list[Any]:
    """A row of the table, a cell for each of the heading's columns."""
    numbers = {} if found.vector is None else {f"embedding_{i}": v for i, v in enumerate(found.vector.tolist())}
    ranked = enumerate(zip(found.labels, found.probabilities, strict=True), start=1)
    others = {f"{name}_{i}": v for i, pair in ranked for name, v in zip(("label", "probability"), pair, strict=True)}
    row: dict[str, Any] = {**found.row(), **others, **numbers}
    return [row.get(name) for name in heading]


class EmbeddingFile:
    """Embeddings of all images that could be read, written whole at the end.

    ``.npz`` holds ``embedding`` fp32 [n, D] and ``names``; ``.safetensors`` the same tensor, and ``names`` as JSON in
    its metadata. Raises UserError for another ending, and where a file is there that is none of these: before the work.
    """

    def __init__(self, path: str) -> None:
        if not path.endswith(KINDS):
            raise UserError(f"embeddings in {path!r}: give a file that ends in {' or '.join(KINDS)}")
        check_folder(Path(path).parent)
        check_target(path, is_our_embedding)
        self.path, self.names, self.rows = path, list[str](), list[np.ndarray]()

    def add(self, found: Prediction) -> None:
        """Remember an image's embedding, where it has one."""
        if found.embedding is not None:
            self.names.append(found.name)
            self.rows.append(found.embedding)

    def close(self) -> None:
        """Write the file, where there is something for it."""
        if not self.rows:
            return
        embedding = np.stack(self.rows)
        with replacing(self.path, is_our_embedding) as part:
            if self.path.endswith(".npz"):
                np.savez(part, embedding=embedding, names=np.array(self.names))
            else:
                save_file({"embedding": embedding}, part, metadata={"names": json.dumps(self.names)})


def is_our_embedding(file: Path) -> bool:
    """Whether a file is one that ``EmbeddingFile`` wrote: it holds what that writes, and nothing else."""
    try:
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                return sorted(archive.namelist()) == ["embedding.npy", "names.npy"]
        with safetensors.safe_open(file, "np") as opened:
            return list(opened.keys()) == ["embedding"] and "names" in (opened.metadata() or {})
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, safetensors.SafetensorError):
        return False


class PredictionFolder:
    """``predictions.csv``, and in ``tokens/`` a picture of what each token of an image stands for.

    Raises UserError where the folder, or a file of these names, is somebody else's: before the work.
    """

    def __init__(self, path: str, top: int) -> None:
        check_folder(path)
        check_not_foreign(path)
        for name, signs in PREDICT.items():
            check_target(Path(path) / name, partial(is_ours, signs=signs))
        for picture in sorted(Path(path, "tokens").glob("*.png")):
            check_target(picture, is_our_picture)
        self.path, self.table, self.taken = Path(path), io.StringIO(), set[str]()
        self._write = csv_lines(self.table, top)

    def add(self, found: Prediction) -> None:
        """Write what was found of an image."""
        self._write(found)
        if found.error is None:
            try:
                picture = found.token_map()
            except ImageError:  # it could be read a moment ago; its row is there
                return
            write_picture(self.path / "tokens" / f"{self._free(found.name)}.png", picture)

    def close(self) -> None:
        """Write the table."""
        write_text(self.path / "predictions.csv", self.table.getvalue())

    def _free(self, name: str) -> str:
        """A file's name for an image, by the end of its path; another number for each of the same."""
        short = re.sub(r"[^\w.-]+", "_", os.path.basename(name))[:80] or "image"
        places = (short, *(f"{short}-{i}" for i in range(2, len(self.taken) + 3)))
        free = next(place for place in places if place not in self.taken)
        self.taken.add(free)
        return free
