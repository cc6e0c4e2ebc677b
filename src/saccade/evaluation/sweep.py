"""``eval`` as people call it: accuracy, MACs and measured speed of settings and of ranges of them, and a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from saccade.checkpoint import Source, open_model
from saccade.core.registry import Entry, registry
from saccade.data import ImageSet, open_images
from saccade.evaluation import accuracy
from saccade.evaluation.accuracy import Score
from saccade.evaluation.candidates import RIVAL
from saccade.evaluation.circumstances import RUN, circumstances, csv_text, model_name, run_name
from saccade.evaluation.rivals import is_rival, open_rivals
from saccade.evaluation.speed import Speed, time_together
from saccade.evaluation.successive_halving import front
from saccade.evaluation.sweep_result import Evaluation, SweepRow, untrained_note
from saccade.evaluation.untrained import untrained
from saccade.model import AdaptiveViT
from saccade.reports.rows import Row
from saccade.reports.scale import Scale
from saccade.reports.sweep_report import SweepReport, curve_kind, render_sweep
from saccade.runners.runner import FP32, Runner
from saccade.setting import Call, Setting, expand
from saccade.storage.files import check_folder, json_text, write_texts
from saccade.storage.run_folder import owned
from saccade.storage.signs import EVAL
from saccade.terminal.progress import Progress

SECONDS = 10.0  # of timing, where a range is asked for
CLOSE = 0.01  # what counts as near dense in the report's answer: one point


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
    metric: str | None = None,
    rivals: Source | Sequence[Source] = (),
    command: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Scores and speed of settings of a model on images, the dense model first; and why which images were not read.

    Args:
        model: a model, a folder, or a timm name with ``weights`` or ``pretrained``; ``device`` as in
            ``saccade.checkpoint.open_model``.
        data: a folder or zip of images, ``class/name`` (see ``saccade.data.open_images``).
        settings: one or several, ranges too: ``"grid(8..40)"``, ``"evit(0.3..0.9..0.1)"``. A range stops at what makes
            sense to its method, for a grid at the patches that divide the input.
        split: of a folder of splits; None: the held-out one.
        limit: at most this many images, spread evenly over the set.
        batch: images at once, for timing too.
        seconds: of timed runs, all settings interleaved with dense, never fewer than 7 of each; 0: no timing;
            None: 10 where there is a range, else 0.
        out: a folder for ``scores.csv``, ``scores.json`` and ``report.html``; called again with it, an interrupted
            call goes on from there.
        corrupt: ``"masks:50"``, ``"gaussian_noise:3"``, … (``saccade.data.corrupt``), the same for all settings.
        dtype: number type of all that is run, "fp32", "bf16" or "fp16"; None: the model's own (``model.deployed``).
        metric: what is compared (``saccade.evaluation.metric``): "top-1", "agreement", "kl" or "cells"; of an encoder
            "recall@10", "reindexed@10", "cosine", "knn" or "cells". None: the usual one, which is said.
        rivals: one or several other models, each a row: a timm name (pretrained), "NAME=weights.safetensors", a folder,
            a module.
        progress: where to show it; None: nowhere.

    Raises:
        UserError: bad model, data, settings, corruption or folder, labels that do not fit the head, a model whose
            logits are not finite or all alike.
    """
    model = open_model(model, weights, pretrained, device)
    model = model.deploy(Runner(dtype or (model.deployed.dtype if model.deployed else "fp32")))
    folder = None if out is None else Path(out)
    if folder is not None:
        check_folder(folder)
    given = [settings] if isinstance(settings, (str, Setting)) else settings
    curves = {text: expanded(model, text) for text in map(str, given)}
    names = list(dict.fromkeys(name for found in curves.values() for name in found))
    ranged = {text: found for text, found in curves.items() if found != [text]}
    images = data if isinstance(data, ImageSet) else open_images(os.fspath(data), split)
    others = {rival.name: rival for rival in open_rivals(rivals, model)}
    found = accuracy.evaluate(
        model,
        images,
        names,
        limit=limit,
        batch=batch,
        cache=folder and folder / "cache",
        corrupt=corrupt,
        metric=metric,
        rivals=list(others.values()),
        progress=progress,
    )
    scores, failures = found
    speeds: dict[str, Speed] = {}
    if seconds or (seconds is None and ranged):
        views = {s.setting: others[s.setting].model if s.setting in others else model.at(s.setting).eval()
                 for s in scores}  # fmt: skip
        timed = time_together(views, batch, SECONDS if seconds is None else seconds, progress)
        speeds = {row.setting: row for row in timed}
    rows = [
        SweepRow(
            **vars(s),
            speed=speeds.get(s.setting),
            trained=None if s.setting in others else trained_for(model, s),
            untrained=() if s.setting in others else untrained(model, s.setting),
        )
        for s in scores
    ]
    result = Evaluation(rows, failures, found.left_out, found.metric)
    if folder is not None:
        _publish(folder, model, images, rows, ranged, result, corrupt, command)
    return result


def expanded(model: AdaptiveViT, text: str) -> list[str]:
    """The settings that a line with ranges stands for on this model. Raises UserError as ``setting.expand``."""
    known = registry()

    def sensible(call: Call) -> bool:
        return call.name not in known or known[call.name].accepts(model.backbone, call.args, dict(call.kwargs))

    return expand(text, sensible)


def trained_for(model: AdaptiveViT, row: Score) -> bool | None:
    """Whether the weights were trained for a setting, or for dense where it gives dense's very answers."""
    if not model.trained:
        return None
    known = registry()
    listed = {_normal(model, known, setting) for setting in model.trained}
    same = row.kl.mean == 0.0 and row.mac_ratio == 1.0 and _normal(model, known, "dense") in listed
    return same or _normal(model, known, row.setting) in listed


def _normal(model: AdaptiveViT, known: Mapping[str, Entry], setting: str) -> str:
    """A setting with every knob at its name: how it is written makes no difference."""
    parts = []
    for call in Setting.parse(setting).calls:
        entry = known.get(call.name)
        knobs = entry and entry.bound(model.backbone, call.args, dict(call.kwargs))
        parts.append((call.name, sorted(knobs.items(), key=lambda knob: knob[0])) if knobs else (call,))
    return repr(parts)


def _publish(
    folder: Path,
    model: AdaptiveViT,
    images: ImageSet,
    rows: list[SweepRow],
    ranged: dict[str, list[str]],
    found: Evaluation,
    corrupt: str | None,
    command: str,
) -> None:
    """Write the table, the numbers and the page."""
    facts = circumstances(model) | {"images": f"{images.path.name}: {rows[0].images}", "metric": found.metric}
    facts |= {"corruption": corrupt} if corrupt else {}
    if speed := rows[0].speed:
        facts["timing"] = f"batch {speed.batch}, medians of {speed.runs} interleaved runs, against dense {speed.runner}"
    failures = found.failures
    facts["number type"] = str(model.deployed or FP32)
    notes = [f"`{name}` could not be read and counts nowhere: {reason}" for name, reason in list(failures.items())[:10]]
    notes += [f"`{name}` is left out: {reason}" for name, reason in found.left_out.items()]
    table = _table(rows)
    places = {row.setting: i for i, row in enumerate(rows)}
    written = {"facts": facts, "rows": [r.to_dict() for r in rows], "not_read": failures, "left_out": found.left_out}
    facts[RUN] = run = run_name(command, written)
    report = SweepReport(
        title=f"{model_name(model)}: {', '.join(ranged) or 'settings'}",
        command=command,
        verdict=_verdict(rows),
        facts=facts,
        metric_name=rows[0].metric,
        rows=_by_curve(table, ranged),
        curves={text: [places[name] for name in found if name in places] for text, found in ranged.items()},
        untrained={i for i, row in enumerate(rows) if row.trained is False},
        notes=notes,
    )
    pages = {"report.html": render_sweep(report), "scores.csv": csv_text(table, run), "scores.json": json_text(written)}
    write_texts({folder / name: text for name, text in pages.items()})


def _by_curve(table: list[Row], ranged: dict[str, list[str]]) -> list[Row]:
    """The rows as the page draws them: those of a range look like their curve, the first where there are several."""
    curve = {name: k for k, found in reversed([*enumerate(ranged.values())]) for name in found}
    return [replace(row, family=curve_kind(curve[row.setting])) if row.setting in curve else row for row in table]


def _table(rows: list[SweepRow]) -> list[Row]:
    known = registry()
    cost = {r.setting: -r.speed.speedup if r.speed else r.gmacs for r in rows}
    scale = Scale.of(rows[0].metric)
    ours = [r for r in rows if not is_rival(r.setting)]
    best = front({r.setting: (cost[r.setting], scale.merit(r.value.mean)) for r in ours})

    def row(r: SweepRow) -> Row:
        entries = [] if is_rival(r.setting) else [known[call.name] for call in Setting.parse(r.setting).calls]
        kind = "dense" if all(e.kind == "tokenizer" for e in entries) else "reduction"
        kind = "random" if any(e.baseline for e in entries) else kind
        kind = RIVAL if is_rival(r.setting) else kind
        notes = ["not trained for"] if r.trained is False else []
        notes += [untrained_note(r)] if r.untrained else []
        notes += ["saves MACs, not time"] if r.speed and not r.speed.worth_it else []
        speed: dict[str, Any] = vars(r.speed) if r.speed else {}
        delta, delta_low, delta_high = r.delta.three() if r.delta else (None, None, None)
        return Row(
            setting=r.setting,
            family=kind,
            gmacs=r.gmacs,
            mac_ratio=r.mac_ratio,
            value=r.value.mean,
            value_low=r.value.low,
            value_high=r.value.high,
            delta=delta,
            delta_low=delta_low,
            delta_high=delta_high,
            agreement=r.agreement.mean,
            tokens=r.tokens,
            on_frontier=r.setting in best,
            chosen=False,
            note="; ".join(notes),
            metric=r.metric,
            **{k: speed.get(k) for k in ("speedup", "conversion", "images_per_s", "p50_ms", "memory_mb")},
        )

    return [row(r) for r in rows]


def _verdict(rows: list[SweepRow]) -> list[str]:
    """What the sweep says in words: the fastest near dense, the best, and what was not trained for."""
    dense, *others = [r for r in rows if not is_rival(r.setting)]
    timed, scale = dense.speed is not None, Scale.of(dense.metric)

    def gain(r: SweepRow) -> float:
        return r.speed.speedup if r.speed else r.mac_ratio

    def words(r: SweepRow) -> str:
        cost = f"{gain(r):.2f}× faster" if timed else f"{gain(r):.2f}× fewer MACs"
        delta = f"{scale.difference(r.value.mean - dense.value.mean)} {scale.step or dense.metric}"
        limits = f" [{100 * r.delta.low:+.1f}, {100 * r.delta.high:+.1f}]" if r.delta else ""
        return f"{cost} than `dense`, {delta}{limits}"

    def loss(r: SweepRow) -> float:
        return scale.merit(dense.value.mean) - scale.merit(r.value.mean)

    lines, close = [], "one point" if scale.share else f"{CLOSE}{scale.suffix}"
    near = [r for r in others if not r.untrained and gain(r) > 1.0 and loss(r) <= CLOSE]
    more, most = ("faster", "fastest") if timed else ("cheaper", "cheapest")
    if near:
        chosen = max(near, key=gain)
        lines.append(f"`{chosen.setting}` is the {most} within {close} of `dense`: {words(chosen)}.")
    elif others:
        lines.append(f"No other setting is {more} than `dense` within {close} of it.")
    best = max(rows if dense.delta is not None else others or rows, key=lambda r: scale.merit(r.value.mean))
    ends = f"{scale.value(best.value.low)}, {scale.value(best.value.high)}"
    lines.append(
        f"The best {dense.metric} is {scale.value(best.value.mean)} [{ends}], `{best.setting}` at "
        f"{best.gmacs:.3g} GMACs."
    )
    strange = [r for r in rows if r.trained is False]
    if strange:
        lines.append(f"The weights were not trained for {len(strange)} of {len(rows)} settings: hollow points.")
    elif any(r.trained is None for r in others):
        lines.append("What settings the weights were trained for is not recorded with them.")
    return lines
