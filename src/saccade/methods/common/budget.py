"""Compute of a setting by arithmetic alone, and the strength of a method that meets a budget.

Methods whose counts are static can be priced without a model, an image or a run: token counts go through the blocks,
and every block costs what its shapes say. The price is the one that a trace gives, for an image of the model's own
size and patches.
"""

from __future__ import annotations

from collections.abc import Callable

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
    knob, value = ("gmacs", gmacs) if speed is None else ("speed", speed)
    if gmacs is not None and speed is not None:
        raise UserError(f"{name}: give one of gmacs and speed, not both")
    least = 0.0 if knob == "gmacs" else 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e6:
        raise UserError(f"{name}: {knob}={value!r} is not a number from {least:g} up to a million")

    def price(i: int) -> int:
        return macs(backbone, (priced or make)(i))

    dense = macs(backbone)
    budget = value * 1e9 if knob == "gmacs" else dense / value
    cheapest = price(steps)
    if cheapest > budget:
        limit = cheapest / 1e9 if knob == "gmacs" else dense / cheapest
        side = "least" if knob == "gmacs" else "most"
        raise UserError(f"{name}: {knob}={value:g} is out of reach, the {side} is {limit:.3g}; combine it with grid(…)")
    low, high = 0, 0 if dense <= budget else steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if price(middle) <= budget else (middle + 1, high)
    return make(low)
