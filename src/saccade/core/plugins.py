"""Methods, tokenizers and scorers from outside of the package: a file that the user names, or an installed package.

A package brings them by an entry point of the group ``saccade.methods`` that names a module; importing it registers.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from saccade.errors import UserError

GROUP = "saccade.methods"
_ORIGIN: ContextVar[str] = ContextVar("origin", default="")
_LOADED: dict[str, str] = {}  # files by their paths, and the modules that they became


def origin_of(build: Callable) -> str:
    """Where a registered name comes from: "" for the package's own, else the plugin, or the module, that has it."""
    module = build.__module__ or "a script"
    return "" if module.split(".")[0] == "saccade" else _ORIGIN.get() or module


def load_plugin(file: str | os.PathLike) -> None:
    """Run a Python file that registers methods, tokenizers or scorers; once, whatever names it has.

    Raises UserError: no such file, an error in it, a name that another has already.
    """
    path = Path(os.path.realpath(file))
    if str(path) in _LOADED:
        return
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"plugin {os.fspath(file)!r} is no Python file that is there")
    name = f"saccade_plugin_{path.stem}"
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        with registering(path.name):
            spec.loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"plugin {path.name} does not run ({type(error).__name__}: {first[:200]})") from error
    _LOADED[str(path)] = name


def load_installed() -> None:
    """Import what installed packages bring; what does not import is named in a warning, and left out."""
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else point.value
        try:
            with registering(package):
                point.load()
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(f"plugin {package} is left out ({type(error).__name__}: {first[:200]})", stacklevel=2)


@contextmanager
def registering(origin: str) -> Iterator[None]:
    """What is registered within comes from there."""
    token = _ORIGIN.set(origin)
    try:
        yield
    finally:
        _ORIGIN.reset(token)
