"""The folder that a verb writes its results in: its own, apart from what it reads, and of nothing else's."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from saccade.errors import UserError
from saccade.storage.files import check_folder, shortened, sweep
from saccade.storage.foreign import check_not_foreign
from saccade.storage.locks import owning
from saccade.storage.model_folder import check_ours
from saccade.storage.signs import Signs, is_ours

P = ParamSpec("P")
R = TypeVar("R")
BELOW = ("model", "checkpoints", "cache")  # folders of ours in it


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
        if (folder / name).exists() and not is_ours(folder / name, signs):
            raise UserError(
                f"{shortened(out)} holds a {name} that is of something else: remove it, or give another folder"
            )
    check_not_foreign(folder)
    if (folder / "model").is_dir():
        check_ours(folder / "model")
    with owning(folder) as path:
        for place in (path, *(found for name in BELOW for found in (path / name, *(path / name).glob("*/")))):
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
