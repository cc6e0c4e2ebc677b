"""The ideal of a setting: the same token counts at the same places by slicing, so that nothing is decided or moved.

It is a setting itself, so all that runs settings runs it: timm's blocks, the executors, engines. Its time ÷ the
setting's own is what is *kept* of what fewer tokens could give on this hardware; the rest is what deciding costs.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from saccade.core.plan import Gater, Method
from saccade.core.provenance import Cells
from saccade.core.record import Trace
from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.methods.cut import calls
from saccade.model import AdaptiveViT
from saccade.setting import Setting


def decides(model: AdaptiveViT) -> bool:
    """Whether a method works in the blocks under a model's setting."""
    return any(len(method.steps) > 0 for method in model.plan.methods)


def ideal_of(model: AdaptiveViT) -> Setting:
    """The setting that cuts a model's tokens to the counts of its own setting, at the model's input size.

    Tokenizer and depth stay as they are.

    Raises:
        UserError: there is none: counts that are not known beforehand, parts of blocks that run or not, tokens that
            come back, or a tokenizer that chooses.
    """
    _require_static(model)
    weight = next(model.parameters())
    image = torch.zeros(1, model.backbone.channels, *model.input_size(), dtype=weight.dtype, device=weight.device)
    with torch.inference_mode():
        trace: Trace = model.deploy(None).eval()(image).trace
    cells = trace.first.shape[1]
    if not torch.equal(trace.first, Cells(1, cells, trace.first.device).made()):
        raise UserError(f"{model.setting} has no ideal: its tokenizer chooses the tokens")
    prefix = model.backbone.num_prefix
    sites = [(i, site) for i in range(len(trace.blocks)) for site in ("block", "attn")]
    counts = [n - prefix for block in trace.blocks for n in block.static_counts]
    changes = list(zip(sites, pairwise([cells, *counts]), strict=True))
    if any(after > before for _, (before, after) in changes):
        raise UserError(f"{model.setting} has no ideal: it brings tokens back, which no slice does")
    known, methods = registry(), iter(model.plan.methods)
    stay = [c for c in model.setting.calls if known[c.name].kind == "tokenizer" or not len(next(methods).steps)]
    cuts = {
        name: calls(name, [(i, after) for (i, site), (before, after) in changes if site == name and after < before])
        for name in ("block", "attn")
    }
    return Setting((*stay, *cuts["block"], *cuts["attn"]))


def _require_static(model: AdaptiveViT) -> None:
    for method in model.plan.methods:
        for step in method.steps:
            if isinstance(step, Gater):
                raise UserError(f"{model.setting} has no ideal: it chooses what of a block runs, and cuts no tokens")
            if step.count(model.backbone.num_patches) is None:
                raise UserError(f"{model.setting} has no ideal: how many tokens it leaves is not known beforehand")
        if len(method.steps) and type(method).head is not Method.head:
            raise UserError(f"{model.setting} has no ideal: it gives the logits by a head of its own")
