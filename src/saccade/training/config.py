"""What a training run is made of: one small typed TOML file, whose every key can be set on the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saccade.data.store import TooLong, read_regular
from saccade.errors import UserError, nearest
from saccade.training.augmentation import Augment

MOST_BYTES = 2**20  # of a config
Decay = Annotated[float, Field(ge=0, lt=1)]
TASKS = {  # what a run is about -> module:class
    "classify": "saccade.tasks.classification.classification_task:Classify",
    "segment": "saccade.tasks.segmentation.segmentation_task:Segment",
    "detect": "saccade.tasks.detection.detection_task:Detect",
    "textimage": "saccade.tasks.image_text.image_text_task:Pairing",
}


class Section(BaseModel):
    """A part of the config: frozen, nothing that it does not name, and no number that is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(Section):
    """The ViT that is trained."""

    name: str = "vit_tiny_patch16_224"  # a timm name, or a folder saved by Saccade
    weights: str | None = None  #         a safetensors file with timm's keys
    pretrained: bool = False  #           timm's own weights, from the hub
    new_head: bool = False  #             leave out their classifier: one is made for the images, whatever theirs knows
    size: int | tuple[int, int] | None = None  # input pixels, or (h, w); positions are resized; None: the model's own
    crop_pct: float | None = Field(None, gt=0, le=1)  # of evaluation; None: the model's own
    args: dict[str, Any] = {}  #          further arguments of timm.create_model (drop_path_rate, embed_dim, …)


class Data(Section):
    """Images, as ``eval`` reads them."""

    path: str = ""
    split: str = "train"  #    ignored where there are no splits
    holdout: float = Field(0.1, ge=0, lt=1)  # share kept for checking where there is no val split; 0: no checks
    check_limit: int = Field(1000, ge=1)  #    images of a check, evenly spread
    cache_gb: float = Field(4.0, ge=0)  #      decode once into a file, where it stays below this
    workers: int = Field(2, ge=0)  #           processes that read and augment


class Segment(Section):
    """Classes of pixels, and what predicts them (segment)."""

    classes: tuple[str, ...] = Field((), max_length=255)  # in the order of their values in label files
    void: int = Field(255, ge=0, le=65535)  #    the value that is no class
    head: Literal["linear", "mask"] = "mask"  #  one linear map, or Segmenter's mask transformer
    layers: int = Field(2, ge=1, le=48)  #       of the mask transformer
    how: Literal["fit", "whole", "slide"] = "fit"  # how checks look: saccade.tasks.segmentation.segmenter.look


class Texts(Section):
    """How texts become vectors (detect, textimage)."""

    table: str | None = (
        None  # embeddings made elsewhere (saccade.tasks.image_text.text_tower.save_table); None: a tower of bytes
    )
    width: int = Field(128, ge=1)
    depth: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    length: int = Field(128, ge=2)  # most bytes of a text


class Pairs(Section):
    """Images with texts, and how they are compared (textimage)."""

    images: str | None = None  # what names in a table are relative to; None: the table's folder
    held: str | None = None  #   pairs to check on; None: the share data.holdout
    held_images: str | None = None
    templates: tuple[str, ...] = ()  # make texts of class names: "a photo of a {}."; (): there are texts
    loss: Literal["sigmoid", "softmax"] = "sigmoid"
    width: int | None = Field(None, ge=1)  # of the shared space; None: the image tower's, as it is


class Detect(Section):
    """Boxes, and what each part of the loss weighs (detect); defaults are OWL-ViT's."""

    annotations: str | None = None  # a COCO JSON; data.path holds its images; None: data.path is "scenes"
    held: str | None = None  #         another to check on; None: the share data.holdout
    held_images: str | None = None  #  None: data.path
    least: float = Field(0.3, ge=0, le=1)  # share of an object that a crop must leave, or it is none
    queries: Literal["text", "learned"] = "text"
    width: int = Field(128, ge=1)  # of queries
    focal: float = Field(1.0, ge=0)
    l1: float = Field(1.0, ge=0)
    giou: float = Field(1.0, ge=0)
    alpha: float = Field(0.3, ge=0, le=1)
    gamma: float = Field(2.0, ge=0)
    top: int = Field(100, ge=1, le=100)  # detections of an image that a check counts


class Knot(Section):
    """A distribution over the settings at a point of the training."""

    at: float = Field(ge=0, le=1)  # share of all steps
    weights: tuple[float, ...]


class Ramp(Section):
    """From the first setting to the last along half a cosine, as EViT lowers its keep rate (arXiv 2202.07800).

    A step draws one of the two settings next to where the ramp is, so that the mean over draws is on it exactly: the
    first alone up to ``start``, the middle of the list half way, the last alone from ``stop`` on.
    """

    start: float = Field(0.0, ge=0, le=1)  # shares of all steps
    stop: float = Field(ge=0, le=1)


class Sampling(Section):
    """Which settings a step runs: those of ``every``, and ``random`` ones drawn by ``weights``."""

    settings: tuple[str, ...] = Field(("dense",), min_length=1)
    weights: Literal["uniform", "compute"] | tuple[float, ...] | tuple[Knot, ...] | Ramp = "uniform"
    every: tuple[str, ...] = ()  # "largest", "smallest" (by MACs), or one of the settings
    random: int = Field(1, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Sampling:
        count = len(self.settings)
        if len(set(self.settings)) < count:
            raise ValueError("a setting is listed twice")
        if isinstance(self.weights, Ramp) and self.weights.start > self.weights.stop:
            raise ValueError(f"weights: a ramp cannot start at {self.weights.start} and stop at {self.weights.stop}")
        given: tuple[Any, ...] = self.weights if isinstance(self.weights, tuple) else ()
        rows = [knot.weights for knot in given] if given and isinstance(given[0], Knot) else [given]
        for row in rows if isinstance(self.weights, tuple) else ():
            if len(row) != count or min(row) < 0 or sum(row) <= 0:
                raise ValueError(f"weights {row}: give {count} of them, one a setting, none negative, not all zero")
        for name in self.every:
            if name not in ("largest", "smallest", *self.settings):
                raise ValueError(f"every: {name!r} is neither 'largest', 'smallest' nor one of the settings")
        if self.random + len(self.every) == 0:
            raise ValueError("random=0 and every=() leave a step nothing to run")
        return self


class Distill(Section):
    """What is learned from a teacher beside the labels."""

    teacher: str = ""  #        "": none; "self": the largest setting of each step; a timm name or a folder
    teacher_weights: str | None = None
    teacher_pretrained: bool = False
    weight: float = Field(0.5, ge=0, le=1)  #     share of the loss; 1: labels are not used
    labels: float | None = Field(None, ge=0)  #   weight of the labels beside it; None: 1 - weight
    kind: Literal["kl", "hard"] = "kl"
    temperature: float = Field(1.0, gt=0)
    features: float = Field(0.0, ge=0)  #         weight of 1 - cosine of the features before the head
    tokens: float = Field(0.0, ge=0)  #           weight of the squared error of the tokens that are kept to the end
    init: bool = False  #                         start from the teacher's weights, resized where that is needed


class Optim(Section):
    """AdamW with a cosine per step."""

    lr: float = Field(1e-4, gt=0)
    backbone: float = Field(1.0, ge=0)  # factor on lr of the ViT but its head; 0: frozen
    head: float = Field(1.0, ge=0)
    methods: float = Field(1.0, ge=0)  #  of what methods and tokenizers learn
    freeze: float = Field(0.0, ge=0)  #   epochs for which the backbone stands still
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    warmup: float = Field(0.05, ge=0, lt=1)  # share of all steps
    final: float = Field(0.01, ge=0, le=1)  #  of lr, at the end
    clip: float = Field(1.0, ge=0)  #          norm of all gradients; 0: never
    ema: float = Field(0.0, ge=0, lt=1)  #     decay of averaged weights; 0: none
    smoothing: float = Field(0.0, ge=0, lt=1)  # of labels


class Run(Section):
    """How long, how much at once, how often to look."""

    epochs: float = Field(1.0, gt=0)
    steps: int | None = Field(None, ge=1)  # instead of epochs
    batch: int = Field(64, ge=1)  #   images of one step, over all processes
    accumulate: int = Field(1, ge=1)  # parts that a step's batch is computed in
    seed: int = Field(0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    checkpointing: bool = False  #    keep no activations inside blocks, compute them twice
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    log_every: int = Field(10, ge=1)  #   steps
    check_every: float = Field(1.0, gt=0)  # epochs
    save_every: int = Field(200, ge=1)  #   steps
    keep_every: int | None = Field(None, ge=1)  # steps; checkpoints at these are kept for good
    tensorboard: bool = False


class Config(Section):
    """One training run."""

    task: str = "classify"
    model: Source = Source()
    data: Data = Data()
    segment: Segment = Segment()
    texts: Texts = Texts()
    pairs: Pairs = Pairs()
    detect: Detect = Detect()
    sampling: Sampling = Sampling()
    distill: Distill = Distill()
    augment: Augment = Augment()
    optim: Optim = Optim()
    run: Run = Run()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.task not in TASKS:
            raise ValueError(f"there is no task {self.task!r}{nearest(self.task, TASKS)}; give {' or '.join(TASKS)}")
        if self.run.batch % self.run.accumulate:
            raise ValueError(f"run.batch={self.run.batch} is no multiple of run.accumulate={self.run.accumulate}")
        if self.distill.teacher == "self" and "largest" not in self.sampling.every:
            raise ValueError('distill.teacher="self" needs "largest" in sampling.every: it is the teacher')
        if self.distill.init and self.distill.teacher in ("", "self"):
            raise ValueError("distill.init needs a teacher")
        return self


def shipped() -> dict[str, str]:
    """Names and texts of the configs that come with the package."""
    found = sorted((f.name, f) for f in files("saccade.configs").iterdir() if f.name.endswith(".toml"))
    return {name.removesuffix(".toml"): file.read_text(encoding="utf-8") for name, file in found}


def read_config(source: str | Path | Mapping[str, Any], changes: Iterable[str] = ()) -> Config:
    """A config by the name of a shipped one, from a TOML file or from a mapping, with ``key=value`` changes.

    Raises:
        UserError: no such config, not TOML, unknown key, value of the wrong kind or out of range.
    """
    values = dict(source) if isinstance(source, Mapping) else _parse(*_text(str(source)))
    for change in changes:
        _change(values, change)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_words(problem) for problem in error.errors()[:3])) from None


def _text(source: str) -> tuple[str, str]:
    known = shipped()
    if source in known:
        return known[source], source
    try:
        if Path(source).exists():
            return read_regular(Path(source), MOST_BYTES).decode(), source
    except (OSError, ValueError, TooLong) as error:  # too long a name or file, no permission, not UTF-8
        raise UserError(f"cannot read the config {source!r}: {getattr(error, 'strerror', None) or error}") from None
    raise UserError(f"there is no config {source!r}{nearest(source, known)}; or give the path of a TOML file")


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"config {name!r} is not TOML: {error}") from None


def _change(values: dict[str, Any], change: str) -> None:
    """Carry out ``optim.lr=1e-3``: the value is TOML, or else a string."""
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise UserError(f"cannot read {change!r}: write key=value, like optim.lr=1e-3 or data.path=photos.zip")
    *sections, last = (part.strip() for part in key.split("."))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{key!r}: {section!r} is a value, not a section")
    values[last] = value


def _words(problem: Any) -> str:
    """One line for one problem that pydantic found."""
    place = [str(part) for part in problem["loc"] if not str(part).startswith(("literal", "tuple", "function"))]
    key, text = ".".join(place), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        section: Any = Config
        for part in place[:-1]:
            section = section.model_fields[part].annotation
        return f"there is no key {key!r}{nearest(place[-1], section.model_fields)}"
    value = "" if isinstance(problem["input"], (dict, BaseModel)) else f"={problem['input']!r}"
    return f"{key}{value}: {text}" if key else text
