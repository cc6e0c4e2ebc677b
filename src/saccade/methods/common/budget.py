"""Compute of a setting by arithmetic alone, and the strength of a method that meets a budget.

Methods whose counts are static can be priced without a model, an image or a run: token counts go through the blocks,
and every block costs what its shapes say. The price is the one that a trace gives, for an image of the model's own
size and patches. What gates leave out is priced by the shares that they are to leave on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from saccade.core.plan import Backbone, Method, Plan, Reducer
from saccade.errors import UserError


def macs(backbone: Backbone, *methods: Method) -> int:
    """MACs that one image runs through a ViT under some methods, the shortened last block and deciding included.

    Equal to ``Trace.macs`` of a forward pass on the model's own grid, where no count depends on the image and the
    attention is fused (as it is in fp32).
    """
    plan, cost, prefix = Plan(methods), backbone.cost, backbone.num_prefix
    n, total, depth = backbone.num_patches, 0, plan.depth(backbone.depth)
    for block in range(depth):
        before = plan.site(block, "block", n)
        n, total = before.left, total + before.macs
        if backbone.pool == "token" and block == depth - 1:  # what the patches would become is not read
            total += int(cost.attention(prefix, prefix + n)) + prefix * cost.mlp
            n = 0
            break
        between = plan.site(block, "attn", n)
        total += int(cost.attention(prefix + n, prefix + n)) + between.macs
        if "cls_attn" in between.read and "attn_received" not in between.read:  # computed beside a fused kernel
            total += backbone.heads**2 * backbone.head_dim * (prefix + n)
        n = between.left
        total += (prefix + n) * cost.mlp
    patch = backbone.channels * backbone.patch_size[0] * backbone.patch_size[1]
    fixed, each = backbone.head
    return total + backbone.num_patches * patch * backbone.dim + fixed + each * (prefix + n)


def static(backbone: Backbone, *methods: Method) -> bool:
    """Whether ``macs`` knows all there is to know: no gates, no counts that depend on the image, no other head."""
    steps = [step for method in methods for step in method.steps]
    counted = all(isinstance(s, Reducer) and s.count(backbone.num_patches) is not None for s in steps)
    return counted and all(type(method).head is Method.head for method in methods)


@dataclass(frozen=True)
class Used:
    """What a block computes for an image: so many patch tokens, and shares of its heads and of its branches.

    Of several draws, or several images, the means; each axis is drawn by itself.
    """

    patches: float
    heads: float = 1.0
    branches: float = 1.0


def gated(backbone: Backbone, used: Mapping[int, Used], partial: bool = False, short: bool = False) -> float:
    """MACs that one image is expected to run where some blocks leave a part out; those of deciding are left out.

    Args:
        used: by block. Where the last one is gated it computes what its gates leave on, and else, where only the class
            token is read, that alone.
        partial: heads that are off pass their own values on.
        short: patches were dropped, and not gated: the last block is as it is without.
    """
    cost, prefix, n = backbone.cost, backbone.num_prefix, backbone.num_patches
    total = float(macs(backbone))
    for block, found in used.items():
        alone = backbone.pool == "token" and block == backbone.depth - 1
        for sign, now, first in ((-1, Used(n), alone), (1, found, alone and short)):
            keys = prefix + now.patches
            queries = prefix if first else keys
            asked, there, heads = torch.tensor([queries, keys, now.heads], dtype=torch.float64)
            attention = float(cost.attention(asked, there, heads, partial))
            total += sign * now.branches * (attention + queries * cost.mlp)
    return total


def fit(
    name: str,
    backbone: Backbone,
    make: Callable[[int], Method],
    steps: int,
    gmacs: float | None = None,
    speed: float | None = None,
    priced: Callable[[int], Method] | None = None,
) -> Method:
    """The weakest of make(0) … make(steps), ever cheaper but for what deciding costs, within a budget.

    Args:
        make: a method at a strength; 0 is off.
        gmacs: the budget, 10^9 MACs an image; or
        speed: how many times fewer MACs than the dense model.
        priced: what costs the same, where the counts of ``make`` are not known beforehand.

    Raises:
        UserError: not exactly one budget, one that is no budget, or one that make(steps) is still over.
    """
    return make(strength(name, backbone, lambda i: macs(backbone, (priced or make)(i)), steps, gmacs, speed))


def strength(
    name: str,
    backbone: Backbone,
    price: Callable[[int], float],
    steps: int,
    gmacs: float | None = None,
    speed: float | None = None,
) -> int:
    """The least of the strengths 0 … steps, ever cheaper by ``price``, that is within a budget: as ``fit``."""
    dense = macs(backbone)
    budget = aim(name, dense, gmacs, speed)
    cheapest = price(steps)
    if cheapest > budget:
        knob, value = ("gmacs", gmacs) if speed is None else ("speed", speed)
        limit = cheapest / 1e9 if knob == "gmacs" else dense / cheapest
        side = "least" if knob == "gmacs" else "most"
        raise UserError(f"{name}: {knob}={value:g} is out of reach, the {side} is {limit:.3g}; combine it with grid(…)")
    low, high = 0, 0 if dense <= budget else steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if price(middle) <= budget else (middle + 1, high)
    return low


def aim(name: str, dense: float, gmacs: float | None, speed: float | None) -> float:
    """The MACs that one of two knobs asks for; UserError where it is not exactly one, or no budget."""
    knob, value = ("gmacs", gmacs) if speed is None else ("speed", speed)
    if gmacs is not None and speed is not None:
        raise UserError(f"{name}: give one of gmacs and speed, not both")
    least = 0.0 if knob == "gmacs" else 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e6:
        raise UserError(f"{name}: {knob}={value!r} is not a number from {least:g} up to a million")
    return value * 1e9 if knob == "gmacs" else dense / value


def even_usage(
    name: str,
    backbone: Backbone,
    axes: Mapping[int, Sequence[str]],
    gmacs: float | None,
    speed: float | None,
    partial: bool = False,
) -> float:
    """The most that all axes of all gated blocks may be used, alike, within a budget.

    Args:
        axes: by block, what is gated: "patch" (of which prefix tokens, which are on, are counted), "head", "block".
        partial: as for ``gated``.
    """
    prefix, n = backbone.num_prefix, backbone.num_patches

    def price(i: int) -> float:
        on = 1 - i / 1000

        def used(axes: Sequence[str]) -> Used:
            patches = max(0.0, on * (prefix + n) - prefix) if "patch" in axes else n
            return Used(patches, *(on if axis in axes else 1.0 for axis in ("head", "block")))

        return gated(backbone, {block: used(some) for block, some in axes.items()}, partial)

    return 1 - strength(name, backbone, price, 999, gmacs, speed) / 1000
