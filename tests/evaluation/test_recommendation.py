"""What ``tune`` chooses and says: hand-made searches, in which speed, halves of the images and families disagree."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.evaluation.answers import Predictions
from saccade.evaluation.candidates import Candidate, Target
from saccade.evaluation.metric import Metric
from saccade.evaluation.options import Measured, Option, Search
from saccade.evaluation.recommendation import SURE, _is_tie, by_importance, choose, conclude, difference
from saccade.evaluation.speed import Speed
from saccade.evaluation.stats import Interval, paired_difference, proportion
from saccade.runners.runner import Runner


def said(hits: list[int]) -> Predictions:
    """Class 1, which is the true one, or 0."""
    zeros, value = torch.zeros(len(hits)), torch.tensor(hits).double()
    top, none = torch.tensor(hits).long().unsqueeze(1), torch.empty(len(hits), 0)
    return Predictions(torch.arange(len(hits)), top, zeros, zeros, zeros.double(), zeros.double(), value, value, none)


def measured(
    setting: str,
    hits: list[int],
    speedup: float,
    family: str = "reduction",
    selection: list[int] | None = None,
    **options,
) -> Measured:
    """An option with these hits on the reporting half; on the other half it does the same unless told."""
    gmacs = options.pop("gmacs", 1 / speedup)
    candidate = Candidate(setting, family, gmacs * 1e9, False)
    speed = Speed(
        setting, "fp32", 8, 100.0, 20 / speedup, 0, 0, speedup, speedup, speedup, 1 / gmacs, 1.0, gmacs, 9, 1, "", 7
    )
    row = SimpleNamespace(images=len(hits), value=proportion(torch.tensor(hits).bool()), delta=Interval(0.0, 0.0, 0.0))
    chosen_by = hits if selection is None else selection
    share = sum(chosen_by) / len(chosen_by)
    return Measured(Option(candidate, Runner(**options)), speed, share, 0.5, row, said(hits), said(chosen_by))


def judge(metric: str = "top-1") -> SimpleNamespace:
    """What knows the metric of each image, in its own unit."""
    found = Metric(metric)
    return SimpleNamespace(
        values=lambda p: p.value, merits=lambda p: found.scale.merit(1.0) * p.value, labels=None, metric=found
    )


JUDGE = judge()
GOOD, FAIR, POOR = [1, 1, 1, 1, 0] * 40, [1, 1, 1, 0, 0] * 40, [1, 1, 0, 0, 0] * 40
DENSE = measured("dense", GOOD, 1.0, "dense")


def search(target: Target, *options: Measured) -> Search:
    return Search(target, [DENSE, *options], "top-1", evaluator=JUDGE, selection_images=200)


def verdict(target: Target, *options: Measured):
    return conclude(search(target, *options))


def test_a_reduction_that_beats_plain_dense_is_used():
    found = verdict(Target("speedup", 1.5), measured("evit(0.5)", GOOD, 1.6), measured("grid(32)", FAIR, 1.6, "dense"))
    assert found.chosen.option.name == "evit(0.5)" and found.met
    assert found.lines[0].startswith("Use `evit(0.5)`: 1.60× as fast as dense on this machine, batch 8")
    assert any("without reducing tokens: `grid(32)`" in line and "+20.0 points" in line for line in found.lines)


def test_the_parts_of_a_gain_are_told_apart():
    whole = measured("evit(0.5)", GOOD, 3.0, dtype="bf16", engine="openvino")
    found = verdict(
        Target("speedup", 1.5), whole, measured("dense", FAIR, 2.0, "dense", dtype="bf16", engine="openvino")
    )
    assert found.chosen is whole
    assert "Of its 3.00×, 2.00× is the runner's (bf16 openvino), 1.50× the setting's." in found.lines


@pytest.mark.parametrize("plain", [GOOD, FAIR])
def test_where_plain_dense_is_as_good_no_reduction_is_needed(plain):
    found = verdict(Target("speedup", 1.5), measured("evit(0.5)", FAIR, 1.6), measured("grid(32)", plain, 1.6, "dense"))
    assert found.chosen.option.name == "grid(32)" and found.met
    assert found.lines[0].startswith("No token reduction is needed: use `grid(32)`")
    assert any("token reduction: `evit(0.5)`" in line for line in found.lines)


def test_the_demos_contradiction_does_not_happen():
    """dense · bf16 at 1.90× was chosen beside a reduction that is faster and better."""
    plain = measured("dense", FAIR, 1.9, "dense", dtype="bf16")
    reduced = measured("evit(0.6)", GOOD, 3.0, dtype="bf16")
    assert verdict(Target("speedup", 1.5), plain, reduced).chosen is reduced
    assert verdict(Target("drop", 0.5), plain, reduced).chosen is reduced


def test_a_tie_within_noise_goes_to_the_faster_and_says_so():
    one_more = [*FAIR[:-1], 1]  # one image of 200
    slow, fast = measured("tome(r=4)", one_more, 1.6), measured("evit(0.5)", FAIR, 2.4)
    found = verdict(Target("speedup", 1.5), slow, fast)
    assert found.chosen is fast
    assert any("`tome(r=4)`" in line and "0.5 points better, which is within noise" in line for line in found.lines)
    clear = verdict(Target("speedup", 1.5), measured("tome(r=4)", GOOD, 1.6), fast)
    assert clear.chosen.option.name == "tome(r=4)"


def test_a_slower_reduction_has_to_be_surely_better_than_what_reduces_nothing():
    """Four images of 200 more than dense in another engine, at two thirds of its speed: chosen once, and a surprise."""
    plain = measured("dense", [1] * 194 + [0] * 5 + [1], 3.1, "dense", dtype="bf16")
    ahead = measured("evit(0.9)", [1] * 199 + [0], 2.1, dtype="bf16")  # five gained, one lost
    found = verdict(Target("speedup", 1.5), plain, ahead)
    assert found.chosen is plain and found.lines[0].startswith("No token reduction is needed: use `dense · bf16`")
    assert any(
        "`evit(0.9) · bf16`" in x and "two standard errors): so the faster one, which reduces" in x for x in found.lines
    )
    slower = measured("dense", plain.found.value.int().tolist(), 1.9, "dense", dtype="bf16")
    assert verdict(Target("speedup", 1.5), slower, ahead).chosen is ahead, "of the slower one nothing is expected"
    surely = measured("dense", [1] * 184 + [0] * 15 + [1], 3.1, "dense", dtype="bf16")
    assert verdict(Target("speedup", 1.5), surely, ahead).chosen is ahead, "fifteen gained, one lost"


def test_few_images_do_not_leave_a_good_reduction_for_a_far_smaller_input():
    """Of 42 images six fewer are within two standard errors; a loss of 14 points is nothing to choose by speed."""
    whole = measured("dense", [1] * 31 + [0] * 11, 2.2, "dense", dtype="bf16")
    merged = measured("tome(r=15)", [1] * 30 + [0] * 12, 2.8, dtype="bf16")
    swapped = [0] * 8 + [1] * 22 + [0] * 10 + [1] * 2  # eight lost, two gained
    small = measured("grid(28)", swapped, 3.1, "dense")
    mosaic = measured("quadtree(79, size=256)", swapped, 4.6, dtype="bf16")
    assert _is_tie(small, merged, JUDGE, SURE) and not _is_tie(small, merged, JUDGE)
    assert verdict(Target("speedup", 2.0), whole, merged, small, mosaic).chosen is merged


halves = st.lists(st.booleans(), min_size=20, max_size=20)


@given(
    st.lists(st.tuples(st.floats(0.5, 4.0), halves, halves, st.sampled_from(["dense", "reduction"])), min_size=1),
    st.sampled_from([Target("speedup", 1.0), Target("speedup", 2.0), Target("drop", 0.2), Target("ms", 12.0)]),
)
def test_what_is_chosen_is_never_beaten_and_is_what_the_words_say(options, target):
    found = [
        measured(f"m({i})", list(map(int, report)), speed, family, list(map(int, select)))
        for i, (speed, select, report, family) in enumerate(options)
    ]
    asked = search(target, *found)
    result = conclude(asked)
    fit = [m for m in asked.measured if m.meets(target, DENSE)]
    assert result.met is bool(fit)
    name = result.chosen.option.name
    assert f"`{name}`" in result.lines[0] or (name == "dense" and "the model as it is" in result.lines[0])
    if not fit:
        return
    assert result.chosen in fit
    own = result.chosen
    assert not any(
        m.speed.speedup >= own.speed.speedup
        and m.selection >= own.selection
        and (m.speed.speedup, m.selection) != (own.speed.speedup, own.selection)
        for m in fit
    )
    ordered = by_importance(asked)
    assert ordered[0] is DENSE and own in ordered[:2] and len(ordered) == len(asked.measured)
    assert choose(fit, asked)[0] is own


def test_rows_that_look_better_are_explained():
    lucky = measured("tome(r=8)", GOOD, 2.0, selection=POOR)
    found = verdict(Target("speedup", 1.5), measured("evit(0.5)", FAIR, 1.6), lucky)
    assert found.chosen.option.name == "evit(0.5)"
    assert any("`tome(r=8)` is faster and better on the reported images, but was 20.0 points" in x for x in found.lines)
    equal = measured("tome(r=8)", FAIR, 2.0, selection=POOR)
    found = verdict(Target("speedup", 1.5), measured("evit(0.5)", FAIR, 1.6), equal)
    assert any("`tome(r=8)` is faster and as good on the reported images, but was 20.0" in x for x in found.lines)
    dear = measured("tome(r=8)", GOOD, 2.0, gmacs=0.9)
    found = verdict(Target("gmacs", 0.7), measured("evit(0.5)", FAIR, 1.6), dear)
    assert any("`tome(r=8)`" in line and "not within the target (0.7 GMACs)" in line for line in found.lines)


def test_it_is_said_whether_so_many_images_can_tell():
    tell = verdict(Target("speedup", 1.5), measured("evit(0.5)", FAIR, 1.6))
    assert "200 images can tell: that loss is real, at least" in tell.lines[1]
    others = [1 - hit for hit in GOOD[:5]]  # four lost, one gained
    few = verdict(Target("speedup", 1.5), measured("evit(0.5)", [*others, *GOOD[5:]], 1.6))
    assert few.lines[1].startswith("200 images cannot tell it from no loss at all, nor from a loss of ")
    assert few.lines[1].endswith(" labelled images would tell one point.")


def test_nothing_meets_the_target():
    found = verdict(
        Target("speedup", 9.0), measured("evit(0.5)", FAIR, 1.6), measured("random(0.4)", POOR, 2.0, "random")
    )
    assert not found.met
    assert found.lines[0].startswith("No: nothing here is within the target (9× faster). The fastest is `evit(0.5)`")
    assert found.chosen.option.name == "evit(0.5)"  # a baseline is nothing to deploy


def test_only_token_reduction_gets_there():
    lines = verdict(Target("speedup", 1.5), measured("evit(0.5)", FAIR, 1.6)).lines
    assert "Only token reduction gets there." in lines
    alone = verdict(Target("speedup", 1.5), measured("grid(32)", FAIR, 1.6, "dense"))
    assert alone.lines[0].startswith("No token reduction gets there: use `grid(32)`") and "Only token" not in " ".join(
        alone.lines
    )


def test_a_chosen_reduction_is_held_against_the_random_baseline():
    found = verdict(
        Target("speedup", 1.5),
        measured("evit(0.5)", FAIR, 1.6),
        measured("random(0.5)", POOR, 1.6, "random"),
        measured("random(0.9)", GOOD, 1.1, "random"),
    )
    assert found.chosen.option.name == "evit(0.5)"
    assert found.lines[-1].startswith("Against the random baseline `random(0.5)`") and "+20.0 points" in found.lines[-1]
    assert "chance" not in " ".join(found.lines)


def test_targets_are_met_by_their_own_measure():
    option = measured("evit(0.5)", FAIR, 1.6, gmacs=0.5)  # 12.5 ms
    for kind, inside, outside in [("speedup", 1.6, 1.7), ("gmacs", 0.5, 0.4), ("ms", 12.5, 12.4), ("drop", 0.2, 0.19)]:
        assert option.meets(Target(kind, inside), DENSE)
        assert not option.meets(Target(kind, outside), DENSE)


def test_differences_are_paired():
    a, b = measured("a", [1, 0] * 50, 1.0), measured("b", [0, 1] * 50, 1.0)
    assert difference(a, a, JUDGE).three() == (0, 0, 0)
    assert difference(a, b, JUDGE).high > 0.1  # as often right, on other images


@pytest.mark.parametrize("count", [1, 2, 20, 500])
@pytest.mark.parametrize("kind", ["equal", "all gained", "all lost"])
def test_no_difference_seen_on_few_images_is_no_certainty(count, kind):
    a = torch.ones(count).bool() if kind != "all lost" else torch.zeros(count).bool()
    b = a if kind == "equal" else ~a
    found = paired_difference(a, b)
    assert found.mean == {"equal": 0.0, "all gained": 1.0, "all lost": -1.0}[kind]
    assert -1 <= found.low <= found.mean <= found.high <= 1
    width = found.high - found.low
    assert (width > 0.5) if count <= 2 else (width < 0.3) if count == 20 else 0 < width < 0.02


def test_what_the_verdict_says_of_a_rival():
    chosen = measured("evit(0.5)", FAIR, 1.6)

    def said(rival, target=None):
        found = verdict(target or Target("speedup", 1.5), chosen, rival)
        assert found.chosen.option.candidate.family != "rival"
        return next(line for line in found.lines if "rival small" in line)

    better = said(measured("rival small", GOOD, 2.0, "rival"))
    assert better.startswith("Another model does better at this budget: `rival small`") and "+20.0 points" in better
    assert "not exported" in better
    assert "does worse at this budget" in said(measured("rival small", POOR, 2.0, "rival"))
    same = said(measured("rival small", FAIR, 2.0, "rival"))
    assert "cannot be told apart" in same and "faster one" in same
    assert "is not within the target" in said(measured("rival small", GOOD, 1.2, "rival"))
    faster = said(measured("rival small", FAIR, 9.0, "rival"), Target("drop", 0.5))
    assert "does better at this budget" in faster
    alone = verdict(Target("speedup", 1.5), measured("rival small", GOOD, 2.0, "rival"))
    assert not alone.met and alone.chosen is DENSE
    assert any("does better at this budget" in line for line in alone.lines)
