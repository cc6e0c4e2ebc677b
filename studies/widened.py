"""Make a ViT twice as wide that computes what a trained one does: a start for training, or for timing a larger model.

Claim     None of its own: it makes a model, and checks that it gives the same logits.
Method    Net2Net (arXiv 1511.05641): every channel, hidden unit and head (or channel of a head) stands there twice, and
          what reads it takes a part of its weight from each copy. With ``--spread`` the parts are random, so that the
          copies, which are alike in the beginning, learn apart.
Command   python studies/widened.py runs/scenes/model --heads 4 --spread 0.25 --out runs/wide
Cost      seconds
Measured  src/saccade/assets/scenes/README.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import timm
import torch
from jobs import parser_of
from torch import Tensor

import saccade
from saccade.backbones.saving import save
from saccade.core.timm_types import ViT


def main() -> None:
    parser = parser_of(__doc__, "runs/wide", "model")
    parser.add_argument("--heads", type=int, required=True, help="of the wide model: as many, or twice as many")
    parser.add_argument("--spread", type=float, default=0.0, help="standard deviation of a copy's part from one half")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = saccade.load(given.model, "dense", runner=None).float().eval()
    told = json.loads((Path(given.model) / "config.json").read_text())
    vit = model.vit
    args = {**told["model_args"], "embed_dim": 2 * vit.embed_dim, "num_heads": given.heads}
    wide = widen(vit, cast(ViT, timm.create_model(told["architecture"], **args)), given.spread)
    save(saccade.AdaptiveViT(wide), given.out, classes=told["saccade"]["classes"], trained=told["saccade"]["trained"])


def widen(vit: ViT, wide: ViT, spread: float = 0.0) -> ViT:
    """Give a ViT of twice the width, with as many heads or twice as many, weights that make it compute what ``vit``
    does."""
    heads, larger = vit.blocks[0].attn.num_heads, wide.blocks[0].attn.num_heads == vit.blocks[0].attn.num_heads

    def in_heads(first: Tensor, second: Tensor, parts: int) -> Tensor:
        """Two copies of the channels of heads, of so many parts, in a dimension of their own: together in a head that
        is larger, or in heads of their own."""
        pair = [copy.unflatten(0, (parts, heads, -1)) for copy in (first, second)]
        return torch.cat(pair, 2 if larger else 1).flatten(0, 2)

    twice: dict[str, Tensor] = {}
    for key, value in vit.state_dict().items():
        name, weight = key.rpartition(".")[0].rpartition(".")[2], key.endswith("weight")
        mixes = weight and value.ndim == 2  # channels: each copy by a part of its weight
        first = (0.5 + spread * torch.randn_like(value)) * value if mixes else value
        second = value - first if mixes else value
        if name == "proj" and mixes:
            value = in_heads(first.T, second.T, 1).T
        elif mixes:
            value = torch.cat([first, second], 1)
        if name == "qkv":
            query, *others = in_heads(value, value, 3).chunk(3)
            # a product of two larger heads is twice as large, and divided by the root of twice as many channels
            value = torch.cat([query * 0.5**0.5 if larger else query, *others])
        elif key in ("cls_token", "pos_embed"):
            value = torch.cat([value, value], 2)
        elif name != "head":
            value = torch.cat([value, value])
        twice[key] = value
    wide.load_state_dict(twice)
    wide.pretrained_cfg = vit.pretrained_cfg
    images = torch.randn(2, 3, *vit.patch_embed.img_size)
    with torch.inference_mode():
        torch.testing.assert_close(wide.eval()(images), vit.eval()(images), atol=1e-3, rtol=1e-3)
    return wide


if __name__ == "__main__":
    main()
