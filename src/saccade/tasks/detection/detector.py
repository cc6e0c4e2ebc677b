"""Open-vocabulary detection in OWL-ViT's form: every patch says what it sees, and where, at any patch size.

OWL-ViT (arXiv 2205.06230): no decoder and no pooling. Each token of the last block gives one box, relative to its own
cell, and one vector, which is compared with those of queries: words, or vectors learned for known classes. FlexiViT
(arXiv 2212.08013) §5.3 trains it at random patch sizes. Here under any setting: a cell has the features of the token
that stands for it, or last stood for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from saccade.core.head import Body, Head
from saccade.core.record import Trace
from saccade.core.timm_types import ViT
from saccade.core.tokens import Tokens
from saccade.data import Preprocess
from saccade.errors import UserError
from saccade.evaluation.defined import require_finite
from saccade.model import AdaptiveViT
from saccade.renamed.finder import moved
from saccade.tasks.detection.hungarian import corners
from saccade.tasks.image_text.text_tower import open_texts

PRIOR = -4.6  # logit of 0.01: at first, hardly anything is an object
SCALE = 10.0  # of a cosine, at first
Found = dict[str, Tensor]  # in one image, in torchmetrics' words
TOP = 100  #    detections of an image that are looked at, as in COCO
__getattr__ = moved(__name__)


@dataclass(frozen=True)
class Detected:
    """What a forward pass gives: one prediction for each of N = gh * gw cells."""

    logits: Tensor  # [B, N, K]  of each query
    boxes: Tensor  #  [B, N, 4] fp32  (cx, cy, w, h), shares of the image's sides
    tokens: Tokens
    trace: Trace


class Heads(nn.Module):
    """The class and the box head, and the queries.

    Args:
        texts: gives queries of E numbers; see ``saccade.tasks.image_text.text_tower``.
        dim: D, the width of the ViT.
        classes: the queries to ask unless others are given.
    """

    def __init__(self, texts: nn.Module, dim: int, classes: Sequence[str]) -> None:
        super().__init__()
        self.texts, self.names, self.dim = texts, list(classes), dim
        described: dict[str, Any] = texts.describe()  # type: ignore[operator]
        self.width: int = described["out"]
        self.seen = nn.Linear(dim, self.width)
        self.shift, self.scale = nn.Linear(dim, 1), nn.Linear(dim, 1)
        self.box = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 4))
        for layer, start in ((self.shift, PRIOR / SCALE), (self.scale, SCALE - 1), (self.box[-1], 0.0)):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.constant_(layer.bias, start)  # type: ignore[arg-type]

    def ask(self, names: Sequence[str]) -> Tensor:
        """Queries for words, [K, E] of length 1."""
        return F.normalize(self.texts.encode(names).float(), dim=-1)  # type: ignore[operator]

    def forward(self, features: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, D, gh, gw], queries [K, E] -> logits [B, N, K] and boxes [B, N, 4], cells row by row."""
        cells = features.flatten(2).transpose(1, 2)
        near = F.normalize(self.seen(cells).float(), dim=-1) @ queries.T
        logits = (near + self.shift(cells).float()) * (F.elu(self.scale(cells).float()) + 1)
        return logits, (self.box(cells).float() + own_cells(features)).sigmoid()

    def macs(self, cells: int, queries: int) -> int:
        """Multiply-accumulates for one image; queries are made once for many images and not counted."""
        box = 2 * self.dim * self.dim + 4 * self.dim
        return cells * (self.dim * (self.width + 2) + self.width * queries + box)


def own_cells(features: Tensor) -> Tensor:
    """Each cell as a box, in logits: [N, 4] for a map [..., gh, gw]. What a box head that says nothing predicts."""
    gh, gw = features.shape[-2:]
    y = (torch.arange(gh, device=features.device) + 0.5) / gh
    x = (torch.arange(gw, device=features.device) + 0.5) / gw
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    sides = [torch.full_like(rows, 1 / gw), torch.full_like(rows, 1 / gh)]
    return torch.stack([columns, rows, *sides], -1).flatten(0, 1).logit(eps=1e-4)


class DetectionHead(Head):
    """Class and box heads on every cell of the dense map."""

    task, noun, verb, config = "detect", "detector", "detect", "detect"

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads

    @property
    def class_names(self) -> tuple[str, ...]:
        """The queries to ask unless others are given."""
        return tuple(self.heads.names)

    def check(self, model: Body) -> None:
        if self.heads.dim != model.vit.embed_dim:
            raise UserError(f"this ViT has width {model.vit.embed_dim} and its heads {self.heads.dim}: make them alike")

    def forward(self, model: Body, images: Tensor, queries: Tensor | None = None) -> Detected:
        """images [B, C, h, w], normalised -> one prediction a cell, for ``queries`` [K, E] (None: its own classes)."""
        features, tokens, trace = model.features(images)
        queries = self.ask(self.heads.names) if queries is None else queries
        logits, boxes = self.heads(features, queries)
        return Detected(logits, boxes, tokens, replace(trace, head=self.heads.macs(logits.shape[1], len(queries))))

    def ask(self, names: Sequence[str]) -> Tensor:
        """Queries [K, E] for words: for ``forward``, and worth making once."""
        return self.heads.ask(names)

    def describe(self) -> dict[str, Any]:
        texts: Any = self.heads.texts
        return {"queries": texts.describe(), "names": self.heads.names}

    @classmethod
    def rebuild(cls, vit: ViT, described: dict[str, Any]) -> DetectionHead:
        queries, names = described.get("queries"), described.get("names")
        if not (isinstance(queries, dict) and isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise UserError("this detector does not say what its queries and names are")
        return cls(Heads(open_texts(queries), vit.embed_dim, names))


def squashed(view: AdaptiveViT) -> Preprocess:
    """What a detector sees of an image: all of it, at its own size, whatever the image's shape."""
    return replace(Preprocess.of(view.vit, view.input_size()), crop_pct=1.0, crop_mode="squash")


@torch.no_grad()
def look(view: AdaptiveViT, image: Image.Image, names: Sequence[str] | None = None, least: float = 0.3) -> Found:
    """What is in one RGB image, most certain first: of ``names`` (None: its own classes), scores of ``least`` or more.

    Boxes are in pixels of the image; ``labels`` are places in ``names``.

    Raises UserError for answers that are not finite, ImageError for an image too narrow.
    """
    weight = view.vit.patch_embed.proj.weight
    batch = squashed(view)(image).unsqueeze(0).to(weight.device, weight.dtype)
    out = view(batch, None if names is None else DetectionHead.of(view).ask(names))
    for values in (out.boxes, out.logits):
        require_finite(values, view.setting, "answers")
    (found,) = detections(out)
    sides = torch.tensor([image.width, image.height] * 2)
    return {k: v[found["scores"] >= least] for k, v in (found | {"boxes": found["boxes"] * sides}).items()}


def draw(image: Image.Image, found: Found, names: Sequence[str]) -> Image.Image:
    """An RGB image with what ``look`` found in it: boxes, names and scores."""
    pixels = pil_to_tensor(image)
    if not len(found["scores"]):
        return image
    pairs = zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
    said = [f"{names[label]} {score:.2f}" for label, score in pairs]
    width = max(1, min(image.size) // 150)
    return to_pil_image(draw_bounding_boxes(pixels, found["boxes"], said, colors="red", width=width))


def detections(out: Detected, top: int = TOP) -> list[Found]:
    """The ``top`` most certain (cell, query) pairs of each image, best first, as torchmetrics takes them.

    ``boxes`` [t, 4] as (x1, y1, x2, y2) in shares of the image, ``scores`` [t] in 0 … 1, ``labels`` [t] int64.
    """
    count = out.logits.shape[-1]
    best, places = out.logits.float().flatten(1).topk(min(top, out.logits[0].numel()))  # scores may be 1 alike
    index = (places // count).unsqueeze(-1).expand(-1, -1, 4)
    boxes = corners(out.boxes).clamp(0, 1).gather(1, index)
    rows = zip(boxes.cpu(), best.sigmoid().cpu(), (places % count).cpu(), strict=True)
    return [{"boxes": b, "scores": s, "labels": label} for b, s, label in rows]
