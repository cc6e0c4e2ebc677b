"""The metric of every setting on images that are never trained on, while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from saccade.reports import Checked
from saccade.terminal.progress import Progress
from saccade.training.multi_setting import MultiSettingModel
from saccade.training.task import Task


def check(
    task: Task, student: MultiSettingModel, settings: Sequence[str], step: int, progress: Progress
) -> list[Checked]:
    """Measure each setting of a student, with its interval."""
    assert task.held is not None
    mode = student.training
    student.eval()
    bar = progress.start("checking", min(len(task.held), task.config.data.check_limit) * len(settings))
    found = []
    for setting, view in zip(settings, student.views, strict=True):
        bar(0, what=f"checking {setting}")
        metric, gmacs = task.measure(view, bar)
        found.append(Checked(step, setting, *metric.three(), gmacs))
    bar.finish()
    student.train(mode)
    return found


def as_row(checked: Checked, column: str) -> dict[str, Any]:
    """A row of checks.csv, where the metric stands under its own name."""
    return {column if name == "top1" else name: value for name, value in vars(checked).items()}


def from_rows(rows: Sequence[dict[str, Any]], column: str) -> list[Checked]:
    """The inverse of ``as_row``; rows that are of no check, in a table that was damaged, are left out."""
    named = [{"top1" if name == column else name: value for name, value in row.items()} for row in rows]
    return [Checked(**row) for row in named if row.keys() == KINDS.keys() and all(map(_fits, row.values(), row))]


KINDS = {f.name: str if f.name == "setting" else (int, float) for f in fields(Checked)}


def _fits(value: object, name: str) -> bool:
    return isinstance(value, KINDS[name])  # type: ignore[arg-type]
