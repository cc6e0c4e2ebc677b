"""All that may stand in a model folder's ``config.json``: one schema, typed and bounded.

A folder from elsewhere says what the model is. It never says what else to open, to download or to run, and what it says
is small: nothing is allocated for a number in it before the header of the weights has agreed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError, model_validator

from saccade.errors import UserError
from saccade.storage.architecture import ACTS, MLPS, NORMS
from saccade.storage.files import shortened

FORMAT = 1
CONFIG = "config.json"
MOST_BYTES = 64 * 2**20
Side = Annotated[int, Field(ge=1, le=8192)]  # pixels
Patch = Annotated[int, Field(ge=1, le=512)]
Text = Annotated[str, StringConstraints(max_length=1000)]
Rate = Annotated[FiniteFloat, Field(ge=0, lt=1)]
Positive = Annotated[FiniteFloat, Field(gt=0, le=100)]
Pair = tuple[Side, Side]


class Strict(BaseModel):
    """A part of the schema: nothing that it does not name, and no type but the right one."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class ModelArgs(Strict):
    """What timm is asked for; see ``saccade.storage.architecture``."""

    num_classes: int = Field(0, ge=0, le=2**24)
    img_size: Side | Pair = 224
    patch_size: Patch | tuple[Patch, Patch] = 16
    in_chans: int = Field(3, ge=1, le=1024)
    global_pool: Literal["token", "avg", "map"] = "token"
    embed_dim: int = Field(192, ge=1, le=16384)
    depth: int = Field(12, ge=1, le=256)
    num_heads: int = Field(3, ge=1, le=512)
    reg_tokens: int = Field(0, ge=0, le=1024)
    num_reg_tokens: int = Field(0, ge=0, le=1024)
    class_token: bool = True
    no_embed_class: bool = False
    pos_embed: Literal["learn", "none", ""] = "learn"
    pool_include_prefix: bool = False
    dynamic_img_size: bool = False
    dynamic_img_pad: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    scale_attn_norm: bool = False
    scale_mlp_norm: bool = False
    init_values: Positive | None = None
    mlp_ratio: Positive = 4.0
    mlp_layer: Literal[*MLPS] = "Mlp"  # type: ignore[valid-type]
    act_layer: Literal[*ACTS] = "gelu"  # type: ignore[valid-type]
    norm_layer: Literal[*NORMS] = "layernorm"  # type: ignore[valid-type]
    embed_norm_layer: Literal[*NORMS] = "layernorm"  # type: ignore[valid-type]
    norm_eps: Annotated[FiniteFloat, Field(ge=0, le=1)] = 1e-6
    drop_rate: Rate = 0.0
    pos_drop_rate: Rate = 0.0
    proj_drop_rate: Rate = 0.0
    attn_drop_rate: Rate = 0.0
    drop_path_rate: Rate = 0.0


class Preprocessing(Strict):
    """timm's names; what else timm may have written is left out."""

    model_config = ConfigDict(extra="ignore")
    input_size: tuple[Annotated[int, Field(ge=1, le=1024)], Side, Side] | None = None
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random", ""] | None = None
    crop_pct: Annotated[FiniteFloat, Field(ge=0.05, le=20)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    mean: Annotated[list[FiniteFloat], Field(min_length=1, max_length=1024)] | None = None
    std: Annotated[list[Positive], Field(min_length=1, max_length=1024)] | None = None
    num_classes: int | None = None
    tag: Text | None = None
    license: Text | None = None


class Seal(Strict):
    """Which weights belong to this config."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    bytes: int = Field(ge=8)


class Runner(Strict):
    """The way to run the model that was chosen."""

    dtype: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    compiled: bool = False
    engine: Annotated[str, StringConstraints(max_length=50)] | None = None  # in the place of compiled
    batch: Annotated[int, Field(ge=1, le=2**20)] | None = None


class Ours(Strict):
    """What is under ``saccade``. A task's own facts stand beside these, and are for the task to check."""

    model_config = ConfigDict(extra="allow")
    format: Literal[1]
    setting: Text
    settings: Annotated[list[Text], Field(max_length=1000)] = []
    plugins: dict[Text, Text] = {}  # methods that the settings name and this package has not, and what brings them
    task: Text = "classify"
    weights: Seal | None = None  # folders of before have none
    resize: Any = None  # see ResizeSpec.from_dict
    input_size: Pair = None  # type: ignore[assignment]  # may be absent, not null
    runner: Runner | Text | None = None


class FolderConfig(Strict):
    """``config.json``: timm's, with ours under one key."""

    model_config = ConfigDict(extra="ignore")
    architecture: Text
    args: ModelArgs = Field(alias="model_args")
    pretrained_cfg: Preprocessing = Preprocessing()
    label_names: Annotated[list[Text], Field(max_length=2**24)] | None = None
    label_descriptions: dict[Text, Text] | None = None
    saccade: Ours

    @model_validator(mode="after")
    def names_fit(self) -> FolderConfig:
        """As many different names as classes."""
        names, count = self.label_names, self.args.num_classes
        if names is not None and (len(names) != count or len({*names}) < count):
            raise ValueError(f"label_names: {len({*names})} different names for {count} classes")
        return self


class HubConfig(Strict):
    """``config.json`` as timm writes it for its hub, as far as it says what the model is."""

    model_config = ConfigDict(extra="ignore")
    architecture: Text
    args: ModelArgs = Field(ModelArgs(), alias="model_args")
    num_classes: Annotated[int, Field(ge=0, le=2**24)] | None = None
    pretrained_cfg: Preprocessing = Preprocessing()
    label_names: Annotated[list[Text], Field(max_length=2**24)] | None = None
    label_descriptions: dict[Text, Text] | None = None


def parse(data: bytes, path: Path) -> FolderConfig:
    """The config in a file's bytes. Raises UserError for anything that is none of ours."""
    try:
        return FolderConfig.model_validate_json(data)
    except ValidationError as error:
        wrong, *others = error.errors(include_url=False, include_context=False)
        if any(e["type"] == "missing" and e["loc"] == ("saccade",) for e in (wrong, *others)):
            raise UserError(
                f"{shortened(path.parent)} was not saved by Saccade: a folder of timm or transformers is opened as "
                f"{shortened(f'local-dir:{path.parent}')} with --pretrained (in Python: pretrained=True)"
            ) from None
        place = ".".join(str(part) for part in wrong["loc"])[:100]
        value = wrong.get("input")
        if place == "saccade.format":
            raise UserError(
                f"{shortened(path.parent)} has format {value!r}; this version reads format {FORMAT}"
            ) from None
        if place == "saccade.setting":
            raise UserError(f"{shortened(path)} names no setting of at most 1000 characters") from None
        if place.startswith("saccade.input_size"):
            what = f"input_size={str(value)[:50]} is not two whole numbers in [1, 8192]"
            raise UserError(f"{shortened(path)}: {what}") from None
        given = "" if wrong["type"] == "missing" or isinstance(value, (dict, list, bytes)) else f"={str(value)[:50]!r}"
        what = f"{place}{given}: {wrong['msg']}" if place else wrong["msg"]
        raise UserError(f"{shortened(path)} is not a Saccade config ({' '.join(what.split())[:250]})") from None
    except (ValueError, RecursionError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise UserError(f"{shortened(path)} is not a Saccade config ({reason})") from None


def read_bytes(path: Path) -> bytes:
    """The bytes of a config file. Raises UserError: missing, too long, unreadable."""
    if not path.is_file():
        raise UserError(f"{shortened(path.parent)} is not a model folder: it has no {CONFIG}")
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{shortened(path.parent)} is not a model folder: it has no {CONFIG}") from None
    except OSError as error:
        raise UserError(f"cannot read {shortened(path)}: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise UserError(f"{shortened(path)} is over {MOST_BYTES >> 20} MiB: it is not a Saccade config")
    return data


_CLOSED: ContextVar[str] = ContextVar("closed", default="")


@contextmanager
def closed(folder: str) -> Iterator[None]:
    """Within this block a setting comes from a folder: nothing that it names may open a file or a network."""
    token = _CLOSED.set(folder)
    try:
        yield
    finally:
        _CLOSED.reset(token)


def check_open(what: str) -> None:
    """Raises UserError where ``what`` is about to be opened because a folder's setting says so."""
    if folder := _CLOSED.get():
        raise UserError(
            f"{shortened(folder)}: its setting would open {what}, and a folder opens nothing else: pass the setting "
            "yourself, as in saccade.load(folder, setting)"
        )
