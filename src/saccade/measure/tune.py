"""``tune``, the main job: the best accuracy at a budget, as a measured frontier and a model to deploy.

Settings are enumerated and priced (``candidates``), raced on one half of the images (``race``) and timed (``speed``);
what is reported was measured on the other half, which no choice has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from saccade.data import ImageSet, Preprocess, open_images
from saccade.errors import UserError
from saccade.measure.accuracy import Judge, Predictions, Score, paired, score, spread
from saccade.measure.cache import Cache
from saccade.measure.candidates import Candidate, Target, candidates
from saccade.measure.race import front, race, shuffled_halves
from saccade.measure.speed import FP32, Entry, Runner, Speed, time_together
from saccade.model import AdaptiveViT
from saccade.progress import Progress

SURVIVORS = 14  # reductions that are timed and reported
LEAST_IMAGES = 20


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
    selection: float | None = None  # metric on the half that choices were made by
    likelihood: float | None = None  # mean probability of the true class there, which breaks ties
    score: Score | None = None  #     on the half that is reported
    found: Predictions | None = None  # there, image by image

    @property
    def rank(self) -> tuple[float, float]:
        """Better is larger: selection-half metric, then likelihood."""
        return self.selection or 0.0, self.likelihood or 0.0

    def meets(self, target: Target, dense: Measured) -> bool:
        """Whether this option is within the target."""
        if target.kind == "drop":
            return (dense.selection or 0.0) - (self.selection or 0.0) <= target.value
        limits = {"speedup": (target.value, self.speed.speedup), "gmacs": (self.speed.gmacs, target.value)}
        low, high = limits.get(target.kind, (self.speed.p50_ms, target.value))
        return low <= high


@dataclass(frozen=True)
class Search:
    """What a search found: every option measured, the dense model first."""

    target: Target
    measured: list[Measured]
    metric: str = ""  #              "top-1", "agreement with dense", or "" where only speed was measured
    frontier: set[str] = field(default_factory=set)  # names that none beats in both speed and selection-half metric
    judge: Judge | None = None
    report_places: list[int] = field(default_factory=list)
    selection_images: int = 0


def search(
    model: AdaptiveViT,
    data: str | Path | ImageSet | None,
    target: Target,
    *,
    cache: Path | None = None,
    split: str | None = None,
    limit: int = 2000,
    batch: int = 8,
    seconds: float = 30.0,
    compiled: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Search:
    """Measure the settings of a model that matter for a target.

    Args:
        data: images (see ``saccade.data.open_images``); None: measure speed only.
        cache: folder for what was measured, to go on after an interruption; None: forget.
        limit: at most so many images, spread evenly over the set; half select, half report.
        batch: images at once, for timing.
        seconds: of interleaved timing.
        compiled: also time the dense model under ``torch.compile``.

    Raises:
        UserError: bad data or target, fewer than 20 images.
    """
    progress = progress or Progress()
    ratio = _mac_ratio(model, target, batch, progress)
    if data is None:
        entrants = candidates(model, None, progress)
        speeds = _time(model, [Option(c) for c in entrants], batch, seconds, progress)
        return Search(target, [Measured(o, s) for o, s in speeds.items()])

    images = data if isinstance(data, ImageSet) else open_images(data, split)
    judge = Judge(model, images)
    places = spread(len(images), limit)
    if len(places) < LEAST_IMAGES:
        raise UserError(
            f"{len(places)} images in {images.path}: tune needs {LEAST_IMAGES} or more to choose and report"
        )
    halves = shuffled_halves(len(places), seed, None if judge.labels is None else judge.labels[places])
    select, report = ([places[i] for i in half] for half in halves)
    predict = _predictor(model, judge, cache, progress)

    entrants = candidates(model, ratio, progress)
    progress.say(f"{len(entrants)} settings; {len(select)} images to choose by, {len(report)} to report on")
    selected = {Option(c): p for c, p in race(entrants, select, _plainly(predict), SURVIVORS).items()}
    dense = next(iter(selected))
    judge.need(selected[dense], dense.name)
    selected = {o: paired(p, selected[dense])[0] for o, p in selected.items()}
    ways = [Runner("bf16"), *([Runner("fp32", True), Runner("bf16", True)] if compiled else [])]
    speeds = _time(model, [*selected, *(Option(dense.candidate, way) for way in ways)], batch, seconds, progress)

    values = {o: judge.hits(p).double().mean().item() for o, p in selected.items()}
    best = front({o: (-speeds[o].speedup, values[o]) for o in selected})
    halved = [Option(o.candidate, ways[0]) for o in selected if o in best and o != dense]  # both savings at once
    if speeds[Option(dense.candidate, ways[0])].speedup > 1 and halved:
        speeds |= _time(model, [dense, *halved], batch, seconds / 3, progress) | {dense: speeds[dense]}
    for option in speeds:
        if option not in selected:
            selected[option] = paired(predict(option, select), selected[dense])[0]

    said = {option: predict(option, report) for option in speeds}
    measured = [
        Measured(
            option,
            speed,
            selection=judge.hits(selected[option]).double().mean().item(),
            likelihood=(-selected[option].nll).exp().mean().item(),
            score=score(option.name, said[option], said[dense], judge),
            found=said[option],
        )
        for option, speed in speeds.items()
    ]
    frontier = front({m.option.name: (-m.speed.speedup, m.selection or 0.0) for m in measured})
    return Search(target, measured, judge.metric, frontier, judge, report, len(select))


Predict = Callable[[Option, Sequence[int]], Predictions]


def _predictor(model: AdaptiveViT, judge: Judge, cache: Path | None, progress: Progress) -> Predict:
    """Predictions of an option on images, from the cache where they are there; one copy of the model a number type."""
    store = Cache(cache, model, judge.images.fingerprint(), Preprocess.of(model.vit), model.backbone) if cache else None
    copies: dict[str, AdaptiveViT] = {}

    def predict(option: Option, indices: Sequence[int]) -> Predictions:
        dtype = option.runner.dtype
        if dtype not in copies:
            copies[dtype] = Runner(dtype).model(model)
        same = option.candidate.setting == "dense" and dtype == "fp32"
        view = judge.dense if same else copies[dtype].at(option.candidate.setting).eval()
        advance = progress.start(option.name, len(indices))

        def compute() -> Predictions:
            return judge.predict(view, indices, advance)

        found = store.get(f"{option.candidate.setting} {dtype}", indices, compute) if store else compute()
        if lost := sorted({*indices} - {*found.indices.tolist()}):
            judge.predict(view, lost)  # names them again where the rest came from the cache
        advance.finish()
        return found

    return predict


def _plainly(predict: Predict) -> Callable[[Candidate, list[int]], Predictions]:
    return lambda candidate, indices: predict(Option(candidate), indices)


def _time(
    model: AdaptiveViT, options: Sequence[Option], batch: int, seconds: float, progress: Progress
) -> dict[Option, Speed]:
    """Interleaved timing; options whose runner does not work here (no compiler) are left out, and said."""
    copies = {dtype: Runner(dtype).model(model) for dtype in {o.runner.dtype for o in options}}
    entries: dict[str, Entry] = {
        o.name: (copies[o.runner.dtype].at(o.candidate.setting).eval(), o.runner) for o in options
    }
    rows = {row.setting: row for row in time_together(entries, batch, seconds, progress)}
    return {o: rows[o.name] for o in options if o.name in rows}


def _mac_ratio(model: AdaptiveViT, target: Target, batch: int, progress: Progress) -> float | None:
    """The MAC ratio that a target is about; None where none is."""
    if target.kind == "speedup":
        return target.value
    if target.kind == "drop":
        return None
    dense = time_together({"dense": (model.at("dense").eval(), FP32)}, batch, 1.0, progress)[0]
    now = dense.gmacs if target.kind == "gmacs" else dense.p50_ms
    return max(1.0, now / target.value)
