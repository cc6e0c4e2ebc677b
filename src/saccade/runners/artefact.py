"""A folder that runs without Saccade: an engine's files, ``config.json``, ``predict.py``, and the parity report."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, FiniteFloat, StringConstraints, ValidationError
from torch import Tensor

from saccade.errors import UserError
from saccade.runners.engine import Session, check_dtype, engine_of
from saccade.runners.runner import Runner
from saccade.storage.files import check_folder, discard, part_beside, reported, shortened, sweep, to_disk
from saccade.storage.folder_config import CONFIG, Preprocessing, Strict, Text, read_bytes
from saccade.storage.weights import digest

KEY = "saccade_export"
FORMAT = 1
CODE = ("aoti", "torch")  # engines whose files are run, or unpacked, as code
ELSEWHERE = re.compile(rb"\x0a(\x08|\x88[\x80]*\x00)location")  # of a tensor of an ONNX file, in another file
PREPROCESS = {"size", "interpolation", "crop_pct", "crop_mode", "mean", "std"}
OURS = {CONFIG, "predict.py", "parity.md", "model.onnx", "model.xml", "model.bin", "model.pt2"}
Count = Annotated[int, Field(ge=1, le=65536)]


class Engine(Strict):
    """The runner of an artefact."""

    engine: Text
    dtype: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    batch: Count | None = None  # None: any number of images


class Resizing(Preprocessing):
    """What ``predict.py`` does before the model, in timm's words, and the pixels (h, w) that the model takes."""

    size: tuple[Count, Count]


class Parity(Strict):
    """How far the artefact's answers are from those of the model that it was made of, in fp32 by PyTorch."""

    images: int = Field(ge=0)
    source: Text  # which images
    agreement: FiniteFloat | None = None  # share with the same best class; None: an encoder
    cosine: FiniteFloat  # mean, of logits or features
    largest: FiniteFloat  # difference of any logit or feature, over the largest one
    top1: FiniteFloat | None = None  # of the artefact, where images have labels
    top1_before: FiniteFloat | None = None
    least: FiniteFloat  # agreement (cosine) that was asked for
    met: bool


class ExportConfig(Strict):
    """``config.json`` of an artefact, under ``saccade_export``."""

    format: Literal[1]
    runner: Engine
    precision: Text  # that the engine computed in where it was exported
    architecture: Text
    setting: Text
    tokens: Literal["fixed", "masked"]  # counts that the graph holds, or masks over all tokens, at the cost of all
    gmacs: FiniteFloat  # of one image, as the setting costs where what is left out is skipped
    input: Text
    pixels: bool = False  # uint8 [B, H, W, 3] of any size, prepared in the graph; else float [B, 3, h, w], normalised
    outputs: Annotated[list[Text], Field(min_length=1, max_length=3)]
    preprocessing: Resizing
    class_names: Annotated[list[Text], Field(max_length=2**24)] | None = None  # folders
    labels: Annotated[list[Text], Field(max_length=2**24)] | None = None  #       what people call them
    files: dict[Text, Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]]
    versions: dict[Text, Text]
    parity: Parity | None = None


@dataclass(frozen=True)
class Answered:
    """What an artefact gives for images."""

    logits: Tensor  # [B, K], or features [B, D] of an encoder
    owner: Tensor | None = None  # [B, cells] int32: which token each cell ended in; -1: dropped
    tokens: Tensor | None = None  # [B] int32


class Artefact:
    """An exported model, open: ``artefact(images).logits``, images [B, 3, h, w] fp32, normalised."""

    def __init__(self, folder: Path, config: ExportConfig, session: Session) -> None:
        self.folder, self.config, self.session = folder, config, session
        self.setting = config.setting
        self.class_names, self.labels = (names and tuple(names) for names in (config.class_names, config.labels))
        self.preprocessing = config.preprocessing.model_dump(include=PREPROCESS)
        self.deployed = Runner(config.runner.dtype, config.runner.engine, config.runner.batch)

    def __call__(self, images: Tensor) -> Answered:
        """A batch of the wrong size or type raises UserError."""
        shape, (h, w), batch = tuple(images.shape), self.input_size(), self.config.runner.batch
        pixels = images.dtype == torch.uint8 and images.ndim == 4 and shape[3] == 3 and min(shape[1:3]) > 1
        fits = pixels if self.config.pixels else shape[1:] == (3, h, w) and images.is_floating_point()
        if not fits or (batch and shape[0] != batch):
            form = "uint8 [{}, H, W, 3]" if self.config.pixels else f"float [{{}}, 3, {h}, {w}]"
            raise UserError(f"images of shape {shape}: this artefact takes {form.format(batch or 'B')}")
        found = self.session.all(images if self.config.pixels else images.float())
        first = found[self.config.outputs[0]]
        return Answered(first, found.get("owner"), found.get("tokens"))

    def logits(self, images: Tensor) -> Tensor:
        """The first output for any number of images; where the batch is fixed, the last one is filled up."""
        size, found = self.config.runner.batch or len(images), []
        for part in images.split(max(size, 1)):
            missing = size - len(part)
            whole = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
            found.append(self(whole).logits[: len(part)])
        return torch.cat(found)

    def input_size(self) -> tuple[int, int]:
        """Pixels (h, w)."""
        return self.config.preprocessing.size

    def eval(self) -> Artefact:
        """Itself: there is no other mode."""
        return self

    def __repr__(self) -> str:
        return f"Artefact({self.setting}, {self.deployed}, {len(self.class_names or ())} classes)"


def is_artefact(folder: Path) -> bool:
    """Whether a folder's config is an artefact's."""
    file = folder / CONFIG
    return file.is_file() and f'"{KEY}"'.encode() in read_bytes(file)[:200]


def open_artefact(folder: str | os.PathLike, *, trusted: bool = False, threads: int | None = None) -> Artefact:
    """An artefact's folder, in its engine. Nothing in it but the engine's files is opened, and ``predict.py`` never.

    Args:
        trusted: also open files that are machine code (AOTInductor) or unpacked by PyTorch; do so only with your own.
        threads: of one call; None: as many as torch has.

    Raises:
        UserError: no artefact, files that are not those the config names, an engine that is not installed.
    """
    path = Path(folder)
    config = _parsed(path)
    runner = config.runner
    if runner.engine in CODE and not trusted:
        raise UserError(
            f"{shortened(path)} holds code ({runner.engine}): if it is your own, "
            f"saccade.runners.artefact.open_artefact({str(path)[:80]!r}, trusted=True), or run its predict.py"
        )
    Runner(runner.dtype, runner.engine, runner.batch)
    engine = engine_of(runner.engine)
    check_dtype(engine, runner.engine, runner.dtype)
    if set(config.files) != set(engine.FILES):
        raise UserError(f"{shortened(path / CONFIG)}: files {sorted(config.files)} are not {sorted(engine.FILES)}")
    for name, expected in config.files.items():
        file = path / name
        if not file.is_file() or digest(file) != expected:
            raise UserError(f"{shortened(file)} is not the file that {CONFIG} was written with: export again")
        if name.endswith(".onnx") and ELSEWHERE.search(file.read_bytes()):
            raise UserError(f"{shortened(file)} keeps weights in another file, which Saccade does not open")
    try:
        session = engine.open(path, runner.dtype, threads or torch.get_num_threads())
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{runner.engine} does not open {shortened(path)} ({reason})") from None
    if list(session.outputs) != config.outputs:
        raise UserError(f"{shortened(path)} gives {list(session.outputs)}, and its {CONFIG} says {config.outputs}")
    return Artefact(path, config, session)


def _parsed(folder: Path) -> ExportConfig:
    data = read_bytes(folder / CONFIG)
    try:
        found = json.loads(data)
        if not (isinstance(found, dict) and isinstance(found.get(KEY), dict)):
            raise UserError(f"{shortened(folder)} is not what saccade export writes: its {CONFIG} has no {KEY!r}")
        return ExportConfig.model_validate_json(json.dumps(found[KEY]))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False)[0]
        place, reason = ".".join(map(str, wrong["loc"]))[:100], wrong["msg"]
        raise UserError(f"{shortened(folder / CONFIG)}: {place}: {reason}"[:400]) from None
    except (ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise UserError(f"{shortened(folder / CONFIG)} is not JSON ({reason})") from None


@contextmanager
def folder_made(target: str | os.PathLike) -> Iterator[Path]:
    """A hidden folder beside ``target`` that takes its place when the block ends well, and goes when it does not.

    An artefact that is there is renamed away first, and is back where the new one cannot take its place. A process that
    is killed between the two renames leaves both, whole, under hidden names; the next export to end well removes them.

    Raises UserError where ``target`` holds anything that is not an artefact, before the work is done.
    """
    check_free(target)
    with reported("write", target):
        place = Path(os.path.realpath(target))
        place.parent.mkdir(parents=True, exist_ok=True)
        part = part_beside(place)
        part.mkdir()
        try:
            yield part
            for file in part.iterdir():
                to_disk(file)
            to_disk(part)
            if place.is_dir():
                before = part_beside(place)
                os.replace(place, before)
                try:
                    os.replace(part, place)
                except BaseException:
                    os.replace(before, place)
                    raise
                discard(before)
            else:
                os.replace(part, place)
            to_disk(place.parent)
        finally:
            discard(part)
        sweep(place.parent, f".{place.name[:40]}.")


def check_free(target: str | os.PathLike) -> None:
    """Raises UserError where an artefact cannot be written: something else is there."""
    check_folder(target)
    place = Path(target)
    found = sorted(entry.name for entry in place.iterdir()) if place.is_dir() else []
    if found and not is_artefact(place):
        raise UserError(f"{shortened(target)} is there and is not an exported model: give another --out")
    if foreign := [name for name in found if name not in OURS]:
        raise UserError(f"{shortened(target)} holds {foreign[0][:80]!r} beside an exported model: give another --out")


def write_config(folder: Path, facts: Mapping[str, Any]) -> ExportConfig:
    """Write ``config.json`` with the checksums of the engine's files that lie in a folder."""
    engine = engine_of(facts["runner"]["engine"])
    files = {name: digest(folder / name) for name in engine.FILES}
    config = ExportConfig.model_validate_json(json.dumps({"format": FORMAT, **facts, "files": files}))
    text = json.dumps({KEY: config.model_dump(mode="json", exclude_none=True)}, indent=2)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return config


def compared(before: Tensor, after: Tensor) -> dict[str, float]:
    """Two answers to the same images, [n, K]: agreement of the best class, mean cosine, largest difference."""
    before, after = before.double(), after.double()
    scale = before.abs().max().clamp(min=1e-12)
    return {
        "agreement": (before.argmax(-1) == after.argmax(-1)).double().mean().item(),
        "cosine": torch.cosine_similarity(before, after, dim=-1).mean().item(),
        "largest": ((before - after).abs().max() / scale).item(),
    }
