"""``relevance``: which places of an image a setting's answer rests on.

Gradient times attention, rolled out over the blocks (Chefer, Gur & Wolf, arXiv 2103.15679, eqs. 5 and 6):
``Ā = mean over heads of (∂y/∂A ⊙ A)⁺``, ``R ← R + Ā R`` from ``R = 1``; y is the logit of a class, and what is read is
the row of the tokens that the head pools. Needs all attention of all blocks, N × N, so it is computed here and nowhere
else: in one forward pass whose attention is caught on its way, without touching the model.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from saccade.analysis import register
from saccade.analysis.layers import Seen, watch
from saccade.analysis.study import Finding, Study, no_classes, readable
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.evaluation.defined import require_choice, require_finite
from saccade.evaluation.stats import Interval, bootstrap
from saccade.model import AdaptiveViT
from saccade.reports.overlay import draw_overlay
from saccade.reports.report_blocks import Pictures, Table


class Caught(TorchFunctionMode):
    """Keeps every attention matrix [B, H, Q, K] that is made inside; a fused kernel is spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in (Tensor.softmax, torch.softmax, F.softmax) and out.ndim == 4:
            self.shares.append(out)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        self.shares.append((scores if attn_mask is None else scores + attn_mask).softmax(-1))
        return self.shares[-1] @ v


def rollout(model: AdaptiveViT, images: Tensor, target: int) -> tuple[Tensor, Tokens]:
    """How much each token of the tokenizer matters for a class: images [1, C, h, w] -> [P+N] fp32, and those tokens.

    Where tokens are merged or dropped, the new token's row is the mean of its cells' rows.

    Raises UserError where the logit, or what it depends on, is not finite, and where it depends on no attention.
    """
    with torch.enable_grad(), Caught() as caught:
        seen, last = watch(model, images.detach().clone().requires_grad_(), sparse=False)
        shares = list(caught.shares)  # the head may attend too, but not to the image's tokens among themselves
        logits = require_choice(require_finite(model.forward_head(last), model.setting), model.setting)
        logit = logits[0, target]
    gradients = torch.autograd.grad(logit, shares, allow_unused=True, materialize_grads=True)
    if not all(bool(g.isfinite().all()) for g in gradients):
        raise UserError(f"relevance: a gradient of `{model.setting}` holds NaN or infinity: look at it in fp32")
    if not any(bool(g.any()) for g in gradients):
        raise UserError(f"relevance: the answer of `{model.setting}` depends on no attention: it rests on no place")
    with torch.no_grad():
        start = next(s.before for s in seen if s.site == "block")
        relevance = torch.eye(start.x.shape[1], device=images.device)
        attended = iter([(g * a).clamp(min=0).float().mean(1)[0] for g, a in zip(gradients, shares, strict=True)])
        for event in seen:
            if event.site == "attn":  # between attention and MLP: this block has attended
                relevance = relevance + next(attended) @ relevance
            relevance = carry(event) @ relevance if event.after is not event.before else relevance
        pooled = relevance[:1] if model.vit.global_pool == "token" else relevance[last.num_prefix :]
    return pooled.mean(0), start


def carry(event: Seen) -> Tensor:
    """What each token after a reduction is made of, by cells: rows sum to 1, [P+M, P+N] of the first image."""
    before, after = event.before, event.after
    prefix, old, new = before.num_prefix, before.owner[0], after.owner[0]
    both = (old >= 0) & (new >= 0)
    counts = before.x.new_zeros(after.num_patches, before.num_patches, dtype=torch.float32)
    counts.index_put_((new[both], old[both]), torch.ones_like(old[both], dtype=torch.float32), accumulate=True)
    made = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return torch.block_diag(torch.eye(prefix, device=made.device), made)


def over_cells(relevance: Tensor, tokens: Tokens) -> Tensor:
    """Each cell's share of all patch tokens' relevance [P+N] -> [G], sum 1: a token's is spread over its cells."""
    own = relevance[tokens.num_prefix :] / tokens.area()[0].clamp(min=1)
    cells = tokens.scatter_to_grid(own[None, :, None])[0, :, 0]
    return cells / cells.sum().clamp(min=1e-30)


def half(cells: Tensor) -> float:
    """The smallest share of the cells [G] (sum 1) that holds half of the relevance."""
    reached = cells.sort(descending=True).values.cumsum(0)
    return (int((reached < 0.5).sum()) + 1) / len(cells)


def share(values: list[float]) -> Interval:
    """The mean of shares of an image with its 95 % interval; of one image it is 0 … 1, since it has no spread."""
    return bootstrap(torch.tensor(values), least=0.0, most=1.0)


@register("relevance", misfit=no_classes)
def relevance(study: Study, *, images: int = 24, photos: int = 4) -> Finding:
    """Which places of an image the answer rests on: gradient × attention, rolled out (arXiv 2103.15679).

    Args:
        images: how many to measure; all settings explain the class that the dense model says.
        photos: how many of them to draw.
    """
    for knob, value, least in (("images", images, 1), ("photos", photos, 0)):
        if type(value) is not int or value < least:
            raise UserError(f"relevance: {knob}={value!r} is not a whole number, {least} or more")
    views = study.views()
    places = readable(study, images)
    advance = study.progress.start("relevance", len(places) * len(views))
    areas: dict[str, list[float]] = {name: [] for name in views}
    rows: list[tuple[str, list[tuple[str, Image.Image]]]] = []
    for place in places:
        (_, seen), = study.batches({"dense": study.model, **views}, lambda done: None, [place])  # fmt: skip
        with torch.inference_mode():
            target = int(study.model(seen["dense"]).logits[0].argmax())
        panels = [("photo", study.photo(place, study.model))]
        for name, view in views.items():
            found, tokens = rollout(view, seen[name], target)
            cells = over_cells(found, tokens).cpu()
            areas[name] += [half(cells)] if cells.any() else []
            if len(rows) < photos:
                panels.append((name, draw_overlay(study.photo(place, view), cells, tokens.grid)))
            advance()
        if len(rows) < photos:
            rows.append((study.images.names[place], panels))
    advance.finish()
    for name, values in areas.items():
        if not values:
            raise UserError(f"relevance: no place of any image speaks for the answer of `{name}`")
    means = {name: share(values) for name, values in areas.items()}
    narrow, wide = (pick(means, key=lambda name: means[name].mean) for pick in (min, max))
    line = (
        f"Half of the relevance lies on {means[narrow].mean:.1%} of the image at `{narrow}`"
        + (f", on {means[wide].mean:.1%} at `{wide}`" if wide != narrow else "")
        + f" (means of {len(places)} images)."
    )
    without = {name: missing for name, values in areas.items() if (missing := len(places) - len(values))}
    lines = [line, *(f"In {n} of them no place speaks for the answer of `{name}`." for name, n in without.items())]
    written = {n: [(m.mean, f"{m.mean:.1%} [{m.low:.1%}, {m.high:.1%}]")] for n, m in means.items()}
    table = Table(
        "How much of the image holds half of the relevance",
        "Mean over images, with its 95 % interval: the less, the more concentrated; never below the area of a token.",
        {"share of the image": "the smallest share of the cells that holds half of the relevance"},
        written,
    )
    pictures = Pictures("Where it looks", "Bright matters; each map has its own scale.", rows)
    return Finding(lines, {"images": len(places), "half": {n: vars(m) for n, m in means.items()}}, [table, pictures])
