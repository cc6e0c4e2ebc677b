"""``adavit``: which patches, heads and branches of each block run, decided for each image (AdaViT, arXiv 2111.15668).

Meng et al., CVPR 2022; to be trained. Nothing is dropped for good: what a block leaves out, the next may use.
``form="released"`` computes and trains what the released code does. The default differs from that code in this:

* The class token is normed before it is read, and patches without the weights of the block's norm; the code reads the
  class token as it is, and patches behind ``norm1``.
* The threshold is 0.5 on every axis, and training draws a part with the probability that its gate gives. The code has
  0.6 for patches, in training too: there a logit l is on with probability sigmoid(l - τ log 1.5).
* About 98 % of everything is kept before anything is learned; biases start at 0 in the code, so that half is.
* The first block is whole, and the last one too where only its class token is read; the code gates patches in every
  block, heads and branches in all but the first.
* A head that is off leaves the MLP alone; in the code its channels are 0 at the input of the MLP.
* A head's gate has the gradient of the head's output, a patch's that of attention over the tokens that are on. In the
  code heads multiply queries, keys and values too, and a patch that is off attends to itself alone.
* The usage loss squares the miss of every axis, over patches and all blocks that decide. The code squares tokens (the
  class token counts as one that is on) and has the absolute miss of branches, and of heads where their attention is on.

In both forms, and not in that code: partial heads learn beside patches too; a block with gates keeps its drop path;
where there is no class token the mean token is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.gates import Gates, straight_through
from saccade.core.init import draw, init_module
from saccade.core.plan import Backbone, Gater, Method
from saccade.core.record import BlockTrace, Trace
from saccade.core.registry import also, register
from saccade.core.timm_types import TimmBlock
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import blocks, fraction, one_of
from saccade.methods.common.budget import aim, even_usage
from saccade.methods.common.sampling import choose, logit, mean_of

AXES = ("patch", "head", "block")
FORMS = ("token", "paper", "released")
HEADS = ("full", "partial")
START = 0.98  # share of everything that is kept before anything is learned
STD = 0.02  # of the weights of a decision, as published
RELEASED = {"patch": 0.6, "head": 0.5, "block": 0.5}  # thresholds of the released code


@dataclass(frozen=True)
class Rule:
    """How gates are decided."""

    form: str
    thresholds: Mapping[str, float]  # by axis
    partial: bool  # a head that is off passes its own values on
    tau: float
    noise: float

    @property
    def released(self) -> bool:
        """As the released code decides."""
        return self.form == "released"

    def chosen(self, axis: str, logits: Tensor, training: bool) -> Tensor:
        """0/1 of each logit, straight-through."""
        threshold = self.thresholds[axis]
        if not self.released:
            noise, threshold = (self.noise, 0.5) if training else (0.0, threshold)
            return choose(logits, noise, self.tau, threshold)
        logits = logits.float()
        if training:
            drawn = torch.rand_like(logits).clamp(1e-7, 1 - 1e-7).logit()  # the difference of two Gumbels
            logits = (logits + self.noise * drawn) / self.tau
        return straight_through(logits, threshold)


class Decide(Gater):
    """One linear layer for each axis: from the class token (without one: the mean token), or from each patch.

    Features are normed; in the released form patches by the block's norm, and the class token not at all.
    """

    ragged = True

    def __init__(self, outputs: Mapping[str, int], dim: int, rule: Rule) -> None:
        super().__init__()
        self.dim, self.rule, self.outputs = dim, rule, dict(outputs)
        self.part = "released" if rule.released else ""  # what it learns reads other features
        layers = init_module(lambda: nn.ModuleDict({axis: nn.Linear(dim, count) for axis, count in outputs.items()}))
        self.layers: Any = layers

    def macs(self, n: int) -> int:
        patch = {"patch": n} if self.rule.form != "paper" and "patch" in self.outputs else {}
        return self.dim * sum({**self.outputs, **patch}.values())

    def gates_for(self, block: TimmBlock, tokens: Tokens) -> Gates:
        if not self.rule.released:
            return self(tokens)
        patches = block.norm1(tokens.x)[:, tokens.num_prefix :] if "patch" in self.outputs else tokens.patches
        return self.decide(tokens, tokens.x, patches)

    def forward(self, tokens: Tokens) -> Gates:
        x = F.layer_norm(tokens.x, (self.dim,), eps=1e-6)
        return self.decide(tokens, x, x[:, tokens.num_prefix :])

    def decide(self, tokens: Tokens, x: Tensor, patches: Tensor) -> Gates:
        """x [B, P+N, D], of which the summary of an image is taken, and patches [B, N, D]: as they are read."""
        summary = x[:, 0] if tokens.num_prefix else mean_of(x, tokens.weights())
        gates: dict[str, Tensor] = {}
        for axis, layer in self.layers.items():
            of_each = axis == "patch" and self.rule.form != "paper"
            logits = layer(patches).squeeze(-1) if of_each else layer(summary)
            if axis == "patch" and logits.shape[1] != tokens.num_patches:
                raise UserError(
                    f"adavit: form='paper' decides over {logits.shape[1]} places and there are {tokens.num_patches} "
                    "tokens; take form='token', or the model's own grid"
                )
            chosen = self.rule.chosen(axis, logits, self.training)
            gates |= {"attn": chosen[:, 0], "mlp": chosen[:, 1]} if axis == "block" else {axis: chosen}
        whole = self.rule.released and not self.rule.partial
        return Gates(**gates, partial=self.rule.partial, mlp_heads=whole, inner=self.rule.released)


class AdaViT(Method):
    """Decisions for each block, and what training holds their usage to."""

    def __init__(
        self,
        steps: Iterable[tuple[int, Gater]],
        usage: Mapping[str, float],
        budget: tuple[str, float] | None,
        weight: float,
        released: bool,
    ) -> None:
        super().__init__(steps)
        self.usage, self.budget, self.weight, self.released = dict(usage), budget, weight, released

    def loss(self, trace: Trace) -> dict[str, Tensor]:
        """Σ over axes of (mean usage - usage wanted)², means over images, blocks and units; or, with a budget,
        (mean MACs / MACs wanted - 1)²; times the weight. The released form: see ``released_misses``."""
        if trace.images == 0:
            return {}
        if self.budget is not None:
            kind, value = self.budget
            whole = trace.macs(nominal=True).mean() if kind == "share" else 1e9
            return {"budget": self.weight * (trace.target_macs().mean() / (value * whole) - 1).square().float()}
        blocks = [block for at in self.at if at < len(trace.blocks) and (block := trace.blocks[at]).gates is not None]
        gates = [block.gates for block in blocks if block.gates is not None]
        if self.released:
            misses = released_misses(blocks, self.usage)
            return {"usage": self.weight * torch.stack(misses).sum()} if misses else {}
        used = {axis: [mean for g in gates if (mean := usage_of(g, axis)) is not None] for axis in self.usage}
        misses = [(torch.stack(used[axis]).mean() - self.usage[axis]) ** 2 for axis in self.usage if used[axis]]
        return {"usage": self.weight * torch.stack(misses).sum()} if misses else {}


def usage_of(gates: Gates, axis: str) -> Tensor | None:
    """Mean of an axis' gates over images and units; None where the axis has none."""
    found = [gates.attn, gates.mlp] if axis == "block" else [getattr(gates, axis)]
    given = [gate.mean() for gate in found if gate is not None]
    return torch.stack(given).mean() if given else None


def released_misses(blocks: Sequence[BlockTrace], usage: Mapping[str, float]) -> list[Tensor]:
    """The released usage loss of each axis that has gates: the squared miss of the share of tokens that are on, prefix
    tokens among them; the absolute miss of the share of heads, in the images whose attention is on, and of branches."""
    found: list[Tensor] = []
    pairs = [(block, block.gates) for block in blocks if block.gates is not None]
    patches = [(block.static_counts[0], g.patch) for block, g in pairs if g.patch is not None]
    if "patch" in usage and patches:
        on = torch.stack([patch.sum() + len(patch) * (n - patch.shape[1]) for n, patch in patches]).sum()
        found.append((on / sum(n * len(patch) for n, patch in patches) - usage["patch"]) ** 2)
    heads = [(g.head, g.attn) for _, g in pairs if g.head is not None]
    if "head" in usage and heads:
        attends = [torch.ones_like(head[:, 0]) if attn is None else attn.detach() for head, attn in heads]
        used = torch.stack([(head.mean(1) * on).sum() for (head, _), on in zip(heads, attends, strict=True)]).sum()
        found.append((used / torch.stack(attends).sum().clamp(min=1) - usage["head"]).abs())
    branches = [branch.mean() for _, g in pairs for branch in (g.attn, g.mlp) if branch is not None]
    if "block" in usage and branches:
        found.append((torch.stack(branches).mean() - usage["block"]).abs())
    return found


# No menu: untrained, it keeps what it keeps at random. `tune` tries the settings that weights were trained for.
@also(before={"form": {"released": "token"}})  # which was the code's way to read patches, and no more
@register("adavit", sources={"paper": "axes noise", "code": "heads tau weight"})
def adavit(
    backbone: Backbone,
    usage: float | tuple[float, ...] | None = None,
    axes: str | tuple[str, ...] = AXES,
    at: int | Iterable[int] | None = None,
    gmacs: float | None = None,
    share: float | None = None,
    threshold: float | tuple[float, ...] | None = None,
    form: str = "token",
    heads: str = "full",
    tau: float = 5.0,
    weight: float = 2.0,
    noise: float = 1.0,
    speed: float | None = None,
) -> Method:
    """Decide for each image which patches, heads and branches of a block run (arXiv 2111.15668); it has to be trained.

    Skipping is exact on every axis. Where each image of a batch has its own heads, they are skipped only if so many
    are off that this is faster (``heads.should_skip_heads``); ``Trace.macs`` counts what ran.

    Args:
        usage: share of each axis that training aims at, one for all or one for each of ``axes``; None: 0.7, and 0.5 in
            the released form.
        axes: what is decided: 'patch', 'head', 'block' (attention and MLP branch), or several of them.
        at: 0-based blocks; None: all but the first, and but the last where only the class token is read after it
            (there nothing else is computed anyway); in the released form all, patches alone in the first.
        gmacs: instead of ``usage``, the mean 10^9 MACs of an image that training aims at, heads left out (the released
            form: by the usage of which all axes together cost that, each part on by itself); or
        share: the same as a share of the MACs without gates.
        threshold: of the probability in evaluation, one for all axes or one for each; None: 0.5 (released: 0.6 for
            patches, and in training too). Another makes a trained model cheaper or dearer.
        form: 'token', each patch's logit from itself (any number of tokens); 'paper', all places' logits from the class
            token (the model's own grid only); 'released', all that the released code computes and trains: a head that
            is off is 0 at the MLP's input too, the class token is read raw; thresholds, start, blocks, losses and
            gradients are that code's (``saccade/methods/adavit.py`` lists what differs in the other forms).
        heads: a head that is off gives nothing ('full'), or passes its own values on ('partial').
        tau: temperature of the draws in training; it scales the gradient of the gates and, where the threshold is 0.5,
            not their frequency.
        weight: of the loss that holds training to the usage or the budget.
        noise: of the draws in training, 1: as published, 0: training decides as evaluation does (the released form by
            sigmoid(logit / tau)). A run that goes through settings of less and less noise ends where evaluation begins.
        speed: as ``gmacs``, for this many times fewer MACs than without gates.
    """
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in axes:
        one_of("adavit", "axes", axis, AXES)
    one_of("adavit", "form", form, FORMS)
    released = form == "released"
    if len(set(axes)) != len(axes) or not axes:
        raise UserError(f"adavit: axes={axes!r}: name one or more of {', '.join(AXES)}, each once")
    wanted = _each("usage", (0.5 if released else 0.7) if usage is None else usage, axes)
    thresholds = _each("threshold", tuple(map(_default(released).get, axes)) if threshold is None else threshold, axes)
    fraction("adavit", "noise", noise)
    one_of("adavit", "heads", heads, HEADS)
    if released and backbone.cost.attn_dim != backbone.dim:
        raise UserError(f"adavit: form='released' needs heads as wide as the model ({backbone.dim}) together")
    given = [knob for knob, value in (("gmacs", gmacs), ("share", share), ("speed", speed)) if value is not None]
    if len(given) > 1:
        raise UserError(f"adavit: give one of gmacs, share and speed, not {' and '.join(given)}")
    for knob, number, least in (("tau", tau, 0.001), ("weight", weight, 0.0), ("gmacs", gmacs, 1e-6)):
        optional = knob == "gmacs" and number is None
        if not optional and (isinstance(number, (bool, type(None))) or not least <= number <= 1e6):
            raise UserError(f"adavit: {knob}={number!r} is not a number from {least:g} up to a million")
    if speed is not None:
        share = aim("adavit", 1.0, None, speed)
    budget = ("gmacs", gmacs) if gmacs is not None else None
    if share is not None:
        budget = ("share", fraction("adavit", "share", share, 1e-6 if speed else 0.001))
    outputs = {"patch": backbone.num_patches if form == "paper" else 1, "head": backbone.heads, "block": 2}
    chosen = blocks("adavit", at, tuple(range(backbone.depth)) if released else deciding(backbone), backbone.depth)
    if released and budget is not None:
        gated = {i: axes if i else [axis for axis in axes if axis == "patch"] for i in chosen}
        speed = None if share is None else 1 / share
        wanted = dict.fromkeys(axes, even_usage("adavit", backbone, gated, gmacs, speed, heads == "partial"))
        budget = None
    rule = Rule(form, thresholds, heads == "partial", tau, noise)
    steps: list[tuple[int, Decide]] = []
    for i in chosen:
        decided = {axis: outputs[axis] for axis in axes if axis == "patch" or i > 0 or not released}
        if decided:
            steps.append((i, Decide(decided, backbone.dim, rule)))
            start(steps[-1][1], i, 0.5 if released else START)
    return AdaViT(steps, wanted, budget, weight, released)


def _default(released: bool) -> Mapping[str, float]:
    return RELEASED if released else dict.fromkeys(AXES, 0.5)


def _each(knob: str, value: Any, axes: tuple[str, ...]) -> dict[str, float]:
    """A knob's value for each axis."""
    given = value if isinstance(value, (tuple, list)) else (value,) * len(axes)
    if len(given) != len(axes):
        raise UserError(f"adavit: {knob}={value!r} does not fit axes={axes!r}: give one number, or one for each axis")
    return {axis: fraction("adavit", knob, one) for axis, one in zip(axes, given, strict=True)}


def deciding(backbone: Backbone) -> tuple[int, ...]:
    """All blocks but the first, and but the last where its patches are not read."""
    return tuple(range(1, backbone.depth - (backbone.pool == "token" and backbone.depth > 2)))


@torch.no_grad()
def start(step: Decide, seed: int, share: float) -> None:
    """Small weights, and biases at which about ``share`` of everything is on."""
    for i, layer in enumerate(step.layers.values()):
        layer.weight.copy_(draw(tuple(layer.weight.shape), STD, 100 * seed + i))
        layer.bias.fill_(logit(share))
