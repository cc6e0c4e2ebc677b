"""``tune``, the main job: the best accuracy at a budget, as a measured frontier and a model to deploy.

Settings are enumerated and priced (``candidates``), raced on one half of the images (``successive_halving``) and timed
together (``speed``); what is reported was measured on the other half, which no choice has seen. What fails is left out
by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from saccade.checkpoint import Source
from saccade.data import ImageSet, open_images
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.evaluation.allowance import LEAST_IMAGES, Allowance
from saccade.evaluation.candidates import Target
from saccade.evaluation.evaluator import Evaluator, check_head
from saccade.evaluation.options import Search
from saccade.evaluation.prediction_cache import Cache
from saccade.evaluation.rivals import open_rivals
from saccade.evaluation.search_run import SearchRun
from saccade.methods.common.arguments import whole
from saccade.model import AdaptiveViT
from saccade.runners.engine import check_dtype, engine_of, installed
from saccade.runners.runner import COMPILE, CUDAGRAPH, FP32, Runner
from saccade.terminal.progress import Progress

COMPILE_MINUTES = 6.0  # of time without which nothing is compiled: that takes a minute each; twice beside an engine
EXPORT_MINUTES = 3.0  # without which nothing is exported
MOST_SCHEDULES = 10**6
AUTO = "auto"


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
    runner: str | Sequence[str | Runner] = AUTO,
    schedules: int | None = None,
    seed: int = 0,
    metric: str | None = None,
    rivals: Source | Sequence[Source] = (),
    allowance: Allowance | None = None,
    progress: Progress | None = None,
) -> Search:
    """Measure the settings of a model that matter for a target.

    Args:
        data: images (see ``saccade.data.open_images``); None: measure speed only.
        cache: folder for what was measured, to go on after an interruption; None: forget.
        limit: at most this many images, spread evenly over the set; half select, half report.
        batch: images at once, for timing.
        seconds: of interleaved timing.
        compiled: also time the dense model under ``torch.compile``; False, with "auto": PyTorch eager alone.
        runner: ways to run beside fp32 eager: "auto" for bf16, ``torch.compile`` and the engines that are installed, as
            far as there is time; or their names, like ["bf16", "onnx", "openvino bf16"].
        schedules: how many are tried in a search for the budget's own (``evaluation/schedule_search.py``); 0: none.
            None: 400, or fewer where time is short.
        metric: what settings are compared by (``saccade.evaluation.metric``); None: the usual one.
        rivals: other models to measure beside (``saccade.evaluation.rivals``), which are never chosen.
        allowance: the time that all of this may take; None: what it needs.

    Raises:
        UserError: bad data, target or number of schedules, a model whose answers cannot be compared, fewer than 20
            images, or than the metric needs in each half.
    """
    if schedules is not None:
        whole("tune", "schedules", schedules, 0, MOST_SCHEDULES)
    progress, allowance = progress or Progress(), allowance or Allowance()
    if data is None:
        if metric is not None or rivals:
            raise UserError("a metric and rivals are measured on images: give some, or leave both out")
        return SearchRun(model, target, None, batch, None, allowance, progress).by_speed(seconds)
    check_head(model, encoders=True)
    images = data if isinstance(data, ImageSet) else open_images(data, split)
    evaluator = Evaluator(model, images, metric=metric)
    evaluator.metric.aim(target)
    others = open_rivals(rivals, model)
    for rival in others:
        rival.check(evaluator)
    places = spread(len(images), limit)
    if len(places) < LEAST_IMAGES:
        raise UserError(
            f"{len(places)} images in {images.path}: tune needs {LEAST_IMAGES} or more to choose and report"
        )
    evaluator.check_count(len(places) // 2)
    runners = _runners(runner, compiled, allowance, next(model.parameters()).device)
    for line in evaluator.notes:
        progress.say(line)
    store = Cache.of(cache, evaluator) if cache else None
    return SearchRun(model, target, evaluator, batch, store, allowance, progress, others).run(
        places, seconds, runners, seed, schedules
    )


def _runners(
    named: str | Sequence[str | Runner], compiled: bool, allowance: Allowance, device: torch.device
) -> list[Runner]:
    """Ways to run beside fp32 eager. Raises UserError for one that is not there."""
    if named != AUTO:
        chosen = [Runner.of(name) for name in ([named] if isinstance(named, str) else named)]
        for runner in chosen:
            if runner.exported:
                check_dtype(engine_of(runner.engine), runner.engine, runner.dtype)
        return [runner for runner in dict.fromkeys(chosen) if runner != FP32]
    found, minutes = [Runner("bf16")], allowance.seconds / 60 if allowance.limited else math.inf
    if device.type == "cuda":
        found += [Runner("fp32", CUDAGRAPH), Runner("bf16", CUDAGRAPH)]
    engines = installed() if compiled and minutes >= EXPORT_MINUTES and device.type == "cpu" else []
    if compiled and minutes >= COMPILE_MINUTES * (2 if engines else 1):
        found += [Runner("fp32", COMPILE), Runner("bf16", COMPILE)]
    return found + engines
