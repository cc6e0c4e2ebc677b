"""Google's weight files (big_vision's ``.npz``) as timm state dicts. Their FlexiViTs: kernel 32 x 32, positions 7 x 7.

Names and layouts are those of the files; timm (Apache-2.0) reads them too, at one patch size.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saccade.errors import UserError

PREFIXES = ("", "params/", "params/img/", "img/", "opt/target/")
ENDING = ".npy"  # of the members of an .npz
MOST_NUMBERS = 4 * 10**9  # of all arrays; the largest published ViT has 1.8 · 10^9
DENSEST = 10  # numbers a byte of the file: weights do not compress, and zeros without end are no ViT
MOST_BLOCKS = 1000
Rule = tuple[str, Callable[[Tensor], Tensor]]


def _same(x: Tensor) -> Tensor:
    return x


def _turn(x: Tensor) -> Tensor:
    return x.T  # a Dense kernel is [in, out]


# name in the file -> name in timm, and how the array is turned
TOP: dict[str, Rule] = {
    "embedding/kernel": ("patch_embed.proj.weight", lambda x: x.permute(3, 2, 0, 1)),  # [h, w, C, D]
    "embedding/bias": ("patch_embed.proj.bias", _same),
    "cls": ("cls_token", _same),
    "pos_embedding": ("pos_embed", _same),
    "Transformer/encoder_norm/scale": ("norm.weight", _same),
    "Transformer/encoder_norm/bias": ("norm.bias", _same),
    "head/kernel": ("head.weight", _turn),
    "head/bias": ("head.bias", _same),
}
ATTENTION = "MultiHeadDotProductAttention_0"
BLOCK: dict[str, Rule] = {
    "LayerNorm_0/scale": ("norm1.weight", _same),
    "LayerNorm_0/bias": ("norm1.bias", _same),
    "LayerNorm_1/scale": ("norm2.weight", _same),
    "LayerNorm_1/bias": ("norm2.bias", _same),
    f"{ATTENTION}/out/kernel": ("attn.proj.weight", lambda x: x.flatten(0, 1).T),  # [H, d, D]
    f"{ATTENTION}/out/bias": ("attn.proj.bias", _same),
    "MlpBlock_0/Dense_0/kernel": ("mlp.fc1.weight", _turn),
    "MlpBlock_0/Dense_0/bias": ("mlp.fc1.bias", _same),
    "MlpBlock_0/Dense_1/kernel": ("mlp.fc2.weight", _turn),
    "MlpBlock_0/Dense_1/bias": ("mlp.fc2.bias", _same),
}
JOINED = ("query", "key", "value")  # [D, H, d] and [H, d]: one matrix in timm


def read_npz(file: str | os.PathLike) -> dict[str, Tensor]:
    """A big_vision ViT under timm's names, float32; ``pos_embed`` [1, g * g, D] has no entry for the class token.

    Raises:
        UserError: missing, another format, object arrays (never unpickled), an array that is not known, or arrays of
            more numbers than a ViT of that file could have.
    """
    arrays = _unstacked(_arrays(Path(file)))
    state: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, array in arrays.items():
        inside = re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)", name)
        block, short = (f"blocks.{inside[1]}.", inside[2]) if inside else ("", name)
        part = re.fullmatch(rf"{ATTENTION}/({'|'.join(JOINED)})/(kernel|bias)", short) if inside else None
        rule = (BLOCK if inside else TOP).get(short)
        if part and array.ndim == 2 + (part[2] == "kernel"):
            rows = array.flatten(1).T if part[2] == "kernel" else array.flatten()
            joined.setdefault(f"{block}attn.qkv.{'weight' if part[2] == 'kernel' else 'bias'}", {})[part[1]] = rows
        elif rule:
            state[block + rule[0]] = rule[1](array)
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{str(file)!r} holds {len(unknown)} arrays that are not of a big_vision ViT ({', '.join(unknown[:3])}, …)"
        )
    for name, parts in joined.items():
        if len(parts) < len(JOINED):
            raise UserError(f"{str(file)!r} lacks a part of {name}: it needs {', '.join(JOINED)}")
        state[name] = torch.cat([parts[part] for part in JOINED])
    return {name: weight.contiguous() for name, weight in state.items()}


def _arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of the image tower, without their prefix; nothing is read before all of them are known to be right."""
    if not path.is_file():
        raise UserError(f"there is no weights file {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as members:
            prefix = _check_members(members, path)
        with np.load(path, allow_pickle=False) as archive:
            found = {n.removeprefix(prefix): archive[n] for n in archive if n.startswith(prefix)}
    except (ValueError, OSError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{str(path)!r} is not a readable .npz of plain arrays ({reason[:150]})") from None
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise UserError(f"{str(path)!r}: {name} is not an array of finite real numbers")
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in found.items()}


def _check_members(archive: zipfile.ZipFile, path: Path) -> str:
    """The prefix of the image tower's arrays, by what their headers say. Raises UserError for what is no ViT's, or
    would take more memory than one, ValueError for members that are no arrays."""
    names = archive.namelist()
    prefix = next((p for p in PREFIXES if f"{p}embedding/kernel{ENDING}" in names), None)
    if prefix is None:
        raise UserError(f"{str(path)!r} has no array 'embedding/kernel': it is not a ViT of big_vision")
    own = [info for info in archive.infolist() if info.filename.startswith(prefix)]
    short = [info.filename.removeprefix(prefix).removesuffix(ENDING) for info in own]
    if unknown := [name for name in short if not _is_known(name)]:
        raise UserError(
            f"{str(path)!r} holds {len(unknown)} arrays that are not of a big_vision ViT ({', '.join(unknown[:3])}, …)"
        )
    numbers = 0
    for name, info in zip(short, own, strict=True):
        shape, kind, header = _read_header(archive, info)
        if kind.kind != "f":
            raise UserError(f"{str(path)!r}: {name} is not an array of finite real numbers")
        if "encoderblock/" in name and (not shape or shape[0] > MOST_BLOCKS):
            raise UserError(f"{str(path)!r}: {name} of shape {shape} is not of 1 to {MOST_BLOCKS} blocks")
        if (size := header + math.prod(shape) * kind.itemsize) != info.file_size:
            raise ValueError(f"{name} of shape {shape} takes {size} bytes and has {info.file_size}")
        numbers += math.prod(shape)
    limit = min(MOST_NUMBERS, DENSEST * path.stat().st_size)
    if numbers > limit:
        raise UserError(f"{str(path)!r} holds {numbers:,} numbers, limit {limit:,} for a file of its size")
    return prefix


def _read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type of an array, and the bytes before it. Raises ValueError, for objects too."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{info.filename} is of version {version} of the format")
        shape, _, kind = readers[version](member)
        if kind.hasobject:
            raise ValueError(f"{info.filename} holds objects")
        return shape, kind, member.tell()


def _is_known(name: str) -> bool:
    """Whether a ViT has an array of this name, stacked or one a block."""
    inside = re.fullmatch(r"Transformer/encoderblock(?:_\d+)?/(.+)", name)
    part = rf"{ATTENTION}/({'|'.join(JOINED)})/(kernel|bias)"
    return inside[1] in BLOCK or re.fullmatch(part, inside[1]) is not None if inside else name in TOP


def _unstacked(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All blocks may be one array, with a leading axis for the block ("scan"): one array a block instead."""
    apart: dict[str, Tensor] = {}
    for name, array in arrays.items():
        head, stacked, tail = name.partition("Transformer/encoderblock/")
        named = {f"{head}Transformer/encoderblock_{i}/{tail}": part for i, part in enumerate(array)} if stacked else {}
        apart.update(named or {name: array})
    return apart
