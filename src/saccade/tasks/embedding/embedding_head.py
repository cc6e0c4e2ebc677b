"""One vector an image as what a model gives: how it is pooled, and whether it has length 1, kept with the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from saccade.backbones.embeddings import POOLS, check_pool
from saccade.core.head import Body, Head
from saccade.core.output import Output
from saccade.core.timm_types import ViT
from saccade.errors import UserError


class EmbeddingHead(Head):
    """Pooled features [B, D], as ``model.embed(images, pool, normalise=…)`` gives them: ``model(images).logits``.

    A model that ends so is an encoder, as one with ``num_classes=0`` is: it is measured by neighbours, exported with
    the output ``embedding``, and run by every engine. It has no weights.

    Args:
        pool: "own", what the ViT's classifier would read; "token", the class token; "mean", of patches, each as often
            as patches were merged into it, without class token and registers; "map", the ViT's own attention pooling.
        normalise: to length 1.

    Raises:
        UserError: another way of pooling; with the model, one that its ViT has not learned.
    """

    task, noun, verb, config = "embed", "encoder", "predict", ""
    embeds: ClassVar[bool] = True

    def __init__(self, pool: str = "own", *, normalise: bool = False) -> None:
        super().__init__()
        if pool not in POOLS or type(normalise) is not bool:
            raise UserError(f"an embedding head with pool={str(pool)[:40]!r}, normalise={str(normalise)[:40]!r}: give "
                            f"one of {', '.join(POOLS)}, and True or False")  # fmt: skip
        self.pool, self.normalise = pool, normalise

    def check(self, model: Body) -> None:
        check_pool(model.vit, self.pool)

    def forward(self, model: Body, images: Tensor) -> Output:
        """images [B, C, h, w], normalised -> embeddings [B, D] as ``logits``, with tokens and trace."""
        out = model.forward_vit(images) if self.pool == "own" else self._pooled(model, images)
        return out.with_logits(F.normalize(out.logits, dim=-1)) if self.normalise else out

    def _pooled(self, model: Body, images: Tensor) -> Output:
        tokens, trace = model.forward_tokens(images)
        trace = trace if self.pool == "map" else replace(trace, head=0)
        return Output(model.pooled(tokens, self.pool), tokens, trace)

    def describe(self) -> dict[str, Any]:
        return {"pool": self.pool, "normalise": self.normalise}

    @classmethod
    def rebuild(cls, vit: ViT, described: dict[str, Any]) -> EmbeddingHead:
        return cls(described.get("pool", "own"), normalise=described.get("normalise", False))

    def extra_repr(self) -> str:
        """What it is told."""
        return f"pool={self.pool!r}, normalise={self.normalise}"
