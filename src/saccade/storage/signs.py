"""By what a file is known as one that a verb wrote: its name, and words or keys inside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from saccade.storage.files import read_at_most

Signs = tuple[str, ...]  # of a file that we wrote: keys of its object in JSON, else words near its beginning
PAGE: Signs = ('<meta name="generator" content="saccade">',)
TRAIN = {"config.json": ("optim", "sampling"), "metrics.csv": ("step",), "checks.csv": ("step",), "report.html": PAGE}
TUNE = {"frontier.csv": ("setting",), "frontier.json": ("verdict", "rows"), "report.html": PAGE}
EVAL = {"scores.csv": ("setting",), "scores.json": ("facts", "rows"), "report.html": PAGE}
ANALYZE = {"analysis.json": ("facts", "findings"), "report.html": PAGE}
PREDICT = {"predictions.csv": ("image,", ",gmacs,error")}
MODEL = {"config.json": ("saccade", "architecture")}
HEAD = 2**16  # characters that are looked through for signs
MOST_BYTES = 256 << 20  # of a JSON file of ours


def is_ours(file: Path, signs: Signs) -> bool:
    """Whether a file that is there has these signs, or is empty."""
    try:
        if not file.stat().st_size:
            return True
        if file.suffix == ".json":
            found = json.loads(read_at_most(file, MOST_BYTES))
            return isinstance(found, dict) and all(sign in found for sign in signs)
        with open(file, encoding="utf-8", errors="replace") as stream:
            head = stream.read(HEAD)
        return all(sign in head for sign in signs)
    except (OSError, ValueError, RecursionError):
        return False


def written_by_us(folder: Path) -> bool:
    """Whether a folder holds a file that a verb wrote: what else is in it was put there by its owner."""
    kinds: list[Mapping[str, Signs]] = [TRAIN, TUNE, EVAL, ANALYZE, PREDICT, MODEL]
    known = [(folder / name, signs) for kind in kinds for name, signs in kind.items()]
    return any(file.is_file() and file.stat().st_size > 0 and is_ours(file, signs) for file, signs in known)
