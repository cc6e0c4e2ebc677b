"""Heads by the names that folders have for their tasks; the module of one is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from saccade.core.head import Head
from saccade.errors import UserError

CLASSIFY, EMBED = "classify", "embed"  # by the ViT's own classifier; by what it would read
EMBEDDING = "embedding"  # the head that needs to be told nothing
HEADS = {  # that come with the package; Head.written has those from elsewhere
    "segment": "saccade.tasks.segmentation.segmenter:SegmentationHead",
    "detect": "saccade.tasks.detection.detector:DetectionHead",
    "textimage": "saccade.tasks.image_text.two_tower:TwoTowerHead",
    EMBED: "saccade.tasks.embedding.embedding_head:EmbeddingHead",
}


def known_tasks() -> tuple[str, ...]:
    """Tasks whose folders can be opened."""
    return tuple(dict.fromkeys((CLASSIFY, *HEADS, *Head.written)))


def head_kind(task: str) -> type[Head]:
    """The head of a task, other than ``CLASSIFY``, that is known."""
    if task not in HEADS:
        return Head.written[task]
    module, _, name = HEADS[task].partition(":")
    return getattr(import_module(module), name)


def head_of(given: Head | str) -> Head:
    """A head, or the one that a word stands for. Raises UserError for another word."""
    if isinstance(given, Head):
        return given
    if given != EMBEDDING:
        raise UserError(f"head={str(given)[:40]!r} is neither {EMBEDDING!r} nor a saccade.Head")
    return head_kind(EMBED)()
