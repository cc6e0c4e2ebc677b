"""Accuracy of every setting on images that are never trained on, while training goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saccade.data import CACHE_BYTES, ImageSet, Loader, Preprocess
from saccade.measure.accuracy import spread
from saccade.measure.stats import proportion
from saccade.progress import Progress
from saccade.training.student import Student
from saccade.views import Checked


class Checker:
    """Held-out images, decoded once for each input size."""

    def __init__(self, images: ImageSet, labels: Sequence[int], limit: int, batch: int) -> None:
        self.images, self.labels, self.batch = images, torch.tensor(labels), batch
        self.places = spread(len(images), limit)
        self.failures: dict[str, str] = {}
        self._loaders: dict[tuple[int, int], Loader] = {}

    def __call__(self, student: Student, settings: Sequence[str], step: int, progress: Progress) -> list[Checked]:
        """Top-1 of each setting, with its interval."""
        mode = student.training
        student.eval()
        bar = progress.start("checking", len(self.places) * len(settings))
        found = []
        for setting, view in zip(settings, student.views, strict=True):
            bar(0, what=f"checking {setting}")
            hits, macs = [], []
            for batch in self._loader(student, view.input_size()).batches(self.batch, self.places):
                weight = student.vit.patch_embed.proj.weight
                with torch.no_grad():  # not inference mode, whose tensors must not meet training's
                    out = view(batch.images.to(weight.device, weight.dtype))
                hits.append(out.logits.argmax(-1).cpu() == self.labels[batch.indices])
                macs.append(out.trace.macs().cpu())
                bar(len(batch.indices))
            top1 = proportion(torch.cat(hits))
            found.append(Checked(step, setting, *top1.three(), torch.cat(macs).mean().item() / 1e9))
        bar.finish()
        student.train(mode)
        return found

    def _loader(self, student: Student, size: tuple[int, int]) -> Loader:
        if size not in self._loaders:
            room = CACHE_BYTES // 8
            self._loaders[size] = Loader(self.images, Preprocess.of(student.vit, size), cache_bytes=room)
        loader = self._loaders[size]
        self.failures.update(loader.failures.items)
        return loader
