"""What the classes of a head are called, by folders and by people."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saccade.backbones.vit import class_names_of
from saccade.core.timm_types import ViT


@dataclass(frozen=True)
class Classes:
    """``names``: what folders call the classes of a head, in its order; ``words``: what people call them."""

    names: tuple[str, ...]
    words: tuple[str, ...]

    @classmethod
    def of(cls, vit: ViT) -> Classes:
        """Of a model; without known names those are the numbers of the classes."""
        names = class_names_of(vit) or tuple(map(str, range(vit.num_classes)))
        told = {**_imagenet_words(names), **(vit.pretrained_cfg.get("label_descriptions") or {})}
        whole = [str(told.get(name, name)) for name in names]
        short = [text.split(",")[0] for text in whole]
        often = Counter(short)
        words = [s if often[s] == 1 else w for s, w in zip(short, whole, strict=True)]
        often = Counter(words)
        return cls(names, tuple(w if often[w] == 1 else f"{w} ({n})" for n, w in zip(names, words, strict=True)))

    def best(self, logits: Tensor, top: int) -> dict[str, Any]:
        """The classes of the ``top`` highest of logits [K], best first, and their probabilities."""
        found = logits.softmax(-1).topk(min(top, len(self.names))) if self.names else None
        places = () if found is None else tuple(found.indices.tolist())
        return {
            "indices": places,
            "probabilities": () if found is None else tuple(found.values.tolist()),
            "classes": tuple(self.names[i] for i in places),
            "labels": tuple(self.words[i] for i in places),
        }


def _imagenet_words(names: tuple[str, ...]) -> dict[str, str]:
    """What people call those of ImageNet's synsets that are among names."""
    from timm.data import ImageNetInfo

    synsets = [name for name in names if re.fullmatch(r"n\d{8}", name)]
    told = {}
    if synsets:
        info = ImageNetInfo()
        for name in synsets:
            with suppress(KeyError):  # no synset of ImageNet, in spite of its name
                told[name] = info.label_name_to_description(name)
    return told
