"""Scorers: how much each block of an image wants to be split. One file each; ``base`` says what they have in common."""

from saccade.tokenizers.scorers import attention, feature, gate, gradcam, pixel, plain, texture  # noqa: F401
from saccade.tokenizers.scorers.base import (
    Scene,
    Scorer,
    build_scorer,
    given,
    list_scorers,
    register_scorer,
)

__all__ = ["Scene", "Scorer", "build_scorer", "given", "list_scorers", "register_scorer"]
