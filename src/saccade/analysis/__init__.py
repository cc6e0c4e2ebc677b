"""``analyze``: what changes inside a model between settings. One file an analysis; adding one is adding a file.

    @register("name", misfit=why_not)
    def name(study: Study, *, knob: int = 3) -> Finding:
        \"\"\"What it asks, in a sentence (paper).\"\"\"

A finding is lines, numbers and parts (``saccade.reports.report_blocks``); pages and JSON are made of them here, for all
alike.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from saccade.analysis.study import Finding, Study, usual
from saccade.checkpoint import Source, open_model
from saccade.data import ImageSet, Preprocess, open_images
from saccade.data.store import TooLong, read_regular
from saccade.errors import UserError, nearest
from saccade.evaluation.accuracy import spread
from saccade.evaluation.circumstances import RUN, circumstances, model_name, run_name
from saccade.evaluation.prediction_cache import Cache
from saccade.evaluation.sweep import expanded
from saccade.model import AdaptiveViT
from saccade.reports.analysis_report import AnalysisReport, render_analysis
from saccade.reports.report_blocks import render_parts
from saccade.setting import Call, Setting
from saccade.storage.files import check_folder, json_text, write_json, write_texts
from saccade.storage.run_folder import owned
from saccade.storage.signs import ANALYZE
from saccade.terminal.progress import Progress
from saccade.terminal.results import Result
from saccade.terminal.text_table import Column, Table

MOST_BYTES = 256 * 2**20  # of a finding that is read again: pages hold pictures
Misfit = Callable[[AdaptiveViT, ImageSet], str | None]


@dataclass(frozen=True)
class Analysis:
    """A registered analysis."""

    name: str
    run: Callable[..., Finding]  # of a study, and knobs
    misfit: Misfit  #              why it has nothing to say about a model on these images; None: it has

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.run) or "").split("\n", 1)[0]

    def check(self, call: Call) -> None:
        """Raises UserError for knobs that it does not have."""
        knobs = [*inspect.signature(self.run).parameters.values()][1:]
        for knob, _ in call.kwargs:
            if knob not in [k.name for k in knobs]:
                raise UserError(f"{self.name} has no knob {knob!r}{nearest(knob, [k.name for k in knobs])}")
        if call.args:
            raise UserError(f"{self.name}: name its knobs ({', '.join(map(str, knobs))})".replace("'", ""))


_REGISTRY: dict[str, Analysis] = {}


def register(name: str, misfit: Misfit = lambda model, images: None) -> Callable[[Callable], Callable]:
    """Put ``run(study, *, knobs) -> Finding`` into the registry; ``misfit`` tells cheaply where it does not apply."""

    def add(run: Callable) -> Callable:
        _REGISTRY[name] = Analysis(name, run, misfit)
        return run

    return add


def registry() -> dict[str, Analysis]:
    """All analyses: every file of this package is looked at once."""
    for module in iter_modules(__path__, __name__ + "."):
        import_module(module.name)
    return dict(sorted(_REGISTRY.items()))


@dataclass(frozen=True)
class Found:
    """What one analysis found."""

    lines: list[str]  #       in words, the answer first
    data: dict[str, Any]  #   in numbers
    markup: str  #            its section of the report


class Findings(Result, dict[str, Found]):
    """What ``analyze`` gives: findings by name, in the order asked for."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each line of a finding."""
        return [{"analysis": name, "finding": line} for name, found in self.items() for line in found.lines]

    def table(self) -> Table:
        cells = [[row["analysis"], row["finding"].replace("`", "")] for row in self.rows]
        return Table("Findings", ["analysis", Column("finding", 0, prose=True)], cells)


@owned(ANALYZE)
def analyze(
    model: Source,
    data: str | os.PathLike | ImageSet,
    settings: str | Sequence[str] = (),
    what: str = "",
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | None = None,
    split: str | None = None,
    limit: int = 300,
    batch: int = 32,
    out: str | os.PathLike | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Findings:
    """Compare what settings do inside a model; write ``analysis.json`` and ``report.html``.

    Args:
        model: a model, a folder, or a timm name with ``weights`` or ``pretrained``; ``device`` as in
            ``saccade.checkpoint.open_model``.
        data: a folder or zip of images (see ``saccade.data.open_images``).
        settings: those to compare, ranges too; none: dense and what the weights were trained for, or what tokenizers
            offer. The first is the one that others are held against.
        what: analyses by name, with knobs: ``"cka | relevance(photos=6)"``; empty: all that fit the images.
        split: of a folder of splits; None: the held-out one.
        limit: at most this many images, spread evenly over the set.
        batch: images at once.
        out: a folder, written after each analysis; called again with it, an interrupted call goes on from there.
        progress: where to show it; None: nowhere.

    Returns:
        findings by name, in the order asked for.

    Raises:
        UserError: bad data, settings, names, knobs or folder; an analysis asked for that the images do not fit.
    """
    progress = progress or Progress()
    folder = None if out is None else Path(out)
    if folder is not None:
        check_folder(folder)
    calls = Setting.parse(what).calls
    model = open_model(model, weights, pretrained, device).deploy(None)
    images = data if isinstance(data, ImageSet) else open_images(os.fspath(data), split)
    for line in images.notes:
        progress.say(line)
    given = [settings] if isinstance(settings, str) else settings
    names = [name for text in given for name in expanded(model, text)] or usual(model)
    names = list(dict.fromkeys(str(Setting.parse(name)) for name in names))
    study = Study(model.at("dense").eval(), images, tuple(names), tuple(spread(len(images), limit)), batch, progress)
    study.views()  # every setting is checked before any is run
    chosen, left_out = _choose(calls, model, images)
    page = _Page(folder, study, command, left_out)
    for call in chosen:
        page.add(call)
    return page.found


def _choose(calls: Sequence[Call], model: AdaptiveViT, images: ImageSet) -> tuple[list[Call], dict[str, str]]:
    """The analyses to run, and why others are left out."""
    known = registry()
    for call in calls:
        if call.name not in known:
            raise UserError(f"there is no analysis {call.name!r}{nearest(call.name, known)}")
        known[call.name].check(call)
        if reason := known[call.name].misfit(model, images):
            raise UserError(f"{call.name}: {reason}")
    if len({call.name for call in calls}) < len(calls):
        raise UserError("an analysis is named twice: name each once")
    if calls:
        return list(calls), {}
    reasons = {name: entry.misfit(model, images) for name, entry in known.items()}
    fitting = [Call(name) for name, reason in reasons.items() if reason is None]
    if not fitting:
        raise UserError(f"no analysis fits {images.path}: {'; '.join(f'{n}: {r}' for n, r in reasons.items())}")
    return fitting, {name: reason for name, reason in reasons.items() if reason}


class _Page:
    """The findings so far, in memory and in the folder."""

    def __init__(self, folder: Path | None, study: Study, command: str, left_out: dict[str, str]) -> None:
        self.folder, self.study, self.command, self.left_out = folder, study, command, left_out
        self.found = Findings()
        content, names = study.images.subset(study.places).fingerprint(), study.model.class_names
        facts = content, names, Preprocess.of(study.model.vit), study.places, study.batch, study.settings
        self.cache = None if folder is None else Cache(folder / "cache", study.model, *facts).folder

    def add(self, call: Call) -> None:
        """Run an analysis, or take up what an interrupted call found; write all."""
        key = hashlib.sha256(str(call).encode()).hexdigest()[:16]
        file = None if self.cache is None else self.cache / f"{call.name}-{key}.json"
        if file is None or (found := _read(file)) is None:
            finding = registry()[call.name].run(self.study, **dict(call.kwargs))
            found = Found(finding.lines, finding.data, render_parts(finding.parts))
            if file is not None:
                write_json(file, vars(found))
        self.found[call.name] = found
        if self.folder is not None:
            self._write(self.folder)

    def _write(self, folder: Path) -> None:
        study = self.study
        facts = circumstances(study.model) | {
            "images": f"{study.images.path.name}: {len(study.places)}",
            "settings": ", ".join(study.settings),
        }
        notes = [f"`{name}` was left out: {reason}" for name, reason in self.left_out.items()]
        notes += [f"`{name}` could not be read: {reason}" for name, reason in [*study.failures.items()][:10]]
        known = registry()
        sections = [(name, known[name].summary, found.lines, found.markup) for name, found in self.found.items()]
        findings = {name: {"lines": found.lines, **found.data} for name, found in self.found.items()}
        written = {"facts": facts, "settings": study.settings, "findings": findings, "left_out": self.left_out,
                   "not_read": study.failures}  # fmt: skip
        facts[RUN] = run_name(self.command, written)
        report = AnalysisReport(f"{model_name(study.model)}: analysis", self.command, sections, facts, notes)
        pages = {"report.html": render_analysis(report), "analysis.json": json_text(written)}
        write_texts({folder / name: text for name, text in pages.items()})


def _read(file: Path) -> Found | None:
    """A finding that was written before; None where there is none, or it cannot be read."""
    try:
        return Found(**json.loads(read_regular(file, MOST_BYTES).decode()))
    except (OSError, ValueError, TypeError, RecursionError, TooLong):
        return None
