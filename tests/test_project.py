"""What a project of the trade has: one version number, and the files that people look for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import saccade

ROOT = Path(__file__).parents[1]
FILES = (
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "Containerfile",
    ".github/workflows/ci.yml",
    ".github/pull_request_template.md",
    ".github/ISSUE_TEMPLATE/wrong.md",
    ".github/ISSUE_TEMPLATE/idea.md",
    ".pre-commit-config.yaml",
    "src/saccade/py.typed",
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_people_look_for_is_there(name):
    assert (ROOT / name).is_file()


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "saccade.__version__"}
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited and newest and cited[1] == newest[1] == saccade.__version__
