"""The report of a training run: what was logged is there, escaped, bounded, and whatever was logged makes a page."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from html_page import Page
from saccade.reports import Checked, Sample, Share, TrainingReport, render_training
from saccade.reports.curves import BUCKETS, Series, path, step_range, thin
from saccade.reports.formatting import amount, compact, whole
from saccade.reports.setting_curves import _apart
from saccade.reports.svg import Axis


def steps(count: int, **values: float) -> list[dict[str, float]]:
    return [
        {"step": k, "epoch": k / 10, "loss": 3 / (1 + k), "loss/task": 2 / (1 + k), "lr": 1e-3, "grad_norm": 1.0,
         "images_per_s": 400.0, "wait": 0.05, "gmacs": 12.5 * k, "images": 64 * k} | values
        for k in range(count)
    ]  # fmt: skip


CHECKS = [
    Checked(step, setting, top1 + step / 1000, top1 + step / 1000 - 0.02, top1 + step / 1000 + 0.02, gmacs)
    for step in (50, 99)
    for setting, top1, gmacs in (("dense", 0.7, 1.26), ("tome(r=8)", 0.68, 0.9))
]
SHARES = [Share("dense", 40, 3_000_000.0), Share("tome(r=8)", 60, 1_000_000.0)]
RUN = TrainingReport(
    "a title", "saccade train", ["It learned `two` settings", "a reason"], {"device": "cpu", "wall time": "2 min 3 s"},
    "top-1", steps(100), CHECKS, SHARES, [Sample("fish", [("photo", Image.new("RGB", (8, 8)))])], ["a note"],
)  # fmt: skip


def render(**values: object) -> tuple[str, Page]:
    text = render_training(replace(RUN, **values))
    return text, Page(text)


def numbers_drawn(text: str) -> str:
    return "".join(re.findall(r"<svg.*?</svg>", text, re.S))


def test_the_page_shows_all_that_it_was_given():
    text, page = render()
    for shown in (
        "a title", "saccade train", "It learned two settings", "a reason", "a note", "fish", "cpu",
        "2\u202fmin\u202f3\u202fs",
        "dense", "tome(r=8)", "79.9 %", "77.9 … 81.9 %", "77.9", "−2.0", "40.0", "60.0", "75.0", "25.0",
        "3.00 million", "1.00 million", "1\u202f238", "6\u202f336", "9.90 epochs", "5.0 % of its time",
    ):  # fmt: skip
        assert shown in page.text, shown
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert heads == ["Loss", "Accuracy of every setting", "What each setting got", "Throughput",
                     "What each token stands for", "How it was run"]  # fmt: skip
    named = [a.get("aria-label") or "" for t, a in page.tags if t == "svg" and a.get("role") == "img"]
    for words in ("loss over steps", "learning rate", "gradient norm", "2 settings over the steps", "images/s",
                  "top-1 against GMACs", "waiting for data"):  # fmt: skip
        assert any(words in name for name in named), words
    assert all(named) and page.count("html") == page.count("body") == page.count("h1") == 1
    assert "not data-bound" in page.text and "Still running" not in page.text and "not a finite" not in page.text
    assert "$" not in re.sub(r"<script>.*</script>", "", text, flags=re.S)


def test_the_page_is_one_file_without_outside_references():
    text, page = render()
    assert not re.search(r"https?://|url\(|@import|<script[^>]+src", text)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), attributes


def test_text_is_escaped_everywhere():
    evil = '<script>alert("1")</script>&\'"$title'
    text, page = render(
        title=evil, command=evil, verdict=[evil, evil], facts={evil: evil, "wall time": evil, "images seen": evil},
        metric_name=evil, steps=[{"step": 1, "loss": 1.0, f"loss/{evil}": 2.0}, {"step": 2, f"loss/{evil}": math.nan}],
        checks=[Checked(1, evil, 0.5, 0.4, 0.6, 1.0), Checked(1, "b", 0.4, 0.3, 0.5, 0.5)],
        shares=[Share(evil, 1, 1.0)], samples=[Sample(evil, [(evil, Image.new("RGB", (8, 8)))])], notes=[evil],
        running=True,
    )  # fmt: skip
    assert page.count("script") == 1 and 'alert("1")' not in text and page.text.count(evil) >= 12


def test_a_running_data_bound_run_says_so():
    _, page = render(running=True, steps=steps(100, wait=0.4))
    assert "Still running: this is the state at step 99." in page.text
    assert "The run was data-bound: it spent 40.0 % of its time waiting for data." in page.text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_loss_that_is_not_finite_is_a_gap_and_said(bad):
    rows = steps(100)
    rows[30]["loss"] = rows[31]["loss"] = bad
    text, page = render(steps=rows)
    assert "loss was not a finite number at 2 of 100 logged steps, first at step 30" in page.text
    assert not re.search(r"[\"\s,(]-?(nan|inf)[\"\s,)]", numbers_drawn(text)) and page.count("path", "bad") == 2
    everything, page = render(steps=steps(5, loss=bad, **{"loss/task": bad}))
    assert "first at step 0" in page.text and "loss over steps" not in everything


def test_parts_that_have_nothing_are_left_out():
    _, page = render(steps=[], checks=[], shares=[], samples=[], notes=[], facts={}, command="", verdict=[])
    assert page.count("figure") == page.count("table") == 0 and page.count("h1") == 1
    _, page = render(steps=[], checks=[], shares=[], running=True)
    assert "no step is logged yet" in page.text
    text, page = render(steps=steps(1), checks=CHECKS[:1], shares=[])
    assert re.search(r'class="line series s0 dash0" d="M[\d. ]+h.01"', text), "one point is a dot"
    assert page.count("figure") >= 4 and page.count("tr") == 2
    _, page = render(checks=[])
    assert page.count("tr") == 3 and "Accuracy of every setting" not in page.text
    _, page = render(steps=[{"loss": 1.0}, {"step": 5, "lr": 0.1}, {"step": 6, "loss": 0.5, "wait": None}])
    assert page.count("figure") >= 4


def test_thirty_settings_with_long_names_stay_apart():
    checks = [
        Checked(s, f"{'grid(20) | tome(r=13) | ' * 6}{k}", 0.5 + k / 100, 0.4, 0.9, 1 + k)
        for k in range(30)
        for s in (1, 2)
    ]
    text, page = render(checks=checks, shares=[])
    assert page.count("tr") == 31 and page.count("g", "curve") == 2 * 30
    looks = set(re.findall(r'<path class="line (series s\d dash\d)" d="M-10', text))
    assert len(looks) == 30


def test_a_long_run_draws_few_points():
    rng = np.random.default_rng(0)
    rows = [{"step": k, "loss": v, "grad_norm": v} for k, v in enumerate(rng.random(20_000) + 1)]
    rows[7777]["loss"] = 55.0
    checks = [Checked(k, "dense", 0.5, 0.4, 0.6, 1.0) for k in range(2000)]
    text, _ = render(steps=rows, checks=checks)
    drawn = [len(re.findall("[ML]", d)) for d in re.findall(r' d="([^"]*)"', text)]
    assert max(drawn) <= 2 * BUCKETS and len(text) < 500_000


losses = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 9), st.just(0.0))


@settings(max_examples=60, deadline=None)
@given(st.lists(losses, max_size=60), st.integers(1, 20))
def test_thinning_keeps_the_extremes_and_the_gaps(values, buckets):
    series = Series.of([{"step": k, "loss": v} for k, v in enumerate(values)], "loss")
    drawn = thin(series, buckets)
    good = [v for v in values if abs(v) < 1e30]
    shown = [v for _, v in drawn.raw if not math.isnan(v)]
    assert len(shown) <= 2 * buckets and set(shown) <= set(good)
    assert len(series.broken) == len(values) - len(good)
    assert any(math.isnan(v) for _, v in drawn.raw) == (len(good) < len(values))
    assert [s for s, _ in drawn.raw] == sorted(s for s, _ in drawn.raw)
    if good:
        assert min(shown) == min(good) and max(shown) == max(good)
        smooth = [v for _, v in drawn.smooth if not math.isnan(v)]
        room = 1e-9 * max(abs(v) for v in good)
        assert min(good) - room <= min(smooth) and max(smooth) <= max(good) + room


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(losses, losses, losses), max_size=6), st.lists(st.tuples(losses, losses), max_size=6))
def test_any_numbers_make_a_page_that_parses(rows, checked):
    checks = [Checked(k, f"s{k % 2}", a, b, a, b) for k, (a, b) in enumerate(checked)]
    logged = [{"step": s, "loss": a, "lr": b, "grad_norm": a, "images_per_s": b, "wait": a} for s, a, b in rows]
    text, _ = render(steps=logged, checks=checks, shares=[Share("s0", 0, math.nan)], samples=[])
    assert not re.search(r"[\"\s,(LMV]-?(nan|inf)[\"\s,)]", numbers_drawn(text))


def test_lines_break_where_a_value_is_missing():
    x, y = Axis(0, 10, 0, 100), Axis(0, 10, 100, 0)
    assert path("k", [(0, 1), (1, 2), (2, math.nan), (3, 4)], x, y).count("M") == 2
    assert path("k", [(0, math.nan)], x, y) == ""
    assert step_range([]) == (0, 1) and step_range([7]) == (6, 8) and step_range([10, 4000]) == (0, 4000)


def test_labels_at_the_end_keep_their_order_and_their_distance():
    placed = _apart([50.0, 50.0, 51.0, 200.0], 15.0, 26.0, 376.0)
    assert all(b - a >= 15 - 1e-9 for a, b in pairwise(placed)) and placed[-1] == 200.0
    assert _apart([370.0, 375.0], 15.0, 26.0, 376.0)[-1] <= 376.0 and _apart([], 15.0, 0.0, 1.0) == []


def test_numbers_are_as_short_as_they_can_be():
    assert [compact(v) for v in (0.5, 3e-5, 1000.0, 1e8, 0.0, -2.0)] == ["0.5", "3e−5", "1\u202f000", "1e8", "0", "−2"]
    assert amount(3.21e6) == "3.21 million" and amount(1240.0) == "1\u202f240" and whole(4000) == "4\u202f000"
