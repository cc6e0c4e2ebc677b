"""Which methods of a setting have parameters that are still where they started: figures that say nothing of them."""

from __future__ import annotations

import torch

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
        start, again = dict(first.named_parameters()), dict(second.named_parameters())
        if not start or not all(torch.equal(start[k], again[k]) for k in start):
            continue
        pairs = ((v, model.learned.get(f"{call.name}.{k}")) for k, v in start.items())
        if all(now is None or torch.equal(v, now.to("cpu", v.dtype)) for v, now in pairs):
            names.append(call.name)
    return tuple(dict.fromkeys(names))
