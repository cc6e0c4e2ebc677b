"""How far an exported model's answers are from those of the model that it was made of, on images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.data import ImageError, ImageSet, Loader, Preprocess, head_labels, open_images
from saccade.data.scenes import scenes
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.model import AdaptiveViT
from saccade.runners.artefact import Artefact, compared

DRAWN = 64  # scenes, where no images are given
BATCH = 8


class Samples:
    """The images that artefacts are compared on, and what their classes are."""

    def __init__(self, data: str | os.PathLike | ImageSet | None, limit: int, places: Sequence[int] | None) -> None:
        self.set = scenes() if data is None else data if isinstance(data, ImageSet) else open_images(os.fspath(data))
        self.source = f"{DRAWN} drawn scenes" if data is None else Path(str(self.set.path)).name
        self.labelled = data is not None and self.set.labels is not None
        self.places = spread(len(self.set), DRAWN if data is None else limit) if places is None else list(places)

    def batches(self, preprocess: Preprocess, pixels: bool) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """Normalised images, the same or their pixels [1, H, W, 3], and places; what cannot be read is left out."""
        if not pixels:
            for batch in Loader(self.set, preprocess).batches(BATCH, self.places):
                yield batch.images, batch.images, list(batch.indices)
            return
        for place in self.places:
            with suppress(ImageError):
                image = self.set.read(place)
                bare = torch.from_numpy(np.array(image))
                yield preprocess(image).unsqueeze(0), bare.unsqueeze(0), [place]

    def labels(self, model: AdaptiveViT) -> Tensor | None:
        """Classes of all images in the model's head; None: they have none that it knows."""
        if not (self.labelled and model.vit.num_classes):
            return None
        try:
            return torch.tensor(head_labels(self.set, model.vit).indices)
        except UserError:
            return None


@torch.inference_mode()
def parity(
    view: AdaptiveViT, artefact: Artefact, preprocess: Preprocess, samples: Samples, least: float
) -> dict[str, Any]:
    """The facts of ``saccade.runners.artefact.Parity``. Raises UserError where no image can be read."""
    before, after, places, device = [], [], list[int](), next(view.parameters()).device
    for images, given, indices in samples.batches(preprocess, artefact.config.pixels):
        before.append(view(images.to(device)).logits.cpu())
        after.append(artefact.logits(given))
        places += indices
    if not places:
        raise UserError(f"none of the images in {samples.source} could be read: there is nothing to compare on")
    a, b, labels = torch.cat(before), torch.cat(after), samples.labels(view)
    facts: dict[str, Any] = compared(a, b)
    if not view.vit.num_classes:
        facts["agreement"] = None
    elif labels is not None:
        truth = labels[places]
        facts |= {"top1": _share(b.argmax(-1) == truth), "top1_before": _share(a.argmax(-1) == truth)}
    same = facts["cosine"] if facts["agreement"] is None else facts["agreement"]
    finite = bool(b.isfinite().all())
    return {**facts, "images": len(places), "source": samples.source, "least": least, "met": finite and same >= least}


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
