"""The example notebooks: valid, small, found from the site, and run from top to bottom on what the package brings."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from notebooks import EXAMPLES, cells, execute
from saccade.core import registry
from saccade.evaluation import sweep

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
NAMES = {
    "tune-and-deploy",
    "finetune-with-a-reduction",
    "what-it-looks-at",
    "segmentation-with-merged-tokens",
    "embed-and-search",
    "write-a-method",
}
LARGEST = 16_000  # bytes: without outputs


def test_there_is_one_for_each_job():
    assert {notebook.stem for notebook in NOTEBOOKS} == NAMES
    nav = (EXAMPLES.parent / "mkdocs.yml").read_text(encoding="utf-8")
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f": examples/{name}.md\n" in nav and f"examples/{name}.ipynb" in readme


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_a_notebook_without_outputs(notebook):
    book = json.loads(notebook.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and notebook.stat().st_size < LARGEST
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    for cell in book["cells"]:
        needed = {"cell_type", "id", "metadata", "source"}
        assert cell.keys() == (needed | {"outputs", "execution_count"} if cell["cell_type"] == "code" else needed)
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert cells(notebook, "markdown")[0].startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_tables_and_pictures(notebook, tmp_path, monkeypatch):
    if 'runner="onnx"' in "".join(cells(notebook)) and importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("ONNX Runtime is not installed")
    monkeypatch.setattr(sweep, "SECONDS", 0.0)  # of timing
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry.registry()))  # one of them registers a method
    monkeypatch.chdir(tmp_path)
    shown = execute(notebook)
    assert shown.tables and shown.pictures
    assert all(Path(place).is_dir() for place in tmp_path.glob("runs/*"))
