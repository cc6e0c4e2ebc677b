"""Two towers, one space: images under any setting, and texts; what pulls them together, and what can be asked then.

FlexiViT (arXiv 2212.08013) §5.2: *FlexiLiT* trains a text tower against a locked image tower that is run at a random
setting each step (LiT, arXiv 2111.07991); *FlexiCLIP* trains both. Compared by a softmax over the batch (CLIP, arXiv
2103.00020) or pair by pair (SigLIP, arXiv 2303.15343).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.head import Body, Head
from saccade.core.record import Trace
from saccade.core.timm_types import ViT
from saccade.core.tokens import Tokens
from saccade.errors import UserError, nearest
from saccade.renamed.finder import moved
from saccade.tasks.image_text.text_tower import open_texts

MOST = 100.0  # of the scale, as in CLIP
__getattr__ = moved(__name__)


@dataclass(frozen=True)
class Loss:
    """How similarities become a loss, and where their scale and shift start."""

    scale: float
    shift: float
    of: Callable[[Tensor, Tensor], Tensor]  # (logits [b, b], same [b, b] bool) -> a sum over the images


def by_softmax(logits: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of finding each image's text among the batch's, and each text's image; the mean of both.

    Where several are right (equal texts), each is to get an equal share of the probability.
    """
    share = same.to(logits.dtype)
    there = -(share / share.sum(1, keepdim=True) * logits.log_softmax(1)).sum()
    back = -(share / share.sum(0, keepdim=True) * logits.log_softmax(0)).sum()
    return (there + back) / 2


def by_sigmoid(logits: Tensor, same: Tensor) -> Tensor:
    """Each image with each text of the batch: belongs together or does not."""
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum()


LOSSES = {"softmax": Loss(1 / 0.07, 0.0, by_softmax), "sigmoid": Loss(10.0, -10.0, by_sigmoid)}


class Space(nn.Module):
    """The space that images and texts share: E numbers, of length 1.

    Args:
        texts: a text tower or table with E outputs.
        features: D, the width of the image tower's pooled features.
        project: a linear map of them to E; False: none, E = D (LiT's locked tower as it is).
        loss: of ``LOSSES``.
    """

    def __init__(self, texts: nn.Module, features: int, *, project: bool, loss: str = "sigmoid") -> None:
        super().__init__()
        if loss not in LOSSES:
            raise UserError(f"there is no loss {loss!r}{nearest(loss, LOSSES)}")
        self.loss, self.texts = loss, texts
        width = described(texts)["out"]
        if not project and width != features:
            raise UserError(
                f"texts have {width} numbers and images {features}: give them a projection, or equal widths"
            )
        self.project: nn.Module = nn.Linear(features, width, bias=False) if project else nn.Identity()
        self.log_scale = nn.Parameter(torch.tensor(math.log(LOSSES[loss].scale)))
        self.shift = nn.Parameter(torch.tensor(LOSSES[loss].shift))

    def images(self, features: Tensor) -> Tensor:
        """Pooled features [n, D] -> [n, E]."""
        return F.normalize(self.project(features).float(), dim=-1)

    def words(self, texts: Sequence[str]) -> Tensor:
        """n texts -> [n, E]."""
        return F.normalize(self.texts.encode(texts).float(), dim=-1)  # type: ignore[operator]

    def compare(self, images: Tensor, words: Tensor, same: Tensor) -> Tensor:
        """The loss of b images and their texts, both [b, E], summed over images.

        ``same`` [b, b] bool: text j is (also) a text of image i. Each image's own always is; so are equal texts, which
        would else be wrong answers that nothing could tell from the right one.
        """
        with torch.autocast(images.device.type, enabled=False):  # 100 times a cosine in bf16 is off by 0.3
            logits = self.log_scale.exp().clamp(max=MOST) * images.float() @ words.float().T + self.shift
            return LOSSES[self.loss].of(logits, same)


@dataclass(frozen=True)
class Embedded:
    """What a forward pass gives."""

    embedding: Tensor  # [B, E], of length 1
    tokens: Tokens
    trace: Trace


class TwoTowerHead(Head):
    """The space that pooled features of images share with texts."""

    task, noun, verb, config = "textimage", "two-tower model", "zeroshot", "flexilit"

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space

    def forward(self, model: Body, images: Tensor) -> Embedded:
        """images [B, C, h, w], normalised -> their places in the space."""
        out = model.forward_vit(images)
        return Embedded(self.space.images(out.logits), out.tokens, out.trace)

    def words(self, texts: Sequence[str]) -> Tensor:
        """n texts -> their places in the space, [n, E], of length 1."""
        return self.space.words(texts)

    def classes(self, named: Sequence[Sequence[str]]) -> Tensor:
        """One direction for each class, [K, E]: the mean of its prompts', of length 1 again."""
        each = self.words([text for prompts in named for text in prompts]).split([len(p) for p in named])
        return F.normalize(torch.stack([words.mean(0) for words in each]), dim=-1)

    def describe(self) -> dict[str, Any]:
        project = not isinstance(self.space.project, nn.Identity)
        return {"texts": described(self.space.texts), "project": project, "loss": self.space.loss}

    @classmethod
    def rebuild(cls, vit: ViT, ours: dict[str, Any]) -> TwoTowerHead:
        texts, project, loss = ours.get("texts"), ours.get("project"), ours.get("loss")
        if not (isinstance(texts, dict) and isinstance(project, bool) and isinstance(loss, str)):
            raise UserError("this text-image model does not say what its texts, projection and loss are")
        return cls(Space(open_texts(texts), vit.num_features, project=project, loss=loss))


def described(texts: Any) -> dict[str, Any]:
    """``texts.describe()``, for type checkers."""
    return texts.describe()
