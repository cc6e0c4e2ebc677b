"""The latency curve of a model on this device, measured once and kept: ``saccade doctor --curve MODEL``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.evaluation.circumstances import circumstances
from saccade.evaluation.latency_curve import LatencyCurve, decides_nothing, measure
from saccade.evaluation.schedule import rules_of
from saccade.evaluation.work import work_of
from saccade.execution.policy import cache_file
from saccade.model import AdaptiveViT
from saccade.reports.figure import Figure
from saccade.reports.latency_figures import latency_figures
from saccade.reports.page import render_figures, render_page, section
from saccade.runners.engine import engine_of, versions
from saccade.runners.runner import FP32, Runner
from saccade.setting import Call, Setting
from saccade.storage.files import write_json
from saccade.terminal.progress import Progress
from saccade.terminal.results import Result
from saccade.terminal.text_table import Column, Table


@dataclass(frozen=True)
class CurveRow:
    """One part of a forward's time."""

    part: str
    ms: float  #      of a batch
    each_token_us: float | None = None  # microseconds more for each token that comes to it; None: no such part


class DeviceCurve(Result):
    """What a block takes by its tokens, what deciding takes by method, and tokenizer and head."""

    def __init__(self, curve: LatencyCurve) -> None:
        self.curve = curve
        blocks = zip(curve.tokens, curve.block, strict=True)
        self.rows = [CurveRow(f"a block of {round(n)} tokens", ms) for n, ms in blocks]
        self.rows += [
            CurveRow(f"{name or 'grid'}, {round(n)} tokens: embedding and head", ms)
            for name, pairs in curve.tokenizers.items()
            for n, ms in pairs
        ]
        self.rows += [
            CurveRow(f"{name}: deciding, a block", ms, 1e3 * token) for name, (ms, token, _) in curve.methods.items()
        ]

    def table(self) -> Table:
        """As the command prints it."""
        cells = [
            [row.part, f"{row.ms:.3f}", "" if row.each_token_us is None else f"{row.each_token_us:+.2f}"]
            for row in self.rows
        ]
        columns = [Column("part", rank=0), Column("ms a batch", rank=0), Column("µs more a token", rank=0)]
        return Table(f"Latency curve: {self.curve.runner}, batch {self.curve.batch}", columns, cells)

    def figures(self) -> list[Figure]:
        """A block's time by its tokens, and what deciding takes by method, as a report shows them."""
        return latency_figures(self.curve.tokens, self.curve.block, self.curve.decision_ms(), self.curve.block[-1])

    def page(self) -> str:
        """Figures as a page of HTML."""
        told = f"A block of {round(self.curve.tokens[-1])} tokens takes {self.curve.block[-1]:.3g} ms"
        table = self.table()
        shown = section("curve", "What a forward's time is made of", render_figures(self.figures()))
        return render_page(table.title, "plain", told, [], "", [shown])


def device_curve(
    model: AdaptiveViT,
    *,
    runner: Runner | str = FP32,
    batch: int = 1,
    seconds: float = 10.0,
    progress: Progress | None = None,
) -> DeviceCurve:
    """The curve of a model in a runner: read, where it was measured here before, or measured and kept.

    Raises UserError for an unknown runner, or an engine that is not installed.
    """
    runner, some = Runner.of(runner), some_of_each(model)
    return DeviceCurve(curve_of(model, some, runner=runner, batch=batch, seconds=seconds, progress=progress))


def curve_of(
    model: AdaptiveViT,
    some: Sequence[str],
    *,
    runner: Runner,
    batch: int,
    seconds: float = 10.0,
    progress: Progress | None = None,
) -> LatencyCurve:
    """The curve by some settings of a model: one that was measured here before by these or by the whole menu, or a new
    one, which is kept."""
    if (known := known_curve(model, some, runner, batch)) is not None:
        return known
    curve = measure(model, some, runner=runner, batch=batch, seconds=seconds, progress=progress)
    file = curve_file(model, some, runner, batch)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, curve.to_dict())
    return curve


def known_curve(model: AdaptiveViT, some: Sequence[str], runner: Runner, batch: int) -> LatencyCurve | None:
    """A curve by some settings, or by the whole menu, that was measured here before."""
    whole, own = (_read(curve_file(model, settings, runner, batch)) for settings in (some_of_each(model), some))
    return whole or own


def some_of_each(model: AdaptiveViT) -> list[str]:
    """Settings by which methods and tokenizers are known: of a method the weakest and the strongest of its menu, and
    the strongest on a smaller input, where there is one, so that few tokens come to it as well as many. Of one that
    takes counts, for the weakest one that decides in three blocks where its menu does in all, or the other way round;
    and what of the strongest decides otherwise, where it counts in several ways."""
    menus = {name: entry.menu(model.backbone) for name, entry in registry().items()}
    tokenizers = [s for name, menu in menus.items() if registry()[name].kind == "tokenizer" for s in menu]
    half = (model.backbone.num_prefix + model.backbone.num_patches) / 2
    grids = [s for s in tokenizers if decides_nothing(s)]
    smaller = sorted(grids, key=lambda s: abs(work_of(model.at(s).eval()).attention[0] - half))[:1]
    found = tokenizers
    for name, menu in menus.items():
        if registry()[name].kind != "tokenizer" and menu:
            weakest = _in_other_blocks(model, name, menu[-1]) or menu[0]
            found += [weakest, menu[-1], *_on_smaller(model, smaller, menu[-1]), *_in_one_way(model, menu[-1])]
    return list(dict.fromkeys(found))


def _on_smaller(model: AdaptiveViT, grids: Sequence[str], setting: str) -> Iterator[str]:
    for grid in grids:
        with suppress(UserError):  # counts that a smaller input has not
            view = model.at(f"{grid} | {setting}").eval()
            if work_of(view).deciding:
                yield str(view.setting)


def _in_one_way(model: AdaptiveViT, setting: str) -> Iterator[str]:
    """Of a method that counts in several ways: in one alone, where that decides otherwise."""
    (call,) = Setting.parse(setting).calls
    entry, whole = registry()[call.name], work_of(model.at(setting).eval()).deciding
    given = dict(zip(entry.knobs, call.args, strict=False)) | dict(call.kwargs)
    for knob in entry.counts if len(entry.counts) > 1 else ():
        zeros = {other: 0 for other in entry.counts if other != knob}
        alone = str(Setting((Call(call.name, (), tuple((given | zeros).items())),)))
        if not work_of(model.at(alone).eval()).deciding.keys() <= whole.keys():
            yield alone


def _in_other_blocks(model: AdaptiveViT, name: str, setting: str) -> str | None:
    """Half of all tokens by a method, in three blocks where a setting of it decides in more, or else in all; None where
    it takes no counts."""
    rules, depth = rules_of(name, model.backbone), model.backbone.depth
    if not rules:
        return None
    work = work_of(model.at(setting).eval())
    few = max((sites for sites, *_ in work.deciding.values()), default=0.0) > depth / 2
    some = {depth // 4, depth // 2, 3 * depth // 4} if few else {*range(1, depth)}
    each = max(1, model.backbone.num_patches // (2 * len(some)))
    *others, rule = rules
    counts = tuple(each * (block in some) for block in range(depth))
    given = {other.knob: 0 for other in others} | {rule.knob: counts} | dict(rule.others)
    return str(model.at(str(Setting((Call(name, (), tuple(given.items())),)))).setting)


def curve_file(model: AdaptiveViT, some: Sequence[str], runner: Runner, batch: int) -> Path:
    """Where a curve is kept: named by the model's shapes, settings, runner, batch, device, threads and versions."""
    facts = [repr(model.vit), repr(model.backbone), *some, str(runner), batch, sorted(circumstances(model).items())]
    facts += sorted(versions(engine_of(runner.engine)).items()) if runner.exported else []
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    return cache_file().parent / f"latency-{key}.json"


def _read(file: Path) -> LatencyCurve | None:
    try:
        return LatencyCurve.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
