"""What a search looks at and what it finds: settings with a way to run them, and all that was measured of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from saccade.evaluation.accuracy import Score
from saccade.evaluation.answers import Predictions
from saccade.evaluation.candidates import Candidate, Target
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.latency_curve import LatencyCurve
from saccade.evaluation.speed import Speed
from saccade.runners.runner import FP32, Runner


@dataclass(frozen=True)
class Option:
    """A setting and a way to run it."""

    candidate: Candidate
    runner: Runner = FP32

    @property
    def name(self) -> str:
        """The setting and, where it is not the usual one, the runner."""
        return self.candidate.setting + ("" if self.runner == FP32 else f" · {self.runner}")

    @property
    def plain(self) -> bool:
        """No token is reduced: the model itself, a smaller input or a larger patch, however it is run."""
        return self.candidate.family == "dense"


@dataclass(frozen=True)
class Measured:
    """All that was measured of an option; accuracies are None where only speed was."""

    option: Option
    speed: Speed
    selection: float | None = None  # merit on the half that choices were made by: the metric, of which more is better
    likelihood: float | None = None  # mean of ``Predictions.evidence`` there, which breaks ties
    score: Score | None = None  #     on the half that is reported
    found: Predictions | None = None  # there, image by image
    chosen_by: Predictions | None = None  # on the other half

    @property
    def rank(self) -> tuple[float, float]:
        """Better is larger: selection-half merit, then likelihood."""
        return self.selection or 0.0, self.likelihood or 0.0

    def meets(self, target: Target, dense: Measured) -> bool:
        """Whether this option is within the target."""
        if target.kind == "drop":
            return (dense.selection or 0.0) - (self.selection or 0.0) <= target.value + 1e-12
        limits = {"speedup": (target.value, self.speed.speedup), "gmacs": (self.speed.gmacs, target.value)}
        low, high = limits.get(target.kind, (self.speed.p50_ms, target.value))
        return low <= high


@dataclass(frozen=True)
class Search:
    """What a search found: every option measured, the dense model first."""

    target: Target
    measured: list[Measured]
    metric: str = ""  #              "top-1", "agreement", "recall@10", …; "" where only speed was measured
    frontier: set[str] = field(default_factory=set)  # names that none beats in both speed and selection-half metric
    evaluator: Evaluator | None = None
    report_places: list[int] = field(default_factory=list)
    selection_images: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # what was left out, and why
    notes: list[str] = field(default_factory=list)  # what time did not suffice for
    curve: LatencyCurve | None = None  # that schedules were priced by

    @property
    def aim(self) -> str:
        """The target in words."""
        return str(self.target) if self.evaluator is None else self.evaluator.metric.aim(self.target)
