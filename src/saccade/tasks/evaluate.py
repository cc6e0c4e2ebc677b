"""``eval`` of any task's model: it is opened once, and the evaluation of its task measures it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from saccade.checkpoint import Source, open_model, task_of
from saccade.errors import UserError
from saccade.evaluation.rivals import listed
from saccade.evaluation.sweep_result import Evaluation
from saccade.setting import Setting
from saccade.storage.run_folder import check_apart
from saccade.terminal.progress import Progress
from saccade.terminal.results import Scores

# What is measured of a task's model; the keywords of each are the options that it has.
EVALUATIONS = {
    "classify": "saccade.evaluation.sweep:evaluate",
    "embed": "saccade.evaluation.sweep:evaluate",
    "segment": "saccade.tasks.segmentation.mean_iou:evaluate_segmentation",
    "detect": "saccade.tasks.detection.average_precision:evaluate_detection",
    "textimage": "saccade.tasks.image_text.zero_shot:evaluate_words",
}


def evaluate(
    model: Source,
    data: Any,
    settings: str | Setting | Sequence[str | Setting] = (),
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch: int | None = None,
    seconds: float | None = None,
    out: str | os.PathLike | None = None,
    corrupt: str | None = None,
    dtype: str | None = None,
    metric: str | None = None,
    rivals: Source | Sequence[Source] = (),
    command: str = "",
    progress: Progress | None = None,
) -> Evaluation | Scores:
    """Scores of settings of a model on what its task is measured on, with intervals; and what could not be read.

    Of a classifier or encoder ``saccade.evaluation.sweep.evaluate``: accuracy, agreement, MACs and speed, beside dense.
    Of a folder that another task was trained in: mIoU (``saccade.segment``), average precision (``saccade.detect``),
    or accuracy of classes in words and retrieval (``saccade.zeroshot``), whose functions have more options.

    Args:
        model: a model, a folder, or a timm name with ``weights`` or ``pretrained``; ``device`` as in
            ``saccade.checkpoint.open_model``.
        data: images as the task has them: ``class/name``, pairs of images and labels, a COCO file, images with texts.
        settings: one or several; ranges too where it is a classifier.
        split: of a folder of splits; None: the held-out one.
        limit: at most this many images, spread evenly over the set.
        batch: images at once; None: as many as the task's function says.
        seconds, out, corrupt, dtype, metric, rivals: of a classifier or encoder; see
            ``saccade.evaluation.sweep.evaluate``.
        progress: where to show it; None: nowhere.

    Raises:
        UserError: an option that the task's evaluation does not have, and what that raises.
    """
    if out is not None:
        check_apart(out, [model, weights])
    opened = open_model(model, weights, pretrained, device)
    measure = evaluation_of(task := task_of(opened))
    able = inspect.signature(measure).parameters
    given: dict[str, Any] = {"split": split, "limit": limit, "batch": batch, "seconds": seconds}
    given |= {"out": out, "corrupt": corrupt, "dtype": dtype, "metric": metric, "rivals": listed(rivals) or None}
    given = {name: value for name, value in given.items() if value is not None}
    if more := [name for name in given if name not in able]:
        flags = ", ".join(f"--{'rival' if name == 'rivals' else name}" for name in more)
        options = f"{flags} (in Python: {', '.join(f'{name}=' for name in more)})"
        raise UserError(f"a model for task {task!r} is evaluated without {options}: leave {_them(more)} out")
    given |= {name: value for name, value in {"command": command}.items() if name in able}
    several = [settings] if isinstance(settings, (str, Setting)) else settings
    return measure(opened, data, [str(setting) for setting in several], progress=progress, **given)


def evaluation_of(task: str) -> Callable[..., Evaluation | Scores]:
    """The function that measures models of a task. Raises UserError for that of a head from elsewhere."""
    if task not in EVALUATIONS:
        raise UserError(
            f"there is no evaluation of task {task!r}, only of {', '.join(EVALUATIONS)}: measure it yourself"
        )
    module, _, name = EVALUATIONS[task].partition(":")
    return getattr(import_module(module), name)


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"
