"""``tune`` as people call it: search, conclude, and write frontier, report and model into a folder."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from saccade.backbones.saving import check_savable, save
from saccade.checkpoint import Source, open_model
from saccade.data import ImageSet
from saccade.evaluation.allowance import Allowance, Clock
from saccade.evaluation.candidates import RIVAL, Target
from saccade.evaluation.circumstances import RUN, circumstances, csv_text, model_name, run_name
from saccade.evaluation.device_curve import DeviceCurve
from saccade.evaluation.export import export_chosen
from saccade.evaluation.options import Measured, Search
from saccade.evaluation.recommendation import Recommendation, conclude
from saccade.evaluation.tune import search
from saccade.evaluation.tune_result import TuneResult
from saccade.model import AdaptiveViT
from saccade.reports.frontier_report import Report, render_report
from saccade.reports.render_tokens import token_map
from saccade.reports.rows import Row, Sample
from saccade.reports.scale import Scale
from saccade.runners.runner import FP32, QUANTISED
from saccade.storage.files import check_folder, json_text, staged
from saccade.storage.run_folder import owned
from saccade.storage.signs import TUNE
from saccade.terminal.progress import Progress

SAMPLES, SHOWN = 4, 5  # photos, and settings beside the dense one, whose token maps the report shows


@owned(TUNE)
def tune(
    model: Source,
    data: str | os.PathLike | ImageSet | None,
    target: str | float | None = None,
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | None = None,
    gmacs: float | None = None,
    ms: float | None = None,
    max_drop: str | float | None = None,
    out: str | os.PathLike = "runs/tune",
    minutes: float | None = None,
    command: str = "",
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
    **options: Any,
) -> TuneResult:
    """Find the best accuracy at a budget; write ``frontier.csv``, ``frontier.json``, ``report.html`` and ``model/``.

    Called again with the same model, images and folder it goes on from what was measured. A setting that fails is
    named in the report with its error, and left out.

    Args:
        model: a model, a folder, or a timm name with ``weights`` or ``pretrained``; ``device`` as in
            ``saccade.checkpoint.open_model``.
        data: images (see ``saccade.data.open_images``); None: measure speed only, and choose nothing.
        target: a speed-up, like ``"2x"``; or one of
        gmacs: a MAC budget per image, 10^9; ms: a latency per batch; max_drop: what accuracy may be lost, "1%";
            of a metric that is no share a number in its unit, 0.01. With none of them: the fastest that loses at most
            one point, or 0.01.
        out: the folder.
        minutes: that all of it may take: fewer images, then fewer settings are measured. None: as long as it needs.
        clock: what tells the time, in seconds.
        options: of ``saccade.evaluation.tune.search``: split, limit, batch, seconds, compiled, runner,
            schedules, seed, metric, rivals.

    Raises:
        UserError: bad data, target or folder; a model whose answers cannot be compared.
    """
    allowance = Allowance.of(minutes, clock)
    aim = Target.of(target, gmacs=gmacs, ms=ms, max_drop=max_drop)
    assumed = all(v is None for v in (target, gmacs, ms, max_drop))
    folder = Path(out)
    check_folder(folder)
    model = open_model(model, weights, pretrained, device).deploy(None)
    model = FP32.model(model)  # all number types are made of it; a folder may hold half precision
    if data is not None:
        check_savable(model)
    path = os.fspath(data) if isinstance(data, os.PathLike) else data
    found = search(model, path, aim, cache=folder / "cache", allowance=allowance, progress=progress, **options)
    recommendation = conclude(found)
    option = recommendation.chosen.option
    rows = [_row(m, found, recommendation) for m in found.measured]
    facts = _facts(model, found, options, assumed)
    batch = found.measured[0].speed.batch
    chosen = model.deploy(replace(option.runner, batch=batch)).at(option.candidate.setting).eval()
    lines = [*recommendation.lines, *(_run_it(folder) if found.evaluator is not None else [])]
    if found.evaluator is not None:
        alike = {m.option.runner: m.speed.speedup for m in found.measured if m.option.candidate == option.candidate}
        lines += export_chosen(chosen, option.runner, folder, found.evaluator.images, found.report_places, alike)
    if assumed:
        lines.append(f"Assumed, as nothing was asked for: {found.aim}; batches of {batch} images (--batch).")
    left_out = [f"`{name}` is left out: {reason}" for name, reason in found.failed.items()]
    details = [_details(row, m) for row, m in zip(rows, found.measured, strict=True)]
    written = {
        "verdict": lines,
        "met": recommendation.met,
        "facts": facts,
        "notes": found.notes,
        "left_out": found.failed,
        "rows": details,
    }
    facts[RUN] = run = run_name(command, written)

    report = Report(
        title=f"{model_name(model)}: {found.aim}",
        command=command,
        verdict=lines,
        facts=facts,
        metric_name=found.metric or "top-1",
        rows=rows,
        samples=_samples(model, found, recommendation),
        notes=[*found.notes, *left_out],
        curve=[] if found.curve is None else DeviceCurve(found.curve).figures(),
        about="" if found.evaluator is None else f"{found.evaluator.metric.described()}.",
    )
    pages = {"report.html": render_report(report), "frontier.csv": csv_text(rows, run)}
    pages["frontier.json"] = json_text(written)
    with staged({folder / name: text for name, text in pages.items()}):
        if found.evaluator is not None:
            save(chosen, folder / "model", verdict=lines, run=run)
    setting, runner = str(chosen.setting), str(option.runner)
    return TuneResult(chosen, setting, runner, lines, recommendation.met, rows, folder, found.failed)


def _run_it(folder: Path) -> list[str]:
    """The line of code that runs what was chosen, and the command."""
    place = (folder / "model").as_posix()
    return [
        f"To run it: `saccade.load({place!r})(images).logits`, or `saccade predict {shlex.quote(place)} photo.jpg`; "
        "number type and compilation included."
    ]


def _row(m: Measured, found: Search, recommendation: Recommendation) -> Row:
    score, speed = m.score, m.speed
    nothing = (None, None, None)
    value, value_low, value_high = score.value.three() if score else nothing
    delta, delta_low, delta_high = score.delta.three() if score and score.delta else nothing
    return Row(
        setting=m.option.name,
        family=m.option.candidate.family,
        gmacs=score.gmacs if score else speed.gmacs,
        mac_ratio=score.mac_ratio if score else speed.mac_ratio,
        value=value,
        value_low=value_low,
        value_high=value_high,
        delta=delta,
        delta_low=delta_low,
        delta_high=delta_high,
        agreement=score.agreement.mean if score else None,
        speedup=speed.speedup,
        conversion=speed.conversion,
        images_per_s=speed.images_per_s,
        p50_ms=speed.p50_ms,
        memory_mb=speed.memory_mb,
        tokens=score.tokens if score else speed.tokens,
        on_frontier=m.option.name in found.frontier,
        chosen=m is recommendation.chosen and found.evaluator is not None,
        note=_note(m),
        metric=found.metric,
    )


def _note(m: Measured) -> str:
    if m.option.candidate.family == RIVAL:
        return "another model: not exported"
    return "" if m.speed.worth_it else "saves MACs, not time"


def _details(row: Row, m: Measured) -> dict[str, Any]:
    return {
        **vars(row),
        "runner": str(m.option.runner),
        "selection_value": None if m.selection is None else Scale.of(row.metric).merit(m.selection),
        "score": m.score and m.score.to_dict(),
        "speed": m.speed.to_dict(),
    }


def _facts(model: AdaptiveViT, found: Search, options: dict[str, Any], assumed: bool) -> dict[str, str]:
    """How it was measured, in words."""
    speed = found.measured[0].speed
    facts = {
        **circumstances(model),
        "target": found.aim + (" (assumed: none was given)" if assumed else ""),
        "timing": f"batch {speed.batch}, medians of {speed.runs} runs, all rows in turn, against dense {speed.runner}",
        "attention": f"dense: {speed.kernels}",
    }
    if found.evaluator is not None:
        evaluator = found.evaluator
        halves = f"{found.selection_images} to choose by, {len(found.report_places)} reported"
        facts["metric"] = evaluator.metric.described()
        facts["images"] = f"{Path(evaluator.images.path).name}: {halves}"
        if any(m.option.runner.exported and m.option.runner.dtype != QUANTISED for m in found.measured):
            facts["rows of an engine"] = (
                "scored by PyTorch in the row's number type; the chosen one is compared in its engine, in its export"
            )
        facts["seed"] = str(options.get("seed", 0))
        if evaluator.failures:
            named = ", ".join(f"{name} ({reason})" for name, reason in list(evaluator.failures.items())[:5])
            facts["not read"] = f"{len(evaluator.failures)} images: {named}"
    return facts


def _samples(model: AdaptiveViT, found: Search, recommendation: Recommendation) -> list[Sample]:
    """Token maps of a few photos of the reporting half, under the settings that matter most."""
    evaluator = found.evaluator
    if evaluator is None:
        return []
    usual = [m for m in found.measured if m.option.candidate.family == "reduction"]
    usual.sort(
        key=lambda m: (
            m.option.name not in found.frontier,
            abs(m.speed.mac_ratio - recommendation.chosen.speed.mac_ratio),
        )
    )
    settings = ["dense", recommendation.chosen.option.candidate.setting, *(m.option.candidate.setting for m in usual)]
    settings = list(dict.fromkeys(settings))[: SHOWN + 1]
    samples: list[Sample] = []
    for place in found.report_places:
        if len(samples) == SAMPLES:
            break
        if evaluator.images.names[place] in evaluator.failures:
            continue
        image = evaluator.images.read(place)
        panels = [(setting, token_map(model.at(setting).eval(), image)) for setting in settings]
        samples.append(Sample(evaluator.images.names[place], panels))
    return samples
