"""``predict``: from photos to answers — label names, probabilities, embedding, token map and MACs of each image.

predictor = saccade.Predictor("runs/photos/model")
predictor("photos/")[0].label
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.checkpoint import Source, open_model
from saccade.core.output import Output
from saccade.data import ImageError, Preprocess
from saccade.data.classes import Classes
from saccade.data.inputs import Input, inputs
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.prediction.predictions import Details, Prediction, Predictions
from saccade.runners.artefact import Artefact, is_artefact, open_artefact
from saccade.runners.runner import EAGER

BATCH = 8
READERS = 2  # threads that decode ahead of the model


class Predictor:
    """A model with its preprocessing and class names: images in, answers out, in the same order.

    Calls from several threads at once are fine; nothing is remembered between them.

    Args:
        model: a folder that Saccade wrote (run as it recommends: number type, engine) or exported, a timm name with
            ``weights`` or ``pretrained``, a timm ViT or an AdaptiveViT.
        weights, pretrained, num_classes, device: as in ``saccade.checkpoint.open_model``.
        setting: instead of the model's own.
        batch: images at once; None: as many as the folder's model was chosen for, else 8.
        top: labels of an image.

    Raises:
        UserError: bad model or setting; a model of another task; a batch or ``top`` below 1.
    """

    def __init__(
        self,
        model: Source | Artefact,
        *,
        weights: str | os.PathLike | None = None,
        pretrained: bool = False,
        num_classes: int | None = None,
        setting: str | None = None,
        device: str | None = None,
        batch: int | None = None,
        top: int = 5,
    ) -> None:
        for name, value in (("batch", batch), ("top", top)):
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name}={value!r} is not a whole number of 1 or more")
        self.batch, self.top = batch or BATCH, top
        if (exported := _artefact(model)) is not None:
            if setting is not None or weights is not None or pretrained or num_classes is not None:
                raise UserError(f"{exported.folder} is exported: leave out setting, weights and num_classes")
            if exported.config.pixels:
                raise UserError(f"{exported.folder} takes photos as they are: run its predict.py, or call it")
            self.model: AdaptiveViT | Artefact = exported
            self.preprocess = Preprocess.from_dict(exported.preprocessing)
            names = tuple(exported.class_names or ())
            self.classes = Classes(names, tuple(exported.labels or names))
            return
        assert not isinstance(model, Artefact)
        opened = open_model(model, weights, pretrained, device, num_classes=num_classes, deployed=True)
        if (head := opened.task_head) is not None and not head.embeds:
            raise UserError(
                f"this is a model for task {head.task!r}, which predict does not know: use saccade {head.verb}"
            )
        if opened.backbone.channels != 3:
            raise UserError(f"this model takes {opened.backbone.channels} channels, and predict gives RGB: call it")
        self.model = (opened if setting is None else opened.at(setting)).eval()
        self.preprocess = Preprocess.of(self.model.vit, self.model.input_size())
        self.classes = Classes.of(self.model.vit)
        runner = self.model.deployed
        self.batch = batch or (runner and runner.batch) or BATCH

    def __call__(self, images: Any) -> Predictions:
        """Answers for images, in their order; an image that cannot be used has its ``error``, and nothing else.

        Args:
            images: one or an iterable (of iterables, …) of

                * a path of an image, a folder (with all below it), a zip, or a pattern like ``"photos/*.jpg"``;
                * a PIL image, or the bytes of an image file;
                * an array [h, w, 3], [h, w] or [h, w, 4] (alpha is dropped), or a batch of them [n, h, w, c]: uint8, or
                  float from 0 to 1;
                * a tensor [3, h, w] or [1, h, w], or a batch of them [n, c, h, w]: uint8, or float from 0 to 1, not
                  normalised.

        Raises:
            UserError: a path that is not there, a folder without images, what is no image at all.
        """
        return Predictions(self.stream(images))

    def stream(self, images: Any) -> Iterator[Prediction]:
        """The same one by one, as soon as a batch is done; what comes next is read ahead."""
        waiting: list[tuple[Input, Tensor | ImageError]] = []
        ready = 0
        for given, future in self._submitted(inputs(images)):
            found = _result(future)
            waiting.append((given, found))
            ready += isinstance(found, Tensor)
            if ready == self.batch:
                yield from self._answer(waiting)
                waiting, ready = [], 0
        yield from self._answer(waiting)

    def __repr__(self) -> str:
        known = f"{len(self.classes.names)} classes" if self.classes.names else "no class names"
        height, width = self.preprocess.size
        return f"Predictor({self.model.setting}, {known}, {height}×{width} pixels, batch {self.batch})"

    def _submitted(self, given: Iterable[Input]) -> Iterator[tuple[Input, Future[Tensor]]]:
        """The crop of each image in order, while those of the next ones are under way."""
        pool = ThreadPoolExecutor(READERS)
        pending: deque[tuple[Input, Future[Tensor]]] = deque()
        try:
            for one in given:
                pending.append((one, pool.submit(self._crop, one)))
                if len(pending) > self.batch + READERS:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            pool.shutdown(cancel_futures=True)

    def _crop(self, given: Input) -> Tensor:
        return self.preprocess.crop(given.read(), given.name)

    def _answer(self, waiting: list[tuple[Input, Tensor | ImageError]]) -> Iterator[Prediction]:
        """Answers of one batch, and of the images between that could not be read."""
        crops = [found for _, found in waiting if isinstance(found, Tensor)]
        answers = iter(self._run(torch.stack(crops)) if crops else ())
        for given, found in waiting:
            if isinstance(found, ImageError):
                yield Prediction(given.name, error=found.reason)
                continue
            logits, known = next(answers)
            if not logits.isfinite().all():
                yield Prediction(given.name, error="the model answers NaN or infinity: check its weights and precision")
                continue
            crop, look = partial(self._crop, given), partial(self._look, given)
            vector = None if self.classes.names else logits.numpy()
            best = self.classes.best(logits, self.top)
            yield Prediction(given.name, **best, read=crop, look=look, known=known, vector=vector)

    @torch.inference_mode()
    def _run(self, crops: Tensor) -> list[tuple[Tensor, Details | None]]:
        """uint8 [B, 3, h, w] -> of each image the logits [K], and what ran where that is known without more work."""
        if isinstance(self.model, Artefact):
            logits = self.model.logits(self.preprocess.normalise(crops))
            return [(row, self._exported_details(row)) for row in logits]
        out = self.model(self._images(crops))
        logits = out.logits.float().cpu()
        runner = self.model.deployed
        known = [None] * len(crops) if runner is not None and runner.engine != EAGER else self._details(out)
        return [*zip(logits, known, strict=True)]

    @torch.inference_mode()
    def _look(self, given: Input) -> Details:
        """What runs for one image, uncompiled."""
        if isinstance(self.model, Artefact):
            raise UserError(
                f"{self.model.folder} is exported and gives logits alone: for embeddings, token maps and MACs "
                "ask the model that it was made of"
            )
        return self._details(self.model(self._images(self._crop(given).unsqueeze(0))))[0]

    def _exported_details(self, found: Tensor) -> Details | None:
        """Of an encoder, whose answer is the embedding; a classifier's artefact gives nothing beside its logits."""
        if self.classes.names or not isinstance(self.model, Artefact):
            return None
        return Details(found.numpy(), np.empty((0, 0), np.int32), round(self.model.config.gmacs * 1e9))

    def _images(self, crops: Tensor) -> Tensor:
        assert isinstance(self.model, AdaptiveViT)
        weight = self.model.vit.patch_embed.proj.weight
        return self.preprocess.normalise(crops).to(weight.device, weight.dtype)

    def _details(self, out: Output) -> list[Details]:
        assert isinstance(self.model, AdaptiveViT)
        vit, tokens, trace = self.model.vit, out.tokens, out.trace
        if self.model.task_head is None:
            x = vit.norm(tokens.x.to(vit.patch_embed.proj.weight.dtype))
            embeddings = self.model.pooled_head(x, tokens, pre_logits=True).float().cpu().numpy()
        else:
            embeddings = out.logits.float().cpu().numpy()
        owner = (trace.blocks[-1].owner if trace.blocks else trace.first).int().unflatten(1, trace.grid).cpu().numpy()
        macs = trace.macs().tolist()
        return [Details(e, cells, round(cost)) for e, cells, cost in zip(embeddings, owner, macs, strict=True)]


def predict(
    model: Source | Artefact | Predictor,
    images: Any,
    setting: str | None = None,
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | None = None,
    batch: int | None = None,
    top: int = 5,
) -> Predictions:
    """Label names, probabilities, embeddings, token maps and MACs of images; see ``Predictor``, which is kept open."""
    if isinstance(model, Predictor):
        return model(images)
    options: dict[str, Any] = {"weights": weights, "pretrained": pretrained, "setting": setting, "device": device}
    return Predictor(model, **options, batch=batch, top=top)(images)


def _artefact(model: Source | Artefact) -> Artefact | None:
    """What ``saccade export`` wrote, open or as a folder; None: another model."""
    if isinstance(model, (str, os.PathLike)) and is_artefact(Path(model)):
        return open_artefact(model)
    return model if isinstance(model, Artefact) else None


def _result(future: Future[Tensor]) -> Tensor | ImageError:
    try:
        return future.result()
    except ImageError as error:
        return error
