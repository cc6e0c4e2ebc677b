"""Texts as vectors: a small byte-level transformer, embeddings that were made elsewhere, or a learned vector each.

Bytes and not words or sub-words: there is no vocabulary to ship, to fit or to fall out of, every language and every
misspelling is readable, and five times the length costs nothing that matters beside an image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from saccade.errors import UserError
from saccade.storage.files import replacing
from saccade.storage.weights import read_weights

END, PAD = 256, 257  # after the 256 bytes
LIMITS = {"width": 4096, "depth": 64, "heads": 64, "length": 4096}  # a config from elsewhere may not ask for more


class Texts(Protocol):
    """What turns texts into vectors; an ``nn.Module``."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """n texts -> [n, E], not normalised."""
        ...

    def describe(self) -> dict[str, Any]:
        """What ``open_texts`` needs, beside the weights, to build it again; plain JSON."""
        ...


def tokenise(texts: Sequence[str], length: int) -> Tensor:
    """UTF-8 bytes, then ``END``, then ``PAD`` up to the longest of them: n texts -> [n, L] int64, L ≤ ``length``.

    A longer text is cut at ``length - 1`` bytes. An empty one is ``END`` alone.
    """
    rows = [[*text.encode("utf-8", "surrogatepass")[: length - 1], END] for text in texts]
    longest = max(map(len, rows), default=1)
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], dtype=torch.int64).view(-1, longest)


class TextTower(nn.Module):
    """A transformer over bytes, read at the mean of its tokens, which a text of any length has.

    Args:
        out: E, the width of what it gives.
        width, depth, heads: of its blocks, which are timm's.
        length: most bytes of a text, the end included.
    """

    def __init__(self, out: int, width: int = 128, depth: int = 4, heads: int = 4, length: int = 128) -> None:
        super().__init__()
        self.shape = {"width": width, "depth": depth, "heads": heads, "length": length}
        _check(self.shape)
        self.embed = nn.Embedding(PAD + 1, width)
        self.pos_embed = nn.Parameter(torch.empty(1, length, width))
        for table in (self.embed.weight, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [n, L] int64 as ``tokenise`` gives them -> [n, E]; padding changes nothing."""
        present = tokens != PAD
        x = self.embed(tokens) + self.pos_embed[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x, attn_mask=present[:, None, None, :])
        share = (present / present.sum(1, keepdim=True)).to(x.dtype)
        return self.head((share.unsqueeze(-1) * self.norm(x)).sum(1))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """n texts -> [n, E], not normalised."""
        return self(tokenise(texts, self.shape["length"]).to(self.pos_embed.device))

    def describe(self) -> dict[str, Any]:
        """What ``open_texts`` makes it again by."""
        return {"kind": "bytes", "out": self.head.out_features, **self.shape}


class _Known(nn.Module):
    """Texts that are looked up, each once."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self.texts = list(texts)
        self._place = {text: i for i, text in enumerate(self.texts)}
        if len(self._place) != len(self.texts) or not self.texts:
            raise UserError(f"{len(self.texts)} texts of which {len(self._place)} are different: give each one once")

    def places(self, texts: Sequence[str]) -> list[int]:
        """Where texts are. Raises UserError for one that is not there."""
        unknown = next((text for text in texts if text not in self._place), None)
        if unknown is not None:
            raise UserError(f"no embedding for the text {unknown[:80]!r}: only for {len(self.texts)} others")
        return [self._place[text] for text in texts]


class TextTable(_Known):
    """Embeddings of known texts, made once by any model, and one linear map on top, which learns.

    Args:
        texts: n of them, each once.
        table: [n, F] fp32, frozen.
        out: E.
    """

    def __init__(self, texts: Sequence[str], table: Tensor, out: int) -> None:
        super().__init__(texts)
        if table.ndim != 2 or len(table) != len(self.texts):
            raise UserError(f"{len(self.texts)} texts for embeddings of shape {list(table.shape)}: give one each")
        self.table: Tensor
        self.register_buffer("table", table.float())
        self.head = nn.Linear(table.shape[1], out, bias=False)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """n texts of the table -> [n, E], not normalised."""
        return self.head(self.table[self.places(texts)])

    def describe(self) -> dict[str, Any]:
        """What ``open_texts`` makes it again by."""
        return {"kind": "table", "out": self.head.out_features, "in": self.head.in_features, "texts": self.texts}


class Learned(_Known):
    """A vector for each of some texts, learned like any weight: the words mean nothing, and no other can be asked."""

    def __init__(self, texts: Sequence[str], out: int) -> None:
        super().__init__(texts)
        self.table = nn.Parameter(torch.empty(len(self.texts), out))
        nn.init.trunc_normal_(self.table, std=0.02)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """n texts of those learned -> [n, E], not normalised."""
        return self.table[self.places(texts)]

    def describe(self) -> dict[str, Any]:
        """What ``open_texts`` makes it again by."""
        return {"kind": "learned", "out": self.table.shape[1], "texts": self.texts}


def open_tower(out: int, table: str | None = None, **shape: int) -> nn.Module:
    """A fresh ``TextTower`` of that shape, or a ``TextTable`` of a file."""
    return TextTower(out, **shape) if table is None else TextTable(*read_table(table), out)


def save_table(file: str | os.PathLike, texts: Sequence[str], table: Tensor) -> None:
    """Write embeddings [n, F] of n texts as ``read_table`` reads them: safetensors, the texts as JSON in its header."""
    with replacing(file) as part:
        save_file({"embeddings": table.detach().float().cpu().contiguous()}, part, {"texts": json.dumps(list(texts))})


def read_table(file: str | os.PathLike) -> tuple[list[str], Tensor]:
    """Texts, and their embeddings [n, F]. Raises UserError for a file that ``save_table`` would not have written."""
    table = read_weights(file).get("embeddings")
    with safe_open(file, "pt") as opened:
        header = (opened.metadata() or {}).get("texts", "")
    try:
        texts = json.loads(header)
    except (ValueError, RecursionError):
        texts = None
    if table is None or not _strings(texts):
        raise UserError(
            f"{str(file)!r} holds no table of texts: write it with saccade.tasks.image_text.text_tower.save_table"
        )
    return texts, table


def open_texts(described: dict[str, Any]) -> nn.Module:
    """Build what ``describe`` described, with weights to be loaded. Raises UserError for anything else."""
    kind, out = described.get("kind"), described.get("out")
    if isinstance(out, int) and 0 < out <= LIMITS["width"]:
        if kind == "bytes" and described.keys() <= {"kind", "out", *LIMITS}:
            return TextTower(out, **{name: described[name] for name in LIMITS if name in described})
        texts, width = described.get("texts"), described.get("in")
        if kind == "table" and _strings(texts) and isinstance(width, int) and 0 < width <= LIMITS["width"]:
            return TextTable(texts, torch.zeros(len(texts), width), out)
        if kind == "learned" and _strings(texts):
            return Learned(texts, out)
    raise UserError(f"not the description of a text tower: {str(described)[:120]}")


def _strings(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _check(shape: dict[str, Any]) -> None:
    for name, value in shape.items():
        if not isinstance(value, int) or not 0 < value <= LIMITS[name]:
            raise UserError(f"text tower: {name}={value!r} is not a whole number from 1 to {LIMITS[name]}")
    if shape["width"] % shape["heads"]:
        raise UserError(f"text tower: width={shape['width']} is no multiple of heads={shape['heads']}")
