"""The pages of the site that are made: bars in code, measured rows, places in the pages of results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from markdown import markdown

import docs_pages
import measured
from oracles import make_vit
from saccade.backbones.vit import backbone_of
from saccade.core.registry import registry

ROOT = Path(__file__).parents[1]
TABLE = """\
| setting | what |
|---|---|
| `imagepiece() \\| evit(0.8)` | either \\| or |
"""
DENSE = {"method": "", "setting": "dense", "gmacs": 1.25, "mac_ratio": 1.0, "value": 0.8, "value_low": 0.75,
         "value_high": 0.85, "delta": 0.0, "delta_low": 0.0, "delta_high": 0.0}  # fmt: skip
ROW = DENSE | {"method": "tome", "setting": "tome(r=13)", "gmacs": 0.78, "mac_ratio": 1.6, "value": 0.78,
               "value_low": 0.73, "value_high": 0.83, "delta": -0.02, "delta_low": -0.04}  # fmt: skip
ABOUT = {"command": "python studies/methods.py", "model": "M", "versions": "V", "data": "D.zip", "images": 300}
SPEED = {"setting": "tome(r=13)", "runner": "eager", "batch": 8}
SPEED |= {"speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6}


def shown(text: str) -> str:
    return markdown(docs_pages.on_page_markdown(text), extensions=["tables", "fenced_code"])


def test_options_of_commands_stay_in_one_line():
    html = '<p>Take <code>--quick</code> or <code>tune --max-drop 1%</code>.</p><!--off--><a href="#--x">x--y</a>'
    found = docs_pages.on_page_content(html)
    assert found.count('<span class="flag">') == 2
    assert (
        '<code><span class="flag">--quick</span></code>' in found and '<span class="flag">--max-drop</span> 1%' in found
    )
    assert found.endswith('<!--off--><a href="#--x">x--y</a>')


def test_a_setting_in_a_table_shows_its_bar_alone():
    html = shown(TABLE)
    assert "<code>imagepiece() | evit(0.8)</code>" in html and "either | or" in html and "\\" not in html
    assert html.count("<td>") == 2


def test_code_that_shows_a_backslash_keeps_it():
    fenced = "```text\n| `a \\| b` |\n```\n"
    assert docs_pages.on_page_markdown(fenced + "\nOr `c \\| d`.\n") == fenced + "\nOr `c \\| d`.\n"
    assert docs_pages.on_page_markdown(fenced + TABLE).count("\\|") == 2


def test_no_page_shows_a_backslash_before_a_bar():
    pages = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")}
    pages |= {"methods": docs_pages.index(), **{name: docs_pages.page(entry) for name, entry in registry().items()}}
    assert [name for name, text in pages.items() if "\\|" in shown(text)] == []


@pytest.fixture
def docs(tmp_path) -> Path:
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "methods.json").write_text(json.dumps({"about": ABOUT, "rows": [DENSE, ROW]}))
    lines = "## By `keep`, at 2×\n\n| run | setting |\n|---|---|\n| a | `evit(0.5)` |\n| b | `evit(0.4) \\| tome()` |\n"
    (tmp_path / "results.md").write_text(lines)
    return tmp_path


def test_a_method_has_its_measured_rows_below_dense(docs):
    text = measured.measured("tome", docs).replace("\u00a0", " ")
    assert "| `dense` | 80.0 % [75.0, 85.0] |  | 1.25 | 1.00× | not timed |" in text
    assert "| `tome(r=13)` | 78.0 % [73.0, 83.0] | −2.0 [−4.0, +0.0] | 0.78 | 1.60× | not timed |" in text
    assert measured.summary("tome", docs) == "−2.0\u00a0at\u00a01.6×" and measured.summary("evit", docs) == ""
    assert "300 photos of `D.zip`" in text and "Not timed yet" in text


def test_speeds_stand_beside_them_where_they_were_measured(docs):
    about = {"command": "C --time", "device": "CPU", "threads": "2", "versions": "V"}
    (docs / "measured" / "speed.json").write_text(json.dumps({"about": about, "rows": [SPEED]}))
    text = measured.measured("tome", docs)
    assert "| speed-up, eager, batch 8 |" in text and "| 1.60× | 1.50× (1.40–1.60) |" in text
    assert "by `C --time` on CPU, 2 threads" in text and "| 1.00× | not timed |" in text


def test_a_method_without_rows_shows_those_of_the_results(docs):
    text = measured.measured("evit", docs)
    assert "| a | `evit(0.5)` |" in text and "| b | `evit(0.4) \\| tome()` |" in text
    assert "From [By `keep`, at 2×](../results.md#by-keep-at-2)." in text
    assert "No trained model is measured" in measured.measured("topk", docs)


def test_every_registered_method_has_a_page_that_says_what_was_measured():
    """And methods.json names no method that is not there any more."""
    rows = json.loads((ROOT / "docs" / "measured" / "methods.json").read_text(encoding="utf-8"))["rows"]
    known, backbone = registry(), backbone_of(make_vit(depth=12, img_size=224))
    assert {row["method"] for row in rows} - {""} <= {*known}
    for name, entry in known.items():
        page = docs_pages.page(entry)
        assert "## Measured" in page
        measurable = bool(entry.baseline or entry.menu(backbone))
        assert measurable == any(row["method"] == name for row in rows), name
