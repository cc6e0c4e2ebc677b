"""A latency curve finds the law that times follow, and prices settings that it has not seen by it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from saccade.cli import main
from saccade.core.registry import registry
from saccade.evaluation import latency_curve
from saccade.evaluation.device_curve import device_curve, some_of_each
from saccade.evaluation.latency_curve import LatencyCurve, measure
from saccade.evaluation.schedule import Space
from saccade.evaluation.work import Work, static_work, work_of
from small_runs import tiny

KNOWN = [
    "tome(r=1)",
    "tome(r=8)",
    "evit(0.8, at=(1,))",
    "evit(0.3, at=(0, 1))",
    "grid(16, size=48)",
    "grid(16, size=16)",
]
UNSEEN = [
    "tome(r=2)",
    "tome(r=(0, 5))",
    "evit(0.5, at=(0, 1))",
    "grid(16, size=48) | tome(r=1)",
    "grid(16, size=32) | tome(r=1)",
    "evit(0.6) | tome(r=1)",
]
SITE, TOKEN = {"tome": 0.3, "evit": 0.5}, {"tome": 0.02, "evit": 0.01}


def law(model) -> float:
    """Milliseconds, written out: a block of n tokens takes 1 + n / 10, shared between its halves by their MACs."""
    mosaic = any(call.name == "quadtree" for call in model.setting.calls)
    cost, total = model.backbone.cost, 1 + mosaic * math.prod(model.input_size()) / 2048
    with torch.inference_mode():
        trace = model(torch.zeros(1, 3, *model.input_size())).trace
    prefix = model.backbone.num_prefix

    def half(tokens, attention):
        macs = float(cost.attention(tokens, tokens)), tokens * cost.mlp
        return (1 + tokens / 10) * macs[0 if attention else 1] / sum(macs)

    def alike(macs):
        low, high = 0.0, 1000.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if cost.attention(middle, middle) < macs else (low, middle)
        return low

    for block in trace.blocks:
        total += half(alike(cost.attention(block.queries, block.keys)), True) + half(block.mlp, False)
    for call, method in zip(
        [c for c in model.setting.calls if registry()[c.name].kind == "method"], model.plan.methods, strict=True
    ):
        for at, step in zip(method.at, method.steps, strict=True):
            if call.name not in SITE:
                continue
            came = trace.blocks[at].static_counts[0] - prefix
            others = [s for s in model.plan.at[at] if s is not step]
            came = others[0].count(came) if others and model.plan.at[at][0] is not step else came
            if at < len(trace.blocks) - 1 and step.count(came) != came:  # the last has no patches
                total += SITE[call.name] + TOKEN[call.name] * came
    return total


@pytest.fixture
def lawful(monkeypatch):
    def timed(entries, *args, **options):
        return {name: SimpleNamespace(p50=law(model) / 1000) for name, model in entries.items()}, {}

    monkeypatch.setattr(latency_curve, "interleaved", timed)


def test_settings_that_were_not_timed_are_priced(lawful):
    model = tiny().eval()
    curve = measure(model, KNOWN, batch=1)
    for setting in [*KNOWN, *UNSEEN, "dense", "depth(2)"]:
        view = model.at(setting).eval()
        assert curve.predict(view) == pytest.approx(law(view), rel=1e-6), setting
    assert curve.predict(model.at("pitome(0.7)").eval()) is None, "its deciding was not measured"
    assert curve.predict(model.at("quadtree(7)").eval()) is None, "nor this tokenizer"
    slower = curve.scaled(1.5)
    for setting in KNOWN:
        view = model.at(setting).eval()
        assert slower.predict(view) == pytest.approx(1.5 * law(view), rel=1e-6), setting
    assert LatencyCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve


def test_few_tokens_come_to_a_method_as_well_as_many(lawful):
    """Its strongest setting is timed on the model's own input and on a smaller one, which tells what it takes there."""
    model = tiny().eval()
    some = some_of_each(model)
    tome = [s for s in some if s.rpartition(" | ")[2].startswith("tome")]
    came = [work_of(model.at(s).eval()).deciding["tome"] for s in tome]
    assert len(tome) == 3 and tome[2].startswith("grid(") and tome[2].partition(" | ")[0] in some
    assert tome[2].endswith(tome[1]) and came[2][1] / came[2][0] < 0.7 * came[0][1] / came[0][0]
    curve = measure(model, some, batch=1)
    for setting in ("tome(r=3)", "grid(16, size=32) | tome(r=1)"):
        view = model.at(setting).eval()
        assert curve.predict(view) == pytest.approx(law(view), rel=1e-6), setting


def test_a_tokenizer_that_was_not_timed_takes_what_its_family_does(lawful):
    model = tiny().eval()
    menu = registry()["quadtree"].menu(model.backbone)
    small, large = ([s for s in menu if size in s] for size in ("size=64", "size=128"))
    assert len({*map(latency_curve.family, small)}) == 1 and len(small) > 2 and large
    assert latency_curve.family("grid(16, size=48)") == latency_curve.family("grid(32)") == ""
    curve = measure(model, [small[0], small[-1], *KNOWN], batch=1)
    for setting in [*small, f"{small[1]} | tome(r=1)"]:
        view = model.at(setting).eval()
        assert curve.predict(view) == pytest.approx(law(view), rel=1e-6), setting
    assert curve.predict(model.at(large[0]).eval()) is None, "of another size none was timed"


def test_a_number_of_tokens_that_a_kernel_does_not_like_is_told_from_others(lawful, monkeypatch):
    """Where the blocks of a smaller input take longer than the line through their neighbours: there alone."""
    model, slow = tiny().eval(), "grid(16, size=48)"

    def timed(entries, *args, **options):
        extra = {name: 3.0 * str(view.setting).startswith(slow) for name, view in entries.items()}
        return {name: SimpleNamespace(p50=(law(view) + extra[name]) / 1000) for name, view in entries.items()}, {}

    monkeypatch.setattr(latency_curve, "interleaved", timed)
    cut = latency_curve._cuts(model)
    monkeypatch.setattr(latency_curve, "_cuts", lambda _: [s for s in cut if not s.startswith("cut(9,")])
    curve = measure(model, KNOWN, batch=1)
    view = model.at(slow).eval()
    assert curve.predict(view) == pytest.approx(law(view) + 3.0, rel=1e-6)
    early = model.at(f"{slow} | evit(0.3, at=(0,))").eval()
    assert law(early) < curve.predict(early) < law(early) + 2.0, "most of its blocks have fewer tokens"


def test_a_model_of_few_patches_has_a_curve(lawful):
    """Of three patches 85 % are three: a block of all tokens is timed once."""
    model = tiny(img_size=(16, 48)).eval()
    curve = measure(model, [], batch=1)
    assert len({*curve.tokens}) == len(curve.tokens) == 3
    assert curve.predict(model.at("dense").eval()) == pytest.approx(law(model.at("dense").eval()), rel=1e-6)


@pytest.mark.parametrize("shape", [{"img_size": (16, 48)}, {"img_size": 16}, {"num_classes": 0}], ids=str)
def test_models_of_any_shape_have_points(lawful, shape):
    """Few patches, or one, or no classes: what is timed runs, and the curve tells what was timed of dense."""
    model = tiny(**shape).eval()
    curve = measure(model, some_of_each(model), batch=1)
    dense = model.at("dense").eval()
    assert curve.predict(dense) == pytest.approx(law(dense), rel=1e-6)


def test_a_schedule_is_priced_without_being_run(lawful):
    model = tiny().eval()
    space, curve = Space.of(model), measure(model, KNOWN, batch=1)
    rule = next(r for r in space.rules if r.method == "tome")
    for tokenizer in ("", "grid(16, size=48)"):
        some = space.scaled(space.shaped(tokenizer, {rule: 1.0}, [1.0, 2.0, 0.0]), 5)
        assert curve.schedule_ms(space, some) == pytest.approx(law(model.at(str(space.setting(some))).eval()), rel=1e-6)
    unknown = space.shaped("", {next(r for r in space.rules if r.method == "mctf"): 1.0}, [0.0, 1.0, 0.0])
    assert curve.schedule_ms(space, unknown) == float("inf")


@pytest.mark.parametrize("setting", ["dense", "tome(r=3)", "evit(0.5)", "tome(r=2) | evit(0.7, at=(1, 2))", "depth(2)"])
def test_work_is_what_a_forward_says(setting):
    model = tiny().at(setting).eval()
    with torch.inference_mode():
        trace = model(torch.zeros(1, 3, *model.input_size())).trace
    work = work_of(model)
    cost = model.backbone.cost
    for block, n, m in zip(trace.blocks, work.attention, work.mlp, strict=True):
        assert float(cost.attention(n, n)) == pytest.approx(float(cost.attention(block.queries, block.keys)))
        assert m == block.mlp
    assert work_of(model) == static_work(model.backbone, [("x", m) for m in ()]) or setting not in ("dense",)


def test_sites_that_compare_no_tokens_are_another_kind():
    """Of a method that counts in several ways; their deciding takes less time."""
    model = tiny().eval()
    both = work_of(model.at("diffrate(prune=(2, 2), merge=(0, 3))").eval()).deciding
    assert both == {"diffrate, by rank alone": (1.0, 16.0, 3.0), "diffrate": (1.0, 14.0, 2.0)}
    on_grid = work_of(model.at("grid(16, size=48) | diffrate(prune=(2, 2), merge=(0, 3))").eval()).deciding
    assert on_grid == {"diffrate, by rank alone": (1.0, 9.0, 3.0), "diffrate": (1.0, 7.0, 2.0)}
    known = {kind for setting in some_of_each(model) for kind in work_of(model.at(setting).eval()).deciding}
    assert both.keys() <= known


def test_work_of_what_depends_on_the_image_comes_from_a_forward():
    model = tiny().at("topk(0.5) | ats(0.8)").eval()
    work = work_of(model)
    assert {*work.deciding} == {"topk", "ats"} and len(work.attention) == 3
    dense = work_of(tiny().eval())
    assert sum(work.mlp) < sum(dense.mlp)


@pytest.mark.parametrize(
    "damage", [{"block": [1.0]}, {"tokens": ["x"]}, {"cost": {"dim": 1}}, {"methods": {"a": [1, 2]}}]
)
def test_what_is_no_curve_is_refused(lawful, damage):
    told = {**measure(tiny().eval(), [], batch=1).to_dict(), **damage}
    with pytest.raises((ValueError, TypeError, KeyError)):
        LatencyCurve.from_dict(json.loads(json.dumps(told)))


def test_doctor_measures_a_curve_once_and_prints_it(lawful, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny().eval()
    found = device_curve(model, batch=2)
    assert found.table().rows[0][0] == "a block of 2 tokens" and "fp32, batch 2" in found.table().title
    assert any(row.part == "tome: deciding, a block" and row.each_token_us is not None for row in found.rows)
    monkeypatch.setattr(latency_curve, "interleaved", None)  # it is not measured again
    assert device_curve(model, batch=2).curve == found.curve
    (file,) = (tmp_path / "saccade").glob("latency-*.json")
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(TypeError):
        device_curve(model, batch=2)  # what is damaged is


def test_settings_of_the_menu_are_known_to_the_curve(lawful, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny().eval()
    curve = device_curve(model).curve
    menu = [s for entry in registry().values() for s in entry.menu(model.backbone)]
    unknown = [s for s in menu if curve.predict(model.at(s).eval()) is None]
    assert not unknown and len(menu) > 20


def test_what_a_graph_masks_is_not_told_by_what_pytorch_skips(lawful):
    model = tiny().eval()
    curve = measure(model, ["ats(0.5)"], batch=1)
    assert curve.predict(model.at("ats(0.5)").eval()) is not None
    exported = replace(curve, runner="fp32 openvino")
    assert exported.predict(model.at("ats(0.5)").eval()) is None
    assert exported.predict(model.at("depth(2)").eval()) is not None


def test_deciding_takes_no_less_than_nothing():
    """What is told of other numbers of tokens lies between times by sites and times by tokens."""
    exact = [(12.0, 2000.0, 12.0), (12.0, 1000.0, 12.0)]
    assert latency_curve._deciding(exact, [6.2, 5.1]) == pytest.approx((4.0 / 12, 0.0011, 0.0))
    assert latency_curve._deciding(exact, [5.0, 6.0]) == pytest.approx((5.5 / 12, 0.0, 0.0)), "fewer took longer"
    assert latency_curve._deciding(exact, [6.0, 2.9]) == pytest.approx((0.0, (2000 * 6 + 1000 * 2.9) / 5e6, 0.0))
    assert latency_curve._deciding(exact[:1], [6.0]) == pytest.approx((0.5, 0.0, 0.0))
    assert latency_curve._deciding(exact, [-1.0, -2.0]) == (0.0, 0.0, 0.0)
    few = (3.0, 400.0, 9.0)  # blocks behind take longer too
    told = [0.2 * sites + 0.001 * tokens + 0.3 * behind for sites, tokens, behind in [*exact, few]]
    assert latency_curve._deciding([*exact, few], told) == pytest.approx((0.2, 0.001, 0.3))


def test_blocks_behind_two_methods_go_by_sizes_once():
    cost = tiny().backbone.cost
    curve = LatencyCurve("fp32", 1, cost, (2.0, 17.0), (1.0, 2.0), {}, {"a": (0.1, 0.0, 0.5), "b": (0.2, 0.0, 0.4)})
    work = Work((), (), {"a": (1.0, 10.0, 4.0), "b": (2.0, 20.0, 6.0)})
    assert curve.deciding(work) == pytest.approx(0.1 + 0.4 + 0.4 * 6)
    assert curve.deciding(Work((), (), {})) == 0.0


def test_the_curve_is_drawn_as_a_page(lawful, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = device_curve(tiny().eval(), batch=2)
    page = found.page()
    assert page.count("<svg") >= 4, "two figures in two layouts"
    assert f"{round(found.curve.tokens[0])} tokens: " in page and ">tome</text>" in page
    deciding = found.curve.decision_ms()
    assert deciding["tome"] == pytest.approx(SITE["tome"] + TOKEN["tome"] * found.curve.tokens[-1])
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--out", str(tmp_path / "page.html")])
    assert "is for a curve: give --curve MODEL" in capsys.readouterr().err
