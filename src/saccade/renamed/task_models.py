"""The models of tasks, which were classes of their own: each is an ``AdaptiveViT`` with a head now."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class TaskModel(type):
    """Of a class of before: a call gives an ``AdaptiveViT`` with ``head``, and ``isinstance`` says what ends in one."""

    head: tuple[str, str]  # module and name

    def __call__(
        cls,
        vit: Any,
        setting: Any = "",
        trained: tuple[str, ...] = (),
        learned: dict[str, Any] | None = None,
        **parts: Any,
    ) -> Any:
        head = cls._head()(**parts)
        return import_module("saccade.model").AdaptiveViT(vit, setting, trained, learned, head=head)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(getattr(instance, "task_head", None), cls._head())

    def _head(cls) -> type:
        module, name = cls.head
        return getattr(import_module(module), name)


class Segmenter(metaclass=TaskModel):
    """``AdaptiveViT(vit, head=SegmentationHead(decoder, classes, void))``."""

    head = "saccade.tasks.segmentation.segmenter", "SegmentationHead"


class Detector(metaclass=TaskModel):
    """``AdaptiveViT(vit, head=DetectionHead(heads))``."""

    head = "saccade.tasks.detection.detector", "DetectionHead"


class TextImage(metaclass=TaskModel):
    """``AdaptiveViT(vit, head=TwoTowerHead(space))``."""

    head = "saccade.tasks.image_text.two_tower", "TwoTowerHead"
