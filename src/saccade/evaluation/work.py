"""What a setting does in the blocks, in tokens: what its time follows from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.plan import Backbone, Gater, Method, Plan, Reducer
from saccade.core.record import BlockCost, BlockTrace, Count
from saccade.core.registry import registry
from saccade.methods.common import budget
from saccade.model import AdaptiveViT

Named = tuple[str, Method]


@dataclass(frozen=True)
class Work:
    """One forward of a setting, an image's mean.

    Attributes:
        attention: by block, as many tokens as would cost attention what it costs, where all ask all.
        mlp: by block, tokens in the MLP.
        deciding: by method, the sites where it decides, the tokens that come to them in all, and the blocks from its
            first site on, which go by what it says of tokens (their sizes). Of a method that counts in several ways,
            sites that compare no tokens are apart: "…, by rank alone".
    """

    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    deciding: dict[str, tuple[float, float, float]]


def static_work(backbone: Backbone, methods: Iterable[Named]) -> Work:
    """By arithmetic, where no count depends on the image (``budget.static``)."""
    methods = list(methods)
    plan = Plan(method for _, method in methods)
    owner = {id(step): name for name, method in methods for step in method.steps}
    n, prefix, depth = backbone.num_patches, backbone.num_prefix, plan.depth(backbone.depth)
    attention, mlp, deciding = [], [], dict[str, tuple[float, float, float]]()

    def reduce(block: int, site: str, n: int) -> int:
        for step in plan.at.get(block, ()):
            if not isinstance(step, Reducer) or step.site != site or (left := step.count(n)) in (n, None):
                continue
            kind = _kind(owner[id(step)], step, n)
            sites, tokens, behind = deciding.get(kind, (0.0, 0.0, float(depth - block)))
            deciding[kind] = sites + 1, tokens + n, behind
            n = left
        return n

    for block in range(depth):
        n = reduce(block, "block", n)
        if backbone.pool == "token" and block == depth - 1:  # what the patches would become is not read
            attention.append(_equal(backbone.cost, _number(backbone.cost.attention(prefix, prefix + n))))
            mlp.append(float(prefix))
            break
        attention.append(float(prefix + n))
        n = reduce(block, "attn", n)
        mlp.append(float(prefix + n))
    return Work(tuple(attention), tuple(mlp), deciding)


def work_of(model: AdaptiveViT) -> Work:
    """Of any setting: by arithmetic, or by one forward of an image of noise."""
    known = registry()
    calls = [call for call in model.setting.calls if known[call.name].kind == "method"]
    methods = [(call.name, method) for call, method in zip(calls, model.plan.methods, strict=True)]
    if len(calls) == len(model.setting.calls) and budget.static(model.backbone, *model.plan.methods):
        return static_work(model.backbone, methods)
    weight, draw = next(model.parameters()), torch.Generator().manual_seed(0)
    noise = torch.randn(1, model.backbone.channels, *model.input_size(), generator=draw)
    with torch.inference_mode():
        blocks = model.deploy(None).eval()(noise.to(weight.device, weight.dtype)).trace.blocks
    deciding: dict[str, tuple[float, float, float]] = {}
    for name, method in methods:
        deciding |= _sites(name, method, blocks, model.backbone)
    attention = tuple(_equal(b.cost, _number(_attention(b))) for b in blocks)
    mlp = tuple(_number(b.mlp if b.mlp_on is None else b.mlp * b.mlp_on) for b in blocks)
    return Work(attention, mlp, deciding)


def attention_share(cost: BlockCost, tokens: float) -> float:
    """Part of a block's MACs that is attention's, where so many tokens ask each other."""
    attention = tokens * 4 * cost.dim * cost.attn_dim + tokens * cost.gate + tokens**2 * 2 * cost.attn_dim
    return attention / (attention + tokens * cost.mlp) if tokens else 0.0


def _kind(name: str, step: Reducer | Gater, n: int) -> str:
    """What decides at a site, as ``Work.deciding`` names it."""
    several = name in registry() and len(registry()[name].counts) > 1
    return f"{name}, by rank alone" if several and not step.macs(n) else name


def _sites(
    name: str, method: Method, blocks: tuple[BlockTrace, ...], backbone: Backbone
) -> dict[str, tuple[float, float, float]]:
    """Where a method has something to do, the patch tokens that came there, and the blocks from there on."""
    found: dict[str, tuple[float, float, float]] = {}
    for at, step in zip(method.at, method.steps, strict=True):
        last = backbone.pool == "token" and at == len(blocks) - 1  # has no patches between its parts
        if at >= len(blocks) or (isinstance(step, Reducer) and step.site == "attn" and last):
            continue
        n = blocks[at].static_counts[0] - backbone.num_prefix
        if not isinstance(step, Reducer) or step.count(n) != n:
            sites, tokens, behind = found.get(kind := _kind(name, step, n), (0.0, 0.0, float(len(blocks) - at)))
            found[kind] = sites + 1, tokens + n, behind
    return found


def _attention(block: BlockTrace) -> Count:
    found = block.cost.attention(block.queries, block.keys, block.heads, block.partial)
    return found if block.attn is None else found * block.attn


def _equal(cost: BlockCost, macs: float) -> float:
    """The number of tokens n whose attention among themselves costs so many MACs: a n² + b n = macs."""
    a, b = 2 * cost.attn_dim, 4 * cost.dim * cost.attn_dim + cost.gate
    return (math.sqrt(b * b + 4 * a * float(macs)) - b) / (2 * a)


def _number(count: Count) -> float:
    return count.double().mean().item() if isinstance(count, Tensor) else float(count)
