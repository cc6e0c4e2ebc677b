"""What a run is about: the one thing that differs between learning to classify, to segment and whatever comes next.

A task says what is trained on, which model learns it, what a step minimises and what a check measures. Everything else
— settings, optimiser, precision, checkpoints, tables, reports — is the same for all of them and is not in here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor, nn

from saccade.data import ImageSet, Loaders, Preprocess
from saccade.data.decoded import Decoded
from saccade.errors import UserError
from saccade.evaluation.stats import Interval
from saccade.model import AdaptiveViT
from saccade.reports import token_map
from saccade.terminal.progress import Progress
from saccade.training.config import TASKS, Config
from saccade.training.image_sets import decode_once

if TYPE_CHECKING:
    from saccade.training.loss import Teacher, TeacherOutput
    from saccade.training.multi_setting import MultiSettingModel

Tick = Callable[[int], None]  # so many more images are done


class Examples(ABC):
    """What is trained on, one by one, by place. Picklable: a copy goes to each worker."""

    path: Path  #                where they come from, for messages
    failures: dict[str, str]  # name -> reason, of those known to be unreadable before training

    @abstractmethod
    def __len__(self) -> int: ...

    def usable(self) -> np.ndarray:
        """The places that are drawn from."""
        return np.arange(len(self))

    @abstractmethod
    def read(self, place: int) -> Any:
        """One example, decoded. Raises ImageError: then it is left out, counted and named."""

    @abstractmethod
    def view(self, read: Any, place: int) -> tuple[Tensor, Tensor]:
        """One augmented view, uint8 [3, h, w], and its label; always of the same shapes.

        It may draw from the global generators of Python, numpy and torch's CPU, which are seeded for it.
        """

    @abstractmethod
    def blank(self) -> tuple[Tensor, Tensor]:
        """A view and a label of the right shapes and types, for a batch that none could be read of."""


class Task(ABC):
    """One kind of training. Its methods are called in the order in which they stand here."""

    metric: ClassVar[str]  # what a check measures, in words: "top-1", "mIoU"
    column: ClassVar[str]  # the same in checks.csv
    images: ImageSet  #         trained on
    held: ImageSet | None  #    only looked at to check
    loaders: Loaders | None  #  of these
    side: int | None = None  #  pixels that images are decoded once for; None: each is read whenever it is drawn
    decoded: Decoded | None = None  # all images, where they are decoded once
    teacher: Teacher | None = None
    notes: list[str]  #         what was chosen or assumed, a line each
    asks: Mapping[str, Any] = {}  # what a forward in training is given beside images
    project: nn.Module  #       learned for training alone: it brings features to a teacher's width

    def __init__(self, config: Config) -> None:
        """Open the data; subclasses ``use`` it. Raises UserError for anything amiss."""
        self.config, self.project = config, nn.Identity()
        self.notes: list[str] = []

    def use(self, images: ImageSet, held: ImageSet | None) -> None:
        """Train on some images and check on others; what was assumed of either is noted."""
        self.images, self.held = images, held
        self.loaders = None if held is None else Loaders(held)
        self.notes += dict.fromkeys([*images.notes, *(held.notes if held else ())])

    def identity(self) -> dict[str, Any]:
        """What tells the data of a run from any other: classes, and images by their content. Plain values, for JSON."""
        found: dict[str, Any] = {"classes": self.images.classes}
        for name, images in (("images", self.images), ("held", self.held)):
            if images is not None:
                found[name] = {"count": len(images), "content": images.fingerprint()}
        return found

    @abstractmethod
    def model(self) -> AdaptiveViT:
        """What training starts from, with a head that fits the data."""

    def ready(self, folder: Path, progress: Progress) -> int:
        """Do once what need not be done for every batch; how many images can be trained on."""
        if self.side is not None:
            self.decoded = decode_once(self.config.data, self.images, self.side, folder, progress)
        return len(self.images) - (len(self.decoded.failures) if self.decoded else 0)

    def teach(self, student: MultiSettingModel) -> None:
        """Open the teacher that the config names."""
        if self.config.distill.teacher not in ("", "self"):
            raise UserError(f"task={self.config.task!r} learns from no teacher but 'self': leave out distill.teacher")

    @abstractmethod
    def examples(self, seen: Preprocess) -> Examples:
        """What is trained on, in views of ``seen.size`` pixels."""

    def batch(self, images: Tensor, labels: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Normalised images [b, 3, h, w] and labels on their device -> what is run, and what it is compared with.

        The targets are one tensor whose first axis is the image. ``key`` is (seed, step, rank).
        """
        return images, labels

    @abstractmethod
    def terms(self, model: AdaptiveViT, out: Any, targets: Tensor, teacher_out: Any, full: int) -> dict[str, Tensor]:
        """The parts of the loss by name, each already weighted, summed over images and divided by ``full`` images.

        ``full`` is the size of a whole batch: an image that could not be read adds nothing, on whichever rank it was.

        Args:
            model: the student under one setting, and ``out`` what it gave.
            teacher_out: the teacher's ``TeacherOutput``, or ``teacher_output`` of the largest setting; None:
                labels only.
        """

    def teacher_output(self, model: AdaptiveViT, out: Any) -> TeacherOutput:
        """What one setting can teach another, without gradient."""
        raise UserError(f"task={self.config.task!r} cannot teach itself: leave out distill.teacher")

    @abstractmethod
    def measure(self, view: AdaptiveViT, tick: Tick) -> tuple[Interval, float]:
        """The metric on held-out images, with its interval, and 10^9 MACs per image."""

    def picture(self, view: AdaptiveViT, image: Image.Image) -> Image.Image:
        """What the report shows of a setting."""
        return token_map(view, image)


def open_task(config: Config) -> Task:
    """The task that a config names. Raises UserError for anything amiss with its data."""
    module, _, name = TASKS[config.task].partition(":")
    return getattr(import_module(module), name)(config)
