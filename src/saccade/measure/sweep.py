"""``eval`` as people call it: accuracy, MACs and measured speed of settings and of ranges of them, and a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.data import ImageSet, open_images
from saccade.files import check_folder, json_text, write_texts
from saccade.measure import accuracy
from saccade.measure.accuracy import Evaluated, Score
from saccade.measure.publish import circumstances, csv_text, model_name
from saccade.measure.race import front
from saccade.measure.speed import Speed, time_together
from saccade.measure.untrained import untrained
from saccade.model import AdaptiveViT
from saccade.opening import Source, open_model
from saccade.plan import Entry, registry
from saccade.progress import Progress
from saccade.run_folder import EVAL, owned
from saccade.runner import FP32, Runner
from saccade.setting import Call, Setting, expand
from saccade.tables import Table
from saccade.views.report import Row
from saccade.views.sweep import SweepReport, curve_kind, render_sweep

SECONDS = 10.0  # of timing, where a range is asked for
CLOSE = 0.01  # what counts as near dense in the report's answer: one point


@dataclass(frozen=True)
class Swept(Score):
    """One row of ``eval``: the score, and what else is known of the setting."""

    speed: Speed | None  #   None: not timed
    trained: bool | None  #  whether the weights were trained for it; None: not recorded
    untrained: tuple[str, ...] = ()  # methods in it whose own parameters are as they were initialised


class Evaluation(Evaluated):
    """What ``eval`` gives: a row for each setting, the dense model first; and what could not be read or scored."""

    rows: list[Swept]

    def table(self) -> Table:
        """Columns that have anything to say, by importance; of a timed evaluation without losses and top-5."""
        rows = self.rows
        timed = any(r.speed for r in rows)
        few = {"NLL", "KL", "top-5"} if timed else set()
        columns = {
            rows[0].metric: [f"{r.top1.mean:.2%} [{r.top1.low:.1%}, {r.top1.high:.1%}]" for r in rows],
            "points vs dense": [_delta(r) for r in rows],
            "GMACs": [f"{r.gmacs:.3f}" for r in rows],
            "speed-up": [f"{r.speed.speedup:.2f}×" if r.speed else "" for r in rows],
            "agree": [f"{r.agreement.mean:.1%}" for r in rows],
            "note": ["untrained" if r.untrained else "" for r in rows],
            "trained": [{True: "yes", False: "no", None: ""}[r.trained] for r in rows],
            "MAC ratio": [f"{r.mac_ratio:.2f}×" for r in rows],
            "images/s": [f"{r.speed.images_per_s:.1f}" if r.speed else "" for r in rows],
            "top-5": [f"{r.top5.mean:.1%}" for r in rows],
            "tokens": [f"{r.tokens:.0f}" for r in rows],
            "NLL": [f"{r.nll.mean:.3f}" for r in rows],
            "KL": [f"{r.kl.mean:.3f}" for r in rows],
        }
        shown = {name: cells for name, cells in columns.items() if name not in few}
        caption = "Intervals are at 95 %."
        if speed := rows[0].speed:
            caption += f" Speed: medians of {speed.runs} interleaved runs at batch {speed.batch}, {speed.runner}."
        cells = [[r.setting, *found] for r, *found in zip(rows, *shown.values(), strict=True)]
        return Table(f"{rows[0].images} images", ["setting", *shown], cells, caption)


@owned(EVAL)
def evaluate(
    model: Source,
    data: str | os.PathLike | ImageSet,
    settings: str | Setting | Sequence[str | Setting] = (),
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch: int = 32,
    seconds: float | None = None,
    out: str | os.PathLike | None = None,
    corrupt: str | None = None,
    dtype: str | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Scores and speed of settings of a model on images, the dense model first; and why which images were not read.

    Args:
        model: a model, a folder, or a timm name with ``weights`` or ``pretrained``; ``device`` as in
            ``saccade.opening.open_model``.
        data: a folder or zip of images, ``class/name`` (see ``saccade.data.open_images``); without classes the metric
            is agreement with the dense model.
        settings: one or several, ranges too: ``"grid(8..40)"``, ``"evit(0.3..0.9..0.1)"``. A range stops at what makes
            sense to its method, for a grid at the patches that divide the input.
        split: of a folder of splits; None: the held-out one.
        limit: at most so many images, spread evenly over the set.
        batch: images at once, for timing too.
        seconds: of timed runs, all settings interleaved with dense, never fewer than 7 of each; 0: no timing;
            None: 10 where there is a range, else 0.
        out: a folder for ``scores.csv``, ``scores.json`` and ``report.html``; called again with it, an interrupted
            call goes on from there.
        corrupt: ``"masks:50"``, ``"gaussian_noise:3"``, … (``saccade.data.corrupt``), the same for all settings.
        dtype: number type of all that is run, "fp32", "bf16" or "fp16"; None: the model's own (``model.runner``).
        progress: where to show it; None: nowhere.

    Raises:
        UserError: bad model, data, settings, corruption or folder, labels that do not fit the head, a model whose
            logits are not finite or all alike.
    """
    model = open_model(model, weights, pretrained, device)
    model = model.deploy(Runner(dtype or (model.runner.dtype if model.runner else "fp32")))
    folder = None if out is None else Path(out)
    if folder is not None:
        check_folder(folder)
    given = [settings] if isinstance(settings, (str, Setting)) else settings
    curves = {text: expanded(model, text) for text in map(str, given)}
    names = list(dict.fromkeys(name for found in curves.values() for name in found))
    ranged = {text: found for text, found in curves.items() if found != [text]}
    images = data if isinstance(data, ImageSet) else open_images(os.fspath(data), split)
    found = accuracy.evaluate(
        model,
        images,
        names,
        limit=limit,
        batch=batch,
        cache=folder and folder / "cache",
        corrupt=corrupt,
        progress=progress,
    )
    scores, failures = found
    speeds: dict[str, Speed] = {}
    if seconds or (seconds is None and ranged):
        views = {s.setting: model.at(s.setting).eval() for s in scores}
        timed = time_together(views, batch, SECONDS if seconds is None else seconds, progress)
        speeds = {row.setting: row for row in timed}
    rows = [
        Swept(
            **vars(s),
            speed=speeds.get(s.setting),
            trained=trained_for(model, s),
            untrained=untrained(model, s.setting),
        )
        for s in scores
    ]
    if folder is not None:
        _publish(folder, model, images, rows, ranged, Evaluation(rows, failures, found.left_out), corrupt, command)
    return Evaluation(rows, failures, found.left_out)


def expanded(model: AdaptiveViT, text: str) -> list[str]:
    """The settings that a line with ranges stands for on this model. Raises UserError as ``setting.expand``."""
    known = registry()

    def sensible(call: Call) -> bool:
        return call.name not in known or known[call.name].stops(model.backbone, call.args, dict(call.kwargs))

    return expand(text, sensible)


def trained_for(model: AdaptiveViT, row: Score) -> bool | None:
    """Whether the weights were trained for a setting, or for dense where it gives dense's very answers."""
    if not model.trained:
        return None
    known = registry()
    listed = {_normal(model, known, setting) for setting in model.trained}
    same = row.kl.high == 0.0 and row.mac_ratio == 1.0 and _normal(model, known, "dense") in listed
    return same or _normal(model, known, row.setting) in listed


def _normal(model: AdaptiveViT, known: Mapping[str, Entry], setting: str) -> str:
    """A setting with every knob at its name: how it is written makes no difference."""
    parts = []
    for call in Setting.parse(setting).calls:
        entry = known.get(call.name)
        knobs = entry and entry.bound(model.backbone, call.args, dict(call.kwargs))
        parts.append((call.name, sorted(knobs.items(), key=lambda knob: knob[0])) if knobs else (call,))
    return repr(parts)


def _delta(row: Score) -> str:
    """The difference from dense in points, with its interval."""
    return "" if row.delta is None else "{:+.2f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in row.delta.three()))


def _publish(
    folder: Path,
    model: AdaptiveViT,
    images: ImageSet,
    rows: list[Swept],
    ranged: dict[str, list[str]],
    found: Evaluation,
    corrupt: str | None,
    command: str,
) -> None:
    """Write the table, the numbers and the page."""
    facts = circumstances(model) | {"images": f"{images.path.name}: {rows[0].images}"}
    facts |= {"corruption": corrupt} if corrupt else {}
    if speed := rows[0].speed:
        facts["timing"] = f"batch {speed.batch}, medians of {speed.runs} interleaved runs, against dense {speed.runner}"
    failures = found.failures
    facts["number type"] = str(model.runner or FP32)
    notes = [f"`{name}` could not be read and counts nowhere: {reason}" for name, reason in list(failures.items())[:10]]
    notes += [f"`{name}` is left out: {reason}" for name, reason in found.left_out.items()]
    table = _table(model, rows, ranged)
    places = {row.setting: i for i, row in enumerate(rows)}
    report = SweepReport(
        title=f"{model_name(model)}: {', '.join(ranged) or 'settings'}",
        command=command,
        verdict=_verdict(rows),
        facts=facts,
        metric_name=rows[0].metric,
        rows=table,
        curves={text: [places[name] for name in found if name in places] for text, found in ranged.items()},
        untrained={i for i, row in enumerate(rows) if row.trained is False},
        notes=notes,
    )
    written = {"facts": facts, "rows": [r.to_dict() for r in rows], "not_read": failures, "left_out": found.left_out}
    pages = {"report.html": render_sweep(report), "scores.csv": csv_text(table), "scores.json": json_text(written)}
    write_texts({folder / name: text for name, text in pages.items()})


def _table(model: AdaptiveViT, rows: list[Swept], ranged: dict[str, list[str]]) -> list[Row]:
    known = registry()
    cost = {r.setting: -r.speed.speedup if r.speed else r.gmacs for r in rows}
    best = front({r.setting: (cost[r.setting], r.top1.mean) for r in rows})
    curve = {name: k for k, found in reversed([*enumerate(ranged.values())]) for name in found}

    def row(r: Swept) -> Row:
        entries = [known[call.name] for call in Setting.parse(r.setting).calls]
        kind = "dense" if all(e.kind == "tokenizer" for e in entries) else "reduction"
        kind = "random" if any(e.baseline for e in entries) else kind
        notes = ["not trained for"] if r.trained is False else []
        notes += [untrained_note(r)] if r.untrained else []
        notes += ["saves MACs, not time"] if r.speed and not r.speed.worth_it else []
        speed: dict[str, Any] = vars(r.speed) if r.speed else {}
        delta, delta_low, delta_high = r.delta.three() if r.delta else (None, None, None)
        return Row(
            setting=r.setting,
            family=curve_kind(curve[r.setting]) if r.setting in curve else kind,
            gmacs=r.gmacs,
            mac_ratio=r.mac_ratio,
            top1=r.top1.mean,
            top1_low=r.top1.low,
            top1_high=r.top1.high,
            delta=delta,
            delta_low=delta_low,
            delta_high=delta_high,
            agreement=r.agreement.mean,
            tokens=r.tokens,
            on_frontier=r.setting in best,
            chosen=False,
            note="; ".join(notes),
            **{k: speed.get(k) for k in ("speedup", "conversion", "images_per_s", "p50_ms", "memory_mb")},
        )

    return [row(r) for r in rows]


def untrained_note(row: Swept) -> str:
    """What to say of a row whose methods have learned nothing yet."""
    return f"untrained: {', '.join(row.untrained)} (parameters as initialised)"


def _verdict(rows: list[Swept]) -> list[str]:
    """What the sweep says in words: the fastest near dense, the best, and what was not trained for."""
    dense, *others = rows
    timed = dense.speed is not None

    def gain(r: Swept) -> float:
        return r.speed.speedup if r.speed else r.mac_ratio

    def words(r: Swept) -> str:
        cost = f"{gain(r):.2f}× faster" if timed else f"{gain(r):.2f}× fewer MACs"
        delta = f"{100 * (r.top1.mean - dense.top1.mean):+.1f} points"
        limits = f" [{100 * r.delta.low:+.1f}, {100 * r.delta.high:+.1f}]" if r.delta else ""
        return f"{cost} than `dense`, {delta}{limits}"

    lines = []
    near = [r for r in others if not r.untrained and gain(r) > 1.0 and r.top1.mean >= dense.top1.mean - CLOSE]
    most = "fastest" if timed else "cheapest"
    if near:
        chosen = max(near, key=gain)
        lines.append(f"`{chosen.setting}` is the {most} within one point of `dense`: {words(chosen)}.")
    elif others:
        lines.append(f"None of these {len(others)} settings is {most[:-3]}er than `dense` within one point of it.")
    best = max(rows, key=lambda r: r.top1.mean)
    lines.append(
        f"The best {dense.metric} is {best.top1.mean:.1%} [{best.top1.low:.1%}, {best.top1.high:.1%}], "
        f"`{best.setting}` at {best.gmacs:.3g} GMACs."
    )
    strange = [r for r in rows if r.trained is False]
    if strange:
        lines.append(
            f"{len(strange)} of {len(rows)} settings are none that the weights were trained for: hollow points."
        )
    elif any(r.trained is None for r in others):
        lines.append("What settings the weights were trained for is not recorded with them.")
    return lines
