"""``cka``: which layers see alike under different settings (FlexiViT, arXiv 2212.08013, §3.6).

Linear CKA in minibatches with the unbiased estimator HSIC₁ (Nguyen, Raghu & Kornblith, arXiv 2010.15327, §3): an
image is an example, its feature map on a common grid is one vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, combinations
from math import isfinite
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.analysis import register
from saccade.analysis.layers import cell_map, levels
from saccade.analysis.study import Finding, Study
from saccade.core.tokens import DROPPED, Tokens
from saccade.errors import UserError
from saccade.reports.formatting import number
from saccade.reports.report_blocks import Heat, Part, Paths

LEAST = 4  # images in a batch: below, HSIC₁ is not defined
LONG = 10.0  # times the median length of a layer's tokens, from which on one token decides
CONSTANT = 1e-12  # a feature that varies by less of its square is the same for all images


def gram(x: Tensor) -> Tensor:
    """Features of n images [n, ...] -> products of every two, about their mean, [n, n] fp64."""
    x = x.flatten(1).double()
    centred = x - x.mean(0)  # HSIC₁ does not see the mean, and large means would cost digits
    if centred.square().sum() <= CONSTANT * x.square().sum():
        return x.new_zeros(len(x), len(x))
    return centred @ centred.T


def hsic(grams: Tensor) -> Tensor:
    """HSIC₁ of every two of P features, from their Gram matrices [P, n, n], n ≥ 4 -> [P, P].

    With diagonals set to zero: [tr(KL) + ΣK ΣL / ((n−1)(n−2)) − 2/(n−2) 1ᵀKL1] / (n(n−3)); unbiased.
    """
    n = grams.shape[-1]
    k = grams * (1 - torch.eye(n, dtype=grams.dtype, device=grams.device))
    rows = k.sum(2)  # [P, n]
    sums = rows.sum(1)  # [P]
    trace = k.flatten(1) @ k.flatten(1).T
    return (trace + sums.outer(sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def similarity(hsics: Tensor) -> Tensor:
    """Linear CKA [P, P] of mean HSICs [P, P]: HSIC(X, Y) / √(HSIC(X, X) · HSIC(Y, Y)); NaN for a constant feature."""
    own = hsics.diagonal()
    scale = torch.where(own > 0, own, torch.nan).sqrt()
    return hsics / scale.outer(scale)


def embedding(cka: Tensor) -> Tensor:
    """Places [P, 2] whose distances are nearest to arccos CKA, a metric: classical scaling (Torgerson 1952)."""
    distances = cka.nan_to_num(0.0).clamp(-1, 1).arccos()
    distances.fill_diagonal_(0)
    centre = torch.eye(len(cka), dtype=cka.dtype) - 1 / len(cka)
    values, vectors = torch.linalg.eigh(-0.5 * centre @ distances.square() @ centre)
    vectors = vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)  # either sign is right: always take the same
    return vectors[:, -2:].flip(1) * values[-2:].flip(0).clamp(min=0).sqrt()


@register("cka")
def cka(study: Study, *, tokens: str = "raw") -> Finding:
    """Which layers see alike under different settings: linear CKA of all pairs (arXiv 2010.15327, 2212.08013).

    Args:
        tokens: 'raw', as in the papers, or 'unit': every token brought to length 1, so that a few of huge length, which
            many ViTs have, do not decide alone.

    Raises:
        UserError: another word, or fewer than 4 images at once.
    """
    if tokens not in ("raw", "unit"):
        raise UserError(f"cka: tokens={tokens!r} is not 'raw' or 'unit'")
    if min(study.batch, len(study.places)) < LEAST:
        raise UserError(f"cka: batches of {min(study.batch, len(study.places))} images: it needs {LEAST} or more")
    patches, classes, counts, used, longest = _measure(study, tokens == "unit")
    if not patches.diagonal().isfinite().any():
        raise UserError("cka: every layer sees all images alike, so there is no CKA: give different images")
    names = list(study.settings)
    images = f"{used} images in batches of up to {study.batch}"
    data: dict[str, Any] = {"tokens": tokens, "levels": counts, "images": used, "longest": longest}
    data["patches"] = _plain(patches)
    hint = f"CKA of every two layers, from the input of block 0 on; {images}"
    groups = [*zip(names, counts, strict=True)]
    parts: list[Part] = [Heat("Patch tokens", hint, groups, data["patches"])]
    if classes is not None:
        data["class token"] = _plain(classes)
        hint = f"CKA of every two layers, from after block 0 on; {images}"
        parts.append(Heat("Class token", hint, [(name, count - 1) for name, count in groups], data["class token"]))
    lines = []
    if undefined := int(patches.diagonal().isnan().sum()):
        lines.append(
            f"{undefined} of {len(patches)} layers see all images alike: they have no CKA, and no map is drawn."
        )
    else:
        hint = "distances are nearest to arccos CKA; numbers count blocks"
        paths = dict(zip(names, (p.tolist() for p in embedding(patches).split(counts)), strict=True))
        parts.append(Paths("Patch tokens as a map", hint, paths))
    if len(names) > 1:
        depth = min(counts) - 1
        middle = range(depth // 4, depth - depth // 4 + 1)
        between = _between(patches, counts, middle)
        data["median patch tokens, middle layers"] = between
        lines.append(
            f"In the middle layers (after {middle[0]} to {middle[-1]} of {depth} blocks) the patch tokens of different "
            f"settings have a CKA of {number(between)} (median over pairs and layers)."
        )
        if classes is not None:
            last = _between(classes, [count - 1 for count in counts], [-1])
            data["median class token, last layer"] = last
            if last is not None and between is not None:
                alike = "more" if last > between else "no more"
                line = f"CKA {number(last)}, than patch tokens are in the middle, {number(between)}"
                lines.insert(0, f"At the end the class token is {alike} alike between settings, {line}.")
    if longest > LONG and tokens == "raw":
        lines.append(
            f"Some patch tokens are {longest:.0f} times as long as usual, and decide most of the CKA of their layers: "
            "`cka(tokens='unit')` leaves lengths out."
        )
    return Finding(lines or ["One setting alone: its layers are compared with each other."], data, parts)


def _measure(study: Study, unit: bool) -> tuple[Tensor, Tensor | None, list[int], int, float]:
    """CKA [P, P] of patch tokens at all layers of all settings, and of class tokens after each block; how many layers
    each setting has; the images used; and how many times the median length of its layer the longest token has."""
    views = study.views()
    advance = study.progress.start("cka", len(study.places))
    has_class = study.model.backbone.has_class_token
    sums: list[Tensor | float] = [0.0, 0.0]
    used, longest, counts = 0, 1.0, [0]
    for places, images in study.batches(views, advance):
        if len(places) < LEAST:
            continue
        with torch.inference_mode():
            found = [levels(view, images[name]) for name, view in views.items()]
            lengths = [t.patches.float().norm(dim=-1, keepdim=True) for tokens in found for t in tokens]
            longest = max(longest, *((n.max() / n.median()).item() for n in lengths if n.median() > 0))
            if unit:
                found = [[_unit(t) for t in tokens] for tokens in found]
            grids = [tokens[0].grid for tokens in found]
            common = min(h for h, _ in grids), min(w for _, w in grids)
            maps = [gram(cell_map(t, common).cpu()) for tokens in found for t in tokens]
            firsts = [gram(t.x[:, 0].cpu()) for tokens in found for t in tokens[1:]] if has_class else []
            for i, grams in enumerate((maps, firsts)):
                if grams:  # every batch counts by its images
                    sums[i] = sums[i] + len(places) * hsic(torch.stack(grams))
        used, counts = used + len(places), [len(tokens) for tokens in found]
    advance.finish()
    if not used:
        raise UserError(f"cka: fewer than {LEAST} images could be read at once; give a larger batch or more images")
    patches, classes = (similarity(s / used) if isinstance(s, Tensor) else None for s in sums)
    assert patches is not None
    return patches, classes, counts, used, longest


def _unit(tokens: Tokens) -> Tokens:
    """Every token at length 1, dropped ones too."""
    assert tokens.dropped_features is not None
    state = {**tokens.state, DROPPED: F.normalize(tokens.dropped_features, dim=-1)}
    return replace(tokens, x=F.normalize(tokens.x, dim=-1), state=state)


def _between(cka: Tensor, counts: Sequence[int], chosen: Sequence[int]) -> float | None:
    """Median over pairs of settings, of the same layer in both; ``counts`` are the layers of each, -1 is the last."""
    ends = [*accumulate(counts)]
    places = [[end - count + k % count for k in chosen] for end, count in zip(ends, counts, strict=True)]
    pairs = [pair for a, b in combinations(places, 2) for pair in zip(a, b, strict=True)]
    values = [v for i, k in pairs if isfinite(v := cka[i, k].item())]
    return median(values) if values else None


def _plain(cka: Tensor) -> list[list[float | None]]:
    return [[round(v, 4) if isfinite(v) else None for v in row] for row in cka.tolist()]
