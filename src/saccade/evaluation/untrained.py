"""Which methods of a setting have parameters that are still where they started: figures that say nothing of them."""

from __future__ import annotations

import torch
from torch import nn

from saccade.backbones.learned import slots
from saccade.core.registry import registry
from saccade.model import AdaptiveViT
from saccade.setting import Setting


def untrained(model: AdaptiveViT, setting: str | Setting) -> tuple[str, ...]:
    """Names of the parts of a setting that learn and have not: every parameter is as it is built.

    Parts without parameters, and those whose start cannot be told from training (drawn anew each time), are none.
    """
    known, names = registry(), []
    for call in Setting.parse(setting).calls:
        entry = known[call.name]
        first, second = (entry(model.backbone, call.args, dict(call.kwargs)) for _ in range(2))
        start, again = (_parameters(part, call.name) for part in (first, second))
        if not start or not all(torch.equal(start[k], again[k]) for k in start):
            continue
        pairs = ((v, model.learned.get(k)) for k, v in start.items())
        if all(now is None or torch.equal(v.to(now.dtype), now.cpu()) for v, now in pairs):
            names.append(call.name)
    return tuple(dict.fromkeys(names))


def _parameters(part: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return {slot.name: own for slot in slots(part, name) if isinstance(own := slot.own, nn.Parameter)}
