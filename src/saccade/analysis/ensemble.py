"""``ensemble``: whether averaging one model's answers at several settings beats one run of the same compute.

FlexiViT (arXiv 2212.08013, §6.4) asks it of patch sizes; here of any settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from saccade.analysis import register
from saccade.analysis.study import Answers, Finding, Study, no_classes
from saccade.data import ImageSet, head_labels
from saccade.errors import UserError
from saccade.evaluation.stats import Interval, paired_difference, proportion
from saccade.evaluation.successive_halving import shuffled_halves
from saccade.evaluation.sweep import expanded
from saccade.model import AdaptiveViT
from saccade.reports.report_blocks import Cell, Part, Table

LEAST = 20  # images: half of them choose the rival, the others compare
MOST = 200  # combinations


@dataclass(frozen=True)
class Comparison:
    """One ensemble against single runs of the same model, on the images that chose nothing."""

    members: tuple[str, ...]
    gmacs: float  #                   of all its runs
    top1: Interval
    rival: str | None  #              the best single run (on the other images) that costs no more
    delta: Interval | None  #         ensemble minus rival, paired
    dearer: str | None  #             the cheapest single run that costs no less
    dearer_delta: Interval | None
    word: str  #                      "wins", "loses" or "not decided"


def compare(
    members: tuple[str, ...],
    hits: dict[str, Tensor],
    together: Tensor,
    gmacs: dict[str, float],
    choose: Tensor,
    report: Tensor,
) -> Comparison:
    """Compare an ensemble's hits ``together`` [n] with those of single runs [n] each, by name.

    It loses where a single run that costs no more is better, and wins where it is better than that one and than a run
    that costs no less; both beyond chance (95 %, paired). ``choose`` and ``report`` are places of different images.
    """
    cost = sum(gmacs[name] for name in members)
    below = [name for name in hits if gmacs[name] <= cost]
    above = [name for name in hits if gmacs[name] >= cost]
    rival = max(below, key=lambda name: hits[name][choose].double().mean().item(), default=None)
    dearer = min(above, key=lambda name: gmacs[name], default=None)

    def against(name: str | None) -> Interval | None:
        return None if name is None else paired_difference(together[report], hits[name][report])

    delta, dearer_delta = against(rival), against(dearer)
    word = "not decided"
    if delta is not None and delta.high < 0:
        word = "loses"
    elif dearer_delta is not None and dearer_delta.low > 0 and (delta is None or delta.low > 0):
        word = "wins"
    return Comparison(members, cost, proportion(together[report]), rival, delta, dearer, dearer_delta, word)


def no_labels(model: AdaptiveViT, images: ImageSet) -> str | None:
    """Why accuracy cannot be measured; None: it can."""
    if reason := no_classes(model, images):
        return reason
    try:
        head_labels(images, model.vit)
    except UserError as error:
        return str(error)
    return None if len(images) >= LEAST else f"{len(images)} images: it needs {LEAST} or more"


@register("ensemble", misfit=no_labels)
def ensemble(study: Study, *, sizes: tuple[int, ...] = (2, 3), rivals: tuple[str, ...] = (), seed: int = 0) -> Finding:
    """Whether averaging answers at several settings beats one run of the same compute (arXiv 2212.08013, §6.4).

    Args:
        sizes: how many settings to average.
        rivals: further single runs to compare with, ranges too: at the compute of an ensemble there must be one.
        seed: of the halves, one to choose a rival on and one to compare on.
    """
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    if not all(type(size) is int and size > 1 for size in sizes):
        raise UserError(f"ensemble: sizes={sizes!r} are not whole numbers of settings, 2 or more")
    groups = [group for size in sizes for group in combinations(study.settings, size)]
    if not 0 < len(groups) <= MOST:
        raise UserError(
            f"ensemble: {len(groups)} combinations of {len(study.settings)} settings: 1 to {MOST} are possible"
        )
    rivals = (rivals,) if isinstance(rivals, str) else rivals
    others = [name for text in rivals for name in expanded(study.model, text)]
    said = study.answers(list(dict.fromkeys(["dense", *study.settings, *others])), "ensemble")
    if len(said.places) < LEAST:
        raise UserError(f"ensemble: {len(said.places)} images could be read: it needs {LEAST} or more")
    truth = torch.tensor(head_labels(study.images, study.model.vit).indices)[said.places]
    choose, report = (torch.tensor(half) for half in shuffled_halves(len(truth), seed, truth))
    hits = {name: p.argmax(1) == truth for name, p in said.probabilities.items()}
    found = [compare(g, hits, _mean(said, g).argmax(1) == truth, said.gmacs, choose, report) for g in groups]

    counts = {word: sum(v.word == word for v in found) for word in ("loses", "wins", "not decided")}
    line = (
        f"Averaging answers of {' or '.join(map(str, sizes))} settings loses to one run of no more compute for "
        f"{counts['loses']} of {len(found)} combinations, wins for {counts['wins']}, and is not decided for "
        f"{counts['not decided']}."
    )
    notes = [] if any(v.dearer for v in found) else [
        "No single run costs as much as an ensemble, so none can win: name dearer ones, like "
        "`ensemble(rivals='grid(8..16)')`."
    ]  # fmt: skip
    columns = {
        "GMACs": "of all runs of the ensemble, per image",
        "top-1 %": "with its 95 % interval",
        "Δ cheaper run": "ensemble minus the best single run that costs no more, in points, paired",
        "Δ dearer run": "ensemble minus the cheapest single run that costs no less, in points, paired",
        "verdict": "beyond chance, at 95 %",
    }
    hint = f"Rivals were chosen on {len(choose)} images, all numbers are of the other {len(report)}."
    rows = {" + ".join(v.members): _cells(v, said.gmacs) for v in found}
    single = {
        name: [(said.gmacs[name], f"{said.gmacs[name]:.3g}"), _share(proportion(own[report]))]
        for name, own in hits.items()
    }
    parts: list[Part] = [
        Table("Ensembles", hint, columns, rows),
        Table("Single runs", "", {k: columns[k] for k in ("GMACs", "top-1 %")}, single),
    ]
    data: dict[str, Any] = {
        "images": len(report),
        "counts": counts,
        "ensembles": [_plain(v) for v in found],
        "single": {n: {"gmacs": said.gmacs[n], "top1": vars(proportion(own[report]))} for n, own in hits.items()},
    }
    return Finding([line, *notes], data, parts)


def _mean(said: Answers, members: tuple[str, ...]) -> Tensor:
    return torch.stack([said.probabilities[name] for name in members]).mean(0)


def _share(top1: Interval) -> Cell:
    return top1.mean, f"{100 * top1.mean:.1f} [{100 * top1.low:.1f}, {100 * top1.high:.1f}]"


def _cells(v: Comparison, gmacs: dict[str, float]) -> list[Cell]:
    def delta(d: Interval | None, name: str | None) -> Cell:
        if d is None or name is None:
            return None, ""
        limits = f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
        return d.mean, f"{limits} {name}, {gmacs[name]:.3g}"

    order = {"loses": -1.0, "not decided": 0.0, "wins": 1.0}
    own = v.gmacs, f"{v.gmacs:.3g}"
    return [own, _share(v.top1), delta(v.delta, v.rival), delta(v.dearer_delta, v.dearer), (order[v.word], v.word)]


def _plain(v: Comparison) -> dict[str, Any]:
    return {k: vars(f) if isinstance(f, Interval) else f for k, f in vars(v).items()}
