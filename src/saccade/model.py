"""``AdaptiveViT``: a timm ViT, a setting and a head, and what they give — logits, tokens, and a trace of what ran."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from saccade.backbones.embeddings import Embeds
from saccade.backbones.hub import HubNames
from saccade.backbones.learned import Learned
from saccade.backbones.plan_builder import build, share
from saccade.backbones.timm_names import TimmNames
from saccade.backbones.vit import backbone_of, class_names_of, head_macs, pools_prefix
from saccade.core.fingerprint import FINGERPRINT, fingerprint
from saccade.core.head import Head, HeadOutput
from saccade.core.hooks import FEATURES, HEAD, any_hooked, around, replaced, require_head
from saccade.core.init import outside
from saccade.core.lazy import unread
from saccade.core.output import LazyOutput, Output
from saccade.core.plan import Backbone, Plan
from saccade.core.record import Trace
from saccade.core.timm_types import ViT
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.execution.loop import encode
from saccade.execution.policy import AUTO, Execution
from saccade.renamed.model_names import OldNames
from saccade.runners.deployable import Deployable
from saccade.setting import Setting
from saccade.tokenizers.grid import Grid

__all__ = ["AdaptiveViT", "Output", "build", "share"]


class AdaptiveViT(OldNames, TimmNames, Embeds, Deployable, HubNames):
    """A timm Vision Transformer run under a setting, up to its own classifier or to a head for another task.

    ``vit`` is the timm module itself: its state dict is timm's. All that a setting learns lives beside it.
    timm's names are answered too: ``num_classes``, ``forward_features``, ``reset_classifier``, … (``TimmNames``).

    Args:
        vit: a timm ``VisionTransformer``, ``VisionTransformerDistilled`` or ``Eva``; others are refused by name.
        setting: ``"tome(r=13)"``, ``"grid(32) | evit(0.7)"``, …; empty: the unreduced model.
        trained: settings that the weights were trained for, where that is known; ``tune`` tries them too.
        learned: what methods learn, by ``<method>.<block>.<name>``; all views of a model share one such dict, so that
            a method has the same parameters at a block in every setting that names it.
        execution: how blocks are run where several ways give the same; None: by the rules. It can be set later too.
        head: for another task, ``model.task_head`` from then on; None: the ViT's own classifier, or pooled features
            where it has none. All views share it.
        fresh: what the setting learns may start where its methods have learned only at other blocks: see ``at``.

    Raises:
        UserError: unsupported class or block, unknown method, knob out of range; a method that has learned at other
            blocks only; a head for a ViT that still has a classifier, or that does not fit it.
    """

    def __init__(
        self,
        vit: nn.Module,
        setting: str | Setting = "",
        trained: tuple[str, ...] = (),
        learned: dict[str, Tensor] | None = None,
        execution: Execution | None = None,
        head: Head | None = None,
        fresh: bool = False,
    ) -> None:
        super().__init__()
        self.execution = execution or Execution.default()
        self.setting = Setting.parse(setting)
        self.trained = trained
        self.learned: dict[str, Tensor] = Learned() if learned is None else learned
        self.vit: ViT = cast(ViT, vit)
        self.rebuild_plan(fresh)
        self.task_head = head
        self.training = vit.training
        if head is not None:
            if count := self.vit.num_classes:
                raise UserError(f"this ViT still has a classifier of {count} classes: vit.reset_classifier(0)")
            head.check(self)

    def rebuild_plan(self, fresh: bool = False) -> None:
        """Make tokenizer and plan for what the ViT is now."""
        vit = self.vit
        self.backbone: Backbone = backbone_of(vit)
        weight = next(p for p in vit.parameters() if p.is_floating_point())
        with outside():
            self.tokenizer, self.plan = build(self.backbone, self.setting, self.learned, fresh)
            for part in (self.tokenizer, self.plan):
                part.to(weight.device, weight.dtype)  # what they learn runs where the model runs
                part.train(vit.training)

    def at(self, setting: str | Setting, *, fresh: bool = False) -> AdaptiveViT:
        """The same parameters under another setting, run the same way: a light view, nothing is copied or mutated.

        Args:
            fresh: what the setting learns and the model has not learned starts, to be trained. False: that is refused
                where the method has learned at other blocks: it would run beside them untrained.
        """
        view = AdaptiveViT(self.vit, setting, self.trained, self.learned, self.execution, self.task_head, fresh)
        view._deployment = self._deployment
        return view

    def with_head(self, head: Head) -> AdaptiveViT:
        """The same ViT and setting with a head for another task; the ViT's classifier is taken off for good.

        The head gets the model's device, number type and mode. Raises UserError where it does not fit.
        """
        self.vit.reset_classifier(0)
        head.to(self.vit.patch_embed.proj.weight).train(self.training)
        return AdaptiveViT(self.vit, self.setting, self.trained, self.learned, self.execution, head)

    @property
    def classifies(self) -> bool:
        """Whether a forward gives logits of the ViT's own classifier, or an encoder's embeddings: no head for another
        task, and no subclass' own forward."""
        own = type(self).forward is AdaptiveViT.forward
        return own and (self.task_head is None or self.task_head.embeds)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """What folders call each class, in the order of the logits: ``n01440764``, ``cat``; None: not known."""
        return class_names_of(self.vit) if self.task_head is None else self.task_head.class_names

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> HeadOutput:
        """images [B, C, h, w], normalised -> ``Output``: logits, tokens, trace; or what the head gives.

        Args:
            args, kwargs: what a head takes beside images, such as a detector's queries.
        """
        if self._deployment is not None and not self.training and not self._deployment.runner.is_plain:
            self._check(images)
            return self._deployment.run(self, images)
        head = self.task_head
        return self.forward_vit(images, *args, **kwargs) if head is None else head(self, images, *args, **kwargs)

    def forward_vit(self, images: Tensor, *, whole: bool = False) -> Output:
        """images [B, C, h, w], normalised -> logits of the ViT's own classifier (pooled features [B, D] where it has
        none), tokens, trace; nothing is computed that these logits do not need.

        Args:
            whole: compute all tokens in the last block, even where the logits read none but the prefix.
        """
        if replaced(self.vit, FEATURES) and self._asks_nothing(images) and not whole:
            return LazyOutput(self.vit(images), partial(self._forward, images))  # a user's own forward has no trace
        return self._forward(images, whole)

    def _forward(self, images: Tensor, whole: bool = False) -> Output:
        ran: list[tuple[Tokens, Trace]] = []

        def logits(images: Tensor) -> Tensor:
            ran.append(self._forward_tokens(images, whole=whole or not self._reads_prefix_only()))
            return self.forward_head(ran[-1][0])

        return Output(around(self.vit, logits, images), *ran[-1])

    def forward_tokens(self, images: Tensor, *, sparse: bool | None = None) -> tuple[Tokens, Trace]:
        """All tokens after the whole last block (before the final norm), with the final owner map, and the trace.

        Args:
            sparse: gates skip what is off; None: except in training, which multiplies instead.
        """
        return self._forward_tokens(images, whole=True, sparse=sparse)

    def _forward_tokens(
        self,
        images: Tensor,
        *,
        whole: bool,
        sparse: bool | None = None,
        dense: bool = False,
        plan: Plan | None = None,
    ) -> tuple[Tokens, Trace]:
        self._check(images)
        vit, tokenizer, plan = self.vit, self.tokenizer, self.plan if plan is None else plan
        start: Tokens = tokenizer(vit, images)
        start = start.with_dropped_features() if dense else start
        if plan.draws:
            start = replace(start, state={**start.state, FINGERPRINT: fingerprint(images)})
        skip = not self.training if sparse is None else sparse
        tokens, blocks = encode(vit, start, plan, whole=whole, sparse=skip, execution=self.execution)
        embed, head = tokenizer.macs(vit, start), head_macs(vit, tokens.x.shape[1])
        return tokens, Trace(blocks, embed, head, images.shape[0], unread(start), start.grid, tokens.state)

    def pooled_head(self, x: Tensor, tokens: Tokens, pre_logits: bool = False) -> Tensor:
        """``head`` of tokens whose normed values are x; ``pre_logits``: what the classifier reads, [B, D]."""
        vit = self.vit
        said = ((type(method), method.head(vit, tokens)) for method in self.plan.methods if not pre_logits)
        if own := {kind: logits for kind, logits in said if logits is not None}:
            require_head(vit)
            if len(own) > 1:
                raise UserError(f"{self.setting}: two of its methods give the logits by a head of their own: name one")
            return next(iter(own.values()))
        weights = None if vit.global_pool == "token" else tokens.weights()  # the patches may not even be there
        if weights is None:
            return vit.forward_head(x, pre_logits=pre_logits)
        require_head(vit)
        if vit.attn_pool is not None:
            patches = x if pools_prefix(vit) else x[:, tokens.num_prefix :]
            bias = replace(tokens, proportional=True).key_bias()[:, x.shape[1] - patches.shape[1] :].to(x.dtype)  # type: ignore[index]
            pooled = vit.attn_pool(patches, attn_mask=bias[:, None, None, :])
        else:  # average
            share = tokens.pad_prefix(weights, float(pools_prefix(vit)))
            share = (share / share.sum(1, keepdim=True)).to(x.dtype)
            pooled = (share.unsqueeze(-1) * x).sum(1)
        read = vit.head_drop(vit.fc_norm(pooled))
        return read if pre_logits else vit.head(read)

    def feature_map(self, images: Tensor) -> Tensor:
        """Features of the full grid [B, D, gh, gw], normed: a merged cell has its token's, a dropped one its last."""
        return self.features(images)[0]

    def features(self, images: Tensor) -> tuple[Tensor, Tokens, Trace]:
        """The dense map [B, D, gh, gw], the tokens that it was spread from, and the trace; no head has run yet."""
        tokens, trace = self._forward_tokens(images, whole=True, dense=True)
        assert tokens.dropped_features is not None
        features = self.vit.norm(tokens.cell_features())
        return features.transpose(1, 2).unflatten(2, tokens.grid), tokens, replace(trace, head=0)

    def input_size(self) -> tuple[int, int]:
        """Pixels (h, w) that images should come in."""
        return self.tokenizer.input_size(self.backbone.input_size)

    def freeze(self, setting: str | Setting | None = None) -> ViT:
        """A plain timm ViT of a plain grid's patch and input size; see :func:`saccade.backbones.freeze.freeze`."""
        from saccade.backbones.freeze import freeze

        return freeze(self, setting)

    def describe(self) -> dict[str, Any]:
        """What a folder must say of the head beside its weights, as JSON: its "task", and what it needs to be built."""
        head = self.task_head
        return {} if head is None else {"task": head.task, **head.describe()}

    def save(self, folder: str) -> None:
        """Write ``model.safetensors`` and ``config.json``; see :func:`saccade.load`."""
        from saccade.backbones.saving import save

        save(self, folder)

    def train(self, mode: bool = True) -> AdaptiveViT:
        """Also switches the timm module, and with it every view of the same parameters made later."""
        if mode and self._deployment is not None:
            self._deployment.forget()  # weights will change, and not always in ways that torch counts
        return super().train(mode)

    def extra_repr(self) -> str:
        """The setting and the way to run, on the first line of what is printed."""
        said = f"setting={str(self.setting)!r}"
        said += "" if self.execution == AUTO else f", {self.execution}"
        return said if self.deployed is None or self.deployed.is_plain else f"{said}, {self.deployed.described()}"

    def _reads_prefix_only(self) -> bool:
        """Whether only the prefix is read of the last block's output, by hooks and a user's own forward too."""
        vit = self.vit
        plain = not replaced(vit, HEAD) and "forward" not in vars(vit.norm)
        return vit.global_pool == "token" and plain and not any_hooked((vit.blocks, vit.norm))

    def _asks_nothing(self, images: Tensor) -> bool:
        """Whether the timm module itself does on these images what the setting says."""
        embed, grid = self.vit.patch_embed, self.tokenizer
        own = isinstance(grid, Grid) and grid.patch == grid.stride == tuple(embed.patch_size)
        return own and not self.plan.methods and tuple(images.shape[-2:]) == tuple(embed.img_size)

    def _check(self, images: Tensor) -> None:
        channels = self.backbone.channels
        shaped = images.ndim == 4 and images.shape[1] == channels and images.shape[2] > 0 and images.shape[3] > 0
        if not shaped or not images.is_floating_point():
            raise UserError(
                f"images of shape {tuple(images.shape)} and type {images.dtype}: expected float [B, {channels}, h, w], "
                "of one pixel or more"
            )
