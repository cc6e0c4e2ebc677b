"""``adavit``: which patches, heads and branches of each block run, decided for each image (AdaViT, arXiv 2111.15668).

Meng et al., CVPR 2022; to be trained. Nothing is dropped for good: what a block leaves out, the next may use. Four
things differ from the released code: the class token is normed before it is read, the threshold is the same in training
and evaluation, the temperature is used, and training starts from a model that keeps about 98 % of everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.gates import Gates
from saccade.core.init import draw, init_module
from saccade.core.plan import Backbone, Gater, Method
from saccade.core.record import Trace
from saccade.core.registry import register
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import blocks, fraction, one_of
from saccade.methods.common.sampling import choose, logit

AXES = ("patch", "head", "block")
FORMS = ("released", "paper")
HEADS = ("full", "partial")
START = 0.98  # share of everything that is kept before anything is learned
STD = 0.02  # of the weights of a decision, as published


class Decide(Gater):
    """One linear layer for each axis, from the normed class token (without one: the mean token); see ``adavit``."""

    ragged = True

    def __init__(
        self,
        outputs: Mapping[str, int],
        dim: int,
        form: str,
        own: bool,
        tau: float,
        threshold: float,
        noise: float,
    ) -> None:
        super().__init__()
        self.dim, self.form, self.own = dim, form, own
        self.tau, self.threshold, self.noise = tau, threshold, noise
        self.outputs = dict(outputs)
        layers = init_module(lambda: nn.ModuleDict({axis: nn.Linear(dim, count) for axis, count in outputs.items()}))
        self.layers: Any = layers

    def macs(self, n: int) -> int:
        patch = {"patch": n} if self.form == "released" and "patch" in self.outputs else {}
        return self.dim * sum({**self.outputs, **patch}.values())

    def forward(self, tokens: Tokens) -> Gates:
        x = F.layer_norm(tokens.x, (self.dim,), eps=1e-6)
        patches = x[:, tokens.num_prefix :]
        summary = x[:, 0] if tokens.num_prefix else _mean(patches, tokens.weights())
        gates: dict[str, Tensor] = {}
        for axis, layer in self.layers.items():
            logits = layer(patches).squeeze(-1) if axis == "patch" and self.form == "released" else layer(summary)
            if axis == "patch" and logits.shape[1] != tokens.num_patches:
                raise UserError(
                    f"adavit: form='paper' decides over {logits.shape[1]} places and there are {tokens.num_patches} "
                    "tokens; take form='released', or the model's own grid"
                )
            noise, threshold = (self.noise, 0.5) if self.training else (0.0, self.threshold)
            chosen = choose(logits, noise, self.tau, threshold)
            gates |= {"attn": chosen[:, 0], "mlp": chosen[:, 1]} if axis == "block" else {axis: chosen}
        return Gates(**gates, partial=self.own)


def _mean(x: Tensor, weights: Tensor | None) -> Tensor:
    """x [B, N, D] -> [B, D]."""
    if weights is None:
        return x.mean(1)
    share = weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
    return (share.unsqueeze(-1).to(x.dtype) * x).sum(1)


class AdaViT(Method):
    """Decisions for each block, and what training holds their usage to."""

    def __init__(
        self,
        steps: Iterable[tuple[int, Gater]],
        usage: Mapping[str, float],
        budget: tuple[str, float] | None,
        weight: float,
    ) -> None:
        super().__init__(steps)
        self.usage, self.budget, self.weight = dict(usage), budget, weight

    def loss(self, trace: Trace) -> dict[str, Tensor]:
        """Σ over axes of (mean usage - usage wanted)², means over images, blocks and units; or, with a budget,
        (mean MACs / MACs wanted - 1)²; times the weight."""
        if trace.images == 0:
            return {}
        if self.budget is not None:
            kind, value = self.budget
            whole = trace.macs(nominal=True).mean() if kind == "share" else 1e9
            return {"budget": self.weight * (trace.target_macs().mean() / (value * whole) - 1).square().float()}
        gates = [found for at in self.at if at < len(trace.blocks) and (found := trace.blocks[at].gates) is not None]
        used = {axis: [mean for g in gates if (mean := usage_of(g, axis)) is not None] for axis in self.usage}
        misses = [(torch.stack(used[axis]).mean() - self.usage[axis]) ** 2 for axis in self.usage if used[axis]]
        return {"usage": self.weight * torch.stack(misses).sum()} if misses else {}


def usage_of(gates: Gates, axis: str) -> Tensor | None:
    """Mean of an axis' gates over images and units; None where the axis has none."""
    found = [gates.attn, gates.mlp] if axis == "block" else [getattr(gates, axis)]
    given = [gate.mean() for gate in found if gate is not None]
    return torch.stack(given).mean() if given else None


# No menu: untrained, it keeps what it keeps at random. `tune` tries the settings that weights were trained for.
@register("adavit")
def adavit(
    backbone: Backbone,
    usage: float | tuple[float, ...] = 0.7,
    axes: str | tuple[str, ...] = AXES,
    at: int | Iterable[int] | None = None,
    gmacs: float | None = None,
    share: float | None = None,
    threshold: float = 0.5,
    form: str = "released",
    heads: str = "full",
    tau: float = 5.0,
    weight: float = 2.0,
    noise: float = 1.0,
) -> Method:
    """Decide for each image which patches, heads and branches of a block run (arXiv 2111.15668); it has to be trained.

    Skipping is exact on every axis. Where each image of a batch has its own heads, they are skipped only if enough of
    them are off for that to be faster (``heads.should_skip_heads``): ``Trace.macs`` counts what ran, ``wanted`` what
    was wanted.

    Args:
        usage: share of each axis that training aims at, one for all or one for each of ``axes``.
        axes: what is decided: 'patch', 'head', 'block' (attention and MLP branch), or several of them.
        at: 0-based blocks; None: all but the first, and but the last where only the class token is read after it
            (there nothing else is computed anyway).
        gmacs: instead of ``usage``, the mean 10^9 MACs of an image that training aims at, heads left out; or
        share: the same as a share of the MACs without gates.
        threshold: of the probability, in evaluation; another than 0.5 makes a trained model cheaper or dearer.
        form: of the patches' decision: 'released', each token's logit from itself (any number of tokens), or 'paper',
            all places' logits from the class token (the model's own grid only).
        heads: a head that is off gives nothing ('full'), or passes its own values on ('partial').
        tau: temperature of the draws in training; it scales the gradient of the gates and not their frequency.
        weight: of the loss that holds training to the usage or the budget.
        noise: of the draws in training, 1: as published, 0: training decides as evaluation does. A run that goes
            through settings of less and less noise ends where evaluation begins.
    """
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in axes:
        one_of("adavit", "axes", axis, AXES)
    wanted = tuple(usage) if isinstance(usage, (tuple, list)) else (usage,) * len(axes)
    if len(wanted) != len(axes) or len(set(axes)) != len(axes) or not axes:
        raise UserError(f"adavit: usage={usage!r} does not fit axes={axes!r}: give one number, or one for each axis")
    for value in wanted:
        fraction("adavit", "usage", value)
    fraction("adavit", "threshold", threshold)
    fraction("adavit", "noise", noise)
    one_of("adavit", "form", form, FORMS)
    one_of("adavit", "heads", heads, HEADS)
    if gmacs is not None and share is not None:
        raise UserError("adavit: give one of gmacs and share, not both")
    for knob, number, least in (("tau", tau, 0.001), ("weight", weight, 0.0), ("gmacs", gmacs, 1e-6)):
        optional = knob == "gmacs" and number is None
        if not optional and (isinstance(number, (bool, type(None))) or not least <= number <= 1e6):
            raise UserError(f"adavit: {knob}={number!r} is not a number from {least:g} up to a million")
    budget = ("gmacs", gmacs) if gmacs is not None else None
    if share is not None:
        budget = ("share", fraction("adavit", "share", share, 0.001))
    all_outputs = {"patch": 1 if form == "released" else backbone.num_patches, "head": backbone.heads, "block": 2}
    outputs = {axis: all_outputs[axis] for axis in axes}
    chosen = blocks("adavit", at, deciding(backbone), backbone.depth)
    steps = [(i, Decide(outputs, backbone.dim, form, heads == "partial", tau, threshold, noise)) for i in chosen]
    for i, step in steps:
        start(step, seed=i)
    return AdaViT(steps, dict(zip(axes, wanted, strict=True)), budget, weight)


def deciding(backbone: Backbone) -> tuple[int, ...]:
    """All blocks but the first, and but the last where its patches are not read."""
    return tuple(range(1, backbone.depth - (backbone.pool == "token" and backbone.depth > 2)))


@torch.no_grad()
def start(step: Decide, seed: int) -> None:
    """Small weights, and biases at which about ``START`` of everything is on."""
    for i, layer in enumerate(step.layers.values()):
        layer.weight.copy_(draw(tuple(layer.weight.shape), STD, 100 * seed + i))
        layer.bias.fill_(logit(START))
