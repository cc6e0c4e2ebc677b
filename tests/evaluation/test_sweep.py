"""Sweeps: ranges become rows with accuracy, MACs and measured time, what was not trained for is marked, all resumes."""

from __future__ import annotations

import csv
import json
import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import saccade
from command_line import Run, place, run  # noqa: F401  (fixtures)
from data_helpers import write_folder
from html_page import Page
from oracles import make_vit
from saccade.errors import UserError
from saccade.evaluation import accuracy, interleaved, sweep
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.sweep import evaluate, expanded, trained_for
from saccade.evaluation.sweep_result import SweepRow
from saccade.model import AdaptiveViT
from small_runs import files, tiny


@pytest.fixture(scope="module")
def model() -> AdaptiveViT:
    return tiny()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"), files(each=7))


# Which steps make sense


def divisors(pixels: int, low: int, high: int) -> list[int]:
    return [p for p in range(low, high + 1) if pixels % p == 0]


@pytest.mark.parametrize(
    ("family", "text", "listed"),
    [
        ("vit", "grid(8..40)", [f"grid({p})" for p in divisors(64, 8, 40)]),
        ("vit", "grid(patch=4..64)", [f"grid(patch={p})" for p in divisors(64, 4, 64)]),
        ("vit", "grid(8..40, size=96)", [f"grid({p}, size=96)" for p in divisors(96, 8, 40)]),
        ("vit", "grid(16, size=32..100)", [f"grid(16, size={s})" for s in (32, 48, 64, 80, 96)]),
        ("vit", "grid(32..8)", ["grid(32)", "grid(16)", "grid(8)"]),
        ("clip", "grid(8..40)", ["grid(8)", "grid(16)", "grid(32)"]),  # of 128 pixels
        ("vit", "grid(20) | tome(r=1..2)", ["grid(20) | tome(r=1)", "grid(20) | tome(r=2)"]),  # who names it wants it
        ("vit", "tome(r=2..6..2)", ["tome(r=2)", "tome(r=4)", "tome(r=6)"]),
        ("vit", "nothing(1..2)", ["nothing(1)", "nothing(2)"]),  # for building to refuse
    ],
)
def test_a_range_stops_where_the_method_says(family, text, listed):
    assert expanded(AdaptiveViT(make_vit(family)), text) == listed


def test_a_range_without_a_sensible_step_says_so():
    with pytest.raises(UserError, match=r"no value in the range of 'grid\(17\.\.19\)' makes sense here"):
        expanded(AdaptiveViT(make_vit()), "grid(17..19)")


# Rows


def test_a_range_is_the_settings_that_it_stands_for(model, photos):
    rows, failures = evaluate(model, photos, "grid(8..40)", seconds=0)
    expected, _ = accuracy.evaluate(model, str(photos), ["grid(8)", "grid(16)", "grid(32)"])
    assert failures == {}
    assert [r.setting for r in rows] == ["dense", "grid(8)", "grid(16)", "grid(32)"]
    assert rows == [SweepRow(**vars(score), speed=None, trained=None) for score in expected]
    assert json.loads(json.dumps(rows[1].to_dict()))["gmacs"] == rows[1].gmacs


def test_several_settings_and_ranges_make_one_table_without_repeats(model, photos):
    rows, _ = saccade.eval(model, photos, ["dense", "tome(r=1..2)", "tome(r=2)", "evit(0.5)"], limit=6, seconds=0)
    assert [r.setting for r in rows] == ["dense", "tome(r=1)", "tome(r=2)", "evit(0.5)"]
    assert all(r.images == 6 for r in rows)


def test_a_wrong_step_of_a_range_is_found_before_any_image_is_run(model, photos, monkeypatch):
    monkeypatch.setattr(Evaluator, "predict", lambda *_: pytest.fail("an image was run"))
    with pytest.raises(UserError, match=r"evit: keep=1\.1 is not a number"):
        evaluate(model, photos, "evit(0.9..1.1..0.1)")


# Speed


@pytest.fixture
def asked(monkeypatch) -> list[float]:
    """Seconds of every timing that was asked for; it is cut short."""
    seconds: list[float] = []
    timed = sweep.time_together

    def time_together(entries, batch, wanted, progress):
        seconds.append(wanted)
        return timed(entries, batch, 0.0, progress)

    monkeypatch.setattr(sweep, "time_together", time_together)
    return seconds


@pytest.mark.parametrize(
    ("settings", "seconds", "timed"),
    [
        ("tome(r=1)", None, []),
        ("tome(r=1..2)", None, [10.0]),
        ("tome(r=1..2)", 0, []),
        ("tome(r=1..2)", 0.5, [0.5]),
        ("tome(r=1)", 0.5, [0.5]),
    ],
)
def test_a_range_is_timed_unless_told_otherwise(model, photos, asked, settings, seconds, timed):
    rows, _ = evaluate(model, photos, settings, seconds=seconds, limit=3, batch=2)
    assert asked == timed
    assert all((r.speed is not None) == bool(timed) for r in rows)


def test_speed_is_measured_beside_dense_at_the_batch_and_size_of_the_setting(model, photos, asked, monkeypatch):
    shapes: dict[str, set[tuple[int, ...]]] = {}
    timed = interleaved._timed

    def watched(way, images, clock):
        def seen(images):
            out = way(images)
            shapes.setdefault(f"{images.shape[-1]}", set()).add(tuple(images.shape))
            return out

        return timed(seen, images, clock)

    monkeypatch.setattr(interleaved, "_timed", watched)
    rows, _ = evaluate(model, photos, "grid(16, size=32..64)", limit=3, batch=5)
    assert shapes == {
        "32": {(5, 3, 32, 32)},
        "48": {(5, 3, 48, 48)},
        "64": {(5, 3, 64, 64)},
    }
    dense, small = rows[0], rows[1]
    assert dense.speed.speedup == 1.0 and (small.speed.batch, small.speed.runs) == (5, 7)
    assert small.speed.mac_ratio == pytest.approx(small.mac_ratio)  # what was timed is what was scored
    assert all(r.speed.setting == r.setting for r in rows)


# What the weights were trained for


@pytest.mark.parametrize(
    ("trained", "setting", "expected"),
    [
        ((), "grid(8)", None),
        (("dense", "grid(32)"), "dense", True),
        (("dense", "grid(32)"), "grid(32)", True),
        (("dense", "grid(32)"), "grid(patch=32)", True),
        (("dense", "grid(32)"), "grid(8)", False),
        (("dense", "grid(32)"), "grid(16)", True),  # gives dense's very answers
        (("grid(32)",), "grid(16)", False),
        (("grid(32)",), "dense", False),
        (("dense", "grid(32)"), "grid(32) | tome(r=2)", False),
        (("dense", "evit(0.5)"), "evit(keep=0.5, fuse=False)", True),
        (("dense", "evit(0.5)"), "evit(0.5, fuse=True)", False),
        (("grid(32) | another_version(3)", "another_version()"), "grid(32)", False),
    ],
)
def test_what_was_trained_for_is_known_however_it_is_written(photos, trained, setting, expected):
    model = tiny()
    model.trained = trained
    rows, _ = evaluate(model, photos, [setting], limit=6)
    assert trained_for(model, rows[-1]) is rows[-1].trained is expected


# The folder


@pytest.fixture(scope="module")
def swept(photos, tmp_path_factory):
    """A model that was trained for two of the settings, the folder of its sweep, and the rows."""
    model, out = tiny(), tmp_path_factory.mktemp("out")
    model.trained = ("dense", "grid(32)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "SECONDS", 0.0)
        rows, _ = evaluate(
            model, photos, ["grid(8..40)", "tome(r=1..2)", "random(0.5)"], out=out, command="saccade eval it"
        )
    return out, rows


def test_the_folder_holds_table_numbers_and_page(swept):
    out, rows = swept
    assert {p.name for p in out.iterdir()} == {"cache", "report.html", "scores.csv", "scores.json"}
    table = [*csv.DictReader((out / "scores.csv").open())]
    numbers = json.loads((out / "scores.json").read_text())
    assert [r["setting"] for r in table] == [r["setting"] for r in numbers["rows"]] == [r.setting for r in rows]
    assert [r["trained"] for r in numbers["rows"]] == [True, False, True, True, False, False, False]
    assert all(
        float(t["speedup"]) == n["speed"]["speedup"] == r.speed.speedup
        for t, n, r in zip(table, numbers["rows"], rows, strict=True)
    )
    assert all(float(t["gmacs"]) == r.gmacs for t, r in zip(table, rows, strict=True))
    assert numbers["not_read"] == {} and "interleaved" in numbers["facts"]["timing"]


def runs_in(folder: Path) -> dict[str, str]:
    """The run that each file of a sweep names."""
    (table,) = {row["run"] for row in csv.DictReader((folder / "scores.csv").open())}
    page = re.search(r"<dt>run</dt><dd>(\w+)</dd>", (folder / "report.html").read_text(encoding="utf-8"))
    numbers = json.loads((folder / "scores.json").read_text())["facts"]["run"]
    return {"report.html": page and page[1], "scores.csv": table, "scores.json": numbers}


@pytest.mark.parametrize("done", [1, 2])
def test_files_of_two_runs_after_a_kill_between_them_name_both(model, photos, tmp_path, monkeypatch, done):
    evaluate(model, photos, ["tome(r=1)"], out=tmp_path, limit=6)
    (first,) = {*runs_in(tmp_path).values()}
    replace, moved = os.replace, []

    def killed(source, target):
        if Path(target).parent == tmp_path:
            if len(moved) == done:
                raise KeyboardInterrupt
            moved.append(Path(target).name)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, photos, ["tome(r=2)"], out=tmp_path, limit=6)
    found = runs_in(tmp_path)
    assert {name for name, run in found.items() if run != first} == {*moved} and len({*found.values()}) == 2
    evaluate(model, photos, ["tome(r=2)"], out=tmp_path, limit=6)
    (again,) = {*runs_in(tmp_path).values()}
    assert again == found[moved[0]] != first


def test_the_page_draws_every_range_twice_and_marks_what_was_not_trained_for(swept):
    out, rows = swept
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(r.setting in page.text for r in rows) and "saccade eval it" in page.text
    assert "grid(8..40)" in page.text and "The weights were not trained for 4 of 7 settings" in page.text
    lines = [a for t, a in page.tags if t == "path" and (a.get("class") or "").startswith("line series")]
    drawn = [a["d"].count("L") for a in lines if "d" in a and "H" not in a["d"]]
    assert drawn == [2, 1] * 4  # two ranges, against compute and time, wide and narrow: three grids, two merges
    hollow = [a for t, a in page.tags if t == "g" and "--card" in (a.get("style") or "")]
    assert len(hollow) == 1 + 4 * 4  # the legend's, and four settings in four plots
    assert page.count("tr") == 1 + len(rows)
    assert "not trained for" in page.text
    assert "http" not in text.replace("http-equiv", "")


def test_an_interrupted_sweep_goes_on_from_what_it_has(photos, tmp_path, monkeypatch):
    model = tiny()
    seen: list[str] = []
    predict = Evaluator.predict

    def stopped(self, view, indices, step=lambda done: None):
        name = str(view.setting)
        if name == "tome(r=3)" and "tome(r=3)" not in seen:
            seen.append(name)
            raise KeyboardInterrupt
        seen.append(name)
        return predict(self, view, indices, step)

    monkeypatch.setattr(Evaluator, "predict", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, photos, "tome(r=1..4)", seconds=0, out=tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists()
    del seen[seen.index("tome(r=3)") + 1 :], seen[: seen.index("tome(r=3)")]
    rows, _ = evaluate(model, photos, "tome(r=1..4)", seconds=0, out=tmp_path / "out")
    assert seen == ["tome(r=3)", "dense", "tome(r=3)", "tome(r=4)"]  # 1 and 2 were kept
    monkeypatch.undo()
    assert rows == evaluate(model, photos, "tome(r=1..4)", seconds=0)[0]


def test_a_broken_image_is_named_also_when_all_else_is_remembered(tmp_path):
    write_folder(tmp_path / "in", {**files(each=4), "a/bad.png": b"no image"})
    for _ in range(2):
        rows, failures = evaluate(tiny(), tmp_path / "in", "tome(r=1..2)", seconds=0, out=tmp_path / "out")
        assert list(failures) == ["a/bad.png"] and rows[0].images == 12
        assert "a/bad.png" in (tmp_path / "out" / "report.html").read_text()


def test_a_sweep_without_labels_or_time_has_a_page_too(tmp_path):
    write_folder(tmp_path / "in", {name.split("/")[1]: data for name, data in files("a").items()})
    evaluate(tiny(), tmp_path / "in", "tome(r=1..2)", seconds=0, out=tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "agreement, the share of images that get the dense model's class" in page.text
    assert "speed-up" not in page.text.split("How it was measured")[0]
    assert "fewer MACs" in page.text or "cheaper" in page.text


# The command


def test_the_command_sweeps(run: Run, tmp_path, asked):
    arguments = ["eval", "model", "photos", "-s", "grid(8..40)", "--limit", 6, "--batch", 2]
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    found = json.loads(out)
    assert [r["setting"] for r in found["rows"]] == ["dense", "grid(8)", "grid(16)", "grid(32)"]
    assert all(r["speed"]["runs"] == 7 for r in found["rows"])
    code, table, _ = run(*arguments, "--out", tmp_path / "out")
    assert (
        code == 0 and "speed-up" in table and "grid(32)" in table and str(tmp_path / "out") in table.replace("\n", "")
    )
    assert (tmp_path / "out" / "report.html").is_file()
    code, table, _ = run(*arguments, "--seconds", 0)
    assert code == 0 and "speed-up" not in table and "NLL" in table


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("-s grid(17..19)", "no value in the range of 'grid(17..19)' makes sense here"),
        ("-s evit(0.3..0.9)", "needs a step"),
        ("-s tome(r=1..5000)", "over the limit of 1000"),
        ("-s tome(r=1..2) --seconds -1", "--seconds"),
        ("-s tome(r=1..2) --out photo.png", "photo.png' is not a folder"),
    ],
)
def test_mistakes_end_in_one_line(run: Run, arguments, said):
    code, out, err = run("eval", "model", "photos", *arguments.split())
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("saccade: ") and said in line


@pytest.mark.slow
def test_real_sweep_collapses_away_from_its_patch_size(data_dir, tmp_path):
    """Fixed weights are best near their own patch size (FlexiViT, arXiv 2212.08013, Fig. 3)."""
    weights, images = data_dir / "vit_tiny_patch16_224.safetensors", data_dir / "inval227_dev.zip"
    if not (weights.is_file() and images.is_file()):
        pytest.skip("no weights or photos in the data folder")
    model = saccade.create_model("vit_tiny_patch16_224", weights=weights)
    rows, _ = evaluate(model, images, "grid(14..32)", limit=100, seconds=0, out=tmp_path)
    value = {r.setting: r.value.mean for r in rows}
    assert value["dense"] == value["grid(16)"] > value["grid(28)"] > value["grid(32)"]
    assert torch.tensor([r.gmacs for r in rows[1:]]).diff().max() < 0


def test_an_engine_behind_pytorch_runs_once_before_it_is_timed():
    """PyTorch's threads wait at full speed for a while, on the cores of the engine's."""
    ran: list[str] = []
    ways = {name: (lambda images, name=name: ran.append(name), torch.zeros(1)) for name in ("a", "b", "c")}
    times = interleaved.in_turn(ways, lambda rounds: rounds < 5, own_threads={"c": True})
    assert all(len(found) == 5 for found in times.values())
    runs = [ran[0], *(name for before, name in pairwise(ran) if name != before)]
    changes = sum((one == "c") != (other == "c") for one, other in pairwise(runs))
    assert len(ran) == 3 * 5 + changes and changes >= 5
    ran.clear()
    interleaved.in_turn(ways, lambda rounds: rounds < 5)
    assert len(ran) == 3 * 5
