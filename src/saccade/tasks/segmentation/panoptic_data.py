"""Images whose every pixel has a class and belongs to a thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from saccade.data.source import read_bytes
from saccade.tasks.segmentation.segmentation_data import PixelSet, decode_ids


@dataclass(frozen=True)
class PanopticSet(PixelSet):
    """Images whose every pixel has a class and a number among things of that class."""

    folder: ClassVar[str] = "panoptic"

    def read(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """Image ``i``, RGB, and int64 [h, w, 2]: class (or ``VOID``) and number."""
        image, name = self.images.read(i), self.labels[i]
        values = decode_ids(read_bytes(self.images.store, name), name, ("RGB",))
        classes = self.checked(values[..., 0], image, name).astype(np.int64)
        return image, np.stack([classes, values[..., 1] * 256 + values[..., 2]], axis=-1)
