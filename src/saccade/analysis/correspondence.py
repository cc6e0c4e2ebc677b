"""``correspondence``: whether a token at one setting is most alike the token of the same place at another.

Cosine similarity of one token with all tokens of the same image at another setting (FlexiViT, arXiv 2212.08013, §6.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.analysis import register
from saccade.analysis.layers import levels
from saccade.analysis.study import Finding, Study, readable
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.evaluation.stats import proportion
from saccade.model import AdaptiveViT
from saccade.reports.overlay import draw_overlay
from saccade.reports.report_blocks import Cell, Pictures, Table

NEAR = 1.5  # cells between the middles of neighbours at most, diagonally too, and half a cell's width


def alike(anchor: Tensor, tokens: Tokens) -> Tensor:
    """Cosine of one vector per image [B, D] with every patch token, spread over the cells [B, G]; dropped: NaN."""
    cosine = F.cosine_similarity(anchor.float().unsqueeze(1), tokens.patches.float(), dim=-1)
    if tokens.valid is not None:
        cosine = cosine.masked_fill(~tokens.valid, -1.0)
    return tokens.scatter_to_grid(cosine.unsqueeze(-1), torch.nan).squeeze(-1)


def near(grid: tuple[int, int], place: tuple[float, float]) -> Tensor:
    """Cells [G] that hold a place (y, x), in shares of height and width, or touch one that does."""
    axes = [(torch.arange(n) + 0.5 - p * n).abs() <= NEAR + 1e-6 for n, p in zip(grid, place, strict=True)]
    return (axes[0].unsqueeze(1) & axes[1]).flatten()


def hits(alike: Tensor, owner: Tensor, close: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the token most alike owns a cell nearby [B] bool, and how often a token drawn at random would [B].

    Where all are alike none is most so: that is no hit.

    ``alike`` [B, G] with NaN where a cell was dropped, ``owner`` [B, G], ``close`` [G] bool.
    """
    best = alike.nan_to_num(-torch.inf).argmax(1, keepdim=True)
    least, most = alike.nan_to_num(torch.inf).amin(1), alike.nan_to_num(-torch.inf).amax(1)
    mine = owner == owner.gather(1, best)  # [B, G] all cells of the best token
    share, alone = [], []
    for row in owner:
        kept = row[row >= 0].unique()
        share.append(len(row[close & (row >= 0)].unique()) / max(1, len(kept)))
        alone.append(len(kept) == 1)
    answered = (least < most) | torch.tensor(alone)
    return (mine & close).any(1) & answered, torch.tensor(share)


@register("correspondence")
def correspondence(
    study: Study, *, token: tuple[float, float] = (0.5, 0.5), layer: int | None = None, photos: int = 4
) -> Finding:
    """Whether a token is most alike the token of the same place at another setting (arXiv 2212.08013, §6.2).

    Args:
        token: the place (y, x) of the token at the first setting, in shares of height and width; the middle by default.
        layer: blocks to run before looking; None: all.
        photos: images to draw.

    Raises:
        UserError: a place outside the image, a layer that is not there.
    """
    depth = study.model.backbone.depth
    layer = depth if layer is None else layer
    if type(layer) is not int or not 0 <= layer <= depth:
        raise UserError(f"correspondence: layer={layer!r} is not one of 0 … {depth}")
    if (
        not isinstance(token, tuple)
        or len(token) != 2
        or not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in token)
    ):
        raise UserError(f"correspondence: token={token!r} is not a place (y, x) with both in [0, 1]")
    first, names = study.settings[0], list(study.settings)
    views = study.views()
    hit: dict[str, list[Tensor]] = {name: [] for name in names}
    luck: dict[str, list[Tensor]] = {name: [] for name in names}
    advance = study.progress.start("correspondence", len(study.places))
    for _, images in study.batches(views, advance):
        maps, place = _maps(views, images, first, token, layer)
        for name, (similar, tokens) in maps.items():
            found, chance = hits(similar, tokens.owner.cpu(), near(tokens.grid, place))
            hit[name].append(found)
            luck[name].append(chance)
    advance.finish()

    rows: dict[str, list[Cell]] = {}
    data: dict[str, Any] = {}
    for name in names[1:] or names:
        share, by_luck = proportion(torch.cat(hit[name])), torch.cat(luck[name]).mean().item()
        there = (torch.cat(luck[name]) > 0).double().mean().item()
        data[name] = {"share": vars(share), "chance": by_luck, "kept": there, "images": len(torch.cat(hit[name]))}
        limits = f"{share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]"
        rows[name] = [(share.mean, limits), (by_luck, f"{by_luck:.1%}"), (there, f"{there:.1%}")]
    worst = min(data, key=lambda name: data[name]["share"]["mean"])
    least = data[worst]["share"]
    where = "centre token" if tuple(token) == (0.5, 0.5) else f"token at {token[0]:g}, {token[1]:g}"
    line = (
        f"The {where} of `{first}` is most alike the token of the same place (or a neighbour) in {least['mean']:.0%} "
        f"[{least['low']:.0%}, {least['high']:.0%}] of the images at worst, at `{worst}`; "
        f"a token at random would be in {data[worst]['chance']:.0%}."
    )
    table = Table(
        "Peaks at the same place",
        f"Images whose most similar token, after {layer} of {depth} blocks, lies within one token of the place.",
        {
            "share of images": "with its 95 % interval",
            "chance": "tokens within one token of the place, of all",
            "place kept": "images in which a token within one token of the place was not dropped",
        },
        rows,
    )
    pictures = Pictures(
        f"Cosine similarity with the {where} of {first}",
        "Bright is alike; the ring marks the place, the cross the peak. Each map has its own scale.",
        [(study.images.names[place], _panels(study, views, place, token, layer)) for place in readable(study, photos)],
    )
    data = {"token": list(token), "layer": layer, "reference": first, "settings": data}
    return Finding([line], data, [table, pictures])


Maps = dict[str, tuple[Tensor, Tokens]]


def _maps(
    views: dict[str, AdaptiveViT], images: dict[str, Tensor], first: str, token: tuple[float, float], layer: int
) -> tuple[Maps, tuple[float, float]]:
    """Similarity [B, G] and tokens at every setting, and the middle of the anchor's cell."""
    with torch.inference_mode():
        every = {name: levels(view, images[name]) for name, view in views.items()}
        found = {name: tokens[min(layer, len(tokens) - 1)] for name, tokens in every.items()}
    own = found[first]
    row, column = (min(int(v * n), n - 1) for v, n in zip(token, own.grid, strict=True))
    assert own.dropped_features is not None
    cell = own.cell_features()[:, row * own.grid[1] + column]  # [B, D], its last where it was dropped
    maps = {name: (alike(cell, tokens).cpu(), tokens) for name, tokens in found.items()}
    return maps, ((row + 0.5) / own.grid[0], (column + 0.5) / own.grid[1])


def _panels(study: Study, views: dict[str, AdaptiveViT], place: int, token: tuple[float, float], layer: int) -> list:
    first = study.settings[0]
    (_, images), = study.batches(views, study.progress.start("drawing", 1), [place])  # fmt: skip
    maps, anchor = _maps(views, images, first, token, layer)
    panels = [("photo", study.photo(place, views[first]))]
    for name, (similar, tokens) in maps.items():
        best = int(similar[0].nan_to_num(-torch.inf).argmax())
        gh, gw = tokens.grid
        marks = [(*anchor, "ring"), ((best // gw + 0.5) / gh, (best % gw + 0.5) / gw, "cross")]
        panels.append((name, draw_overlay(study.photo(place, views[name]), similar[0], tokens.grid, marks)))
    return panels
