"""Learning to detect: images and boxes in, heads on every cell, DETR's loss, average precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter
from torchvision.transforms.functional import InterpolationMode, hflip, pil_to_tensor, resized_crop, vflip

from saccade.data import Preprocess
from saccade.data.decoded import Decoded
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.evaluation.stats import Interval
from saccade.model import AdaptiveViT
from saccade.storage.image_names import CHECK, TEST, kind_of
from saccade.tasks.detection.average_precision import find, score, truths
from saccade.tasks.detection.detection_data import BoxSet, Objects, open_boxes, pad, seen
from saccade.tasks.detection.detector import DetectionHead, Heads, draw, look, squashed
from saccade.tasks.detection.hungarian import Weights, terms
from saccade.tasks.image_text.text_tower import Learned, TextTower, open_tower
from saccade.training.augmentation import Augment
from saccade.training.config import Config
from saccade.training.image_sets import divided
from saccade.training.starting import left_behind, open_source
from saccade.training.task import Examples, Task, Tick

KNOWN = ("scale", "ratio", "hflip", "vflip", "color_jitter", "mix_prob")  # augmentations that boxes can follow


class Detect(Task):
    """Images, and boxes of named things in them."""

    metric, column = "AP", "ap"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for name, known in Augment.model_fields.items():
            if name not in KNOWN and getattr(config.augment, name) != known.default:
                raise UserError(f"augment.{name} moves or hides objects: leave it out for task='detect'")
        self.boxes, self.checked = open_both(config)
        self.use(self.boxes.images, None if self.checked is None else self.checked.images)
        self.weights = Weights(**{name: getattr(config.detect, name) for name in Weights.__dataclass_fields__})

    def identity(self) -> dict[str, Any]:
        found = super().identity() | {"classes": self.boxes.classes, "boxes": self.boxes.fingerprint()}
        return found if self.checked is None else found | {"held boxes": self.checked.fingerprint()}

    def model(self) -> AdaptiveViT:
        model = open_source(self.config.model)
        self.side = max(model.input_size())
        return model.with_head(DetectionHead(self._heads(model)))

    def _heads(self, model: AdaptiveViT) -> Heads:
        """Those of the detector that training starts from, where they can be asked for these names; else new ones."""
        names, rule, given = self.boxes.classes, self.config.detect, model.task_head
        if isinstance(given, DetectionHead) and (
            given.heads.names == names or isinstance(given.heads.texts, TextTower)
        ):
            given.heads.names = names
            return given.heads
        self.notes += left_behind(self.config.model, model, self.config.task)
        learned = rule.queries == "learned"
        texts = Learned(names, rule.width) if learned else open_tower(rule.width, **self.config.texts.model_dump())
        return Heads(texts, model.vit.embed_dim, names)

    def examples(self, seen: Preprocess) -> Boxed:
        return Boxed(self.boxes, seen, self.config.augment, self.config.detect.least, self.decoded)

    def terms(self, model: AdaptiveViT, out: Any, targets: Tensor, teacher_out: Any, full: int) -> dict[str, Tensor]:
        return {name: value / full for name, value in terms(out.logits, out.boxes, targets, self.weights).items()}

    def measure(self, view: AdaptiveViT, tick: Tick) -> tuple[Interval, float]:
        assert self.checked is not None and self.loaders is not None
        loader, names, top = self.loaders.of(squashed(view)), self.checked.classes, self.config.detect.top
        places = spread(len(self.checked), self.config.data.check_limit)
        found, read, gmacs = find(view, loader, names, places, self.config.run.batch, top, tick)
        there = truths([self.checked.objects[i] for i in read])
        return score(str(view.setting), found, there, gmacs).ap, gmacs

    def picture(self, view: AdaptiveViT, image: Image.Image) -> Image.Image:
        return draw(image, look(view, image), DetectionHead.of(view).class_names)


def open_both(config: Config) -> tuple[BoxSet, BoxSet | None]:
    """Images to train on, and those to check on (None where ``data.holdout`` is 0 and none are given)."""
    rule, data = config.detect, config.data
    if rule.annotations is None:
        if kind_of(data.split) in (CHECK, TEST):
            raise UserError(f"data.split={data.split!r} is a held-out split and never trained on: give another")
        if data.path != "scenes":
            raise UserError("no boxes to learn: give detect.annotations=COCO.json, or data.path=scenes")
        return open_boxes("scenes", data.split), open_boxes("scenes", "val") if data.holdout else None
    whole = open_boxes(rule.annotations, images=data.path or None)
    if rule.held is not None:
        held = open_boxes(rule.held, images=rule.held_images or data.path or None)
        if held.classes != whole.classes:
            raise UserError(f"{rule.held} has other categories than {rule.annotations}: they must be the same")
        return whole, held
    if not data.holdout:
        return whole, None
    train, out = divided(whole.images, data)
    return whole.subset(train), whole.subset(out)


class Boxed(Examples):
    """Windows of images at a detector's size, and the boxes in them.

    A window has the share ``scale`` of the image's area, and its sides' shares of the image's sides differ by the
    factor ``ratio``: with both at 1 it is the whole image, squashed, which is what is looked at in the end. An object
    of which less than ``least`` is left is none.
    """

    def __init__(
        self, boxes: BoxSet, seen: Preprocess, augment: Augment, least: float, decoded: Decoded | None = None
    ) -> None:
        self.path, self.failures = boxes.images.path, {} if decoded is None else decoded.failures
        self.boxes, self.augment, self.least, self.decoded = boxes, augment, least, decoded
        self.size, self.how = seen.size, InterpolationMode(seen.interpolation)
        jitter = augment.color_jitter
        self.colour = ColorJitter(jitter, jitter, jitter) if jitter else None

    def __len__(self) -> int:
        return len(self.boxes)

    def usable(self) -> np.ndarray:
        places = np.arange(len(self))
        return places if self.decoded is None else places[self.decoded.sizes[:, 0] > 0]

    def read(self, place: int) -> Image.Image:
        return self.boxes.images.read(place) if self.decoded is None else Image.fromarray(self.decoded.array(place))

    def view(self, read: Image.Image, place: int) -> tuple[Tensor, Tensor]:
        there = self.boxes.objects[place]
        left, top, width, height = self._window(*read.size)
        image = resized_crop(read, top, left, height, width, list(self.size), self.how)
        shares = left / read.width, top / read.height, width / read.width, height / read.height
        boxes, left_over = seen(there.boxes, *shares)
        for flip, probability, axis in ((hflip, self.augment.hflip, 0), (vflip, self.augment.vflip, 1)):
            if torch.rand(()) < probability:
                image = flip(image)
                boxes[:, [axis, axis + 2]] = 1 - boxes[:, [axis + 2, axis]]
        if self.colour is not None:
            image = self.colour(image)
        kept = (left_over > 0) & (left_over >= self.least - 1e-4)  # 1: whole, but for rounding
        return pil_to_tensor(image), pad(Objects(boxes[kept], there.labels[kept], there.crowd[kept]), self.boxes.most)

    def _window(self, width: int, height: int) -> tuple[int, int, int, int]:
        """left, top, width, height in pixels."""
        u, v, x, y = torch.rand(4).tolist()
        (least, most), (narrow, wide) = self.augment.scale, self.augment.ratio
        area, ratio = least + u * (most - least), narrow * (wide / narrow) ** v
        w = max(1, round(width * min(1.0, (area * ratio) ** 0.5)))
        h = max(1, round(height * min(1.0, (area / ratio) ** 0.5)))
        return round(x * (width - w)), round(y * (height - h)), w, h

    def blank(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(3, *self.size, dtype=torch.uint8), torch.full((self.boxes.most, 5), -1.0)
