"""Learning to classify: labels from folders, soft targets, a teacher of the same classes, top-1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from saccade.backbones.vit import class_names_of
from saccade.data import ImageSet, Preprocess, head_labels
from saccade.data.decoded import Decoded
from saccade.data.labels import places_of, some
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.evaluation.stats import Interval, proportion
from saccade.model import AdaptiveViT
from saccade.training.augmentation import isolated
from saccade.training.config import Config
from saccade.training.image_sets import open_sets
from saccade.training.loss import Teacher, TeacherOutput, pooled, terms
from saccade.training.multi_setting import MultiSettingModel
from saccade.training.starting import fit_head, left_behind, open_source, open_teacher, start_from
from saccade.training.task import Examples, Task, Tick


class Classify(Task):
    """Images, each of one class."""

    metric, column = "top-1", "top1"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.use(*open_sets(config.data))
        self.places = spread(len(self.held), config.data.check_limit) if self.held is not None else []

    def model(self) -> AdaptiveViT:
        start = open_source(self.config.model)
        model = AdaptiveViT(start.vit, learned=start.learned)  # another task's head goes
        self.notes += left_behind(self.config.model, start, self.config.task)
        fitted = fit_head(model.vit, self.images)
        self.notes += [fitted.how] if fitted.how else []
        self.side, self.labels = max(model.input_size()), fitted.indices
        self.truth = None if self.held is None else torch.tensor(head_labels(self.held, model.vit).indices)
        self.classes = model.vit.num_classes
        return model

    def teach(self, student: MultiSettingModel) -> None:
        rule = self.config.distill
        if rule.teacher and rule.tokens:
            self.asks = {"whole": True}  # every token after the last block
        if rule.teacher in ("", "self"):
            return
        module = open_teacher(rule).to(student.device)
        count: int = module.num_classes  # type: ignore[assignment]
        order = self._order(class_names_of(module), count, class_names_of(student.vit))
        if rule.init:
            if order not in (None, list(range(count))):
                raise UserError(
                    "distill.init: the teacher's classes are not the student's, in the same order: leave it out"
                )
            start_from(student.vit, module)
        self.teacher = Teacher(module, Preprocess.of(student.vit), order)
        if (rule.features or rule.tokens) and self.teacher.width != student.vit.embed_dim:
            self.project = nn.Linear(student.vit.embed_dim, self.teacher.width)

    def _order(self, theirs: Sequence[str] | None, count: int, own: Sequence[str] | None) -> list[int] | None:
        """Where the student's classes are among the teacher's, by name; None where either has no names."""
        if theirs is None or own is None:
            if count != self.classes:
                raise UserError(f"the teacher has {count} classes and the student {self.classes}: train it first")
            self.notes.append(
                f"the {count} classes of teacher and student are taken to be the same: not both have names"
            )
            return None
        order = places_of(own, theirs)
        if order is None:
            raise UserError(
                f"the teacher has {count} classes and the student {self.classes}, and not all of the student's "
                f"({some(own)}) are among the teacher's ({some(theirs)}): train it first"
            )
        return order

    def examples(self, seen: Preprocess) -> Labelled:
        view = self.config.augment.view(seen.size, seen.interpolation, seen.mean)
        return Labelled(self.images, self.labels, view, self.decoded)

    def batch(self, images: Tensor, labels: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.config.augment.batch(images, labels, self.classes, self.config.optim.smoothing, key)

    def terms(self, model: AdaptiveViT, out: Any, targets: Tensor, teacher_out: Any, full: int) -> dict[str, Tensor]:
        return terms(model, out, targets, teacher_out, self.config.distill, self.project, full)

    def teacher_output(self, model: AdaptiveViT, out: Any) -> TeacherOutput:
        patches = model.vit.norm(out.tokens.patches).detach() if self.asks else None
        return TeacherOutput(out.logits.detach(), pooled(model, out).detach(), patches)

    def measure(self, view: AdaptiveViT, tick: Tick) -> tuple[Interval, float]:
        assert self.truth is not None and self.loaders is not None
        weight = view.vit.patch_embed.proj.weight
        hits, macs = [], []
        for batch in self.loaders.of(Preprocess.of(view.vit, view.input_size())).batches(
            self.config.run.batch, self.places
        ):
            with torch.no_grad():  # not inference mode, whose tensors must not meet training's
                out = view(batch.images.to(weight.device, weight.dtype))
            hits.append(out.logits.argmax(-1).cpu() == self.truth[batch.indices])
            macs.append(out.trace.macs().cpu())
            tick(len(batch.indices))
        return proportion(torch.cat(hits)), torch.cat(macs).mean().item() / 1e9


class Labelled(Examples):
    """Images of an image set, one class each, from their files or decoded once."""

    def __init__(
        self,
        images: ImageSet,
        labels: Sequence[int],
        transform: Callable[[Image.Image], Tensor],
        decoded: Decoded | None = None,
    ) -> None:
        """``transform`` takes an RGB image to uint8 [3, h, w], always of the same size."""
        if len(labels) != len(images) or (decoded is not None and len(decoded) != len(images)):
            counts = f"{len(labels)} labels" + (f", {len(decoded)} decoded images" if decoded is not None else "")
            raise ValueError(f"{counts} for {len(images)} images")
        self.path, self.failures = images.path, {} if decoded is None else decoded.failures
        self.images, self.labels, self.transform, self.decoded = images, labels, transform, decoded
        with isolated(0):
            self._blank = torch.zeros_like(transform(Image.new("RGB", (64, 64))))

    def __len__(self) -> int:
        return len(self.images)

    def usable(self) -> np.ndarray:
        places = np.arange(len(self))
        return places if self.decoded is None else places[self.decoded.sizes[:, 0] > 0]

    def read(self, place: int) -> Image.Image:
        if self.decoded is None:
            return self.images.read(place)
        return Image.fromarray(self.decoded.array(place))

    def view(self, read: Image.Image, place: int) -> tuple[Tensor, Tensor]:
        return self.transform(read), torch.tensor(self.labels[place])

    def blank(self) -> tuple[Tensor, Tensor]:
        return self._blank, torch.tensor(0)
