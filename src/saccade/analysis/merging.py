"""``merging``: what a setting merges, and whether merging changes what is attended to.

The statistics of ImagePiece (arXiv 2412.16491): how many unattended tokens are attended to one block later
(its Table 5), how alike the tokens are that become one (Table 6), how many of them were attended to (Table 7). Read off
owner maps and attention alone: no method is asked what it did, so they are defined for every one, and for none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.analysis import register
from saccade.analysis.layers import Seen, Watched
from saccade.analysis.study import Finding, Study
from saccade.core.plan import Site
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.evaluation.defined import require_finite
from saccade.evaluation.stats import Interval
from saccade.execution.loop import encode
from saccade.methods.common.arguments import one_of
from saccade.model import AdaptiveViT
from saccade.reports.report_blocks import Cell, Table

TOPS = (0.15, 0.2, 0.3, 0.7)  # shares of the most attended tokens, as in the paper's Table 7
DRAWS = 2000


class Judged(Watched):
    """A plan that is watched, and for which every block reads attention and keys."""

    def __init__(self, model: AdaptiveViT) -> None:
        super().__init__(model.plan)
        self.score = "cls_attn" if model.backbone.has_class_token else "attn_received"

    def site(self, block: int, site: str, n: int) -> Site:
        found = super().site(block, site, n)
        return replace(found, read=found.read | {self.score, "key"}) if site == "attn" else found


@dataclass(frozen=True)
class Counts:
    """Sums of one block, by image [n] float64."""

    block: int
    tokens: Tensor  #               patch tokens that attend
    inattentive: Tensor  #          of the block before, in its bottom share, and not dropped since
    risen: Tensor  #                of these, in this block no longer in the bottom share
    pairs: Tensor  #                of tokens that become one after this block's attention
    similarity: Tensor  #           sum over these of their cosine
    merged: Tensor  #               tokens that become one with others
    top: dict[float, Tensor]  #     of these, among so large a share of the most attended


@torch.inference_mode()
def count(model: AdaptiveViT, images: Tensor, p: float = 0.3, metric: str = "key") -> list[Counts]:
    """Count in every block that runs: images [B, C, h, w], normalised.

    Args:
        p: a token is inattentive where it is among this share of the least attended ones.
        metric: of similarity, the mean 'key' over heads or the features 'x'.
    """
    plan = Judged(model)
    last, _ = encode(model.vit, model.tokenizer(model.vit, images), plan, whole=True, execution=model.execution)
    require_finite(last.x, model.setting, "tokens")
    found: list[Counts] = []
    before: Tokens | None = None
    low_before: Tensor | None = None
    for seen in (s for s in plan.seen if s.site == "attn"):
        tokens, alive = seen.before, present(seen.before)
        ranks = ranked(tokens.reading(plan.score), alive)
        amount = alive.sum(1, keepdim=True)
        low = alive & (ranks < part(p, amount))
        none = torch.zeros(len(alive), dtype=torch.float64)
        inattentive = risen = none
        if before is not None and low_before is not None:
            now = follow(before, tokens)
            left = low_before & (now >= 0)
            up = left & ~low.gather(1, now.clamp(min=0))
            inattentive, risen = left.sum(1).double(), up.sum(1).double()
        mates, pairs, similarity = groups(seen, metric)
        top = {k: (mates & (ranks >= part(1 - k, amount))).sum(1).double() for k in TOPS}
        merged = mates.sum(1).double()
        found.append(Counts(seen.block, amount[:, 0].double(), inattentive, risen, pairs, similarity, merged, top))
        before, low_before = tokens, low
    return found


def present(tokens: Tokens) -> Tensor:
    """Which patch tokens are no padding and not dropped, [B, N] bool."""
    there = torch.ones(tokens.x.shape[0], tokens.num_patches, dtype=torch.bool, device=tokens.x.device)
    for known in (tokens.valid, tokens.keep_mask):
        there = there if known is None else there & (known > 0)
    return there


def ranked(score: Tensor, alive: Tensor) -> Tensor:
    """Place of each token from the least attended (0) on, [B, N]; among equals the first, those that are not last."""
    return score.float().masked_fill(~alive, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)


def part(share: float, amount: Tensor) -> Tensor:
    """⌊share · amount⌋, as ``matching.floor_share`` rounds."""
    return (share * amount.double() * 1e9).round().div(1e9).floor()


def follow(before: Tokens, after: Tokens) -> Tensor:
    """Where each patch token went, [B, N] int64: an index of the later ones; -1: dropped, or it owned no cell."""
    slot = torch.full((len(before.owner), before.num_patches + 1), -1, device=before.owner.device)
    return slot.scatter_reduce(1, before.owner + 1, after.owner, "amax")[:, 1:]


def groups(seen: Seen, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens become one with others [B, N] bool; of their pairs in each image the number, and sum of cosines [B].

    Over all pairs of a group of m unit vectors the cosines add up to (|Σu|² - m) / 2.
    """
    if seen.after is seen.before:
        none = torch.zeros(len(seen.before.owner), dtype=torch.float64)
        return torch.zeros_like(present(seen.before)), none, none
    slot = follow(seen.before, seen.after) + 1  # 0: gone
    feature = seen.before.patches if metric == "x" else seen.before.reading("key")
    unit = F.normalize(feature.double(), dim=-1, eps=1e-6)
    slots = seen.after.num_patches + 1
    members = torch.zeros(len(slot), slots, dtype=torch.float64, device=slot.device)
    members = members.scatter_add(1, slot, torch.ones_like(slot, dtype=torch.float64))
    sums = torch.zeros(len(slot), slots, unit.shape[-1], dtype=torch.float64, device=slot.device)
    sums = sums.scatter_add(1, slot.unsqueeze(-1).expand_as(unit), unit)
    own = torch.zeros_like(members).scatter_add(1, slot, unit.square().sum(-1))  # |u|² is 1, but for zero features
    cosines = (sums.square().sum(-1) - own) / 2
    pairs = members * (members - 1) / 2
    mates = (slot > 0) & (members.gather(1, slot) > 1)
    return mates, pairs[:, 1:].sum(1), cosines[:, 1:].sum(1)


def ratio(parts: Tensor, wholes: Tensor, seed: int = 0, limits: tuple[float, float] = (0.0, 1.0)) -> Interval | None:
    """Σ parts / Σ wholes, [n] each, with its 95 % bootstrap interval over images; None where there is no whole.

    One image has no spread: its interval is that of all possible values, ``limits``.
    """
    if not float(wholes.sum()) > 0:
        return None
    n, mean = len(parts), float(parts.sum() / wholes.sum())
    if n == 1:  # of which every resample is itself
        return Interval(mean, *limits)
    drawn = torch.randint(n, (DRAWS, n), generator=torch.Generator().manual_seed(seed))
    spread = parts[drawn].sum(1) / wholes[drawn].sum(1)
    low, high = spread[spread.isfinite()].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)


@register("merging")
def merging(study: Study, *, p: float = 0.3, metric: str = "key") -> Finding:
    """What settings merge, and whether unattended tokens are attended to again (arXiv 2412.16491, Tables 5 to 7).

    Args:
        p: a token is inattentive where it is among this share of the least attended ones.
        metric: of similarity, the mean 'key' over heads, which ToMe merges by, or the features 'x'.
    """
    one_of("merging", "metric", metric, ("key", "x"))
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 < p < 1:
        raise UserError(f"merging: p={p!r} is not between 0 and 1")
    views = study.views()
    advance = study.progress.start("merging", len(study.places))
    found: dict[str, list[list[Counts]]] = {name: [] for name in views}
    for _, images in study.batches(views, advance):
        for name, view in views.items():
            found[name].append(count(view, images[name], p, metric))
    advance.finish()
    rows = {name: [describe(together(parts)) for parts in zip(*counts, strict=True)] for name, counts in found.items()}
    lines = [line for name, blocks in rows.items() for line in in_words(name, blocks)]
    return Finding(lines, {"p": p, "metric": metric, "layers": rows}, [table(name, p, b) for name, b in rows.items()])


def together(parts: tuple[Counts, ...]) -> Counts:
    """One block's counts of several batches, as one."""
    names = ("tokens", "inattentive", "risen", "pairs", "similarity", "merged")
    joined: dict[str, Any] = {name: torch.cat([getattr(p, name).cpu() for p in parts]) for name in names}
    return replace(parts[0], **joined, top={k: torch.cat([p.top[k].cpu() for p in parts]) for k in TOPS})


def describe(counts: Counts) -> dict[str, Any]:
    """The figures of one block, as plain values: (mean, low, high), or None where there is nothing."""

    def three(parts: Tensor, wholes: Tensor, low: float = 0.0) -> tuple[float, float, float] | None:
        found = ratio(parts, wholes, limits=(low, 1.0))
        return None if found is None else found.three()

    return {
        "block": counts.block,
        "tokens": counts.tokens.mean().item(),
        "risen": three(counts.risen, counts.inattentive),
        "merged": counts.merged.mean().item(),
        "similarity": three(counts.similarity, counts.pairs, -1.0),
        "attentive": {f"{k:g}": three(counts.top[k], counts.merged) for k in TOPS},
    }


def in_words(name: str, blocks: list[dict[str, Any]]) -> list[str]:
    """What a setting's figures say."""
    risen = [b["risen"][0] for b in blocks if b["risen"]]
    lines = []
    if risen:
        lines.append(
            f"`{name}`: of the tokens that are least attended to in one block, {min(risen):.0%} to {max(risen):.0%} "
            "are not in the next."
        )
    alike = [b for b in blocks if b["similarity"]]
    if not alike:
        return [*lines, f"`{name}` merges nothing."]
    first, last = alike[0], alike[-1]
    attended = first["attentive"]["0.3"][0]
    return [
        *lines,
        f"`{name}`: cosine of what merges {first['similarity'][0]:.3f} in block {first['block']}, "
        f"{last['similarity'][0]:.3f} in block {last['block']}; {attended:.1%} of what block {first['block']} merges "
        "is among the 30 % most attended.",
    ]


def table(name: str, p: float, blocks: list[dict[str, Any]]) -> Table:
    """A setting's figures, a row for each block."""
    columns = {
        "tokens": "patch tokens that attend, mean over images",
        "attended to again": f"of the {p:.0%} least attended in the block before that are left: attended to here",
        "merged": "tokens that become one with others after this block's attention, mean over images",
        "cosine": "of the pairs that become one",
        **{f"top {k:.0%}": f"of what merges, the share among the {k:.0%} most attended" for k in TOPS},
    }

    def cell(value: tuple[float, float, float] | None, form: str) -> Cell:
        if value is None:
            return None, ""
        mean, low, high = value
        return mean, f"{mean:{form}} [{low:{form}}, {high:{form}}]"

    rows: dict[str, list[Cell]] = {
        f"block {b['block']}": [
            (b["tokens"], f"{b['tokens']:.1f}"),
            cell(b["risen"], ".1%"),
            (b["merged"], f"{b['merged']:.1f}"),
            cell(b["similarity"], ".3f"),
            *(cell(b["attentive"][f"{k:g}"], ".1%") for k in TOPS),
        ]
        for b in blocks
    }
    return Table(name, "With 95 % intervals over images; blocks count from 0.", columns, rows)
