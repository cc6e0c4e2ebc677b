"""The folder that a verb writes its results in: its own, apart from what it reads, and of nothing else's."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from saccade.errors import UserError
from saccade.storage.files import check_folder, read_at_most, shortened, sweep
from saccade.storage.foreign import check_no_photos
from saccade.storage.locks import owning
from saccade.storage.model_folder import check_ours

P = ParamSpec("P")
R = TypeVar("R")
Signs = tuple[str, ...]  # of a file that we wrote: keys of its object in JSON, else words near its beginning
PAGE: Signs = ('<meta name="generator" content="saccade">',)
TRAIN = {"config.json": ("optim", "sampling"), "metrics.csv": ("step",), "checks.csv": ("step",), "report.html": PAGE}
TUNE = {"frontier.csv": ("setting",), "frontier.json": ("verdict", "rows"), "report.html": PAGE}
EVAL = {"scores.csv": ("setting",), "scores.json": ("facts", "rows"), "report.html": PAGE}
ANALYZE = {"analysis.json": ("facts", "findings"), "report.html": PAGE}
BELOW = ("model", "checkpoints", "cache")  # folders of ours in it
HEAD = 2**16  # characters that are looked through for signs
MOST_BYTES = 256 << 20  # of a JSON file of ours


def owned(writes: Mapping[str, Signs]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a verb with arguments ``model``, ``data``, ``weights`` and ``out``: it runs as the owner of ``out``."""

    def wrap(run: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(run)

        @wraps(run)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            if (out := given.arguments["out"]) is None:
                return run(*args, **kwargs)
            with taking(out, writes, [given.arguments.get(name) for name in ("model", "data", "weights")]):
                return run(*args, **kwargs)

        return within

    return wrap


@contextmanager
def taking(out: str | os.PathLike, writes: Mapping[str, Signs], inputs: Iterable[object] = ()) -> Iterator[Path]:
    """Own ``out`` while a verb runs, without what killed runs left unfinished in it.

    Args:
        writes: the files that the verb puts there, and the signs of one that it may replace.
        inputs: paths that it reads; others are passed over.

    Raises:
        UserError: another process owns it; it holds images, or a file of one of these names that is somebody else's;
            it is one of the inputs, or within one, or would write over one; nothing can be written there.
    """
    folder = Path(out)
    check_folder(folder)
    check_apart(out, inputs)
    for name, signs in writes.items():
        if (folder / name).exists() and not _ours(folder / name, signs):
            raise UserError(
                f"{shortened(out)} holds a {name} that is of something else: remove it, or give another folder"
            )
    check_no_photos(folder)
    if (folder / "model").is_dir():
        check_ours(folder / "model")
    with owning(folder) as path:
        for place in (path, *(path / name for name in BELOW)):
            sweep(place, owned=True)
        yield path


def check_apart(out: str | os.PathLike, inputs: Iterable[object]) -> None:
    """Raises UserError where ``out`` is one of the inputs, or within one, or an input is what ``out`` will hold."""
    target = Path(os.path.realpath(out))
    for given in inputs:
        if not isinstance(given, (str, os.PathLike)) or not os.path.exists(given):
            continue
        source = Path(os.path.realpath(given))
        if source == target:
            raise UserError(f"{shortened(out)} is what is read: give another place for what is written")
        if source in target.parents and source.is_dir():
            raise UserError(f"{shortened(out)} is within {shortened(str(given))}, which is read: give another place")
        if target in source.parents and source.relative_to(target).parts[0] in BELOW:
            raise UserError(f"{shortened(out)} would write over {shortened(str(given))}, which is read: give another")


def _ours(file: Path, signs: Signs) -> bool:
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
