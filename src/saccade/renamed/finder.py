"""Modules under the names that they had before: each import of one says where it is now.

``from saccade.plan import Reducer`` works and warns. Nothing is imported before a name is asked for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from saccade.renamed.names import MODULES, NAMES

ROOT = "saccade."


class OldModule(ModuleType):
    """Hands on what its successor has, and what was renamed, under the old name."""

    def __getattr__(self, name: str) -> Any:
        old = self.__name__.removeprefix(ROOT)
        if name.startswith("__"):
            raise AttributeError(name)
        module, _, new = NAMES.get(f"{old}.{name}", f"{MODULES[old]}.{name}").rpartition(".")
        try:
            return getattr(import_module(ROOT + module), new)
        except AttributeError:
            raise AttributeError(f"{ROOT}{old} is {ROOT}{module} now, which has no {name!r}") from None


class Finder(MetaPathFinder, Loader):
    """Finds old modules, after all others have been asked."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The old module of this name, if it is one."""
        if not fullname.startswith(ROOT) or fullname.removeprefix(ROOT) not in MODULES:
            return None
        return ModuleSpec(
            fullname, self, is_package=any(old.startswith(fullname.removeprefix(ROOT) + ".") for old in MODULES)
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that hands on."""
        return OldModule(spec.name, f"Moved to saccade.{MODULES[spec.name.removeprefix(ROOT)]}.")

    def exec_module(self, module: ModuleType) -> None:
        """Say where it is now."""
        new = ROOT + MODULES[module.__name__.removeprefix(ROOT)]
        warnings.warn(f"{module.__name__} is {new} now", DeprecationWarning, stacklevel=2)


def moved(home: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that is still there, for names of ``NAMES`` that have left it; they warn."""

    def named(name: str) -> Any:
        new = NAMES.get(f"{home.removeprefix(ROOT)}.{name}")
        if new is None:
            raise AttributeError(f"module {home!r} has no attribute {name!r}")
        warnings.warn(f"{home}.{name} is {ROOT}{new} now", DeprecationWarning, stacklevel=2)
        module, _, found = new.rpartition(".")
        return getattr(import_module(ROOT + module), found)

    return named


def install() -> None:
    """Make old names importable, once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
