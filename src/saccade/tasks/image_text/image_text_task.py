"""Learning from images and texts: FlexiLiT where the image tower is locked (``optim.backbone=0``), else FlexiCLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from saccade.data import Preprocess
from saccade.data.decoded import Decoded
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.evaluation.stats import Interval, proportion
from saccade.model import AdaptiveViT
from saccade.tasks.classification.classification_task import Labelled
from saccade.tasks.image_text.image_text_data import Pairs, captioned, open_pairs
from saccade.tasks.image_text.text_tower import open_tower
from saccade.tasks.image_text.two_tower import Space, TwoTowerHead
from saccade.tasks.image_text.zero_shot import belonging, embed, ranks
from saccade.training.config import Config
from saccade.training.image_sets import divided, open_sets
from saccade.training.starting import left_behind, open_source
from saccade.training.task import Examples, Task, Tick


class Pairing(Task):
    """Images, and what is said of them; the images of one process's share of a batch are one another's alternatives."""

    metric, column = "R@1", "recall_at_1"  # of an image, among the different texts of the held-out images

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for name in ("mixup", "cutmix"):
            if getattr(config.augment, name):
                raise UserError(f"augment.{name} mixes images, and no text says what of: leave it out")
        if config.run.accumulate > 1:
            raise UserError("run.accumulate > 1 would compare fewer images: leave it out, and set run.checkpointing")
        self.pairs, self.checked = open_both(config)
        self.use(self.pairs.images, None if self.checked is None else self.checked.images)

    def identity(self) -> dict[str, Any]:
        found = super().identity() | {"texts": self.pairs.fingerprint()}
        return found if self.checked is None else found | {"held texts": self.checked.fingerprint()}

    def model(self) -> AdaptiveViT:
        model, rule = open_source(self.config.model), self.config.pairs
        self.side = max(model.input_size())
        if isinstance(model.task_head, TwoTowerHead):  # it goes on learning
            return model
        self.notes += left_behind(self.config.model, model, self.config.task)
        features = model.vit.num_features
        texts = open_tower(rule.width or features, **self.config.texts.model_dump())
        space = Space(texts, features, project=rule.width is not None, loss=rule.loss)
        return model.with_head(TwoTowerHead(space))

    def examples(self, seen: Preprocess) -> Examples:
        return Paired(self.pairs, self.config.augment.view(seen.size, seen.interpolation, seen.mean), self.decoded)

    def terms(self, model: AdaptiveViT, out: Any, targets: Tensor, teacher_out: Any, full: int) -> dict[str, Tensor]:
        rows = targets.tolist()
        texts = [self.pairs.texts[place][which] for place, which in rows]
        same = shared([self.pairs.texts[place] for place, _ in rows], texts).to(targets.device)
        space = TwoTowerHead.of(model).space
        return {self.config.pairs.loss: space.compare(out.embedding, space.words(texts), same) / full}

    def measure(self, view: AdaptiveViT, tick: Tick) -> tuple[Interval, float]:
        assert self.checked is not None and self.loaders is not None
        places = spread(len(self.checked), self.config.data.check_limit)
        seen = embed(
            view, self.loaders.of(Preprocess.of(view.vit, view.input_size())), places, self.config.run.batch, tick
        )
        texts, own = belonging([self.checked.texts[i] for i in seen.places.tolist()])
        with torch.no_grad():
            words = TwoTowerHead.of(view).words(texts).cpu()
        return proportion(ranks(seen.embedding, words, own) < 1), seen.gmacs


def shared(all_texts: Sequence[Sequence[str]], chosen: Sequence[str]) -> Tensor:
    """Whether text j, chosen for image j of a batch, is also one of image i's texts, [b, b] bool."""
    column = {text: i for i, text in enumerate(dict.fromkeys(chosen))}
    own = torch.zeros(len(chosen), len(column), dtype=torch.bool)
    for row, texts in enumerate(all_texts):
        own[row, [column[text] for text in texts if text in column]] = True
    return own[:, [column[text] for text in chosen]]


def open_both(config: Config) -> tuple[Pairs, Pairs | None]:
    """Pairs to train on, and those to check on (None where ``data.holdout`` is 0 and none are given)."""
    rule, data = config.pairs, config.data
    if not data.path:
        raise UserError("no pairs to train on: give data.path=FOLDER, ZIP or TABLE")
    if rule.templates:
        train, held = open_sets(data)
        return captioned(train, rule.templates), None if held is None else captioned(held, rule.templates)
    whole = open_pairs(data.path, rule.images)
    if rule.held is not None:
        return whole, open_pairs(rule.held, rule.held_images or rule.images)
    if not data.holdout:
        return whole, None
    kept, out = divided(whole.images, data)
    return whole.subset(kept), whole.subset(out)


class Paired(Labelled):
    """Images with the place of the image and the number of one of its texts, drawn for each view."""

    def __init__(self, pairs: Pairs, transform: Any, decoded: Decoded | None = None) -> None:
        super().__init__(pairs.images, range(len(pairs)), transform, decoded)
        self.counts = [len(texts) for texts in pairs.texts]

    def view(self, read: Image.Image, place: int) -> tuple[Tensor, Tensor]:
        image = self.transform(read)
        return image, torch.stack([torch.tensor(place), torch.randint(self.counts[place], ())])

    def blank(self) -> tuple[Tensor, Tensor]:
        return super().blank()[0], torch.zeros(2, dtype=torch.int64)
