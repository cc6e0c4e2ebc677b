"""Learning to segment: pixel labels, cross-entropy that leaves void out, a setting that teaches others, mIoU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.tv_tensors import Image as TvImage
from torchvision.tv_tensors import Mask

from saccade.data import Preprocess
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.evaluation.stats import Interval
from saccade.model import AdaptiveViT
from saccade.tasks.segmentation.class_picture import paint
from saccade.tasks.segmentation.mean_iou import count, interval, mean_iou
from saccade.tasks.segmentation.segmentation_data import VOID, PixelSet, open_pixels, pixel_splits
from saccade.tasks.segmentation.segmenter import SegmentationHead, segmenter
from saccade.training.augmentation import Augment
from saccade.training.config import Config
from saccade.training.image_sets import check_split, checking, divided
from saccade.training.loss import TeacherOutput, from_teacher, label_weight
from saccade.training.multi_setting import MultiSettingModel
from saccade.training.starting import left_behind, open_source
from saccade.training.task import Examples, Task, Tick


class Segment(Task):
    """Images whose every pixel has a class, or none."""

    metric, column = "mIoU", "miou"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        rule, data, augment = config.segment, config.data, config.augment
        if not rule.classes:
            raise UserError("name the classes: segment.classes=['road', 'sky', …], in the order of their values")
        for name, value in (("rand_augment", augment.rand_augment), ("erase", augment.erase), ("mixup", augment.mixup)):
            if value:
                raise UserError(f"augment.{name}={value} would part images from their labels: leave it out")
        if augment.cutmix or config.distill.features or config.distill.tokens or config.distill.init:
            raise UserError(
                "augment.cutmix, distill.features, .tokens and .init are for classes of images: leave them out"
            )
        check_split(data)
        known = pixel_splits(data.path)
        self.pixels: PixelSet = open_pixels(data.path, data.split if known else None, rule.classes, rule.void)
        self.checked: PixelSet | None = None
        if data.holdout and (held := checking(known)):
            self.checked = open_pixels(data.path, held, rule.classes, rule.void)
        elif data.holdout:
            self.pixels, self.checked = (self.pixels.subset(p) for p in divided(self.pixels.images, data))
        self.use(self.pixels.images, None if self.checked is None else self.checked.images)

    def identity(self) -> dict[str, Any]:
        found = super().identity() | {"labels": self.pixels.fingerprint()}
        return found if self.checked is None else found | {"held labels": self.checked.fingerprint()}

    def model(self) -> AdaptiveViT:
        model, rule = open_source(self.config.model), self.config.segment
        given = model.task_head
        if isinstance(given, SegmentationHead) and given.classes == rule.classes:  # its decoder goes on learning
            return model.with_head(SegmentationHead(given.decoder, rule.classes, rule.void))
        self.notes += left_behind(self.config.model, model, self.config.task)
        knobs = {} if rule.head == "linear" else {"layers": rule.layers}
        return segmenter(model, rule.classes, rule.head, void=rule.void, **knobs)

    def teach(self, student: MultiSettingModel) -> None:
        if self.config.distill.teacher not in ("", "self"):
            raise UserError("segmentation learns from no teacher but 'self', the largest setting of each step")

    def examples(self, seen: Preprocess) -> PixelExamples:
        return PixelExamples(self.pixels, self.config.augment, seen)

    def terms(self, model: AdaptiveViT, out: Any, targets: Tensor, teacher_out: Any, full: int) -> dict[str, Tensor]:
        rule, each = self.config.distill, full * targets[0].numel() if len(targets) else full
        share = 0.0 if teacher_out is None else rule.weight
        smoothing = self.config.optim.smoothing
        label = F.cross_entropy(
            out.logits.float(), targets.long(), ignore_index=VOID, reduction="sum", label_smoothing=smoothing
        )
        found = {"label": label_weight(rule, teacher_out) * label / each}
        if teacher_out is not None:  # pixels as if they were images: also those that have no label
            said, teacher_logits = (
                logits.float().movedim(1, -1).flatten(0, -2) for logits in (out.logits, teacher_out.logits)
            )
            found["teacher"] = share * from_teacher(said, teacher_logits, rule) / each
        return found

    def teacher_output(self, model: AdaptiveViT, out: Any) -> TeacherOutput:
        return TeacherOutput(out.logits.detach(), out.tokens.x.detach())

    def measure(self, view: AdaptiveViT, tick: Tick) -> tuple[Interval, float]:
        assert self.checked is not None
        places = spread(len(self.checked), self.config.data.check_limit)
        found = count(view, self.checked, places, self.config.segment.how, self.config.run.batch, tick)
        return interval(mean_iou, found.sums), found.macs / 1e9

    def picture(self, view: AdaptiveViT, image: Image.Image) -> Image.Image:
        return paint(view, image)


class PixelExamples(Examples):
    """Pairs seen through one random crop, flip and change of colour for both.

    ``scale`` and ``ratio`` are those of ``Augment``: the crop's share of the area, its width / height before it is
    brought to size.
    """

    def __init__(self, pixels: PixelSet, augment: Augment, seen: Preprocess) -> None:
        self.pixels, self.path, self.failures, self.size = pixels, pixels.images.path, pixels.failures, seen.size
        mode = InterpolationMode.BILINEAR if seen.interpolation == "random" else str_to_interp_mode(seen.interpolation)
        jitter = augment.color_jitter
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(seen.size, augment.scale, augment.ratio, mode, antialias=True),
                v2.RandomHorizontalFlip(augment.hflip),
                v2.RandomVerticalFlip(augment.vflip),
                *([v2.ColorJitter(jitter, jitter, jitter)] if jitter else []),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, place: int) -> tuple[Image.Image, np.ndarray]:
        return self.pixels.read(place)

    def view(self, read: tuple[Image.Image, np.ndarray], place: int) -> tuple[Tensor, Tensor]:
        image, labels = read
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        seen, mask = self.transform(TvImage(pixels), Mask(torch.from_numpy(labels)))
        return seen.as_subclass(Tensor).contiguous(), mask.as_subclass(Tensor).contiguous()

    def blank(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(3, *self.size, dtype=torch.uint8), torch.zeros(self.size, dtype=torch.uint8)
