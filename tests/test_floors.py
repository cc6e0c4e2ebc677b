"""The releases that `make test-floor` installs are the lower bounds that pyproject.toml declares."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUND = re.compile(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9][0-9.]*)")


def release(version: str) -> tuple[int, ...]:
    """Numbers of a release, without zeros at its end: 0.24 is 0.24.0."""
    numbers = [int(part) for part in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def declared() -> dict[str, tuple[int, ...]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["tasks"]]
    bounds = [BOUND.match(line) for line in lines]
    assert all(bounds), f"a dependency without a lower bound: {lines}"
    return {b[1].lower().replace("_", "-"): release(b[2]) for b in bounds if b}


def test_floors_are_the_declared_bounds() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "floors.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line)
    assert {name.lower().replace("_", "-"): release(version) for name, version in pins.items()} == declared()


def test_the_readme_names_the_same_versions() -> None:
    said = dict(re.findall(r"(Python|PyTorch|timm) ≥ ([0-9.]+)", (ROOT / "README.md").read_text()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = declared()
    assert release(said["Python"]) == release(project["requires-python"].removeprefix(">="))
    assert (release(said["PyTorch"]), release(said["timm"])) == (bounds["torch"], bounds["timm"])
