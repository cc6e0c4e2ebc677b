"""Every public class, function and method says what it is; what replaces a base's has the base's words."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest

import saccade

MODULES = [
    info.name
    for info in pkgutil.walk_packages(saccade.__path__, "saccade.")
    if not info.name.endswith("__main__") and ".renamed" not in info.name
]


def undocumented(module: ModuleType) -> Iterator[str]:
    """Names of what is public, defined in this module, and without words."""
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and not inspect.getdoc(thing):
            yield name
        if inspect.isclass(thing):
            yield from (f"{name}.{own}" for own in methods(thing) if not inspect.getdoc(getattr(thing, own)))


def methods(kind: type) -> Iterator[str]:
    """Public methods and properties of a class' own; what a decorator such as ``dataclass`` puts there is not."""
    for name, thing in vars(kind).items():
        written = thing.fget if isinstance(thing, property) else getattr(thing, "__func__", thing)
        if not name.startswith("_") and inspect.isfunction(written) and written.__module__ == kind.__module__:
            yield name


def test_modules_are_found():
    assert {"saccade.model", "saccade.core.plan", "saccade.methods.tome", "saccade.cli.tune"} <= {*MODULES}


@pytest.mark.parametrize("package", sorted({name.split(".")[1] for name in MODULES}))
def test_public_names_have_docstrings(package):
    names = [name for name in MODULES if name.split(".")[1] == package]
    assert not [f"{name}.{found}" for name in names for found in undocumented(importlib.import_module(name))]


EXAMPLE = """
class A:
    'A.'
    def run(self): 'Go.'
    def stop(self): ...
    @property
    def length(self): ...
class B(A):
    def run(self): ...
def f(): ...
def _g(): ...
"""


def test_what_has_no_words_is_named(tmp_path, monkeypatch):
    (tmp_path / "without_words.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    assert sorted(undocumented(importlib.import_module("without_words"))) == ["A.length", "A.stop", "f"]
