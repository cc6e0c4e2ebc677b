"""What answers need so that a figure can be made of them: they are finite, and prefer something."""

from __future__ import annotations

from torch import Tensor

from saccade.errors import UserError


class NonFinite(UserError):
    """A setting gives NaN or infinity where it should answer."""


def require_finite(values: Tensor, setting: object, what: str = "logits") -> Tensor:
    """The answers of a setting to images [n, ...] themselves. Raises NonFinite where one is not finite."""
    bad = ~values.isfinite().flatten(1).all(1)
    if bad.any():
        raise NonFinite(
            f"the {what} of `{setting}` hold NaN or infinity ({int(bad.sum())} of {len(bad)} images): nothing can be "
            "measured of it; check the weights, the images and the number type"
        )
    return values


def require_choice(scores: Tensor, setting: object, what: str = "classes") -> Tensor:
    """Scores [n, K, ...] of K choices themselves. Raises UserError where an image has all K alike, in every place.

    Whichever comes first would be the answer, and the figure that of the first choice.
    """
    alike = (scores.amax(1) == scores.amin(1)).unsqueeze(1).flatten(1).all(1)
    if scores.shape[1] > 1 and alike.any():
        raise UserError(
            f"`{setting}` scores all {what} alike ({int(alike.sum())} of {len(alike)} images): it chooses nothing; "
            "train it, or load weights"
        )
    return scores


def require_many(count: int, what: str, figure: str) -> None:
    """Raises UserError unless there are two or more of what is chosen from: else every answer is right."""
    if count < 2:
        raise UserError(f"{figure} is not defined for {count} {what}: any answer would be right; give 2 or more")
