"""Ways to run a model beside fp32 eager: which of them work here, and which is the fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saccade.evaluation.allowance import Allowance
from saccade.evaluation.candidates import Candidate
from saccade.evaluation.options import Option
from saccade.evaluation.speed import time_all
from saccade.model import AdaptiveViT
from saccade.runners.runner import FP32, Runner
from saccade.terminal.progress import Progress

RUNS = 5
View = Callable[[Option], AdaptiveViT]  # a model as an option runs it


@dataclass(frozen=True)
class Ways:
    """The dense model in each runner that works here."""

    options: list[Option]  # but for fp32 eager; those of ``torch.compile`` have not been tried
    fastest: Option  #        of those that were timed
    ms: dict[Runner, float]  # a batch of the dense model, in those that were timed
    each: float  #            seconds that one setting took to start and to be timed
    failed: dict[str, str]  # why others do not work

    @property
    def runner(self) -> Runner:
        """The fastest."""
        return self.fastest.runner

    def ratio(self, speedup: float | None) -> float | None:
        """How many times faster than the dense model in the fastest runner a setting must be, to be so many times as
        fast as the dense model in fp32 eager; None for None."""
        return None if speedup is None else max(1.0, speedup * self.ms[self.runner] / self.ms[FP32])


def ways(
    dense: Candidate, runners: Sequence[Runner], view: View, batch: int, allowance: Allowance, progress: Progress
) -> Ways:
    """Time the dense model by a few runs in fp32 eager and in each runner that needs no compiler."""
    first, quick = Option(dense), [Option(dense, runner) for runner in runners if not runner.compiled]
    probe = {o.name: view(o) for o in (first, *quick)}
    begun = allowance.clock()
    timing = time_all(probe, batch, 0.0, progress, clock=allowance.clock, least=RUNS)
    each = (allowance.clock() - begun) / len(probe)
    ms = {row.setting: row.p50_ms for row in timing.rows}
    timed = [o for o in (first, *quick) if o.name in ms]
    options = [o for o in (Option(dense, runner) for runner in runners) if o.name not in timing.failed]
    fastest = min(timed, key=lambda o: ms[o.name])
    return Ways(options, fastest, {o.runner: ms[o.name] for o in timed}, each, timing.failed)
