"""Augmentation by timm, as a pure function of its settings, the image and a key."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf, isfinite
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from timm.data import Mixup, create_transform
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

BATCH = -1  # sets the keys of batches apart from those of images, whose seeds may be the same numbers


def reseed(*key: int) -> None:
    """Seed Python's ``random``, numpy's global and torch's CPU generator from ``key``; keys of any length differ."""
    # SeedSequence takes (1,) and (1, 0) for the same seed; a hash of the printed key does not.
    digest = hashlib.sha256(repr(tuple(int(part) for part in key)).encode()).digest()
    random.seed(int.from_bytes(digest[:8], "little"))
    np.random.seed(np.frombuffer(digest[8:24], dtype="<u4"))
    # torch.manual_seed would seed every accelerator as well, whose states `isolated` does not put back.
    torch.default_generator.manual_seed(int.from_bytes(digest[24:], "little") >> 1)


@contextmanager
def isolated(*key: int) -> Iterator[None]:
    """A block whose randomness depends on ``key`` alone; on leaving it, all three generators are as they were.

    The generators belong to the process: no other thread may draw from them meanwhile.
    """
    states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    try:
        reseed(*key)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Augment(BaseModel):
    """What is done to training images, in timm's words.

    ``scale`` and ``ratio`` are those of the random crop: its share of the image's area, and width / height. ``hflip``,
    ``vflip``, ``erase`` and ``mix_prob`` are probabilities, ``mixup`` and ``cutmix`` the alphas of beta distributions
    (0: off; both on: one or the other, evenly). ``color_jitter`` moves brightness, contrast and saturation by up to
    that share. ``rand_augment`` is timm's text, such as "rand-m9-mstd0.5-inc1".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    rand_augment: str | None = None
    color_jitter: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0

    @field_validator("scale", "ratio")
    @classmethod
    def _check_range(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        high, words = (1.0, " and at most 1") if info.field_name == "scale" else (inf, " and finite")
        if not (0 < value[0] <= value[1] <= high and isfinite(value[1])):
            default = cls.model_fields[str(info.field_name)].default
            raise ValueError(f"{value} must be low, high with low above 0, high no less{words}: give such as {default}")
        return value

    @field_validator("hflip", "vflip", "erase", "mix_prob")
    @classmethod
    def _check_probability(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise ValueError(f"{value} is no probability: give 0 (never) to 1 (always)")
        return value

    @field_validator("color_jitter")
    @classmethod
    def _check_jitter(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise ValueError(f"{value} is outside 0 … 1: give 0 (off) to 1 (down to black and up to twice as bright)")
        return value

    @field_validator("mixup", "cutmix")
    @classmethod
    def _check_alpha(cls, value: float) -> float:
        if not 0 <= value < inf:
            raise ValueError(f"{value} is no alpha of a beta distribution: give 0 (off) or more, such as 0.8")
        return value

    @field_validator("rand_augment")
    @classmethod
    def _check_rand_augment(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                rand_augment_transform(value, {"img_mean": (0, 0, 0)})
            except Exception as error:  # timm asserts, and reads numbers as they come
                reason = f" ({error})" if str(error) else ""
                raise ValueError(
                    f"{value!r} is not timm's RandAugment{reason}: give such as 'rand-m9-mstd0.5-inc1', or none"
                ) from None
        return value

    @model_validator(mode="after")
    def _check_jitter_counts(self) -> Augment:
        # timm's create_transform leaves colour jitter out beside RandAugment, except with the '3a' operations.
        if self.color_jitter and self.rand_augment and "3a" not in self.rand_augment:
            raise ValueError(
                f"color_jitter={self.color_jitter} has no effect beside rand_augment={self.rand_augment!r}: "
                "set it to 0, or rand_augment to none"
            )
        return self

    def view(
        self, size: tuple[int, int], interpolation: str, mean: Sequence[float]
    ) -> Callable[[Image.Image], torch.Tensor]:
        """A picklable map of an RGB image to one augmented view, uint8 [3, h, w] for ``size`` = (h, w).

        It draws from the global generators (see ``isolated``). ``interpolation`` is timm's, "random" too; ``mean``, in
        0 … 1, fills what RandAugment moves into the picture.
        """
        # `use_prefetcher` is timm's name for stopping short of normalisation, at uint8.
        transform = create_transform(
            input_size=(3, *size),
            is_training=True,
            use_prefetcher=True,
            scale=self.scale,
            ratio=self.ratio,
            hflip=self.hflip,
            vflip=self.vflip,
            color_jitter=self.color_jitter or cast(float, None),  # None is timm's "off"; 0.0 still costs time
            auto_augment=self.rand_augment,
            interpolation=interpolation,
            mean=tuple(mean),
        )
        for step in transform.transforms:
            for op in getattr(step, "ops", ()):
                if op.aug_fn is posterize:
                    op.aug_fn = _posterize
        return transform

    def batch(
        self, images: Tensor, labels: Tensor, num_classes: int, smoothing: float, key: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Random erasing, then mixup or cutmix, and the targets that go with them.

        ``images`` are normalised floats [b, 3, h, w], left as they are; ``labels`` int64 [b]. Returns images of the
        same shape and targets, float [b, num_classes], whose rows sum to 1. Both depend on ``key`` and the arguments
        alone. Any b goes, also 0: image i is mixed with image b-1-i, and in an odd batch the first with the second.
        """
        if not len(images):
            return images, mixup_target(labels, num_classes, 1.0, smoothing)
        with isolated(BATCH, *key):
            if self.erase:
                # On the CPU, so that the noise is seeded by `key` wherever the images are.
                images = RandomErasing(self.erase, mode="pixel", device="cpu")(images.clone())
            if not (self.mixup or self.cutmix) or not self.mix_prob:
                return images, mixup_target(labels, num_classes, 1.0, smoothing)
            mix = Mixup(
                mixup_alpha=self.mixup,
                cutmix_alpha=self.cutmix,
                prob=self.mix_prob,
                label_smoothing=smoothing,
                num_classes=num_classes,
            )
            count = len(images)
            if count % 2:  # timm mixes even batches only; the added image is a partner, and dropped again
                partner = 1 % count
                images = torch.cat((images, images[partner : partner + 1]))
                labels = torch.cat((labels, labels[partner : partner + 1]))
            else:
                images = images.clone()
            images, targets = mix(images, labels)
            return images[:count], targets[:count]


def _posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    # At full strength timm asks for 0 bits, which newer Pillows refuse and older ones painted black.
    return posterize(image, max(1, bits_to_keep))
