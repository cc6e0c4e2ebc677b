"""Tables: no name and no number is ever cut, whatever the room; what is left out is said."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

import saccade
from saccade.cli import main
from saccade.errors import UserError
from saccade.evaluation.stats import Interval
from saccade.terminal.results import Result, Scores, flat
from saccade.terminal.text_table import Column, Table, width_of

LONG = "imagepiece(p=0.5, merge=0.4) | evit(keep=0.8, at=(3, 6, 9))"
EVAL = Table(
    "model, 300 images of photos",
    ["setting", "top-1", "points vs dense", "GMACs", "speed-up", "images/s", "MAC ratio", "NLL"],
    [
        ["dense", "85.00% [80.1%, 88.2%]", "", "1.170", "1.00×", "52.3", "1.00×", "0.6123"],
        [LONG, "81.67% [76.9%, 85.6%]", "-3.33 [-6.0, -0.7]", "0.660", "1.63×", "86.1", "1.77×", "0.7301"],
    ],
    "Intervals are at 95 %.",
)


def squeezed(text: str) -> str:
    return re.sub(r"[\s┃│━─┏┓┗┛┡┩╇┳┴└┘]", "", text)


def first_column(text: str) -> str:
    return squeezed("".join(line.split("│")[1] for line in text.splitlines() if line.startswith("│")))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 200])
def test_a_table_holds_in_a_terminal(width):
    text = EVAL.render(width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert first_column(text) == squeezed("dense" + LONG)
    left_out = " ".join(text.split("Not shown for want of room: ")[1].split()) if "Not shown" in text else ""
    for i, column in enumerate(EVAL.columns[1:], 1):
        named = column in left_out
        for row in EVAL.rows:
            shown = all(part in text for part in row[i].replace(" [", "\n[").split("\n"))
            assert named or shown, (column, row[i])
    assert "…" not in text


def test_eighty_columns_hold_what_matters_most():
    text = EVAL.render(80)
    heading = [line.strip("┃").split("┃") for line in text.splitlines() if line.startswith("┃")]
    assert [" ".join(part.strip() for part in parts).strip() for parts in zip(*heading, strict=True)] == EVAL.columns[
        :5
    ]
    assert "--json has all" in text
    assert ".to_dicts() has all" in EVAL.render(80, ".to_dicts()")


def test_in_a_pipe_nothing_is_left_out_and_names_stand_on_one_line():
    text = EVAL.render()
    assert all(cell in text for row in EVAL.rows for cell in row)
    assert "Not shown" not in text


def test_a_rank_says_what_goes_first():
    table = Table("", ["name", Column("a", rank=9), "b", Column("c", rank=0)], [["x", "1" * 20, "2" * 20, "3" * 20]])
    assert "Not shown for want of room: a " in table.render(72)
    text = table.render(48)
    assert "3" * 20 in text and "a, b" in text


def test_a_column_without_text_is_no_column():
    assert "empty" not in Table("", ["name", "empty", "b"], [["x", "", "1"], ["y", "", "2"]]).render(80)


names = st.text(st.sampled_from("abcdefghij_(=, )|"), min_size=1, max_size=70).map(lambda s: "n" + " ".join(s.split()))
numbers = st.sampled_from(["", "1.00×", "85.00% [80.1%, 88.2%]", "-1234567.891 [-3.0, +4.0]", "52"])


@given(st.lists(st.tuples(names, numbers, numbers, numbers, numbers), min_size=1, max_size=5), st.integers(1, 160))
def test_whatever_is_in_a_table_no_cell_is_cut(rows, width):
    table = Table("t", ["name", "first", "second", "third", "fourth"], rows)
    text = table.render(width)
    assert max(map(cell_len, text.splitlines())) <= max(width, 40)
    assert first_column(text) == squeezed("".join(row[0] for row in rows))
    left_out = text.split("room: ")[1] if "room: " in text else ""
    for i, column in enumerate(table.columns[1:], 1):
        for cell in (row[i] for row in rows):
            assert column in left_out or all(part in text for part in cell.replace(" [", "\n[").split("\n"))


def test_the_width_is_that_of_the_variable(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert width_of(object()) is None
    monkeypatch.setenv("COLUMNS", "80")
    assert width_of(object()) == 80
    monkeypatch.setenv("COLUMNS", "wide")
    assert width_of(object()) is None


@pytest.mark.parametrize("width", ["", "60", "80", "120"])
def test_list_shows_every_name_knob_and_sentence(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(SystemExit):
        main(["list"])
    text = shown = capsys.readouterr().out
    for row in saccade.list().rows:
        assert row["name"] in text
    columns = zip(*(line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")), strict=True)
    texts = [squeezed("".join(column)) for column in columns]
    for row in saccade.list().rows:
        assert any(squeezed(row["summary"]) in text for text in texts)
        knobs = ", ".join(knob.removesuffix("=None") for knob in row["knobs"])
        assert any(squeezed(knobs) in text for text in texts) or "Not shown for want of room: kind, knobs" in shown


# Results


@dataclass(frozen=True)
class Speed:
    setting: str
    p50_ms: float


@dataclass(frozen=True)
class Row:
    setting: str
    top1: Interval
    speed: Speed | None
    place: Path


ROWS = [
    Row("dense", Interval(0.5, 0.4, 0.6), None, Path("a")),
    Row("tome(r=8)", Interval(0.25, 0.1, 0.4), Speed("tome(r=8)", 12.5), Path("b")),
]


def test_rows_are_flat_dictionaries():
    assert flat(ROWS[1]) == {
        "setting": "tome(r=8)",
        "top1": 0.25,
        "top1_low": 0.1,
        "top1_high": 0.4,
        "speed.setting": "tome(r=8)",
        "speed.p50_ms": 12.5,
        "place": "b",
    }
    assert flat({"a": {"b": 1}, "c": None}) == {"a.b": 1, "c": None}


def test_scores_are_a_pair_and_a_result():
    found = Scores(ROWS, {"x.jpg": "empty file"})
    rows, failures = found
    assert rows is found.rows is found[0] and failures is found.failures is found[1]
    assert isinstance(found, Result) and len(found.to_dicts()) == 2
    assert "tome(r=8)" in repr(found) and "0.25" in repr(found)
    assert found._repr_html_().count("<tr>") == 3
    assert "&lt;b&gt;" in Scores([{"name": "<b>"}], {})._repr_html_()
    many = Scores([{"name": str(i)} for i in range(500)], {})
    assert len(repr(many).splitlines()) < 20 and "490 more rows" in repr(many)
    assert "400 more rows" in many._repr_html_()
    assert repr(Scores([], {})) == "Scores: no rows"


def test_a_data_frame_needs_pandas(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        Scores(ROWS, {}).to_df()


def test_a_data_frame_is_the_rows():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    assert Scores(ROWS, {}).to_df().equals(pandas.DataFrame(Scores(ROWS, {}).to_dicts()))


def test_importing_all_names_leaves_builtins_alone():
    found: dict[str, object] = {}
    exec("from saccade import *", found)
    assert found["Setting"] is saccade.Setting
    assert not {"list", "eval"} & found.keys()
