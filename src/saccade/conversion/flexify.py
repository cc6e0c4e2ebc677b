"""Flexible ViTs, and plain ones made of them.

    model = saccade.flexify("vit_small_patch16_224", pretrained=True)  # kernel 32 x 32, positions 7 x 7
    model.at("grid(12)")(images)  # every patch size is computed from them in the forward pass
    vit = model.freeze("grid(16)")  # a plain timm ViT of that patch size

    saccade.convert("vit_small_patch14_dinov2", "14:16", "folder", pretrained=True)  # for once and all, no training

FlexiViT (arXiv 2212.08013), §3; what a conversion can and cannot give: docs/convert.md.
"""

from __future__ import annotations

import os
import re
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from saccade.backbones.freeze import freeze, rebuilt
from saccade.backbones.saving import check_savable, save
from saccade.backbones.vit import backbone_of, set_resize
from saccade.checkpoint import Source, create_model, open_dense
from saccade.conversion.bigvision import read_npz
from saccade.core.timm_types import ViT
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.setting import Call, Setting
from saccade.storage.model_folder import check_ours
from saccade.storage.run_folder import check_apart
from saccade.storage.weights import fill
from saccade.tokenizers.resize.resampling import PRESETS, choose, resize_kernel, resize_positions

Size = int | tuple[int, int]
GOOGLE_INPUT = (240, 240)  # pixels that all published FlexiViTs were trained at, in [-1, 1]


def flexify(
    source: Source,
    underlying: Size | None = 32,
    grid: Size | None = 7,
    *,
    size: Size | None = None,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    resize: str | None = None,
) -> AdaptiveViT:
    """A ViT whose patch kernel and position table stand for all patch sizes (FlexiViT, arXiv 2212.08013, §3.3).

    Both are resized to sizes of their own, once; from then on they are what is trained, and ``grid(p)`` resizes them in
    the forward pass, differentiably. Under the empty setting it is the plain ViT of the underlying patch size. With the
    source's own sizes nothing is resized. A source is never changed.

    Resizing twice is not resizing once: at its own patch size an untrained flexible model is near its source, not equal
    to it. The nearer, the more of its positions it keeps: ``grid=None`` for all, where training will be short.

    Args:
        source: a timm name, a folder saved by Saccade, or a timm ViT.
        underlying: pixels of the kernel, p or (ph, pw); None: the source's own.
        grid: cells of the position table, g or (gh, gw); None: the source's own.
        size: input pixels, s or (h, w); None: the source's own, and 240 for an ``.npz``.
        weights: a safetensors file with timm's keys, or a FlexiViT of Google's, an ``.npz`` (big_vision's layout; never
            unpickled).
        pretrained: timm's own weights.
        resize: 'default', 'google' or 'timm', see `ResizeSpec`; it stays with the weights. None: what the source was
            trained with; 'google' for an ``.npz``; else 'default'.

    Raises:
        UserError: a source or file that does not fit, sizes out of range, a spec that is not the weights' own.
    """
    google = weights is not None and Path(weights).suffix == ".npz"
    vit = _google(source, Path(weights or ""), size) if google else open_dense(source, weights, pretrained).vit
    known = PRESETS["google"] if google else backbone_of(vit).resize
    spec = choose("flexify", resize, known)
    embed, old = vit.patch_embed, vit.patch_embed.grid_size
    kernel, cells = _pair("underlying", underlying, embed.patch_size, 256), _pair("grid", grid, old, 256)
    with torch.no_grad():
        filters = resize_kernel(embed.proj.weight, kernel, spec)
        table = None if vit.pos_embed is None else resize_positions(vit.pos_embed, old, cells, _prefix(vit), spec)
    made = rebuilt(vit, filters, table, cells, _pair("size", size, embed.img_size, 8192))
    set_resize(made, spec)
    return AdaptiveViT(made)


def convert(
    source: Source,
    patch: Size | str,
    out: str | os.PathLike | None = None,
    *,
    size: Size | None = None,
    resize: str | None = None,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
) -> AdaptiveViT:
    """A ViT for another patch size, without training: its kernel is PI-resized, its position table resized.

    A 14-pixel DINOv2 becomes a 16-pixel one: ``convert("vit_small_patch14_dinov2", "14:16", pretrained=True)``. Give it
    images larger by 16/14, so that it sees the same tokens; that is the default. docs/convert.md says what holds.

    Args:
        source: a timm name, a folder saved by Saccade, or a timm ViT.
        patch: pixels, p or (ph, pw); as text also ``"14:16"``, which checks what the source has.
        out: a folder to save the model to.
        size: input pixels, s or (h, w); None: as many patches as the source has (of a flexible one: its own pixels).
        resize, weights, pretrained: as in `flexify`; ``weights`` is a safetensors file.

    Raises:
        UserError: a source or file that does not fit, another patch size than was said, sizes that do not divide.
    """
    if out is not None:
        check_apart(out, [source, weights])
        check_ours(Path(out))
    model = open_dense(source, weights, pretrained)
    if out is not None:
        check_savable(model)
    own, (old, new) = model.backbone, _patches(patch)
    if old is not None and old != own.patch_size:
        raise UserError(f"the source has patches of {_by(own.patch_size)} pixels, not of {_by(old)}: say '{_by(new)}'")
    cells = model.vit.patch_embed.grid_size
    usual = own.input_size if own.resize else (cells[0] * new[0], cells[1] * new[1])
    pixels = _pair("size", size, usual, 8192)
    knobs = (("size", pixels), ("resize", resize), ("fit", "error"))
    made = AdaptiveViT(freeze(model, Setting((Call("grid", (new,), knobs),))))
    if out is not None:
        spec = choose("convert", resize, own.resize)
        name = model.vit.pretrained_cfg.get("architecture")
        facts = {"from": name, "patch": list(own.patch_size), "size": list(own.input_size), "resize": spec.to_dict()}
        save(made, out, converted=facts)
    return made


def _google(source: Source, file: Path, size: Size | None) -> ViT:
    """A ViT with the weights of an ``.npz``, kernel and positions in the sizes that they have there."""
    state = read_npz(file)
    if isinstance(source, str) and not os.path.isdir(source):
        classes = state["head.weight"].shape[0] if "head.weight" in state else 0
        vit = create_model(source, num_classes=classes).vit
    else:
        vit = open_dense(source).vit
    kernel, table = state["patch_embed.proj.weight"], state.get("pos_embed")
    if table is None or table.ndim != 3 or isqrt(table.shape[1]) ** 2 != table.shape[1]:
        raise UserError(f"{str(file)!r} has no square position table: it is not a FlexiViT of big_vision")
    prefix = _prefix(vit)
    if prefix:  # timm's model has positions for its prefix, the file has none
        table = state["pos_embed"] = torch.cat([table.new_zeros(1, prefix, table.shape[-1]), table], dim=1)
    side = isqrt(table.shape[1] - prefix)
    vit = rebuilt(vit, kernel, table, (side, side), _pair("size", size, GOOGLE_INPUT, 8192))
    fill(vit, state, str(file))
    vit.pretrained_cfg = {**vit.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return vit


def _prefix(vit: ViT) -> int:
    return 0 if vit.no_embed_class else vit.num_prefix_tokens


def _pair(what: str, value: Any, default: Any, most: int) -> tuple[int, int]:
    pair = tuple(default) if value is None else (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(type(v) is int and 1 <= v <= most for v in pair):
        raise UserError(f"{what}={value!r} is not one or two whole numbers in [1, {most}]")
    return pair


def _patches(patch: Size | str) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """``"14:16"`` -> ((14, 14), (16, 16)); ``"16"``, 16 and (16, 16) -> (None, (16, 16)); 16x8 is one oblong size."""
    if not isinstance(patch, str):
        return None, _pair("patch", patch, (), 256)
    found = re.fullmatch(r"(?:(\d+)(?:x(\d+))?:)?(\d+)(?:x(\d+))?", patch.strip())
    if not found:
        raise UserError(f"cannot read the patch sizes {patch!r}: write them like 16, 14:16 or 16x8:16")
    a, b, c, d = (int(side) if side else None for side in found.groups())
    old = None if a is None else _pair("patch", (a, b or a), (), 256)
    return old, _pair("patch", (c, d or c), (), 256)


def _by(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"
