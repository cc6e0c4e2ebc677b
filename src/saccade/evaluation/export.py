"""``export``: one setting of a model as a folder for an engine, compared with the original on images."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saccade.backbones.plan_builder import with_tokenizer
from saccade.checkpoint import Source, open_model
from saccade.data import ImageSet, Preprocess
from saccade.data.classes import Classes
from saccade.errors import UserError
from saccade.evaluation.parity import Samples, parity
from saccade.model import AdaptiveViT
from saccade.runners.artefact import (
    ExportConfig,
    check_free,
    folder_made,
    is_artefact,
    open_artefact,
    write_config,
)
from saccade.runners.engine import check_dtype, engine_of, installed, versions
from saccade.runners.exported import IMAGES, Exported, has_fixed_counts
from saccade.runners.input_stage import InputStage
from saccade.runners.predict_script import script
from saccade.runners.runner import FP32, Runner
from saccade.setting import Setting
from saccade.storage.files import discard, write_text
from saccade.terminal.progress import Progress
from saccade.terminal.results import Result
from saccade.terminal.text_table import Column, Table

LEAST = 0.995  # share of images with the same best class; of encoders, mean cosine
REPORT = "parity.md"
EXPORT = "export"  # folder of what a search chose, where an engine runs it


@dataclass(frozen=True)
class ExportRow:
    """One artefact, and how it agrees with the model that it was made of."""

    setting: str
    folder: Path
    runner: str
    precision: str
    tokens: str
    gmacs: float
    images: int
    agreement: float | None
    cosine: float
    largest: float
    top1: float | None
    top1_before: float | None


class Exports(Result):
    """What ``export`` wrote, one row a setting."""

    def __init__(self, rows: Sequence[ExportRow], source: str) -> None:
        self.rows, self.source = list(rows), source

    def table(self) -> Table:
        """The parity report."""
        columns = ["setting", "runner", "agreement", "cosine", "largest difference", "top-1", "GMACs", "tokens"]
        cells = []
        for row in self.rows:
            same = "" if row.agreement is None else f"{row.agreement:.2%}"
            top1 = "" if row.top1 is None else f"{row.top1:.1%} (PyTorch {row.top1_before:.1%})"
            of = f"{row.runner}" + ("" if row.precision in row.runner else f", computed in {row.precision}")
            numbers = [same, f"{row.cosine:.6f}", f"{row.largest:.1e}", top1, f"{row.gmacs:.2f}", row.tokens]
            cells.append([row.setting, of, *numbers])
        caption = f"Against PyTorch in fp32 on {self.rows[0].images} images ({self.source})." if self.rows else ""
        return Table("Parity", [Column(c, prose=False) for c in columns], cells, caption)

    def markdown(self) -> str:
        """The same for a file beside the artefact."""
        table = self.table()
        names = [c if isinstance(c, str) else c.name for c in table.columns]
        rows = [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *table.rows)]
        return "\n".join(["# Parity", "", *rows, "", table.caption, ""])


def export(
    model: Source,
    out: str | os.PathLike,
    *,
    runner: str | Runner = "onnx",
    settings: Sequence[str] = (),
    batch: int | None = None,
    size: int | None = None,
    data: str | os.PathLike | ImageSet | None = None,
    limit: int = 300,
    places: Sequence[int] | None = None,
    provenance: bool = False,
    pixels: bool = False,
    least: float = LEAST,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    progress: Progress | None = None,
) -> Exports:
    """Write a model under a setting as a folder that an engine runs without Saccade, and compare the two on images.

    The folder holds the engine's file, ``config.json`` (setting, sizes, preprocessing, class names, checksums),
    ``predict.py`` (the engine, NumPy and Pillow) and the parity report. ``saccade.load`` opens it too.

    Args:
        runner: "onnx", "openvino", "aoti" or "torch", with a number type: "openvino bf16", "onnx int8".
        settings: the model's own by default; of several, each has a folder in ``out``, called like it.
        batch: images of every call; None: any number.
        size: pixels of a side, where the setting does not say.
        data: images to compare on, at most ``limit``, or those at these ``places``; None: drawn scenes.
        provenance: outputs "owner" and "tokens" too.
        pixels: take photos of any size, uint8 [B, H, W, 3], and resize, crop and normalise them in the graph.
        least: the agreement below which nothing is written: of an encoder the cosine. It is recorded.

    Raises:
        UserError: an engine that is not installed; a setting that it has no operators for; too little agreement.
    """
    way = Runner.of(runner)
    if not way.exported:
        raise UserError(f"runner {way} is not exported: give onnx, openvino, aoti or torch")
    way = Runner(way.dtype, way.engine, batch)
    if not 0 <= least <= 1:
        raise UserError(f"least={least} is not a share from 0 to 1")
    engine = engine_of(way.engine)
    check_dtype(engine, way.engine, way.dtype)
    whole = FP32.model(open_model(model, weights, pretrained, "cpu")).eval()  # a folder may hold half precision
    names = [str(_sized(whole, s, size)) for s in (settings or [str(whole.setting)])]
    views = {name: whole.at(name).eval() for name in dict.fromkeys(names)}
    folders = {name: Path(out) / _slug(name) if len(views) > 1 else Path(out) for name in views}
    if len(set(folders.values())) < len(folders):
        raise UserError(f"two of the settings {list(folders)} would have the same folder: export them one by one")
    for folder in folders.values():
        check_free(folder)
    images = Samples(data, limit, places)
    rows = []
    advance = (progress or Progress()).start("exporting", len(views))
    for name, view in views.items():
        advance(0, what=f"exporting {name}")
        rows.append(_one(view, folders[name], way, images, provenance, pixels, least))
        advance(1)
    advance.finish()
    made = Exports(rows, images.source)
    if len(views) > 1:
        write_text(Path(out) / REPORT, made.markdown())
    return made


def export_chosen(
    model: AdaptiveViT,
    runner: Runner,
    folder: Path,
    images: ImageSet,
    places: Sequence[int],
    speedups: Mapping[Runner, float] | None = None,
) -> list[str]:
    """What a search chose for an engine, exported into its folder; what there is of it to say.

    Where rounding moves too many answers, the same setting is exported in fp32: by the same engine, else by another.

    Args:
        speedups: of the setting over dense, by runner, as far as they were measured.
    """
    place, said = folder / EXPORT, list[str]()
    try:
        check_free(place)
        if is_artefact(place):
            discard(place)  # of an earlier choice
    except UserError as error:
        return [f"It is not exported: {error}"]
    for way in _instead(runner) if runner.exported else ():
        try:
            (row,) = export(model, place, runner=way, data=images, places=places).rows
        except UserError as error:
            low = "--least" in str(error)
            again = f"saccade export {(folder / 'model').as_posix()} --runner '{way}' --least 0.9 --out FOLDER"
            said.append(f"Not exported: {error}" + (f": `{again}`." if low else "."))
            continue
        same = f"{row.cosine:.4f} cosine" if row.agreement is None else f"{row.agreement:.2%} agreement"
        known = (speedups or {}).get(way)
        fast = "" if known is None or not said else f" at {known:.2f}× of dense"
        how = f" by {way} instead{fast}" if said else ""
        what = "runs without Saccade (`python predict.py photo.jpg`)"
        return [*said, f"Exported{how}: `{place.as_posix()}` {what}, {same} with the original on {row.images} images."]
    return said


def _instead(runner: Runner) -> list[Runner]:
    """A runner, and what runs the same without rounding, the nearest first; the last is there wherever PyTorch is."""
    engines = [runner.engine, *(way.engine for way in installed()), "torch"]
    return list(dict.fromkeys([Runner(runner.dtype, runner.engine), *(Runner("fp32", name) for name in engines)]))


def _one(
    view: AdaptiveViT, folder: Path, runner: Runner, images: Samples, provenance: bool, pixels: bool, least: float
) -> ExportRow:
    engine = engine_of(runner.engine)
    preprocess, classes = Preprocess.of(view.vit, view.input_size()), Classes.of(view.vit)
    stage = InputStage(preprocess.to_dict()) if pixels else None
    exported = Exported.of(view, runner, runner.batch, provenance, stage)
    with torch.inference_mode():
        trace = view(torch.zeros(1, view.backbone.channels, *view.input_size())).trace
    facts: dict[str, Any] = {
        "runner": {"engine": runner.engine, "dtype": runner.dtype, "batch": runner.batch},
        "architecture": str(view.vit.pretrained_cfg.get("architecture", type(view.vit).__name__)),
        "setting": str(view.setting),
        "tokens": "fixed" if has_fixed_counts(view) else "masked",
        "gmacs": trace.macs().item() / 1e9,
        "input": IMAGES,
        "pixels": pixels,
        "outputs": list(exported.outputs),
        "preprocessing": preprocess.to_dict(),
        "class_names": list(classes.names) or None,
        "labels": list(classes.words) or None,
        "versions": versions(engine),
    }
    with folder_made(folder) as part:
        engine.write(exported, part, runner.dtype)
        write_config(part, {**facts, "precision": runner.dtype})
        artefact = open_artefact(part, trusted=True)
        facts["precision"] = artefact.session.precision
        found = parity(view, artefact, preprocess, images, least)
        config = write_config(part, {**facts, "parity": found})
        row = _row(config, folder)
        (part / "predict.py").write_text(script(runner.engine, runner.dtype), encoding="utf-8")
        (part / REPORT).write_text(Exports([row], images.source).markdown(), encoding="utf-8")
        if not found["met"]:
            what = f"cosine {row.cosine:.4f}" if row.agreement is None else f"agreement {row.agreement:.2%}"
            raise UserError(
                f"{view.setting} by {runner}: {what} with the original on {row.images} images is under "
                f"{least:.1%}: nothing was written; a lower --least takes it"
            )
    return row


def _row(config: ExportConfig, folder: Path) -> ExportRow:
    parity, runner = config.parity, config.runner
    assert parity is not None
    facts = {k: v for k, v in parity.model_dump().items() if k in ExportRow.__dataclass_fields__}
    own = Runner(runner.dtype, runner.engine, runner.batch)
    return ExportRow(config.setting, folder, str(own), config.precision, config.tokens, config.gmacs, **facts)


def _sized(model: AdaptiveViT, setting: str, size: int | None) -> Setting:
    parsed = Setting.parse(setting)
    if size is None:
        return parsed
    if size < 1:
        raise UserError(f"size={size} is below 1 pixel")
    patch = model.backbone.patch_size[0]
    sized = with_tokenizer(parsed, Setting.parse(f"grid({patch}, size={size})").calls[0])
    if sized == parsed:
        raise UserError(f"{setting} has a tokenizer of its own: give its size there, and leave out --size")
    return sized


def _slug(setting: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", setting).strip("-.")[:80] or "dense"
