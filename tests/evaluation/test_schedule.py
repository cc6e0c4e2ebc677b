"""Schedules: priced as they run, within their budget, moved at random by a seed, found nearer than they start."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

import saccade
from data_helpers import encode, picture, write_folder
from saccade.data import open_images
from saccade.evaluation.allowance import Allowance
from saccade.evaluation.candidates import Target
from saccade.evaluation.defined import NonFinite
from saccade.evaluation.distance import Distance
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.schedule import Rule, Schedule, Space, by_macs
from saccade.evaluation.schedule_candidates import _apart, _ranked, schedules
from saccade.evaluation.schedule_price import macs
from saccade.evaluation.schedule_search import FoundSchedules, ScheduleSearch, never
from saccade.evaluation.schedule_starts import Starts, Tried
from saccade.evaluation.tune import search
from saccade.model import AdaptiveViT
from saccade.setting import Setting
from small_runs import shorten, tiny

IMAGES = 20


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory) -> Evaluator:
    files = {f"{i:02}.png": encode(picture(70, 66, seed=i)) for i in range(IMAGES)}
    return Evaluator(tiny(), open_images(write_folder(tmp_path_factory.mktemp("photos"), files)))


@pytest.fixture(scope="module")
def space(evaluator) -> Space:
    return Space.of(evaluator.dense)


def some_schedules(space: Space, count: int) -> list[Schedule]:
    draw = random.Random(0)
    lists = [[[draw.randrange(3) for _ in range(space.depth)] for _ in space.rules] for _ in range(count)]
    return [Schedule(draw.choice(space.tokenizers), tuple(map(tuple, one))) for one in lists]


def test_the_space_holds_every_method_that_takes_counts_and_smaller_inputs(space):
    methods = {rule.method for rule in space.rules}
    assert {"tome", "tofu", "mctf", "diffrate"} <= methods
    assert "" in space.tokenizers and any("size=48" in t for t in space.tokenizers)
    assert [r.knob for r in space.rules if r.method == "diffrate"] == ["prune", "merge"]


def test_macs_of_a_schedule_are_those_that_run(evaluator, space):
    for schedule in [space.empty(t) for t in space.tokenizers] + some_schedules(space, 30):
        view = evaluator.dense.at(str(space.setting(schedule))).eval()
        with torch.inference_mode():
            ran = view(torch.randn(1, 3, *view.input_size())).trace.macs().item()
        assert space.macs(schedule) == ran, space.setting(schedule)


def test_a_schedule_is_brought_just_within_a_budget(space):
    for schedule in some_schedules(space, 20):
        start = space.macs(space.empty(schedule.tokenizer))
        found = space.within(schedule, by_macs, limit := 0.7 * start)
        if found is None:
            continue
        assert space.macs(found) <= limit
        weaker = space.scaled(schedule, found.total - 1)
        assert space.macs(weaker) > limit and found.tokenizer == schedule.tokenizer
    assert space.within(space.empty(""), by_macs, 1.0) is None


def test_scaling_keeps_a_total_and_the_shape(space):
    for schedule in some_schedules(space, 10):
        for total in (0, 1, 7, 100):
            scaled = space.scaled(schedule, total)
            assert scaled.total == total and all(c >= 0 for counts in scaled.counts for c in counts)
            exact = [[c * total / schedule.total for c in counts] for counts in schedule.counts]
            assert all(
                abs(a - b) <= 1 for x, y in zip(scaled.counts, exact, strict=True) for a, b in zip(x, y, strict=True)
            )


def test_a_move_keeps_the_tokens_that_leave_and_follows_its_seed(space):
    start = some_schedules(space, 1)[0]
    moved = [space.moved(start, random.Random(i)) for i in range(40)]
    assert all(m.total == start.total and m.tokenizer in space.tokenizers for m in moved)
    assert moved == [space.moved(start, random.Random(i)) for i in range(40)]
    assert len(set(moved)) > 20 and any(m.tokenizer != start.tokenizer for m in moved)
    reached = {
        rule.method
        for m in moved
        for rule, counts, before in zip(space.rules, m.counts, start.counts, strict=True)
        if sum(counts) > sum(before)
    }
    assert reached >= {rule.method for rule in space.rules}


def test_where_a_tokenizer_alone_is_within_the_budget_it_may_be_found(evaluator, space):
    """A schedule of no token has no block to be sensitive at, and nothing to move but its tokenizer."""
    small = min(space.tokenizers, key=space.tokens)
    limit = space.macs(space.empty(small))
    search = ScheduleSearch(space, Distance(evaluator, range(IMAGES)), by_macs, limit, tries=60)
    assert search.run().nearest
    assert space.moved(space.empty(small), random.Random(0)).counts == space.empty(small).counts
    starts = Starts(space, by_macs, limit, search.judge, lambda: False)
    assert starts._by_sensitivity(space.empty(small)) is None


def test_a_setting_is_written_without_what_does_nothing(space):
    assert str(space.setting(space.empty(""))) == "dense"
    rule = next(r for r in space.rules if r.method == "tome")
    only = space.scaled(space.shaped("", {rule: 1.0}, [0.0, 1.0, 1.0]), 9)
    assert str(space.setting(only)) == "tome(r=(0, 4, 5))"


def test_a_setting_is_short_and_hardly_used_rules_are_gone(space):
    of = {(r.method, r.knob): i for i, r in enumerate(space.rules)}
    counts = [[0, 0, 0] for _ in space.rules]
    counts[of["diffrate", "prune"]] = [0, 1, 0]
    counts[of["tome", "r"]] = [9, 12, 0]
    some = Schedule("", tuple(map(tuple, counts)))
    assert str(space.setting(some)) == "diffrate(prune=(0, 1), merge=0) | tome(r=(9, 12))"
    assert str(space.setting(space.tidied(some))) == "tome(r=(9, 13))" and space.tidied(some).total == some.total
    counts[of["diffrate", "prune"]] = [0, 5, 0]
    even = Schedule("", tuple(map(tuple, counts)))
    assert space.tidied(even) == even


@torch.no_grad()
def test_distance_is_the_share_of_probability_that_has_gone_elsewhere(evaluator):
    places = list(range(IMAGES))
    distance = Distance(evaluator, places)
    assert distance.images == IMAGES and distance.of("dense") == pytest.approx([0.0, 0.0], abs=1e-9)
    found = distance.of("tome(r=4)")
    total, model = 0.0, evaluator.dense
    for place in places:
        image = evaluator.preprocess()(evaluator.images.read(place)).unsqueeze(0)
        p, q = (m(image).logits.double().softmax(-1)[0] for m in (model, model.at("tome(r=4)").eval()))
        total += sum(max(0.0, (a - b).item()) for a, b in zip(p, q, strict=True))
    assert sum(found) == pytest.approx(total, rel=1e-4)
    assert len(distance.of("tome(r=4)", least=[found[0] / 2, 0.0])) == 1, "given up"
    assert distance.of("tome(r=4)", batches=1) == found[:1]


def test_an_encoder_is_judged_by_the_cosine_of_its_embedding(tmp_path):
    files = {f"{i:02}.png": encode(picture(70, 66, seed=i)) for i in range(6)}
    encoder = tiny(num_classes=0)
    evaluator = Evaluator(encoder, open_images(write_folder(tmp_path / "photos", files)))
    (found,) = Distance(evaluator, range(6)).of("grid(16, size=48)")
    cosine = torch.nn.functional.cosine_similarity
    batch = {size: evaluator._loaders.of(evaluator.preprocess((size, size))).batches(6, range(6)) for size in (64, 48)}
    a, b = (next(iter(batches)).images for batches in batch.values())
    with torch.inference_mode():
        mine = 1 - cosine(encoder.eval()(a).logits, encoder.at("grid(16, size=48)").eval()(b).logits)
    assert found == pytest.approx(mine.double().sum().item(), rel=1e-4)


def found_by(evaluator, space, tries, **more):
    distance = Distance(evaluator, range(IMAGES))
    limit = space.macs(space.empty("")) / 1.5
    search = ScheduleSearch(space, distance, by_macs, limit, tries=tries, **more)
    return search.run(), distance, limit


def test_the_search_comes_nearer_within_its_budget_and_goes_on_where_it_stopped(evaluator, space, tmp_path):
    start, distance, limit = found_by(evaluator, space, 0)
    found, *_ = found_by(evaluator, space, start.tried + 40)
    assert found.nearest[0].distance < start.nearest[0].distance
    assert found.starts == start.nearest == start.starts
    assert [t.distance for t in found.nearest] == sorted(t.distance for t in found.nearest)
    for tried in found.nearest:
        assert space.macs(tried.schedule) <= limit
        setting = str(space.setting(tried.schedule))
        assert sum(distance.of(setting)) == pytest.approx(tried.distance)
        assert str(Setting.parse(setting)) == setting
    file = tmp_path / "search.json"
    found_by(evaluator, space, start.tried + 15, file=file, key="a")
    assert found_by(evaluator, space, start.tried + 40, file=file, key="a")[0] == found, "went on"
    assert found_by(evaluator, space, start.tried + 40, file=file, key="b")[0] == found, "another's is not taken up"
    file.write_text('{"key": "b", "tried": 5, "population": [["", [[1]], [0.0]]]}', encoding="utf-8")
    assert found_by(evaluator, space, start.tried + 40, file=file, key="b")[0] == found, "nor what does not fit"


def test_a_search_without_time_is_made_again(evaluator, space, tmp_path):
    file = tmp_path / "search.json"
    none, *_ = found_by(evaluator, space, 10, file=file, key="a", enough=lambda: True)
    assert none.nearest == [] and not file.exists()
    assert found_by(evaluator, space, 0, file=file, key="a")[0].nearest
    spent = Allowance(300.0, clock=iter([0.0, *[10.0] * 3, *[100.0] * 10_000]).__next__)
    found = schedules(evaluator, range(IMAGES), partial(macs, ratio=1.5), spent, folder=tmp_path)
    assert found.candidates == [] and found.note == "time did not suffice for a schedule"


def test_only_schedules_that_ran_are_counted_as_tried(evaluator, space, monkeypatch):
    ran = []
    real = Distance.of
    monkeypatch.setattr(Distance, "of", lambda self, setting, *rest: ran.append(setting) or real(self, setting, *rest))
    found, *_ = found_by(evaluator, space, 120)
    assert found.tried == len(ran) <= 120


def test_answers_that_are_not_finite_are_far_away(space, evaluator):
    vit = copy.deepcopy(evaluator.dense.vit)
    scale = [1.0]
    vit.head.register_forward_hook(lambda module, given, out: out * scale[0])
    own = Evaluator(AdaptiveViT(vit), evaluator.images)
    distance = Distance(own, range(4))
    scale[0] = float("nan")
    with pytest.raises(NonFinite, match=r"`tome\(r=1\)` hold NaN or infinity"):
        distance.of("tome(r=1)")
    assert ScheduleSearch(Space.of(own.dense), distance, by_macs, 1.0).judge(space.empty("grid(32)"), (), 1) is None


def test_starts_are_the_best_of_plain_shapes(evaluator, space):
    """No uniform schedule of any rule, brought to the budget, is nearer than the nearest start."""
    start, distance, limit = found_by(evaluator, space, 0)
    for rule in space.rules:
        flat = space.within(space.shaped("", {rule: 1.0}, [1.0] * space.depth), by_macs, limit)
        if flat is not None and rule.method != "diffrate":
            assert start.nearest[0].distance <= sum(distance.of(str(space.setting(flat)))) + 1e-9


def test_a_rule_that_fails_is_left_out(evaluator, space, monkeypatch):
    real = Distance.of

    def of(self, setting, *args, **more):
        if "tofu" in setting:
            raise RuntimeError("no")
        return real(self, setting, *args, **more)

    monkeypatch.setattr(Distance, "of", of)
    found, *_ = found_by(evaluator, space, 60)
    assert found.nearest and not any("tofu" in str(space.setting(t.schedule)) for t in found.nearest)


def test_tune_races_schedules_and_says_from_how_many(evaluator, space, monkeypatch):
    target = Target.of(gmacs=space.macs(space.empty("")) / 1.4e9)
    images, photos = evaluator.images, list[int]()
    shorten(monkeypatch)
    monkeypatch.setattr(Distance, "__init__", _seen(photos, Distance.__init__))
    found = search(evaluator.dense, images, target, compiled=False, seconds=0.0, batch=2, schedules=40)
    searched = [m.option.candidate for m in found.measured if m.option.candidate.tried]
    assert photos and not {*photos} & {*found.report_places}, "the reported half had no part"
    assert any(
        "schedules were tried on 10 of the images that choose" in note and "of MACs" in note for note in found.notes
    )
    assert all(c.tried >= 40 and evaluator.dense.at(c.setting) for c in searched)


def test_what_is_found_on_few_images_is_ranked_by_more_beside_what_it_started_from(evaluator, space):
    """A move that suits the few does not pass a plain shape that is nearer on the many."""
    far, near = Tried(some_schedules(space, 1)[0], (0.0,)), Tried(space.empty(""), (9.0,))
    found = FoundSchedules([far], [near, far], 40, 2)
    assert _ranked(evaluator, range(IMAGES), space, found, never) == ([near, far], IMAGES)
    assert _ranked(evaluator, range(IMAGES), space, found, lambda: True) == ([far, near], 2), "no time is left"
    assert _ranked(evaluator, range(2), space, found, never) == ([far, near], 2), "there are no more"


def test_the_race_has_the_nearest_of_each_tokenizer(space):
    a, b, c, d = (Tried(schedule, (0.0,)) for schedule in some_schedules(space, 4))
    a, b, c, d = (
        replace(t, schedule=replace(t.schedule, tokenizer=n)) for t, n in zip((a, b, c, d), "xxyx", strict=True)
    )
    assert _apart([a, b, c, d]) == [a, c, b, d]


def _seen(photos, real):
    def init(self, evaluator, places, *args):
        photos.extend(places)
        real(self, evaluator, places, *args)

    return init


def test_no_schedules_where_none_are_asked_for_or_time_is_short(evaluator):
    assert schedules(evaluator, range(IMAGES), partial(macs, ratio=1.5), Allowance(), tries=0).candidates == []
    assert schedules(evaluator, range(IMAGES), partial(macs, ratio=1.5), Allowance(120.0)).candidates == []
    none = schedules(evaluator, range(IMAGES), partial(macs, ratio=50.0), Allowance(), tries=1)
    assert none.candidates == [] and none.note == "no schedule is within the budget"


def test_rules_keep_the_other_knobs_of_the_menu():
    shape = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
    space = Space.of(saccade.create_model("vit_tiny_patch16_224", global_pool="avg", class_token=False, **shape))
    assert Rule("diffrate", "prune", (("score", "received"),)) in space.rules


def test_a_report_shows_the_curve_that_schedules_were_priced_by(evaluator, monkeypatch, tmp_path):
    shorten(monkeypatch)
    given = {"runner": ["fp32"], "seconds": 0.0, "batch": 2, "schedules": 5}
    found = saccade.tune(evaluator.dense, evaluator.images, "1.2x", out=tmp_path / "time", **given)
    assert any("milliseconds in fp32, batch 2" in row or "within the budget" in row for row in _notes(found))
    assert "A block&#x27;s time by its tokens" in _page(found) or "A block's time by its tokens" in _page(found)
    plain = saccade.tune(evaluator.dense, evaluator.images, gmacs=1e-3, out=tmp_path / "macs", **given)
    assert "time by its tokens" not in _page(plain), "MACs need no curve"


def _notes(found) -> list[str]:
    return json.loads((found.folder / "frontier.json").read_text(encoding="utf-8"))["notes"]


def _page(found) -> str:
    return (found.folder / "report.html").read_text(encoding="utf-8")
