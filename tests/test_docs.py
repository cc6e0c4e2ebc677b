"""The guides: what they say can be run is run, as it stands, and every page of the site is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import saccade
from test_readme import run, small

DOCS = Path(__file__).parents[1] / "docs"
LONG = ("milliseconds", "one-file")  # which start engines
GUIDES = sorted([DOCS / "index.md", DOCS / "concepts.md", *(DOCS / "guide").glob("*.md")])
RUN = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
assert small  # a fixture


def in_time(page: Path) -> Any:
    """A page, slow where it takes long."""
    return pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem in LONG else ())


@pytest.mark.parametrize("page", [in_time(page) for page in GUIDES])
def test_what_a_guide_shows_runs_in_its_order(page, small, capsys):
    text = page.read_text(encoding="utf-8")
    if "onnx" in "".join(block for _, block in RUN.findall(text)) or "saccade export" in text:
        pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model = saccade.create_model("vit_tiny_patch16_224")
    known: dict[str, Any] = {"images": torch.randn(3, 3, 64, 64), "model": model}
    assert RUN.search(text) or "```text" in text
    for language, block in RUN.findall(text):
        if language == "python":
            exec(compile(block, page.name, "exec"), known)
            continue
        for line in block.splitlines():
            if line.startswith("saccade "):
                run(shlex.split(line, comments=True)[1:])


def test_every_page_is_in_the_navigation():
    """mkdocs tells of links that lead nowhere; of pages that none leads to, it would only log."""
    told = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in told] == []
