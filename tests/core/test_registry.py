"""The registry: what each knob says of itself, and where its default is from."""

from __future__ import annotations

import json

import pytest

import saccade
from saccade.cli import main
from saccade.core.registry import SOURCES, registry
from saccade.errors import UserError


@pytest.mark.parametrize("name", registry())
def test_every_knob_says_what_it_is_and_where_its_default_is_from(name):
    entry = registry()[name]
    assert entry.help.keys() == entry.knobs.keys()
    for knob, text in entry.help.items():
        source = entry.source(knob)
        assert source in SOURCES and text.endswith(f"[{source}]")
        assert len(text.removesuffix(f"[{source}]").strip()) > 3, f"{entry.name}: the docstring does not name {knob}"


@pytest.mark.parametrize("name", registry())
def test_sources_name_knobs_that_there_are_and_each_once(name):
    entry = registry()[name]
    named = [knob for knobs in entry.sources.values() for knob in knobs.split()]
    assert entry.sources.keys() <= SOURCES.keys() - {"ours"}, "what is not named is ours"
    assert set(named) <= entry.knobs.keys() and len(set(named)) == len(named)


@pytest.mark.parametrize(("knob", "source"), [("keep", "paper"), ("tau", "code"), ("threshold", "paper")])
def test_list_of_a_method_shows_its_knobs(knob, source, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["list", "dynamicvit", "--json"])
    assert stopped.value.code in (0, None)
    rows = {row["knob"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == set(saccade.list("dynamicvit")) == registry()["dynamicvit"].knobs.keys()
    assert rows[knob]["source"] == source and rows[knob]["help"].endswith(f"[{source}]")
    text = saccade.list("dynamicvit").table().render(120, "")
    assert knob in text and SOURCES[source] in text


def test_a_method_that_there_is_not_is_named():
    with pytest.raises(UserError, match=r"there is no method 'evt'.*evit.*--plugin"):
        saccade.list("evt")
