"""``tune`` as a whole: it survives its candidates, keeps to its time, times one table in one run, and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product

import pytest
import torch

import saccade
from data_helpers import write_folder
from saccade.data import open_images
from saccade.errors import UserError
from saccade.evaluation import candidates as candidates_module
from saccade.evaluation import export as export_module
from saccade.evaluation import interleaved, search_run
from saccade.evaluation.allowance import Allowance, Costs, plan
from saccade.evaluation.candidates import Candidate
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.export import export_chosen
from saccade.evaluation.failures import by_reason
from saccade.evaluation.report import tune
from saccade.evaluation.speed import time_all
from saccade.evaluation.tune_result import shown
from saccade.runners.artefact import open_artefact
from saccade.runners.runner import Runner
from saccade.terminal.progress import Progress
from slow_cases import cases
from small_runs import QUICK, files, shorten, tiny


@pytest.fixture(scope="module")
def model() -> saccade.AdaptiveViT:
    return tiny()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photos"), files())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


Break = Callable[[pytest.MonkeyPatch, BaseException], None]


def pricing(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    real = candidates_module.price

    def price(model, setting):
        if "evit" in setting:
            raise error
        return real(model, setting)

    patch.setattr(candidates_module, "price", price)


def predicting(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    real = Evaluator.predict

    def predict(judge, view, *args):
        if "evit" in str(view.setting):
            raise error
        return real(judge, view, *args)

    patch.setattr(Evaluator, "predict", predict)


def timing(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    real = interleaved._warm

    def warm(way, view, images):
        if "evit" in str(view.setting):
            raise error
        return real(way, view, images)

    patch.setattr(interleaved, "_warm", warm)


ERRORS = [IndexError("max(): dim 2 is empty\nmore"), RuntimeError("no"), UserError("no")]
PLACES = [pricing, predicting, timing]


@pytest.mark.parametrize(
    "place, error",
    cases([*zip(PLACES, ERRORS, strict=True), (timing, ERRORS[1])], product(PLACES, ERRORS)),
)
def test_a_candidate_that_fails_is_named_and_left_out(model, photos, few, tmp_path, monkeypatch, capsys, place, error):
    place(monkeypatch, error)
    with Progress(shown=True) as progress:
        found = tune(model, photos, "1.2x", out=tmp_path / "out", progress=progress, **QUICK)
    assert found.left_out and all("evit" in name for name in found.left_out)
    reason = "no" if isinstance(error, UserError) else f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert set(found.left_out.values()) == {reason}
    assert not any("evit" in row.setting for row in found.rows) and any("tome" in row.setting for row in found.rows)
    written = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert written["left_out"] == found.left_out
    page = (tmp_path / "out" / "report.html").read_text()
    printed = capsys.readouterr().err
    for name in found.left_out:
        assert f"<code>{name}</code> is left out: " in page
    assert f"left out: {next(iter(found.left_out))}" in printed and f": {reason}\n" in printed


def test_many_settings_that_one_reason_leaves_out_take_one_line():
    few = {"evit(0.7)": "not timed", "tome(r=8)": "no such kernel", "tome(r=9)": "not timed"}
    assert by_reason(few) == ["evit(0.7), tome(r=9): not timed", "tome(r=8): no such kernel"]
    many = {f"tome(r={r})": "not timed" for r in range(1, 29)}
    assert by_reason(many) == ["tome(r=1), tome(r=2) and 26 others: not timed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space left on device")])
def test_what_is_of_the_machine_ends_it(model, photos, few, tmp_path, monkeypatch, error):
    pricing(monkeypatch, error)
    with pytest.raises(type(error)):
        tune(model, photos, "1.2x", out=tmp_path / "out", **QUICK)


def test_a_setting_whose_logits_are_not_finite_is_disqualified_by_name(model, photos, few, tmp_path, monkeypatch):
    real = saccade.AdaptiveViT.forward_head

    def head(self, tokens):
        return real(self, tokens) * (float("nan") if "tome" in str(self.setting) else 1.0)

    monkeypatch.setattr(saccade.AdaptiveViT, "forward_head", head)
    found = tune(model, photos, "1.2x", out=tmp_path / "out", **QUICK)
    assert found.left_out and all("tome" in name for name in found.left_out)
    assert all("NaN or infinity" in reason for reason in found.left_out.values())


def test_the_numbers_of_a_table_agree_with_each_other(model, photos, few, tmp_path):
    """Speed-up, images/s and latency of all rows are of one interleaved run, against one dense model."""
    rows = tune(model, photos, "1.3x", out=tmp_path / "out", **QUICK).rows
    details = json.loads((tmp_path / "out" / "frontier.json").read_text())["rows"]
    assert any("bf16" in row.setting and row.family == "reduction" for row in rows) or len(rows) > 4
    dense = rows[0]
    for row, detail in zip(rows, details, strict=True):
        assert row.speedup == pytest.approx(dense.p50_ms / row.p50_ms)
        assert row.images_per_s == pytest.approx(1e3 * QUICK["batch"] / row.p50_ms)
        assert row.conversion == pytest.approx(detail["speed"]["speedup"] / detail["speed"]["mac_ratio"])
    by = sorted(rows, key=lambda row: row.images_per_s)
    assert [row.speedup for row in by] == sorted(row.speedup for row in rows)
    assert len({detail["speed"]["runs"] for detail in details}) == 1


def test_all_rows_are_timed_in_one_run(model, photos, few, tmp_path, monkeypatch):
    runs = []

    def watched(entries, *args, **options):
        runs.append([*entries])
        return time_all(entries, *args, **options)

    monkeypatch.setattr("saccade.evaluation.search_run.time_all", watched)
    found = tune(model, photos, "1.3x", out=tmp_path / "out", **QUICK)
    assert {row.setting for row in found.rows} <= set(runs[-1])
    assert all(len(run) == 2 for run in runs[:-1])  # whether a smaller number type pays: of these no row is made


def test_dense_the_best_of_each_family_and_the_choice_are_shown_and_controls_folded(model, photos, few, tmp_path):
    found = tune(model, photos, "1.2x", out=tmp_path / "out", **QUICK)
    table = "\n".join(row[0] for row in found.table().rows)
    assert "dense" in table and "→ " in table and "random" not in table
    best = max((r for r in found.rows if r.family == "reduction"), key=lambda r: (r.value, r.speedup))
    assert best.setting in table and found.rows[0] in shown(found.rows)
    page = (tmp_path / "out" / "report.html").read_text()
    main, folded = page.split("<details")[0], page.split("<details")[1].split("</details>")[0]
    assert "random(" in folded and 'data-v="random(' not in main
    assert any(row.family == "random" for row in found.rows)
    assert "random(" in (tmp_path / "out" / "frontier.csv").read_text()


def test_the_verdict_names_a_line_that_runs_it(model, photos, few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = tune(model, photos, out="it's", **QUICK)
    line = next(line for line in found.recommendation if line.startswith("To run it: `"))
    code = line.split("`")[1]
    with torch.inference_mode():
        images = torch.randn(2, 3, *found.model.input_size())
        assert torch.equal(eval(code, {"saccade": saccade, "images": images}), found.model(images).logits)
    assert any(
        "Assumed, as nothing was asked for: at most 1% lost; batches of 2 images" in x for x in found.recommendation
    )


COMPILED = ["fp32 compiled", "bf16 compiled"]


def test_without_a_compiler_nothing_compiled_is_recommended(model, photos, few, tmp_path, monkeypatch):
    def broken(module, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda module, **options: broken)
    found = tune(model, photos, "1x", out=tmp_path / "out", runner=["bf16", *COMPILED], **QUICK)
    assert {"dense · fp32 compiled", "dense · bf16 compiled"} <= set(found.left_out)
    assert "compiled" not in found.runner and not any("compiled" in row.setting for row in found.rows)


def test_an_engine_is_timed_beside_eager_and_what_it_runs_is_exported(model, photos, few, tmp_path, monkeypatch):
    monkeypatch.setattr(search_run, "HALVED", 1)
    found = tune(model, photos, "1x", out=tmp_path / "out", runner=["torch"], **QUICK)
    assert "dense · fp32 torch" in {row.setting for row in found.rows}
    assert not any("bf16" in row.setting for row in found.rows)
    facts = json.loads((tmp_path / "out" / "frontier.json").read_text())["facts"]
    assert "scored by PyTorch" in facts["rows of an engine"]
    images = open_images(photos)
    for runner, there in ((Runner("fp32", "torch"), True), (Runner("bf16"), False)):
        said = export_chosen(found.model, runner, tmp_path / "out", images, range(4))
        assert (tmp_path / "out" / "export" / "predict.py").is_file() is there is any("Exported:" in x for x in said)


def test_what_rounding_moves_too_far_is_exported_in_fp32_and_said(model, photos, tmp_path, monkeypatch):
    real = export_module.parity

    def rounded(view, artefact, *rest):
        found = real(view, artefact, *rest)
        return found | ({"agreement": 0.5, "met": False} if artefact.deployed.dtype in moved else {})

    monkeypatch.setattr(export_module, "parity", rounded)
    moved, images, speedups = {"bf16"}, open_images(photos), {Runner("fp32", "torch"): 1.25}
    refused, instead = export_chosen(model, Runner("bf16", "torch"), tmp_path, images, range(4), speedups)
    assert "agreement 50.00%" in refused and "--runner 'bf16 torch' --least" in refused
    assert "Exported by fp32 torch instead at 1.25× of dense" in instead and "100.00% agreement" in instead
    assert open_artefact(tmp_path / "export", trusted=True).deployed == Runner("fp32", "torch")
    moved |= {"fp32"}
    monkeypatch.setattr(export_module, "installed", list)
    said = export_chosen(model, Runner("bf16", "torch"), tmp_path, images, range(4))
    assert [line.split(":")[0] for line in said] == ["Not exported"] * 2 and not (tmp_path / "export").exists()


def test_an_engine_that_is_not_there_is_refused_before_the_work(model, photos, tmp_path):
    for runner, said in (
        (["tensorrt"], "neither a number type .* nor an engine"),
        ("fp64", "'fp64' is neither"),
        ("bf16 onnx aoti", "is not"),
    ):
        with pytest.raises(UserError, match=said):
            tune(model, photos, "1x", out=tmp_path / "out", runner=runner, **QUICK)


# Time


class Clock:
    """Seconds that pass with the work: so many for each image that a model is given."""

    def __init__(self, patch: pytest.MonkeyPatch, an_image: float) -> None:
        self.now = 0.0
        real = saccade.AdaptiveViT.forward

        def forward(model, images):
            self.now += an_image * len(images)
            return real(model, images)

        patch.setattr(saccade.AdaptiveViT, "forward", forward)

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "an_image, minutes",
    cases([(0.02, 1.0), (0.1, 1.0), (0.1, 4.0), (0.5, 1.0)], product([0.02, 0.1, 0.5], [1.0, 4.0])),
)
def test_a_time_is_kept_to_and_still_says_something(model, photos, few, tmp_path, monkeypatch, an_image, minutes):
    clock = Clock(monkeypatch, an_image)
    found = tune(
        model, photos, "1x", out=tmp_path / "out", minutes=minutes, clock=clock, compiled=False, batch=2, schedules=0
    )
    least = 300 * an_image if an_image > 0.3 else 0.0  # 20 images and four settings are measured whatever it takes
    assert clock.now <= max(60 * minutes, least)
    assert found.rows[0].setting == "dense" and any(row.chosen for row in found.rows)
    assert all(row.value is not None for row in found.rows)


@pytest.mark.parametrize("ratio", [None, 1.5])
def test_once_pricing_is_out_of_time_only_arithmetic_and_tokenizers_alone_are_priced(model, monkeypatch, ratio):
    """A menu of settings that each take a forward does not overdraw the time, and every reduction still has a rival."""
    whole, forwards = candidates_module.candidates(model), []
    real = saccade.AdaptiveViT.forward
    counted = lambda self, images: forwards.append(str(self.setting)) or real(self, images)  # noqa: E731
    monkeypatch.setattr(saccade.AdaptiveViT, "forward", counted)
    found = candidates_module.candidates(model, ratio, enough=lambda: True)
    grids = [c for c in whole.candidates if c.family == "dense" and c.setting != "dense"]
    assert {c.setting for c in grids} <= set(forwards) and all(s.startswith("grid") for s in forwards)
    assert {c.setting for c in grids} < {c.setting for c in found.candidates} < {c.setting for c in whole.candidates}
    assert not any(c.setting.startswith(("topk", "ats")) for c in found.candidates)
    assert any(c.setting.startswith("tome") for c in found.candidates)
    assert found.untried >= len(whole.candidates) - len(found.candidates) and not whole.untried


def test_without_a_time_everything_is_measured(model, photos, few, tmp_path, monkeypatch):
    clock = Clock(monkeypatch, 10.0)
    found = tune(model, photos, "1.2x", out=tmp_path / "out", clock=clock, **QUICK)
    facts = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert facts["facts"]["images"].endswith("21 to choose by, 21 reported") and not facts["notes"]
    assert not found.left_out


CANDIDATES = [Candidate("dense", "dense", 1e9, False)] + [
    Candidate(f"{family}({i})", family, 1e9 - 1e6 * i, False)
    for family, count in (("dense", 10), ("random", 10), ("reduction", 60))
    for i in range(1, count + 1)
]


@pytest.mark.parametrize("seconds", [1.0, 30.0, 120.0, 600.0, 6000.0])
@pytest.mark.parametrize("image", [1e-4, 1e-2, 1.0])
def test_a_plan_fits_or_says_that_it_does_not(seconds, image):
    allowance = Allowance(seconds, clock=lambda: 0.0)
    options = {"images": 2000, "batch": 8, "survivors": 14, "runners": 9, "timing": 30.0, "ratio": 1.5}
    found = plan(CANDIDATES, Costs(image, image), allowance, **options)
    assert 20 <= found.images <= 2000 and found.candidates[0] == CANDIDATES[0]
    assert {c.family for c in found.candidates} == {"dense", "random", "reduction"}
    assert found.seconds <= seconds or found.images == 20
    whole = plan(CANDIDATES, Costs(image, image), Allowance(clock=lambda: 0.0), **options)
    assert whole.images == 2000 and whole.candidates == CANDIDATES and whole.timing >= 30.0


@pytest.mark.parametrize("schedules", [-1, 1.5, True])
def test_what_is_no_number_of_schedules_is_refused(model, photos, tmp_path, schedules):
    with pytest.raises(UserError, match=f"schedules={schedules} is not a whole number"):
        tune(model, photos, "1x", out=tmp_path / "out", schedules=schedules)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), "2", True])
def test_what_is_no_time_is_refused(model, photos, tmp_path, minutes):
    with pytest.raises(UserError, match="minutes="):
        tune(model, photos, "2x", out=tmp_path / "out", minutes=minutes, **QUICK)


def test_timing_that_runs_late_leaves_out_the_last_and_makes_fewer_runs(model, monkeypatch):
    clock = Clock(monkeypatch, 1.0)
    entries = {f"evit({k / 10})": model.at(f"evit({k / 10})").eval() for k in range(3, 10)}
    found = time_all(entries, 1, 100.0, clock=clock, most=40.0)
    assert 4 <= len(found.rows) < 7 and 3 <= found.rows[0].runs < 7
    assert set(found.failed.values()) == {"not timed, to keep within the time"}
    assert [row.setting for row in found.rows] == [*entries][: len(found.rows)]


@pytest.mark.parametrize(
    "setting", ["dynamicvit(0.5)", "evit(0.9) | ltmp(0.5)", "grid(16) | topk(0.5) | dynamicvit(0.7)"]
)
def test_a_method_that_has_learned_nothing_is_no_candidate(few, setting):
    """Though the model says that it was trained for it; from the first change of what it learns on, it is one."""
    plain = tiny()
    model = saccade.AdaptiveViT(plain.vit, "", (setting,)).eval()
    name = "ltmp" if "ltmp" in setting else "dynamicvit"
    for ratio in (None, 1.5):
        priced = candidates_module.candidates(model, ratio)
        assert setting not in [c.setting for c in priced.candidates]
        assert priced.failed[setting] == f"{name} has learned nothing yet: train it, then tune"
        assert not any(name in c.setting for c in priced.candidates)
    model.at(setting)  # what it learns is the model's from now on
    with torch.no_grad():
        for key, weight in model.learned.items():
            if key.startswith(name):
                weight.add_(0.01)
    assert setting not in candidates_module.candidates(model).failed


def test_tune_names_what_is_untrained_and_never_chooses_it(photos, few, tmp_path):
    model = saccade.AdaptiveViT(tiny().vit, "", ("dynamicvit(0.3)",)).eval()
    found = tune(model, photos, "1.1x", out=tmp_path / "out", **QUICK)
    assert "dynamicvit has learned nothing" in found.left_out["dynamicvit(0.3)"]
    assert "dynamicvit" not in found.setting and not any("dynamicvit" in row.setting for row in found.rows)
    assert "dynamicvit has learned nothing" in (tmp_path / "out" / "report.html").read_text()
