"""``tune`` as people call it: search, conclude, and write frontier, report and model into a folder."""

from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

import saccade
from saccade.checkpoint import save
from saccade.data import ImageSet
from saccade.files import check_folder, write_json, write_text
from saccade.measure.candidates import Target
from saccade.measure.tune import Measured, Search, search
from saccade.measure.verdict import Verdict, conclude
from saccade.model import AdaptiveViT
from saccade.opening import Source, open_model
from saccade.progress import Progress
from saccade.results import Result
from saccade.tables import Table
from saccade.views.look import token_map
from saccade.views.report import Report, Row, Sample, render_report

SAMPLES, SHOWN = 4, 5  # photos, and settings beside the dense one, whose token maps the report shows


@dataclass(frozen=True, repr=False)
class Tuned(Result):
    """What ``tune`` hands back."""

    model: AdaptiveViT  #    the chosen one, also saved in ``folder / "model"``
    setting: str
    runner: str  #           the way to run it: "fp32", "bf16", "bf16 compiled", …
    verdict: list[str]  #    the answer first
    met: bool  #             whether the target was met
    rows: list[Row]  #       the frontier table
    folder: Path

    def table(self) -> Table:
        """The frontier, the chosen one and the random baseline, slowest first, with the verdict."""
        rows = sorted(self.rows, key=lambda row: row.speedup or 0.0)
        rows = [row for row in rows if row.on_frontier or row.chosen or row.family == "random" or row.top1 is None]
        cells = [
            [
                ("→ " if row.chosen else "  ") + row.setting,
                f"{row.speedup:.2f}×",
                "" if row.top1 is None else f"{row.top1:.1%}",
                _points(row),
                f"{row.gmacs:.2f}",
                f"{row.mac_ratio:.2f}×",
                f"{row.conversion:.2f}",
            ]
            for row in rows
        ]
        columns = ["setting", "speed-up", "accuracy", "points vs dense", "GMACs", "MAC ratio", "conversion"]
        return Table("Frontier, and the random baseline", columns, cells, "\n".join(self.verdict).replace("`", ""))


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
    command: str = "",
    progress: Progress | None = None,
    **options: Any,
) -> Tuned:
    """Find the best accuracy at a budget; write ``frontier.csv``, ``frontier.json``, ``report.html`` and ``model/``.

    Called again with the same model, images and folder it goes on from what was measured.

    Args:
        model: a model, a folder, or a timm name with ``weights`` or ``pretrained``; ``device`` as in
            ``saccade.opening.open_model``.
        data: images (see ``saccade.data.open_images``); None: measure speed only, and choose nothing.
        target: a speed-up, like ``"2x"``; or one of
        gmacs: a MAC budget per image, 10^9; ms: a latency per batch; max_drop: what accuracy may be lost, "1%".
        out: the folder.
        options: of ``saccade.measure.tune.search``: split, limit, batch, seconds, compiled, seed.

    Raises:
        UserError: bad data, target or folder.
    """
    aim = Target.of(target, gmacs=gmacs, ms=ms, max_drop=max_drop)
    folder = Path(out)
    check_folder(folder)
    model = open_model(model, weights, pretrained, device)
    path = os.fspath(data) if isinstance(data, os.PathLike) else data
    found = search(model, path, aim, cache=folder / "cache", progress=progress, **options)
    verdict = conclude(found)
    rows = [_row(m, found, verdict) for m in found.measured]
    facts = _facts(model, found, options)
    chosen = model.at(verdict.chosen.option.candidate.setting).eval()

    report = Report(
        title=f"{model_name(model)}: {aim}",
        command=command,
        verdict=verdict.lines,
        facts=facts,
        metric_name=found.metric or "top-1",
        rows=rows,
        samples=_samples(model, found, verdict),
    )
    write_text(folder / "report.html", render_report(report))
    write_text(folder / "frontier.csv", csv_text(rows))
    details = [_details(row, m) for row, m in zip(rows, found.measured, strict=True)]
    write_json(
        folder / "frontier.json", {"verdict": verdict.lines, "met": verdict.met, "facts": facts, "rows": details}
    )
    runner = str(verdict.chosen.option.runner)
    if found.judge is not None:
        save(chosen, folder / "model", runner=runner, verdict=verdict.lines)
    return Tuned(chosen, str(chosen.setting), runner, verdict.lines, verdict.met, rows, folder)


def _points(row: Row) -> str:
    """A difference from dense in points, with its interval."""
    if row.delta is None or row.delta_low is None or row.delta_high is None:
        return ""
    return f"{100 * row.delta:+.1f} [{100 * row.delta_low:+.1f}, {100 * row.delta_high:+.1f}]"


def _row(m: Measured, found: Search, verdict: Verdict) -> Row:
    score, speed = m.score, m.speed
    nothing = (None, None, None)
    top1, top1_low, top1_high = score.top1.three() if score else nothing
    delta, delta_low, delta_high = score.delta.three() if score and score.delta else nothing
    return Row(
        setting=m.option.name,
        family=m.option.candidate.family,
        gmacs=score.gmacs if score else speed.gmacs,
        mac_ratio=score.mac_ratio if score else speed.mac_ratio,
        top1=top1,
        top1_low=top1_low,
        top1_high=top1_high,
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
        chosen=m is verdict.chosen and found.judge is not None,
        note="" if speed.worth_it else "saves MACs, not time",
    )


def _details(row: Row, m: Measured) -> dict[str, Any]:
    return {
        **vars(row),
        "runner": str(m.option.runner),
        "selection_metric": m.selection,
        "score": m.score and m.score.to_dict(),
        "speed": m.speed.to_dict(),
    }


def csv_text(rows: Sequence[Any]) -> str:
    """Dataclasses of one kind as a table with a heading, floats unrounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(vars(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(row) for row in rows)
    return text.getvalue()


def model_name(model: AdaptiveViT) -> str:
    """timm's name of it."""
    return model.vit.pretrained_cfg.get("architecture") or type(model.vit).__name__


def _facts(model: AdaptiveViT, found: Search, options: dict[str, Any]) -> dict[str, str]:
    """How it was measured, in words."""
    speed = found.measured[0].speed
    facts = {
        **circumstances(model),
        "target": str(found.target),
        "timing": f"batch {speed.batch}, medians of {speed.runs} interleaved runs, against dense {speed.runner}",
        "attention": f"dense: {speed.kernels}",
    }
    if found.judge is not None:
        judge = found.judge
        halves = f"{found.selection_images} to choose by, {len(found.report_places)} reported"
        facts["images"] = f"{Path(judge.images.path).name}: {halves}"
        facts["seed"] = str(options.get("seed", 0))
        if judge.failures:
            named = ", ".join(f"{name} ({reason})" for name, reason in list(judge.failures.items())[:5])
            facts["not read"] = f"{len(judge.failures)} images: {named}"
    return facts


def circumstances(model: AdaptiveViT) -> dict[str, str]:
    """What every report says of the model and the machine."""
    device = next(model.parameters()).device
    return {
        "model": f"{model_name(model)}, {sum(p.numel() for p in model.vit.parameters()) / 1e6:.1f} M parameters",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "versions": f"saccade {saccade.__version__}, torch {torch.__version__}, timm {timm.__version__}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"CPU, {name}, {os.cpu_count()} cores"


def _samples(model: AdaptiveViT, found: Search, verdict: Verdict) -> list[Sample]:
    """Token maps of a few photos of the reporting half, under the settings that matter most."""
    judge = found.judge
    if judge is None:
        return []
    usual = [m for m in found.measured if m.option.candidate.family == "reduction"]
    usual.sort(
        key=lambda m: (m.option.name not in found.frontier, abs(m.speed.mac_ratio - verdict.chosen.speed.mac_ratio))
    )
    settings = ["dense", verdict.chosen.option.candidate.setting, *(m.option.candidate.setting for m in usual)]
    settings = list(dict.fromkeys(settings))[: SHOWN + 1]
    samples: list[Sample] = []
    for place in found.report_places:
        if len(samples) == SAMPLES:
            break
        if judge.images.names[place] in judge.failures:
            continue
        image = judge.images.read(place)
        panels = [(setting, token_map(model.at(setting).eval(), image)) for setting in settings]
        samples.append(Sample(judge.images.names[place], panels))
    return samples
