"""``relevance_map``: where the answer for one photo comes from, as a picture; ``relevance`` measures it over many."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from saccade.analysis.relevance import over_cells, rollout
from saccade.checkpoint import Source, open_model
from saccade.errors import UserError
from saccade.evaluation.evaluator import check_head
from saccade.reports.overlay import draw_overlay
from saccade.reports.render_tokens import as_seen, inline
from saccade.terminal.results import Result


class _Mapped(NamedTuple):
    picture: Image.Image
    cells: np.ndarray
    target: int


class RelevanceMap(Result, _Mapped):
    """What ``relevance_map`` gives: the picture, each cell's share of the relevance [gh, gw], and the class."""

    __slots__ = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each cell, the most relevant first."""
        order = np.argsort(-self.cells, axis=None, kind="stable")
        places = np.stack(np.unravel_index(order, self.cells.shape), 1).tolist()
        return [{"row": y, "column": x, "share": float(self.cells[y, x])} for y, x in places]

    def __repr__(self) -> str:
        return f"RelevanceMap: {self.cells.shape[0]}×{self.cells.shape[1]} cells, class {self.target}"

    def _repr_html_(self) -> str:
        return inline(self.picture, repr(self))


def relevance_map(
    model: Source,
    image: Image.Image | str | os.PathLike,
    setting: str | None = None,
    *,
    target: int | None = None,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | None = None,
) -> RelevanceMap:
    """Draw which places of a photo the answer depends on: gradient times attention of all blocks (arXiv 2103.15679).

    Args:
        model: a model, a folder, or a timm name with ``weights`` or ``pretrained``; ``device`` as in
            ``saccade.checkpoint.open_model``.
        image: a photo or its path; it is shown as the model sees it, cropped.
        setting: None: the model's own.
        target: the class to explain, a place in the head; None: the one that the model answers.

    Raises:
        UserError: bad setting or class, a model without classes, an answer that depends on no place; ImageError: an
            image that cannot be read.
    """
    model = open_model(model, weights, pretrained, device).deploy(None)
    check_head(model)
    chosen = (model if setting is None else model.at(setting)).eval()
    photo, images, _ = as_seen(chosen, image)
    if target is None:
        with torch.no_grad():
            target = int(chosen(images).logits[0].argmax())
    classes = model.vit.num_classes
    if type(target) is not int or not 0 <= target < classes:
        raise UserError(f"target={target!r} is no class of this model: give a whole number from 0 to {classes - 1}")
    found, tokens = rollout(chosen, images, target)
    cells = over_cells(found, tokens).cpu()
    return RelevanceMap(draw_overlay(photo, cells, tokens.grid), cells.reshape(tokens.grid).numpy(), target)
