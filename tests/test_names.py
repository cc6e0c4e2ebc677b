"""Slow tests, studies and benchmarks run seldom: what they name of the package is there all the same."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for folder in ("tests", "studies", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST) -> tuple[dict[str, ModuleType], list[str]]:
    """Modules of the package by the name that a script gives them, and what it imports that is not there."""
    modules, missing = {}, []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or not (node.module or "").startswith("saccade"):
            continue
        home = importlib.import_module(node.module)
        for alias in node.names:
            try:
                here = hasattr(home, alias.name)
                found = getattr(home, alias.name) if here else importlib.import_module(f"{node.module}.{alias.name}")
            except ImportError:
                missing.append(f"{node.module}.{alias.name}")
                continue
            if isinstance(found, ModuleType):
                modules[alias.asname or alias.name] = found
    return modules, missing


def absent(source: str) -> list[str]:
    """What a script names of the package's modules and does not find there."""
    tree = ast.parse(source)
    modules, missing = imported(tree)
    named = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    pairs = [(n.value.id, n.attr) for n in named if n.value.id in modules]
    return missing + [f"{name}.{attribute}" for name, attribute in pairs if not hasattr(modules[name], attribute)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_script_names_is_there(script):
    assert absent(script.read_text(encoding="utf-8")) == []


def test_a_name_that_moved_is_found():
    source = "from saccade.evaluation import speed\nfrom saccade.core import plan, nothing\nspeed.Logits, plan.Plan"
    assert absent(source) == ["saccade.core.nothing", "speed.Logits"]
