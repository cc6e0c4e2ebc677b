"""timm's names on an ``AdaptiveViT``, so that code written for a timm model finds what it looks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from saccade.core.packing import padded
from saccade.core.plan import Method, Plan, Tokenizer
from saccade.core.timm_types import ViT
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.setting import Setting
from saccade.tokenizers.grid import Grid

if TYPE_CHECKING:
    from saccade.core.record import Trace


class TimmNames(nn.Module):
    """What timm's models have beside their layers, read from ``vit``; feature and head functions run the setting."""

    vit: ViT
    setting: Setting
    tokenizer: Tokenizer
    plan: Plan

    @property
    def num_classes(self) -> int:
        """Of the ViT's head; 0: it has none."""
        return self.vit.num_classes

    @property
    def num_features(self) -> int:
        """Channels D of the tokens, as timm calls them."""
        return self.vit.num_features

    @property
    def head_hidden_size(self) -> int:
        """Channels of what the classifier reads."""
        return self.vit.head_hidden_size

    @property
    def embed_dim(self) -> int:
        """Channels D of the tokens."""
        return self.vit.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class, registers."""
        return self.vit.num_prefix_tokens

    @property
    def global_pool(self) -> str:
        """How the head pools: 'token', 'avg' or 'map'."""
        return self.vit.global_pool

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """timm's facts of each block's output."""
        return self.vit.feature_info

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Preprocessing and class names; ``timm.data.resolve_model_data_config(model)`` reads it."""
        return self.vit.pretrained_cfg

    @pretrained_cfg.setter
    def pretrained_cfg(self, value: dict[str, Any]) -> None:
        self.vit.pretrained_cfg = value

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's other name of ``pretrained_cfg``."""
        return self.vit.pretrained_cfg

    def forward_features(self, images: Tensor) -> Tensor:
        """images [B, C, h, w] -> tokens after the last block and its norm, [B, P+N, D]; padding of a ragged batch too.

        What ``forward_head`` must know of them beside their values is kept as ``.tokens`` of the tensor.
        """
        tokens = padded(self.forward_tokens(images)[0])
        features = self.vit.norm(tokens.x)
        features.tokens = tokens
        return features

    def forward_head(self, features: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        """What ``forward_features`` or ``forward_tokens`` gave -> logits [B, K]; ``pre_logits``: what the classifier
        reads, [B, D].

        Raises UserError where a setting has left fewer tokens, and how many patches each counts for is not known.
        """
        if isinstance(features, Tokens):
            return self.pooled_head(self.vit.norm(features.x), features, pre_logits)
        tokens = getattr(features, "tokens", None)
        if isinstance(tokens, Tokens):
            return self.pooled_head(features, tokens, pre_logits)
        own = any(type(method).head is not Method.head for method in self.plan.methods)
        counted = self.vit.global_pool != "token" and (self.plan.methods or not isinstance(self.tokenizer, Grid))
        if counted or (own and not pre_logits):
            raise UserError(
                f"forward_head cannot tell what the {features.shape[1]} tokens of {self.setting} stand for: give it "
                "what forward_features or forward_tokens gave, as it is"
            )
        return self.vit.forward_head(features, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The ViT's last layer; two of a distilled one."""
        return self.vit.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier in place, as timm does it; 0: none. Class names are forgotten. Views are to be made anew."""
        facts = self.vit.pretrained_cfg
        self.vit.reset_classifier(num_classes, global_pool)
        self.vit.pretrained_cfg = {k: v for k, v in facts.items() if not k.startswith("label_")}
        self.rebuild_plan()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, as this module has them."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass rather than keep what they made."""
        self.vit.set_grad_checkpointing(enable)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "vit" and not name.startswith("__") and hasattr(self.__dict__["_modules"].get("vit"), name):
                raise AttributeError(
                    f"{type(self).__name__} has no {name!r}; its timm module has: model.vit.{name} (knows no setting)"
                ) from None
            raise

    if TYPE_CHECKING:  # what the model gives to these

        def forward_tokens(self, images: Tensor) -> tuple[Tokens, Trace]: ...
        def pooled_head(self, x: Tensor, tokens: Tokens, pre_logits: bool = False) -> Tensor: ...
        def rebuild_plan(self) -> None: ...
