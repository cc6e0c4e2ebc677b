"""timm's own weights, with the kernel of a flexible ViT as large as it was trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import timm
from timm.models import adapt_input_conv, load_pretrained
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from saccade.backbones.addresses import is_address, open_address
from saccade.backbones.freeze import rebuilt
from saccade.backbones.rebuilding import check_name
from saccade.backbones.vit import set_resize
from saccade.core.timm_types import ViT
from saccade.errors import UserError
from saccade.setting import Call
from saccade.storage.weights import line
from saccade.tokenizers.resize.resampling import PRESETS

FLEXIBLE = "flexivit"  # how timm calls Google's; all were trained with one resize
KERNEL, TABLE = "patch_embed.proj.weight", "pos_embed"


def open_vit(name: str, pretrained: bool, **kwargs: Any) -> tuple[ViT, Call | None]:
    """timm's ViT of a name or an address, and the tokenizer that its weights ask for (None: its own).

    Raises UserError: an unknown name, arguments that timm refuses, weights that are not to be had.
    """
    if is_address(name):
        return open_address(name, pretrained, **kwargs), None
    check_name(name)
    try:
        return open_pretrained(name, **kwargs) if pretrained else (cast(ViT, timm.create_model(name, **kwargs)), None)
    except Exception as error:
        if not pretrained:
            raise UserError(f"timm cannot create {name!r}: {line(error)}") from None
        raise UserError(
            f"cannot fetch timm's weights of {name!r} ({line(error)}): without a network give a file, --weights FILE "
            "(in Python: weights=)"
        ) from None


def open_pretrained(name: str, **kwargs: Any) -> tuple[ViT, Call | None]:
    """``timm.create_model(name, pretrained=True, **kwargs)``; of a FlexiViT with the kernel and positions of the file,
    and beside it the grid of the patch size that timm would have given it (None: its own).

    timm resizes a FlexiViT's kernel of 32 × 32 pixels and its positions to its own patch size when it reads them, and
    resizes do not chain: from 16 pixels, kernels for 8 and 12 are off by 2 to 4 times their own norm. Here they stay
    as they are, and the model says how they were resized in training. A ``patch_size`` among the arguments is kept to.

    Raises what timm raises. UserWarning where timm's file has lost the original kernel.
    """
    if not name.startswith(FLEXIBLE):
        return cast(ViT, timm.create_model(name, pretrained=True, **kwargs)), None
    vit = cast(ViT, timm.create_model(name, pretrained=False, **kwargs))
    found: dict[str, Tensor] = {}

    def read(state: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
        found.update({key: state[key] for key in (KERNEL, TABLE) if key in state})
        return checkpoint_filter_fn(dict(state), model, interpolation="bilinear", antialias=False)  # as timm's own

    channels, strict = kwargs.get("in_chans", 3), kwargs.get("pretrained_strict", True)
    load_pretrained(
        vit, vit.pretrained_cfg, num_classes=vit.num_classes, in_chans=channels, filter_fn=read, strict=strict
    )
    own, made = vit.patch_embed.patch_size, vit
    if "patch_size" not in kwargs:
        made = _as_trained(vit, name, channels, found)
    set_resize(made, PRESETS["google"])
    return made, None if made is vit else Call("grid", (own[0] if own[0] == own[1] else tuple(own),))


def _as_trained(vit: ViT, name: str, channels: int, found: Mapping[str, Tensor]) -> ViT:
    """The ViT with a file's own kernel and positions, where they are another size than timm made of them."""
    kernel, table, own = found.get(KERNEL), found.get(TABLE), tuple(vit.patch_embed.patch_size)
    cells = 0 if table is None else round(table.shape[1] ** 0.5)
    square = table is not None and table.ndim == 3 and cells**2 == table.shape[1]
    if kernel is None or table is None or not square or kernel.ndim != 4 or tuple(kernel.shape[-2:]) == own:
        warnings.warn(
            f"timm's file of {name} has no kernel but one that was resized to {own[0]} pixels: other patch sizes are "
            f"far from what was trained; take the original, saccade.flexify({name!r}, weights='….npz'), from "
            f"{vit.pretrained_cfg.get('url') or 'https://github.com/google-research/big_vision'}",
            stacklevel=4,
        )
        return vit
    kernel = kernel if kernel.shape[1] == channels else adapt_input_conv(channels, kernel)
    weight = vit.patch_embed.proj.weight
    return rebuilt(vit, kernel.to(weight), table.to(weight), (cells, cells), vit.patch_embed.img_size)
