"""What a schedule may cost: milliseconds where a curve is known or can be measured in time, else MACs."""

from __future__ import annotations

import pytest

from saccade.evaluation.allowance import Allowance
from saccade.evaluation.candidates import Candidate, Target
from saccade.evaluation.latency_curve import family, split
from saccade.evaluation.options import Option
from saccade.evaluation.schedule import Space, by_macs
from saccade.evaluation.schedule_price import ASSUMED, MACS_MARGIN, TIME_MARGIN, macs, points, price_of
from saccade.evaluation.ways import Ways
from saccade.runners.runner import FP32, Runner
from saccade.setting import Setting
from saccade.terminal.progress import Progress
from small_runs import tiny

BF16, DENSE = Runner("bf16"), Candidate("dense", "dense", 1e9, False)


@pytest.fixture(scope="module")
def space() -> Space:
    return Space.of(tiny().eval())


def ways(eager: float, bf16: float, each: float = 0.01) -> Ways:
    """Milliseconds of the dense model in two ways to run, and seconds to start a setting."""
    fastest = Option(DENSE, BF16 if bf16 < eager else FP32)
    return Ways([Option(DENSE, BF16)], fastest, {FP32: eager, BF16: bf16}, each, {})


def priced(space: Space, target: Target, known: Ways, seconds: float = float("inf")):
    return price_of(target, known, 2, Allowance(seconds), Progress(), space)


def test_gmacs_are_counted_in_macs(space):
    dense = space.macs(space.empty(""))
    price = priced(space, Target.of(gmacs=dense / 2e9), ways(10, 5))
    assert price.cost is by_macs and price.limit == pytest.approx(dense / 2)
    assert priced(space, Target.of(gmacs=dense / 1e9), ways(10, 5)) is None, "the dense model meets it"


@pytest.mark.parametrize(
    ("target", "limit"),
    [(Target.of("2x"), 10 / 2), (Target.of(ms=4.0), 4.0), (Target.of(max_drop="1%"), 8 / ASSUMED)],
    ids=str,
)
def test_times_are_those_of_the_fastest_way_to_run(space, target, limit):
    price = priced(space, target, ways(10, 8))
    assert price.limit == pytest.approx(limit / TIME_MARGIN) and "bf16, batch 2" in price.words
    assert price.cost(space, space.empty("")) == pytest.approx(8.0), "the curve is brought to what dense takes now"
    rule = next(rule for rule in space.rules if rule.method == "tome")
    many = space.scaled(space.shaped("", {rule: 1.0}, [1.0, 0.0, 0.0]), 8)
    assert price.cost(space, many) != price.cost(space, space.empty(""))
    assert priced(space, target, ways(10, 8.1)).key == price.key, "an interrupted search goes on"


def test_where_the_runner_alone_is_fast_enough_there_is_nothing_to_look_for(space):
    assert priced(space, Target.of("2x"), ways(10, 5)) is None
    assert priced(space, Target.of("2x"), ways(10, 5.1)) is not None


def test_without_time_for_a_curve_macs_are_counted_for_the_same_ratio(space, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    price = priced(space, Target.of("2x"), ways(10, 8, each=60.0), seconds=600.0)
    assert price.cost is by_macs
    assert price.limit == pytest.approx(space.macs(space.empty("")) / (MACS_MARGIN * 8 / 5))
    assert priced(space, Target.of("2x"), ways(10, 8, each=0.01), seconds=600.0).cost is not by_macs
    assert priced(space, Target.of("2x"), ways(10, 8, each=60.0), seconds=600.0).cost is not by_macs, "it is known now"


def test_a_ratio_is_what_is_left_to_settings():
    known = ways(10, 5)
    assert known.ratio(None) is None and known.ratio(4.0) == 2.0 and known.ratio(1.5) == 1.0
    assert ways(10, 20).ratio(4.0) == 4.0


def test_points_are_few_and_of_what_a_schedule_holds(space):
    found = points(space)
    methods = {rule.method for rule in space.rules}
    assert {s.partition("(")[0] for s in found} >= methods and len(found) <= 3 * len(methods) + 3
    assert {family(s) for s in space.tokenizers} <= {family(split(Setting.parse(s))[0]) for s in found}
    assert macs(space, 2.0).limit == space.macs(space.empty("")) / 2
