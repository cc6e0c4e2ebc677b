"""What a model ends in where it does another task than its ViT's classifier, and what a head may ask of the model."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from saccade.core.output import Output
from saccade.core.plan import Tokenizer
from saccade.core.record import Trace
from saccade.core.timm_types import ViT
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.setting import Setting

PREFIX = "task_head."  # before the names of a head's weights in a model; in a folder they stand without it


class HeadOutput(Protocol):
    """What every head gives beside its answer."""

    @property
    def tokens(self) -> Tokens:
        """Of the last block."""

    @property
    def trace(self) -> Trace:
        """What ran, the head's MACs included."""


class Body(Protocol):
    """A model as its head sees it: the ViT has no classifier, and runs under a setting."""

    vit: ViT
    setting: Setting
    tokenizer: Tokenizer
    task_head: Head | None

    def forward_vit(self, images: Tensor) -> Output:
        """images [B, C, h, w], normalised -> pooled features [B, D] as ``logits``, with tokens and trace."""

    def forward_tokens(self, images: Tensor) -> tuple[Tokens, Trace]:
        """images [B, C, h, w], normalised -> all tokens after the last block, before the last norm, and the trace."""

    def pooled(self, tokens: Tokens, pool: str) -> Tensor:
        """Tokens after the last block -> [B, D], as ``model.embed`` pools them."""

    def features(self, images: Tensor) -> tuple[Tensor, Tokens, Trace]:
        """images [B, C, h, w], normalised -> the dense map [B, D, gh, gw], its tokens, and a trace without a head."""


class Head(nn.Module):
    """The end of a model for one task: it reads the model and gives the task's answer, under whatever setting.

    One head serves all views of a model. Its weights learn at the head's rate, and stand in a folder under the names
    of its children, ``decoder.*``; so no child is called ``vit`` or ``learned``. ``load`` finds a head that was written
    elsewhere by its ``task``, once its module has been imported.
    """

    written: ClassVar[dict[str, type[Head]]] = {}  # by task: all that have been imported

    task: ClassVar[str]  #   as ``config.json`` names it
    noun: ClassVar[str]  #   a model that ends so, in words: "detector"
    verb: ClassVar[str]  #   of the command that runs it
    config: ClassVar[str]  # a training run that gives one
    embeds: ClassVar[bool] = False  # it gives an ``Output`` of one vector [B, D] an image, as a ViT without classifier
    #                                does; so what measures, runs and exports encoders takes it

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "task" in vars(cls):
            cls.written[cls.task] = cls

    @classmethod
    def of(cls, model: Body, name: str = "this model") -> Self:
        """The head of a model that ends in one of this kind. Raises UserError, naming the way to train one."""
        if not isinstance(model.task_head, cls):
            raise UserError(f"{name} holds no {cls.noun}: train one with `saccade train {cls.config}`")
        return model.task_head

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """What its classes are called, in the order of its answers; None: it has none."""
        return None

    def check(self, model: Body) -> None:
        """Raises UserError unless it fits the ViT and the setting of a model."""

    def forward(self, model: Body, images: Tensor) -> HeadOutput:
        """images [B, C, h, w], normalised -> its answer. A head may take more, each with a default."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What ``rebuild`` must know beside weights and ViT, as JSON."""
        raise NotImplementedError

    @classmethod
    def rebuild(cls, vit: ViT, described: dict[str, Any]) -> Self:
        """The head that ``describe`` described, for a ViT, without its weights. Raises UserError for bad values."""
        raise NotImplementedError
