"""One search for settings, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from saccade.evaluation.accuracy import paired, score
from saccade.evaluation.allowance import Allowance, Costs, plan
from saccade.evaluation.answers import Predictions
from saccade.evaluation.candidates import RIVAL, Candidate, Priced, Target, candidates, price
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.failures import by_reason, described, is_systems
from saccade.evaluation.latency_curve import LatencyCurve
from saccade.evaluation.options import Measured, Option, Search
from saccade.evaluation.prediction_cache import Cache
from saccade.evaluation.recommendation import by_importance
from saccade.evaluation.rivals import Rival
from saccade.evaluation.schedule_candidates import schedules
from saccade.evaluation.schedule_price import price_of
from saccade.evaluation.speed import ALWAYS, Speed, time_all
from saccade.evaluation.successive_halving import front, shuffled_halves, successive_halving
from saccade.evaluation.ways import Ways
from saccade.evaluation.ways import ways as find_ways
from saccade.model import AdaptiveViT
from saccade.runners.runner import FP32, QUANTISED, Runner
from saccade.terminal.progress import Bar, Progress
from saccade.terminal.results import counted

SURVIVORS = 14  # reductions that are timed and reported
HALVED = 8  # of them also in the fastest other way to run
PROBE = 16  # images by which the costs are estimated

T = TypeVar("T")


class SearchRun:
    """One search: what its steps share."""

    def __init__(
        self,
        model: AdaptiveViT,
        target: Target,
        evaluator: Evaluator | None,
        batch: int,
        store: Cache | None,
        allowance: Allowance,
        progress: Progress,
        rivals: Sequence[Rival] = (),
    ) -> None:
        self.target, self.batch, self.store, self.allowance, self.progress = target, batch, store, allowance, progress
        self.plain = model.deploy(None)
        self.failed: dict[str, str] = {}
        self.notes: list[str] = []
        self.bar: Bar | None = None
        self._evaluator = evaluator
        self._curve: LatencyCurve | None = None
        self._rivals = {rival.name: rival.model for rival in rivals}
        self._bases: dict[tuple[str, Runner], AdaptiveViT] = {("", FP32): self.plain}

    @property
    def evaluator(self) -> Evaluator:
        """What measures accuracy; there is none in a run about speed alone."""
        assert self._evaluator is not None
        return self._evaluator

    def by_speed(self, seconds: float) -> Search:
        """Speed alone, of single settings."""
        priced = candidates(self.plain, None, self.progress)
        self._leave_out(priced.failed)
        speeds = self.time([Option(c) for c in priced.candidates], seconds)
        return Search(self.target, [Measured(o, s) for o, s in speeds.items()], failed=self.failed)

    def run(
        self, places: Sequence[int], seconds: float, runners: Sequence[Runner], seed: int, tries: int | None = None
    ) -> Search:
        """All of it, on the images at these places; tries: of the search for schedules."""
        evaluator, say = self.evaluator, self.progress.say
        costs = self._costs(places)
        dense = Candidate("dense", "dense", price(self.plain, "dense"), False)
        ways = find_ways(dense, runners, self._view, self.batch, self.allowance, self.progress)
        self._leave_out(ways.failed)
        ratio = self._mac_ratio(ways)
        halves = shuffled_halves(len(places), seed, None if evaluator.labels is None else evaluator.labels[places])
        select, report = ([places[i] for i in half] for half in halves)
        searched = self._schedules(select, ways, tries, seed)
        priced = self._price(ratio)
        rivals = [Candidate(name, RIVAL, price(m, str(m.setting)), False) for name, m in self._rivals.items()]
        priced = replace(priced, candidates=[*priced.candidates, *searched, *rivals])
        sizes = plan(
            priced.candidates,
            costs,
            self.allowance,
            images=len(places),
            batch=self.batch,
            survivors=SURVIVORS,
            runners=HALVED + len(runners),
            timing=seconds,
            ratio=ratio,
        )
        select, report = select[: -(-sizes.images // 2)], report[: sizes.images // 2]
        evaluator.check_count(len(report))
        if len(sizes.candidates) < len(priced.candidates):
            fewer = len(priced.candidates) - len(sizes.candidates)
            self.notes.append(f"{fewer} of {len(priced.candidates)} settings were not tried, to keep within the time")
        say(f"{len(sizes.candidates)} settings; {len(select)} images to choose by, {len(report)} to report on")
        self.progress.expect(sizes.seconds)
        if self.allowance.limited and self.allowance.spent() + sizes.seconds > self.allowance.seconds:
            say(f"That is more than the time asked for: about {sizes.seconds / 60:.1f} minutes.")

        selected = self._race(sizes.candidates, select, sizes.survivors)
        first = next(iter(selected))
        options = [*selected, *ways.options, *self._in_fastest(ways, selected, sizes.survivors)]
        speeds = self.time(self._by_promise(options, selected), sizes.timing, self._until(0.8))
        chosen_by = {first: selected[first]}
        for option in speeds:
            said = selected.get(option) or self.attempt(option, lambda o=option: self.predict(o, select))  # type: ignore[misc]
            if said is not None:
                chosen_by[option] = paired(said, selected[first])[0]
        measured = [self._chosen_by(o, speeds[o], said) for o, said in chosen_by.items()]
        rows = self._report(measured, report)
        rows = [rows[0], *sorted(rows[1:], key=lambda m: -m.option.candidate.macs)]
        ours = [m for m in rows if m.option.candidate.family != RIVAL]
        frontier = front({m.option.name: (-m.speed.speedup, m.selection or 0.0) for m in ours})
        name, notes, curve = evaluator.metric.name, list(self.notes), self._curve
        return Search(self.target, rows, name, frontier, evaluator, report, len(select), self.failed, notes, curve)

    def _chosen_by(self, option: Option, speed: Speed, said: Predictions) -> Measured:
        """What the selection half and the clock say of an option."""
        merit = self.evaluator.merits(said).mean().item()
        return Measured(option, speed, merit, said.evidence.mean().item(), chosen_by=said)

    def _report(self, measured: list[Measured], places: list[int]) -> list[Measured]:
        """The same with their scores on the reporting half: first of what matters, of the rest while there is time."""
        self.bar = self.progress.start("reporting", len(measured) * len(places))
        plan = Search(self.target, measured, self.evaluator.metric.name, evaluator=self.evaluator)
        found: dict[str, Measured] = {}
        for i, m in enumerate(by_importance(plan)):
            if i >= ALWAYS and self.allowance.beyond(0.92):
                self.failed[m.option.name] = "not reported, to keep within the time"
            elif (said := self.attempt(m.option, lambda o=m.option: self.predict(o, places))) is not None:  # type: ignore[misc]
                first = found[measured[0].option.name].found if found else said
                assert first is not None
                found[m.option.name] = replace(m, score=score(m.option.name, said, first, self.evaluator), found=said)
        self.bar.finish()
        return [found[m.option.name] for m in measured if m.option.name in found]

    def attempt(self, option: Option, work: Callable[[], T]) -> T | None:
        """What the work gives; None where it fails, which is then named. The dense model has to work."""
        if option.candidate.setting == "dense" and option.runner == FP32:
            return work()
        try:
            return work()
        except Exception as error:
            if is_systems(error):
                raise
            self._leave_out({option.name: described(error)})
            return None

    def predict(self, option: Option, indices: Sequence[int]) -> Predictions:
        """Predictions of an option on images, from the cache where they are there."""
        runner = option.runner  # compiled or not, the number type decides; ``speed`` compares the two
        runner = runner if runner.dtype == QUANTISED else Runner(runner.dtype)
        same = option.candidate.setting == "dense" and runner == FP32
        view = self.evaluator.dense if same else self._view(Option(option.candidate, runner))
        if self.bar is not None:
            self.bar(0, what=f"measuring {option.name}")

        def compute() -> Predictions:
            return self.evaluator.predict(view, indices)

        key = f"{option.candidate.setting} {runner}"
        kept = self.store is not None and option.candidate.family != RIVAL  # a rival's weights do not name the cache
        found = self.store.get(key, indices, compute) if self.store and kept else compute()
        if lost := sorted({*indices} - {*found.indices.tolist()}):
            self.evaluator.predict(view, lost)  # names them again where the rest came from the cache
        if self.bar is not None:
            self.bar(len(indices))
        return found

    def time(self, options: Sequence[Option], seconds: float, most: float = math.inf) -> dict[Option, Speed]:
        """Interleaved timing of all options in one run, against the first; what does not work here is left out."""
        entries = {o.name: self._view(o) for o in options}
        timing = time_all(entries, self.batch, seconds, self.progress, clock=self.allowance.clock, most=most)
        self._leave_out(timing.failed)
        rows = {row.setting: row for row in timing.rows}
        return {o: rows[o.name] for o in options if o.name in rows}

    def _view(self, option: Option) -> AdaptiveViT:
        """The model, or a rival, as the option's runner runs it; views share what a runner makes of the weights."""
        name, runner = option.candidate.setting, option.runner
        rival = self._rivals.get(name)
        key = (name if rival else "", runner)
        if key not in self._bases:
            self._bases[key] = (rival or self.plain).deploy(
                None if runner == FP32 else replace(runner, batch=self.batch)
            )
        return self._bases[key].at(rival.setting if rival else name).eval()

    def _leave_out(self, failed: dict[str, str]) -> None:
        for line in by_reason({name: why for name, why in failed.items() if name not in self.failed}):
            self.progress.say(f"left out: {line}")
        self.failed |= failed

    def _costs(self, places: Sequence[int]) -> Costs:
        """Run the dense model on a few images: what is wrong with data or weights is found before anything else."""
        clock, few = self.allowance.clock, list(places[:: max(1, len(places) // PROBE)])[:PROBE]
        start = clock()
        found = self.evaluator.predict(self.evaluator.dense, few)
        if self.store is not None:
            self.store.check("dense", found)
        middle = clock()
        if len(found.indices):
            self.evaluator.predict(self.evaluator.dense, few)
        end = clock()
        return Costs(max(1e-9, (end - middle) / len(few)), max(0.0, 2 * middle - start - end) / len(few))

    def _price(self, ratio: float | None) -> Priced:
        priced = candidates(self.plain, ratio, self.progress, lambda: self.allowance.beyond(0.25))
        self._leave_out(priced.failed)
        if priced.untried:
            self.notes.append(f"{counted(priced.untried, 'setting')} were not priced, to keep within the time")
        return priced

    def _schedules(self, select: Sequence[int], ways: Ways, tries: int | None, seed: int) -> list[Candidate]:
        """Those that are found for the budget, by the images that choose."""
        found = schedules(
            self.evaluator,
            select,
            partial(price_of, self.target, ways, self.batch, self.allowance, self.progress),
            self.allowance,
            tries=tries,
            seed=seed,
            folder=None if self.store is None else self.store.folder,
            progress=self.progress,
        )
        self.notes += [found.note] if found.note else []
        self._curve = found.curve
        return found.candidates

    def _race(self, raced: list[Candidate], select: list[int], survivors: int) -> dict[Option, Predictions]:
        """What the survivors said on the selection half, the dense model first."""
        late: list[str] = []
        self.bar = self.progress.start("racing", len(raced) * len(select) // 2)

        def predict(candidate: Candidate, indices: list[int]) -> Predictions | None:
            if not candidate.is_baseline and self.allowance.beyond(0.6):
                late.append(candidate.setting)
                return None
            option = Option(candidate)
            return self.attempt(option, lambda: self.predict(option, indices))

        selected = {Option(c): p for c, p in successive_halving(raced, select, predict, survivors).items()}
        self.bar.finish()
        self.bar = None
        if late:
            self.notes.append(f"{counted(len(late), 'setting')} left the race early, to keep within the time")
        dense = next(iter(selected))
        self.evaluator.need(selected[dense], dense.name)
        return {o: paired(p, selected[dense])[0] for o, p in selected.items()}

    def _in_fastest(self, ways: Ways, selected: dict[Option, Predictions], survivors: int) -> list[Option]:
        """What was searched for, the best settings of each cost, and rivals, in the fastest way to run, if that is not
        fp32 eager: as many as there is time to start."""
        if ways.runner == FP32:
            return []
        room = self._until(0.7) / 2 / max(ways.each, 1e-9) if ways.runner.exported else math.inf
        most = int(min(HALVED, survivors, room))
        merit = {o: self.evaluator.merits(p).mean().item() for o, p in selected.items()}
        apart = ("random", RIVAL)
        best = front({o: (o.candidate.macs, merit[o]) for o in selected if o.candidate.family not in apart})
        ordered = sorted((o for o in best if o.candidate != ways.fastest.candidate), key=lambda o: -merit[o])
        ordered = list(dict.fromkeys([*(o for o in selected if o.candidate.tried), *ordered]))[:most]
        ordered += [o for o in selected if o.candidate.family == RIVAL]
        return [Option(o.candidate, ways.runner) for o in ordered]

    def _by_promise(self, options: list[Option], selected: dict[Option, Predictions]) -> list[Option]:
        """The dense model, its other ways to run, then the best; random baselines last: for where time is short."""
        merit = {o.candidate: self.evaluator.merits(p).mean().item() for o, p in selected.items()}
        first, *rest = options
        rest.sort(key=lambda o: (o.candidate.family == "random", o.candidate != first.candidate, -merit[o.candidate]))
        return [first, *rest]

    def _until(self, share: float) -> float:
        """Seconds until this share of the time is over; infinite where there is no limit."""
        return max(1.0, share * self.allowance.seconds - self.allowance.spent())

    def _mac_ratio(self, ways: Ways) -> float | None:
        """The MAC ratio that a target is about, where it is met in the fastest way to run; None where none is."""
        if self.target.kind == "gmacs":
            return max(1.0, ways.fastest.candidate.macs / (self.target.value * 1e9))
        speedup = {"speedup": self.target.value, "ms": ways.ms[FP32] / self.target.value}.get(self.target.kind)
        return ways.ratio(speedup)
