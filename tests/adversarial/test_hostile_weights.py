"""Damaged weights: a file is refused, or holds tensors of the model's own names and shapes, all finite.

In a folder that Saccade saved nothing but the very tensors that were saved is taken.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

import saccade
from attack import attempt, damaged, outcomes, twisted
from data_helpers import encode, picture
from oracles import make_vit
from saccade.checkpoint import load_weights
from saccade.errors import UserError
from saccade.model import AdaptiveViT

SMALL = {"depth": 1, "embed_dim": 12, "num_heads": 1, "img_size": 32, "num_classes": 3}


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    return make_vit(**SMALL)


@pytest.fixture(scope="module")
def good(vit) -> bytes:
    return save({k: v.contiguous() for k, v in vit.state_dict().items()})


@pytest.fixture(scope="module")
def folder(vit, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saved") / "model"
    saccade.save(AdaptiveViT(vit, "tome(r=1)"), root)
    return root


def header(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(told: Any, body: bytes, size: int | None = None) -> bytes:
    text = json.dumps(told).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def accepted(vit: torch.nn.Module, data: bytes, file: Path) -> bool:
    """Whether a file is taken; then the module holds what is in it, finite and of its own shapes."""
    twin = make_vit(**SMALL)
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    file.write_bytes(data)
    found = attempt(lambda: load_weights(twin, file))
    if isinstance(found, UserError):
        assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items()), "refused, and yet written to"
        return False
    told = load_file(file)
    for name, own in twin.state_dict().items():
        assert own.shape == before[name].shape and own.dtype == before[name].dtype
        assert torch.isfinite(own).all(), f"{name} is not finite"
        assert torch.equal(own, told[name].to(own.dtype)), f"{name} is not what the file holds"
    return True


def test_undamaged(vit, good, tmp_path):
    assert accepted(vit, good, tmp_path / "w.safetensors")


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_bytes(vit, good, tmp_path, count):
    size = struct.unpack("<Q", good[:8])[0]
    cases = damaged(good, 0, count, header=size + 8)
    found = outcomes(cases, lambda data: accepted(vit, data, tmp_path / "w.safetensors"))
    assert len(found) == count and not all(found)


@pytest.mark.parametrize("count", [200, pytest.param(None, marks=pytest.mark.slow)])
def test_headers(vit, good, tmp_path, count):
    told, body = header(good)
    few = {k: told[k] for k in list(told)[:4]} | {"__metadata__": {"format": "pt"}}
    file = tmp_path / "w.safetensors"
    found = outcomes(twisted(few, 0, count), lambda value: accepted(vit, with_header({**told, **value}, body), file))
    assert found and not all(found)


def _dtype(dtype: torch.dtype) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        state["norm.weight"] = state["norm.weight"].to(dtype)

    return change


def _set(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        state[name] = value(state[name])

    return change


REFUSED: dict[str, Callable[[dict], Any]] = {
    "NaN": _set("head.bias", lambda t: t * float("nan")),
    "infinity": _set("head.bias", lambda t: t / 0),
    "infinity after the cast to the model's own type": _set("head.bias", lambda t: t.double() + 1e300),
    "no columns": _set("head.weight", lambda t: t[:, :0]),
    "one dimension more": _set("head.bias", lambda t: t[None]),
    "transposed": _set("head.weight", lambda t: t.T.contiguous()),
    "complex numbers": _dtype(torch.complex64),
    "truth values": _dtype(torch.bool),
    "whole numbers": _dtype(torch.int64),
    "bytes": _dtype(torch.uint8),
    "another name": lambda state: state.update(NORM=state.pop("norm.weight")),
    "a name too much": lambda state: state.update({"__class__": torch.ones(1)}),
    "a name with a prefix": lambda state: state.update({"module.head.bias": state.pop("head.bias")}),
    "none at all": lambda state: state.clear(),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(vit, good, tmp_path, what):
    state = {k: v.clone() for k, v in vit.state_dict().items()}
    REFUSED[what](state)
    assert not accepted(vit, save(state), tmp_path / "w.safetensors")


def lies(good: bytes) -> dict[str, bytes]:
    """Files whose header says what is not so."""
    told, body = header(good)
    first, second = [k for k in told if k != "__metadata__"][:2]
    size = struct.unpack("<Q", good[:8])[0]
    return {
        "header of 2^63 bytes": struct.pack("<Q", 2**63) + good[8:],
        "header of 90 MB": struct.pack("<Q", 90 * 2**20) + good[8:],
        "header longer than the file": struct.pack("<Q", len(good)) + good[8:],
        "header of no bytes": struct.pack("<Q", 0) + good[8:],
        "header shorter than it is": struct.pack("<Q", size - 1) + good[8:],
        "two tensors in one place": with_header({**told, first: {**told[second]}}, body),
        "a hole": with_header(told, body + b"\0" * 64),
        "offsets reversed": with_header(
            {**told, first: {**told[first], "data_offsets": told[first]["data_offsets"][::-1]}}, body
        ),
        "2^62 elements": with_header({**told, first: {**told[first], "shape": [2**31, 2**31]}}, body),
        "product of the shape wraps to 0": with_header({**told, first: {**told[first], "shape": [2**32, 2**32]}}, body),
        "negative shape": with_header({**told, first: {**told[first], "shape": [-1, -1]}}, body),
        "unknown type": with_header({**told, first: {**told[first], "dtype": "F1024"}}, body),
        "a list": with_header([told], body),
        "10^5 nested lists": struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000 + body,
        "nothing": b"",
        "eight bytes": good[:8],
        "a pickle": b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        "a zip, as torch.save writes": b"PK\x03\x04" + good,
        "a web page": b"<!DOCTYPE html><html>404</html>",
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "an image": encode(picture()),
    }  # fmt: skip


def test_lying_headers(vit, good, tmp_path):
    for what, data in lies(good).items():
        assert not accepted(vit, data, tmp_path / "w.safetensors"), what


@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_saved_folder_gives_what_was_saved_or_nothing(folder, tmp_path, count):
    """Flipped bits of a value too: the folder knows the sum of its tensors."""
    saved = (folder / "model.safetensors").read_bytes()
    truth = saccade.load(folder).state_dict()
    copy = tmp_path / "model"
    copy.mkdir()
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    for name, data in damaged(saved, 1, count, header=256):
        (copy / "model.safetensors").write_bytes(data)
        found = attempt(lambda: saccade.load(copy))
        if not isinstance(found, UserError):
            assert all(torch.equal(v, truth[k]) for k, v in found.state_dict().items()), name


def test_weights_of_another_folder_are_refused(vit, folder, tmp_path):
    """All names and shapes fit, and they are finite: and they are not what was saved with this config."""
    saccade.save(AdaptiveViT(make_vit(**SMALL, seed=1), "tome(r=1)"), tmp_path / "other")
    (tmp_path / "other" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError):
        saccade.load(tmp_path / "other")
