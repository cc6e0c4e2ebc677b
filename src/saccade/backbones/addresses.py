"""Models that are kept where timm keeps its own: ``hf-hub:owner/name`` on the hub, ``local-dir:folder`` on a disk.

There timm writes a ``config.json``, which names the architecture and what it was made with, and ``model.safetensors``;
transformers write the same two with other words in them. Weights in other formats, which may run code, are not read.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import timm
from pydantic import ValidationError
from torch import Tensor

from saccade.backbones.huggingface import vit_of
from saccade.backbones.huggingface_config import is_theirs, read_config
from saccade.backbones.image_processor import FILE as PROCESSOR
from saccade.backbones.image_processor import preprocessing
from saccade.backbones.rebuilding import check_name
from saccade.backbones.vit import set_class_names
from saccade.core.timm_types import ViT
from saccade.errors import UserError
from saccade.storage.architecture import with_layers
from saccade.storage.files import read_at_most, shortened
from saccade.storage.folder_config import CONFIG, MOST_BYTES, HubConfig
from saccade.storage.weights import line, load_weights, read_weights

WEIGHTS = "model.safetensors"
PARTS = f"{WEIGHTS}.index.json"  # where they are in several files
LOCAL, HUB = "local-dir:", ("hf-hub:", "hf_hub:")
Fetch = Callable[[str], Path]  # the name of a file -> where it lies


def is_address(name: str) -> bool:
    """Whether a name is one of timm's addresses."""
    return name.startswith((LOCAL, *HUB))


def open_address(address: str, pretrained: bool, **kwargs: Any) -> ViT:
    """The timm ViT of an address, with its weights where they are asked for.

    Args:
        address: "hf-hub:owner/name", with "@revision" where it is not the newest; or "local-dir:folder".
        kwargs: of ``timm.create_model``, in the place of what the config says.

    Raises:
        UserError: nothing is there, or no network; a config that is none of timm's or transformers', or an architecture
            that timm has not; weights that are in another format, or do not fit.
    """
    fetch = _local(address) if address.startswith(LOCAL) else _hub(address)
    data = _read(address, fetch(CONFIG))
    if is_theirs(values := _values(data)):
        return _theirs(address, fetch, values, pretrained, kwargs)
    _say_what_is_left(address, values)
    config = _config(address, data)
    check_name(config.architecture)
    told = {} if config.num_classes is None else {"num_classes": config.num_classes}
    args = {**told, **with_layers(config.args.model_dump(exclude_unset=True)), **kwargs}
    try:
        vit = cast(ViT, timm.create_model(config.architecture, **args))
    except Exception as error:
        raise UserError(f"timm cannot create {address!r}: {line(error)}") from None
    known = config.pretrained_cfg.model_dump(exclude_unset=True, exclude_none=True)
    vit.pretrained_cfg = {**vit.pretrained_cfg, **known}
    if config.label_names is not None and len({*config.label_names}) == vit.num_classes:
        set_class_names(vit, config.label_names, config.label_descriptions)
    if pretrained:
        load_weights(vit, fetch(WEIGHTS))
    return vit


def _say_what_is_left(address: str, values: Mapping[str, Any]) -> None:
    """Warns of a folder that Saccade saved: an address opens its ViT alone."""
    ours = values.get("saccade")
    setting = ours.get("setting") if isinstance(ours, dict) else None
    if setting not in (None, "", "dense"):
        how = "saccade.load" if address.startswith(LOCAL) else "AdaptiveViT.from_pretrained"
        warnings.warn(
            f"{address!r} was saved under the setting {str(setting)[:100]!r}, and this opens its plain ViT: {how} "
            "opens it whole",
            stacklevel=5,
        )


def _theirs(address: str, fetch: Fetch, values: Mapping[str, Any], pretrained: bool, kwargs: Mapping[str, Any]) -> ViT:
    """A model that transformers wrote, by its weights. Raises UserError, also for arguments beside num_classes=0."""
    if other := [f"{k}={v!r}" for k, v in kwargs.items() if (k, v) != ("num_classes", 0)]:
        advice = "sizes are for the setting, as in grid(16, size=384); a head is taken off by num_classes=0"
        raise UserError(
            f"{address!r} is one of transformers', which is made by its weights, without {other[0]}: {advice}"
        )
    if not pretrained:
        raise UserError(f"{address!r} is one of transformers', which its weights alone describe: give pretrained=True")
    config = read_config(values, repr(address))
    vit = vit_of(config, _tensors(address, fetch), repr(address), classifier=kwargs.get("num_classes") != 0)
    try:
        processor = _values(_read(address, fetch(PROCESSOR)))
    except UserError:  # it need not be there
        processor = None
    vit.pretrained_cfg = {**vit.pretrained_cfg, **preprocessing(processor, config.model_type, repr(address))}
    return vit


def _tensors(address: str, fetch: Fetch) -> dict[str, Tensor]:
    """All weights, of one file or of several."""
    try:
        return read_weights(fetch(WEIGHTS))
    except UserError as missing:
        try:
            index = fetch(PARTS)
        except UserError:
            raise missing from None
    places = _values(_read(address, index)).get("weight_map")
    names = sorted({*places.values()}) if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{PARTS} of {address!r} names no files beside it")
    return {name: tensor for file in names for name, tensor in read_weights(fetch(file)).items()}


def _read(address: str, file: Path) -> bytes:
    try:
        return read_at_most(file, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file.name} of {address!r}: {line(error)}") from None


def _values(data: bytes) -> dict[str, Any]:
    """What stands in a JSON file; {} where that is no object."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _config(address: str, data: bytes) -> HubConfig:
    try:
        return HubConfig.model_validate_json(data)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, wrong["loc"]))[:100]
        raise UserError(f"{CONFIG} of {address!r} cannot be used ({place}: {wrong['msg'][:150]})") from None


def _local(address: str) -> Fetch:
    folder = Path(address.removeprefix(LOCAL))

    def fetch(name: str) -> Path:
        if not (folder / name).is_file():
            raise UserError(
                f"{shortened(folder)} has no {name}, which timm's save_for_hf and transformers' save_pretrained write"
            )
        return folder / name

    return fetch


def _hub(address: str) -> Fetch:
    place, _, revision = address.partition(":")[2].partition("@")

    def fetch(name: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(place, name, revision=revision or None))
        except LocalEntryNotFoundError:
            why = "it is not on this machine, and the hub cannot be reached"
        except EntryNotFoundError:
            why = "it is not there"
            why += "; weights in other formats may run code and are refused" if name == WEIGHTS else ""
        except HFValidationError as error:
            why = line(error)
        except Exception as error:
            why = f"{type(error).__name__}: {line(error)}"
        why += f"; there is a folder of that name here: local-dir:{place}" if os.path.isdir(place) else ""
        raise UserError(f"cannot fetch {name} of {place[:100]!r} from the hub: {why}")

    return fetch
