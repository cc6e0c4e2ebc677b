"""``evit``: keep what the class token attends to, drop or fuse the rest (EViT, arXiv 2202.07800)."""

from __future__ import annotations

from collections.abc import Iterable

from saccade.core.plan import Backbone, Method
from saccade.core.registry import register
from saccade.errors import UserError
from saccade.methods.common.arguments import blocks, fraction
from saccade.methods.common.budget import fit
from saccade.methods.common.matching import KeepAttended, check_score


def _menu(backbone: Backbone) -> list[str]:
    if not backbone.has_class_token:
        return [f"evit({k}, score='received')" for k in (0.9, 0.8, 0.7, 0.6, 0.5)]
    return [f"evit({k})" for k in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)] + ["evit(0.7, fuse=True)", "evit(0.5, fuse=True)"]


@register("evit", sources={"paper": "keep at score"}, menu=_menu)
def evit(
    backbone: Backbone,
    keep: float = 0.7,
    at: int | Iterable[int] | None = None,
    fuse: bool = False,
    score: str = "class",
    gmacs: float | None = None,
    speed: float | None = None,
) -> Method:
    """Drop the patch tokens that the class token attends to least (arXiv 2202.07800).

    Args:
        keep: share of patch tokens kept at each of the blocks, in (0, 1].
        at: 0-based blocks that drop; None: at a quarter, a half and three quarters of the depth.
        fuse: add one token, the attention-weighted sum of those dropped (not divided by the weights' sum).
        score: 'class' attention, or mean attention 'received', for models without a class token.
        gmacs: find ``keep`` for this many GMACs per image (at its own size) instead.
        speed: find ``keep`` for this many times fewer MACs instead.
    """
    keep = fraction("evit", "keep", keep, 0.001)
    if not isinstance(fuse, bool):
        raise UserError(f"evit: fuse={fuse!r} is not True or False")
    reading = check_score("evit", score, backbone)
    at = blocks("evit", at, backbone.stages(), backbone.depth)

    def build(keep: float) -> Method:
        return Method((i, KeepAttended(keep, reading, fuse)) for i in at)

    if gmacs is None and speed is None:
        return build(keep)
    return fit("evit", backbone, lambda i: build(1 - i / 1000), 999, gmacs, speed)
