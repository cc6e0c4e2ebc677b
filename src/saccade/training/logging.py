"""What a run leaves to look at: tables, a TensorBoard log where it is asked for, and a report."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.errors import UserError
from saccade.storage.files import read_at_most, reported, write_text
from saccade.training.batch_stream import BatchStream

Row = dict[str, Any]


class Table:
    """A CSV file: rows are appended, and written anew where a column appears. Each has its ``step``."""

    def __init__(self, path: Path, until: int, writing: bool) -> None:
        """Opens the file of an earlier run, without the rows after step ``until``, which are run again.

        Only one of several processes is ``writing``.
        """
        self.path, self.rows, self.writing = path, [r for r in read_table(path) if r["step"] <= until], writing
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        if writing:
            self._write()

    def add(self, row: Row) -> None:
        """One more row, written at once."""
        self.rows.append(row)
        if not self.writing:
            return
        if all(name in self.columns for name in row):
            with reported("write", self.path), open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(self._text([row], header=False))
                file.flush()
                os.fsync(file.fileno())  # before a checkpoint that has these steps behind it
        else:
            self.columns = list(dict.fromkeys([*self.columns, *row]))
            self._write()

    def _write(self) -> None:
        write_text(self.path, self._text(self.rows, header=True))

    def _text(self, rows: Iterable[Row], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        if header and self.columns:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


MOST_BYTES = 256 << 20  # of a table
SURPLUS = "\0"  # no column is called this: what a row has beyond the header


def read_table(path: Path) -> list[Row]:
    """Rows of a table, numbers as numbers; what a killed process tore or a disk damaged is left out."""
    if not path.is_file():
        return []
    try:
        text = read_at_most(path, MOST_BYTES).decode("utf-8", "replace")
    except ValueError as error:
        raise UserError(f"{str(path)!r}: {error}: it is no table of a training run; move it away") from None
    whole = text[: text.rfind("\n") + 1]
    found: list[Row] = []
    with contextlib.suppress(csv.Error):  # what comes after a field that never ends is lost
        for row in csv.DictReader(io.StringIO(whole), restkey=SURPLUS):
            kept = {k: _value(v) for k, v in row.items() if k and v not in ("", None)} if SURPLUS not in row else {}
            if isinstance(kept.get("step"), (int, float)) and math.isfinite(kept["step"]):
                found.append(kept)
    return found


def _value(text: str) -> Any:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if math.isfinite(number) and number == int(number) and "." not in text else number


class Meter:
    """Means over steps, and how fast they went; values stay on their device until they are asked for."""

    def __init__(self, world: int = 1) -> None:
        self.world = world
        self.loss, self.rate = math.nan, 0.0  # as last taken
        self._sums: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._since = self._clock = time.perf_counter()

    @property
    def text(self) -> str:
        """What was last taken, for a line of progress; nothing before that."""
        return "" if math.isnan(self.loss) else f", loss {self.loss:.3f}, {self.rate:.0f} images/s"

    def restart(self, feed: BatchStream) -> None:
        """Leave out the time since the last step: it was spent on something else."""
        self._since += time.perf_counter() - self._clock
        self._clock = time.perf_counter()
        feed.waited = 0.0 if not self._steps else feed.waited

    def add(self, values: dict[str, Tensor], images: int) -> None:
        """The values of one step."""
        self._steps, self._images = self._steps + 1, self._images + images
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._clock = time.perf_counter()

    def take(self, feed: BatchStream) -> dict[str, float]:
        """Means since the last time, with ``seconds``, ``images_per_s`` and the share of them spent to ``wait``."""
        means = torch.stack([torch.as_tensor(v, dtype=torch.float32) for v in self._sums.values()]) / self._steps
        if self.world > 1:
            torch.distributed.all_reduce(means)
            means /= self.world
        row = dict(zip(self._sums, means.tolist(), strict=True))
        self._clock = time.perf_counter()  # after the values are there
        seconds = max(self._clock - self._since, 1e-9)
        self.loss, self.rate = row["loss"], self._images / seconds
        row |= {"images_per_s": self.rate, "wait": min(1.0, feed.waited / seconds), "seconds": seconds}
        self._sums, self._steps, self._images, self._since, feed.waited = {}, 0, 0, self._clock, 0.0
        return row


class Board:
    """TensorBoard scalars, or nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("run.tensorboard needs the package: pip install tensorboard") from None
            self._writer = SummaryWriter(str(folder))

    def add(self, row: Row) -> None:
        """The numbers of a row, at its step."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Nothing comes any more."""
        if self._writer is not None:
            self._writer.close()
