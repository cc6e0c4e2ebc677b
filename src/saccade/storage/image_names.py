"""What names of files and folders say: a photo, a split."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)


def is_image(name: str) -> bool:
    """Whether a file's name ends like a photo's."""
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


TRAIN, CHECK, TEST = "training", "validation", "test"


KINDS = {
    **dict.fromkeys(("train", "training", "trainset", "trainingset", "trn"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "validate", "valset", "validset", "validationset"), CHECK),
    **dict.fromkeys(("dev", "devset", "development", "eval", "evaluation", "evalset"), CHECK),
    **dict.fromkeys(("heldout", "holdout", "minival"), CHECK),
    **dict.fromkeys(("test", "testing", "testset", "tst"), TEST),
}


def kind_of(split: str) -> str | None:
    """What a split of this name is for: ``TRAIN``, ``CHECK``, ``TEST``; None for any other name.

    Capitals, years and marks between words make no difference: Valid, val2017 and held_out are for checking.
    """
    return KINDS.get(_word(split))


def _word(split: str) -> str:
    return re.sub(r"[\W\d_]+", "", split.casefold())
