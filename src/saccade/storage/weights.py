"""Weights in safetensors files: read whole and finite or not at all, checked against a model, never unpickled."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from saccade.errors import UserError
from saccade.storage.files import shortened

CLASSIFIERS = ("head.", "head_dist.")  # how timm's begin
COMMON_PREFIXES = "module., _orig_mod., backbone., model., encoder. and the like"
# What a key in the file that the model has not, or the other way about, says of how the model is to be made.
UNEXPECTED = {
    r"blocks\.\d+\.ls1\.gamma": "its model has LayerScale: create this one with init_values=1e-5",
    r"blocks\.\d+\.attn\.q_norm\..*": "its model norms queries and keys: create this one with qk_norm=True",
    r"norm_pre\..*": "its model has a norm before the blocks: create this one with pre_norm=True",
    r"fc_norm\..*": "its model pools by average (fc_norm for norm): create this one with global_pool='avg'",
    r"reg_token": "its model has registers: create this one with reg_tokens=",
    r"head_dist\..*": "its model is a distilled one: take its name, like deit_…_distilled_…",
    r"attn_pool\..*": "its model pools by attention: create this one with global_pool='map'",
    r"decoder.*": "it holds a decoder too, as masked autoencoders do: keep the encoder's keys alone",
}
MISSING = {
    r"fc_norm\..*": "its model pools by the class token (norm for fc_norm): create this one with global_pool='token'",
    r"blocks\.\d+\.ls1\.gamma": "its model has no LayerScale: create this one with init_values=None",
    r"head\..*": "its model has no classifier: create this one with num_classes=0",
    r"reg_token": "its model has no registers: create this one with reg_tokens=0",
    r"cls_token": "its model has no class token: create this one with class_token=False, global_pool='avg'",
    r"pos_embed": "its model has no position table: create this one with pos_embed='none'",
}


Shapes = Mapping[str, torch.Size]
READ_ERRORS = (SafetensorError, ValueError, OSError, RuntimeError)  # the last from torch: the file has just gone


def read_weights(file: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises UserError: missing, another format, damaged, not finite."""
    path = _regular(file)
    try:
        state = load_file(path)
    except READ_ERRORS as error:
        raise _unreadable(path, error) from None
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise UserError(f"{shortened(path)} holds NaN or infinity in {len(bad)} of {len(state)} tensors ({some(bad)})")
    return state


def read_header(file: str | os.PathLike) -> dict[str, torch.Size]:
    """The shape of each tensor of a safetensors file; no tensor is read. Raises UserError as ``read_weights``."""
    path = _regular(file)
    try:
        with safe_open(path, "pt") as opened:
            return {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except READ_ERRORS as error:
        raise _unreadable(path, error) from None


def shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of each tensor."""
    return {name: value.shape for name, value in state.items()}


KEPT = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # number types that a folder keeps


def number_type(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """The number type that all of these weights have; None where they have several, or one that no folder keeps."""
    kinds = {v.dtype for v in state.values() if v.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 and kinds <= {*KEPT} else None


def require_keepable(state: Mapping[str, Tensor]) -> None:
    """Raises UserError for weights that no folder gives back: not finite, or of several number types."""
    if bad := [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]:
        raise UserError(f"{len(bad)} tensors of this model hold NaN or infinity ({some(bad)}): no folder would be read")
    if number_type(state) is None:
        kinds = {str(v.dtype).removeprefix("torch."): k for k, v in state.items() if v.is_floating_point()}
        listed = ", ".join(f"{name} of {kind}" for kind, name in sorted(kinds.items())[:3])
        raise UserError(
            f"this model's weights are not of one number type ({listed}): no folder keeps them; .float() it"
        )


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_weights(module: nn.Module, file: str | os.PathLike) -> None:
    """Load a safetensors file strictly, in the module's own dtype; a prefix that all its keys have is taken off, and
    a classifier is left out where the module is one without classes (``num_classes=0``).

    Raises UserError that lists what does not fit, and says what would.
    """
    state, own = read_weights(file), module.state_dict()
    if getattr(module, "num_classes", None) == 0:
        heads = tuple(_prefix(state, own) + name for name in CLASSIFIERS)
        state = {name: value for name, value in state.items() if not name.startswith(heads)}
    fill(module, without_prefix(state, own), str(file))


def fill(module: nn.Module, state: Mapping[str, Tensor], file: str) -> None:
    """Load tensors that came from ``file``, strictly, in the module's own dtype."""
    check_tensors(module.state_dict(), state, type(module).__name__, file)
    module.load_state_dict(state, strict=True)


def check_tensors(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str, file: str) -> None:
    """``check``; and raises UserError for numbers of another kind, or too large for the model's own type.

    Codes of quantised weights are no weights, and what is finite in fp32 may be infinite in fp16.
    """
    check(shapes(own), shapes(state), what, file)
    kinds = {k: f"{state[k].dtype} for {v.dtype}" for k, v in own.items() if _kind(v) != _kind(state[k])}
    if kinds:
        name = min(kinds)
        raise UserError(
            f"{file} does not fit {what}: {len(kinds)} tensors hold another kind of number ({name}: {kinds[name]}); "
            "if they are quantised, dequantise them first"
        )
    large = [k for k, v in own.items() if v.is_floating_point() and not torch.isfinite(state[k].to(v.dtype)).all()]
    if large:
        types = f"{state[large[0]].dtype} in the file, {own[large[0]].dtype} in the model"
        raise UserError(f"{file} holds numbers too large for {what} ({types}) in {len(large)} tensors ({some(large)})")


def _kind(value: Tensor) -> str:
    if value.is_complex() or value.dtype == torch.bool:
        return str(value.dtype)
    return "real" if value.is_floating_point() else "whole"


def without_prefix(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the model's own names, where every name is one of the model's after the same prefix."""
    prefix = _prefix(state, own)
    if prefix and all(name.startswith(prefix) and name[len(prefix) :] in own for name in state):
        return {name[len(prefix) :]: value for name, value in state.items()}
    return state


def _prefix(state: Mapping[str, object], own: Mapping[str, object]) -> str:
    """What stands before the model's names in a file; "" where that is nothing, or none of them is there."""
    for anchor in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", *list(own)[:1]):
        if anchor in own:
            for name in state:
                if name.endswith("." + anchor):
                    return name[: -len(anchor)]
    return ""


def check(own: Shapes, state: Shapes, what: str, file: str) -> None:
    """Raises UserError unless names and shapes are the same; it lists what is missing, unexpected, of another shape."""
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    odd = sorted(k for k in own.keys() & state.keys() if own[k] != state[k])
    if missing or unknown or odd:
        wrong = [f"{tuple(state[k])} for {k} {tuple(own[k])}" for k in odd]
        listed = {"missing": missing, "unexpected": unknown, "of another shape": wrong}
        text = "; ".join(f"{len(v)} {k} ({some(v)})" for k, v in listed.items() if v)
        advice = "; ".join(_advice(own, state, missing, unknown, odd)) or "the keys must be the model's own"
        raise UserError(f"{file} does not fit {what}: {text}; {advice}")


def _advice(own: Shapes, state: Shapes, missing: list[str], unknown: list[str], odd: list[str]) -> list[str]:
    """What to do about it, as far as the names and shapes tell; the most telling first."""
    if prefix := _prefix(state, own):
        return [f"the model's keys begin with {prefix!r} there, among others: keep those, strip {prefix!r}"]
    if missing and unknown and not own.keys() & state.keys():
        return ["the keys must be the model's own (timm's): convert them first"]
    found = []
    if "head.weight" in (*odd, *unknown):
        classes = state["head.weight"][0]
        found.append(
            f"its head has {classes} classes: create this model with num_classes={classes} (--num-classes {classes}), "
            "or with 0 to leave that head out (saccade train: --new-head)"
        )
    kernel = "patch_embed.proj.weight"
    if kernel in odd and state[kernel][:2] == own[kernel][:2]:
        found.append(f"create this model with patch_size={tuple(state[kernel][2:])}, or convert it afterwards")
    table = "pos_embed"
    if table in odd and len(state[table]) == 3 and state[table][2] == own[table][2]:
        count = state[table][1]
        side = next((isqrt(count - p) for p in range(6) if count > p and isqrt(count - p) ** 2 == count - p), None)
        if side:
            found.append(f"its positions are those of {side}x{side} patches: create this model with that img_size=")
    for names, known in ((unknown, UNEXPECTED), (missing, MISSING)):
        found += [said for pattern, said in known.items() if any(re.fullmatch(pattern, name) for name in names)]
    return found[:2]


def _regular(file: str | os.PathLike) -> Path:
    path = Path(file)
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):  # no path at all
        pass
    raise UserError(f"there is no weights file {shortened(path)}")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{shortened(path)} is not a readable safetensors file ({line(error)}); other formats may run code and are "
        "refused: convert it with safetensors.torch.save_file"
    )


def line(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def some(names: list[str], most: int = 6) -> str:
    """The first few of many names."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
