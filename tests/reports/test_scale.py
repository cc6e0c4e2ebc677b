"""How metrics of all kinds are written, and drawn with better on top."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from saccade.reports.frontier_picture import Point, _frontier, frontier_picture
from saccade.reports.plots import frontier_figures
from saccade.reports.rows import Row
from saccade.reports.scale import Scale


@pytest.mark.parametrize(
    ("metric", "value", "difference", "axis", "tick"),
    [
        ("recall@10", "71.2 %", "−0.4", "recall@10 (%)", "71"),
        ("cosine", "0.7120", "−0.0040", "cosine", "0.7125"),
        ("kl", "0.712 nats", "−0.0040", "kl (nats, less is better)", "−0.7125"),
    ],
)
def test_a_metric_is_written_in_its_own_unit(metric, value, difference, axis, tick):
    scale = Scale.of(metric)
    assert scale.value(0.712) == value and scale.difference(-0.004) == difference and scale.axis(metric) == axis
    assert scale.tick(0.7125, 0.02) == tick  # of a height: less is higher where less is better
    assert scale.merit(scale.merit(0.3)) == 0.3 and scale.value(None) == "–"


def row(setting: str, value: float, speedup: float, family: str = "reduction") -> Row:
    return Row(
        setting, family, 1 / speedup, speedup, value, value - 0.01, value + 0.01, None, None, None, 0.9, speedup, 1.0,
        10.0, 5.0, None, 100.0, on_frontier=False, chosen=False, metric="kl",
    )  # fmt: skip


def heights(svg: str) -> dict[str, float]:
    """How far below the top each row's point stands."""
    found = re.findall(r'<g class="pt[^"]*" data-row="(\d+)" transform="translate\([\d.]+,([\d.]+)\)"', svg)
    return {place: float(y) for place, y in found}


def test_less_is_drawn_higher_where_less_is_better():
    rows = [row("dense", 0.0, 1.0, "dense"), row("a", 0.05, 1.5), row("b", 0.2, 1.6), row("other", 0.1, 2.0, "rival")]
    by_cost, by_time = frontier_figures(rows, "kl")
    for figure in (by_cost, by_time):
        spots = heights(figure.svgs["wide"])
        assert spots["0"] < spots["1"] < spots["3"] < spots["2"]
        assert "kl (nats, less is better)" in figure.svgs["wide"] and 'class="mark rival"' in figure.svgs["wide"]
    shares = frontier_figures([replace(r, metric="top-1") for r in rows], "top-1")
    assert heights(shares[0].svgs["wide"])["2"] < heights(shares[0].svgs["wide"])["1"]


def test_a_rival_is_no_part_of_a_frontier():
    points = [Point("dense", "dense", 1.0, 0.0), Point("a", "reduction", 1.5, 0.1), Point("b", "reduction", 1.2, 0.2)]
    rival = Point("other", "rival", 9.0, 0.0)
    assert [p.setting for p in _frontier([*points, rival], Scale.of("kl"))] == ["dense", "a"]
    assert [p.setting for p in _frontier(points, Scale.of("top-1"))] == ["b", "a"]
    assert frontier_picture([*points, rival], "kl").width > 100
