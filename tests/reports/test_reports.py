"""What people see: token maps against slow loops, the report as one safe, self-contained file."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import saccade.reports
from html_page import Page
from saccade.errors import UserError
from saccade.reports import Report, Row, Sample, draw_blocks, draw_tokens, render_report, token_colours
from saccade.reports.formatting import number, percent, points
from saccade.reports.label_placement import place_labels
from saccade.reports.pictures import picture_uri
from saccade.reports.plots import stairs
from saccade.reports.svg import Axis, span
from saccade.reports.token_map import elide, font
from saccade.storage.files import write_text


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@st.composite
def maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """A photo of any size, a grid and any owner map of it."""
    grid = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    image = photo(draw(st.integers(1, 50)), draw(st.integers(1, 50)), draw(st.integers(0, 9)))
    cells = grid[0] * grid[1]
    return image, np.array(draw(st.lists(st.integers(-1, 5), min_size=cells, max_size=cells))), grid


# ---------------------------------------------------------------------------------------------------- token maps


@settings(max_examples=40, deadline=None)
@given(maps())
def test_token_colours_are_those_of_a_slow_loop(case):
    image, owner, (gh, gw) = case
    h, w = max(image.shape[0], gh), max(image.shape[1], gw)
    if (h, w) != image.shape[:2]:
        image = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.NEAREST))
    pixels = {cell: [] for cell in range(gh * gw)}
    for y in range(h):
        for x in range(w):
            pixels[(y * gh // h) * gw + x * gw // w].append(image[y, x].astype(float))
    for cell, colour in enumerate(token_colours(image, owner, (gh, gw))):
        same = [cell] if owner[cell] < 0 else [c for c in pixels if owner[c] == owner[cell]]
        np.testing.assert_allclose(colour, np.mean([p for c in same for p in pixels[c]], axis=0), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(maps())
def test_any_map_of_any_image_renders_with_cells_of_a_readable_size(case):
    image, owner, (gh, gw) = case
    picture = draw_tokens(Image.fromarray(image), torch.from_numpy(owner), (gh, gw), side=64)
    assert picture.mode == "RGB"
    assert picture.height >= 16 * gh and picture.width >= 16 * gw
    assert max(picture.size) >= 64


def test_proportions_are_kept_and_a_stripe_does_not_explode():
    assert draw_tokens(photo(30, 60), np.arange(4), (2, 2), side=100).size == (100, 50)
    assert max(draw_tokens(photo(2000, 1), np.arange(196), (14, 14)).size) <= 4096
    assert draw_tokens(photo(10, 1), np.arange(300), (300, 1)).height == 16 * 300  # unless the cells need it


def test_titles_end_within_their_panel():
    face = font(14)
    assert elide("block 4", 200, face) == "block 4"
    cut = elide("block 4 · 124 tokens", 90, face)
    assert cut.startswith("block") and cut.endswith("…") and face.getlength(cut) <= 90


def test_cells_of_one_token_share_a_fill_wherever_they_lie():
    image = np.zeros((160, 160, 3), dtype=np.uint8)
    image[:, :40], image[:, 120:] = (250, 30, 30), (30, 30, 250)
    owner = np.array([[0, 1, 2, 0]] * 4).ravel()  # the red and the blue side are one token
    picture = np.asarray(draw_tokens(image, owner, (4, 4), side=160)).astype(int)
    left, middle, right = picture[75:85, 15:25], picture[75:85, 55:65], picture[75:85, 135:145]
    merged = left.mean((0, 1)), right.mean((0, 1))
    assert np.abs(merged[0] - merged[1]).max() < 60  # 220 apart in the photo
    assert merged[0][0] > 100 and merged[0][2] > 100  # both hold red and blue
    assert merged[0][0] > merged[1][0] and merged[1][2] > merged[0][2]  # and both still show the photo
    assert middle.max() < 10


def test_lines_stand_between_tokens_and_nowhere_else():
    grey = np.full((64, 64, 3), 120, dtype=np.uint8)
    whole = np.asarray(draw_tokens(grey, np.zeros(16, dtype=int), (4, 4), side=64))
    assert (whole == 120).all()
    split = np.asarray(draw_tokens(grey, np.array([[0, 0, 1, 1]] * 4).ravel(), (4, 4), side=64))
    columns = np.flatnonzero((split != 120).any((0, 2)))
    assert 1 <= len(columns) <= 2 and set(columns) <= {31, 32}


@pytest.mark.parametrize("level", [90, 160, 255])
def test_dropped_cells_are_darker_grey_and_hatched(level):
    image = np.full((128, 128, 3), (level, level // 2, level // 3), dtype=np.uint8)
    owner = np.array([[0, 1, -1, -1]] * 4).ravel()
    picture = np.asarray(draw_tokens(image, owner, (4, 4), side=128)).astype(float)
    kept, dropped = picture[:, :60], picture[:, 68:]
    assert dropped.mean() < 0.75 * kept.mean()
    assert np.ptp(dropped, axis=2).max() < 8 < np.ptp(kept, axis=2).mean()
    assert dropped.std() > 5  # the hatch


def test_a_photo_and_its_map_must_fit():
    with pytest.raises(ValueError, match=r"4x4 grid has 16 cells, got \[9\]"):
        draw_tokens(photo(8, 8), np.zeros(9, dtype=int), (4, 4))
    with pytest.raises(ValueError, match="uint8"):
        draw_tokens(np.zeros((8, 8, 3)), np.zeros(16, dtype=int), (4, 4))
    with pytest.raises(ValueError, match="integers"):
        draw_tokens(photo(8, 8), np.zeros(16), (4, 4))
    with pytest.raises(ValueError, match="1 owner maps and 2 titles"):
        draw_blocks(photo(8, 8), [np.zeros(16, dtype=int)], (4, 4), ["a", "b"])


@settings(max_examples=12, deadline=None)
@given(count=st.integers(0, 13), columns=st.sampled_from([None, 1, 3, 50]))
def test_the_contact_sheet_holds_the_photo_and_every_block(count, columns):
    image = np.full((24, 24, 3), (200, 40, 40), dtype=np.uint8)
    titles = [f"block {k} · a title far wider than its panel" for k in range(count)]
    sheet = np.asarray(draw_blocks(image, [np.zeros(4, dtype=int)] * count, (2, 2), titles, columns, side=48))
    red = (np.abs(sheet.astype(int) - (200, 40, 40)) < 4).all(2)
    assert red.sum() == 48 * 48 * (count + 1)  # nothing is drawn over a panel
    across = (np.diff(red.any(0).astype(int), prepend=0) == 1).sum()
    assert across == min(columns or across, count + 1)


# ---------------------------------------------------------------------------------------------------- the report


TOME = Row(
    "tome(r=8)", "reduction", gmacs=0.9, mac_ratio=1.4, value=0.75, value_low=0.73, value_high=0.77,
    delta=-0.004, delta_low=-0.012, delta_high=0.003, agreement=0.97, speedup=1.3, conversion=0.93,
    images_per_s=500.0, p50_ms=31.0, memory_mb=200.0, tokens=100.0, on_frontier=True, chosen=False,
)  # fmt: skip


def row(setting: str, **values: object) -> Row:
    return replace(TOME, setting=setting, **values)


def report(rows: list[Row], **values: object) -> Report:
    owner = np.array([0, 0, 1, -1])
    panels = [("photo", Image.fromarray(photo(32, 32))), ("tome(r=8)", draw_tokens(photo(32, 32), owner, (2, 2)))]
    base = Report(
        title="a title", command="saccade tune", verdict=["Use `tome(r=8)`: 1.3× faster", "a reason"],
        facts={"model": "vit"}, metric_name="top-1", rows=rows, samples=[Sample("fish", panels)], notes=["a note"],
    )  # fmt: skip
    return replace(base, **values)


ROWS = [
    row("dense", family="dense", gmacs=1.26, mac_ratio=1.0, speedup=1.0, conversion=1.0, delta=0.0),
    row("tome(r=8)", chosen=True),
    row("evit(0.5)", gmacs=0.6, mac_ratio=2.1, speedup=1.8, value=0.70, delta=-0.05, note="steep"),
    row(
        "random(0.3)", family="random", gmacs=0.5, mac_ratio=2.5, speedup=2.3, value=0.2, delta=-0.55, on_frontier=False
    ),
]


def test_the_report_shows_every_setting_and_all_that_it_was_given():
    page = Page(render_report(report(ROWS)))
    for text in (
        *(r.setting for r in ROWS),
        "a title",
        "saccade tune",
        "1.3× faster",
        "a reason",
        "a note",
        "steep",
        "fish",
    ):
        assert text in page.text
    table = [a["data-v"] for t, a in page.tags if t == "th" and "data-v" in a]
    assert table == [r.setting for r in ROWS]
    assert page.count("tr", "chosen") == 1 and page.count("tr", "frontier") == 3
    assert page.count("div", "wide") == page.count("div", "narrow") == 3  # two frontiers and the conversion
    assert page.count("circle", "ring") == 1 + 2 * 3  # the chosen row: in the legend and in each plot
    assert page.count("img") == 2 + 1  # the panels, and the empty frame that enlarges them


def test_the_report_is_one_file_without_outside_references():
    text = render_report(report(ROWS))
    assert not re.search(r"https?://|url\(|@import|<script[^>]+src", text)
    for _, attributes in Page(text).tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), attributes
    assert "${" not in text and "$title" not in text


def test_text_is_escaped_everywhere():
    evil = '<script>alert("1")</script>&\'"'
    rows = [row(evil, note=evil, chosen=True), row(evil, family=evil, gmacs=0.5, value=0.5)]
    samples = [Sample(evil, [(evil, Image.new("RGB", (8, 8)))])]
    text = render_report(Report(evil, evil, [evil, evil], {evil: evil}, evil, rows, samples, [evil]))
    page = Page(text)
    assert page.count("script") == 1 and 'alert("1")' not in text.replace("<script>\n", "")
    assert page.text.count(evil) >= 10  # and is shown as it was written


def test_columns_and_plots_without_numbers_are_left_out():
    nothing = dict.fromkeys(("value", "value_low", "value_high", "delta", "delta_low", "delta_high", "agreement"))
    speed_only = Page(render_report(report([replace(r, **nothing) for r in ROWS])))
    assert "speed-up against MAC ratio" in "".join(a.get("aria-label") or "" for _, a in speed_only.tags)
    assert speed_only.count("div", "wide") == 1
    assert "Δ points" not in speed_only.text and "speed-up" in speed_only.text
    nothing = dict.fromkeys(("speedup", "conversion", "images_per_s", "p50_ms", "memory_mb"))
    accuracy_only = Page(render_report(report([replace(r, **nothing) for r in ROWS])))
    assert accuracy_only.count("div", "wide") == 1
    assert "Δ points" in accuracy_only.text and "images/s" not in accuracy_only.text
    assert "None" not in speed_only.text + accuracy_only.text and "nan" not in speed_only.text


numbers = st.one_of(st.none(), st.sampled_from([0.0, 1.0, math.nan, math.inf]), st.floats(0, 1))
costs = st.one_of(st.floats(1e-6, 1e6), st.just(1.0))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(costs, costs, numbers, numbers, numbers, st.booleans()), max_size=5), st.text(max_size=12))
def test_any_numbers_make_a_page_that_parses(values, name):
    families = ["dense", "reduction", "random", "other"]
    rows = [
        row(f"{name} {k}", family=families[k % 4], gmacs=g, mac_ratio=m, value=a, value_low=b, delta=b, delta_low=a,
            speedup=s and 3 * s, conversion=s, on_frontier=on, chosen=not on and k == 1)
        for k, (g, m, a, b, s, on) in enumerate(values)
    ]  # fmt: skip
    text = render_report(report(rows, samples=[], verdict=[]))
    page = Page(text)
    folded = 0 < sum(r.family == "random" for r in rows) < len(rows)  # in a table of their own
    assert page.count("tr") == (len(rows) + 1 + folded if rows else 0)
    assert not re.search(r"[\"\s,(]-?(nan|inf)[\"\s,)]", "".join(re.findall(r"<svg.*?</svg>", text, re.S)))


def test_a_large_report_stays_small():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8))  # what compresses worst
    samples = [Sample(f"s{k}", [(f"setting {j}", noise) for j in range(7)]) for k in range(4)]
    assert len(render_report(report(ROWS, samples=samples))) < 6_000_000
    flat = draw_tokens(np.full((64, 64, 3), 90, dtype=np.uint8), np.arange(16), (4, 4))
    assert picture_uri(flat, 512, 100_000).startswith("data:image/png")
    assert picture_uri(noise, 512, 10_000_000).startswith("data:image/jpeg")


# ---------------------------------------------------------------------------------------------------- parts


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 9), st.floats(0, 1)), min_size=1, max_size=12), st.booleans())
def test_the_frontier_is_what_nothing_beats(found, gain):
    sign = -1 if gain else 1
    beaten = [p for p in found if any(sign * q[0] <= sign * p[0] and q[1] >= p[1] and q != p for q in found)]
    assert sorted(stairs(found, gain)) == sorted(set(found) - set(beaten))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(60, 540), st.integers(30, 360)), min_size=1, max_size=14, unique=True))
def test_labels_touch_neither_each_other_nor_a_mark_nor_the_border(spots):
    wanted = [(float(x), float(y), f"setting({k})", 70.0) for k, (x, y) in enumerate(spots)]
    area = (48.0, 20.0, 570.0, 376.0)
    boxes = [p.box for p in place_labels(wanted, area, [(x, y) for x, y, _, _ in wanted], [], 250.0) if p]
    assert boxes  # some find a place
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert area[0] <= left < right <= area[2] and area[1] <= top < bottom <= area[3]
        assert not any(left < x < right and top < y < bottom for x, y in spots)
        assert all(right <= b[0] or b[2] <= left or bottom <= b[1] or b[3] <= top for b in boxes[i + 1 :])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=5), st.booleans())
def test_an_axis_holds_its_values_and_has_ticks(values, log):
    axis = Axis(*span(values, 0.05, log), 40.0, 500.0, log)
    assert all(40 < axis(v) < 500 for v in values)
    ticks = axis.ticks(6)
    assert 2 <= len(ticks) <= 16 and all(40 - 1e-6 <= axis(t) <= 500 + 1e-6 for t in ticks)


def test_numbers_are_written_with_fixed_digits_and_real_signs():
    assert [number(v) for v in (0.3141, 1.2, 17.62, 1240.4, 0.0, None)] == [
        "0.314",
        "1.20",
        "17.6",
        "1\u202f240",
        "0.00",
        "–",
    ]
    assert [points(v) for v in (-0.004, 0.0103, -0.0001, math.nan)] == ["−0.4", "+1.0", "0.0", "–"]
    assert percent(0.7123) == "71.2 %"


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_text(path, "old")
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(UserError, match="disk"):
            write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with open(path) as reader:  # who has the old file open keeps it whole
        write_text(path, render_report(report(ROWS)))
        assert reader.read() == "old"
    assert path.read_text(encoding="utf-8").endswith("</html>\n") and len(list(tmp_path.iterdir())) == 1


def test_importing_view_does_not_load_matplotlib():
    assert all(getattr(saccade.reports, name) for name in saccade.reports.__all__)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = saccade.reports.no_such_thing
    code = "import sys, saccade.reports; print('matplotlib' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "False"


def test_the_page_is_the_same_from_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        pages = Counter(pool.map(lambda _: render_report(report(ROWS)), range(8)))
    assert len(pages) == 1
