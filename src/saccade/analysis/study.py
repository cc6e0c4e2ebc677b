"""What an analysis is given — a model, settings, images — and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from saccade.core.registry import registry
from saccade.data import ImageError, ImageSet, Loader, Preprocess
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.evaluation.defined import require_choice, require_finite
from saccade.evaluation.evaluator import check_head
from saccade.model import AdaptiveViT
from saccade.reports.report_blocks import Part
from saccade.terminal.progress import Progress

FEW = 4  # settings compared where none are named


@dataclass(frozen=True)
class Finding:
    """What an analysis found: in words (the answer first, `` `code` `` is set as code), in numbers, and to look at."""

    lines: list[str]
    data: dict[str, Any]  # plain values, for JSON
    parts: list[Part]


@dataclass(frozen=True)
class Answers:
    """What settings said about the same n images."""

    places: Tensor  #                   [n] int64  in the image set
    probabilities: dict[str, Tensor]  # [n, K] fp32, by setting
    gmacs: dict[str, float]  #          mean per image, that ran


@dataclass(frozen=True)
class Study:
    """A model under several settings on some images."""

    model: AdaptiveViT  #       the dense view
    images: ImageSet
    settings: tuple[str, ...]
    places: tuple[int, ...]  #  of the images to look at
    batch: int
    progress: Progress
    failures: dict[str, str] = field(default_factory=dict)  # why which images could not be read, as they are met

    def views(self, settings: Sequence[str] | None = None) -> dict[str, AdaptiveViT]:
        """A light view of the model for each setting (None: all). Raises UserError."""
        return {name: self.model.at(name).eval() for name in (self.settings if settings is None else settings)}

    def some(self, count: int) -> list[int]:
        """At most so many of the places, evenly spread."""
        return [self.places[i] for i in spread(len(self.places), count)]

    def batches(
        self, views: Mapping[str, AdaptiveViT], advance: Callable[[int], object], places: Sequence[int] | None = None
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Images that every view can read, as each wants them: (places, {setting: float [b, 3, h, w]}).

        ``advance`` is called with how many images are done. Raises UserError where not one can be read.
        """
        weight = next(self.model.parameters())
        sizes = {name: view.input_size() for name, view in views.items()}
        loaders = {s: Loader(self.images, Preprocess.of(self.model.vit, s)) for s in dict.fromkeys(sizes.values())}
        todo, any_read = list(self.places if places is None else places), False
        for start in range(0, len(todo), self.batch):
            chunk = todo[start : start + self.batch]
            read = {size: self._load(loader, chunk) for size, loader in loaders.items()}
            common = [place for place in chunk if all(place in found for found in read.values())]
            if common:
                any_read = True
                ready = {
                    size: torch.stack([found[place] for place in common]).to(weight.device, weight.dtype)
                    for size, found in read.items()
                }
                yield common, {name: ready[size] for name, size in sizes.items()}
            advance(len(chunk))
        if not any_read:
            reasons = ", ".join(f"{name} ({reason})" for name, reason in [*self.failures.items()][:3])
            raise UserError(f"nothing to work on in {self.images.path}: {reasons or 'no images were asked for'}")

    def answers(self, settings: Sequence[str], what: str) -> Answers:
        """Probabilities and MACs of settings, all on the same images. Raises UserError where some have no answer."""
        views = self.views(settings)
        advance = self.progress.start(what, len(self.places))
        seen: list[int] = []
        said: dict[str, list[Tensor]] = {name: [] for name in views}
        spent = dict.fromkeys(views, 0.0)
        for places, images in self.batches(views, advance):
            seen += places
            for name, view in views.items():
                with torch.inference_mode():
                    out = view(images[name])
                logits = require_choice(require_finite(out.logits.float(), name), name)
                said[name].append(logits.softmax(-1).cpu())
                spent[name] += out.trace.macs().sum().item() / 1e9
        advance.finish()
        answers = {name: torch.cat(parts) for name, parts in said.items()}
        return Answers(torch.tensor(seen), answers, {name: total / len(seen) for name, total in spent.items()})

    def photo(self, place: int, view: AdaptiveViT) -> Image.Image:
        """An image as a view sees it, cropped. Raises ImageError."""
        prepare = Preprocess.of(self.model.vit, view.input_size())
        return to_pil_image(prepare.crop(self.images.read(place), self.images.names[place]))

    def _load(self, loader: Loader, places: Sequence[int]) -> dict[int, Tensor]:
        """The images that can be read, by place; the others are named."""
        found: dict[int, Tensor] = {}
        try:
            for batch in loader.batches(len(places), places):
                found = dict(zip(batch.indices, batch.images, strict=True))
        except UserError:
            if len(loader.failures) < len(places):  # else: not one could be read, which `failures` tells
                raise
        self.failures.update(loader.failures.items)
        return found


def readable(study: Study, count: int) -> list[int]:
    """The first ``count`` places, evenly spread, whose images can be read."""
    found: list[int] = []
    for place in [*study.some(count), *study.places]:
        if len(found) == count:
            break
        try:
            study.images.read(place)
        except ImageError as error:
            study.failures[error.name] = error.reason
        else:
            found += [] if place in found else [place]
    return found


def no_classes(model: AdaptiveViT, images: ImageSet) -> str | None:
    """Why a model has no answer to explain; None: it has."""
    try:
        check_head(model)
    except UserError as error:
        return str(error)
    return None


def usual(model: AdaptiveViT) -> list[str]:
    """Settings to compare where none are named: what the weights were trained for, or what tokenizers offer."""
    offered = [
        s for e in registry().values() if e.kind == "tokenizer" and not e.baseline for s in e.menu(model.backbone)
    ]
    listed = [s for s in (model.trained or offered) if s != "dense"]
    return ["dense", *(listed[i] for i in spread(len(listed), FEW - 1))]
