"""Schedules: how many tokens leave in which block, by which methods, and from which tokenizer; and what that costs.

A schedule is a setting, written from lists: ``grid(16, size=208) | tome(r=(0, 18, 12, …))``. Which knobs of a method
take a list with a count for each block, its entry in the registry says (``Entry.counts``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from saccade.core.plan import Backbone, Method
from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.methods.common import budget
from saccade.methods.common.arguments import whole_parts
from saccade.model import AdaptiveViT
from saccade.setting import Call, Setting

STEPS = (1, 2, 4, 8, 16)  # tokens of a move
NEAR = (-3, -2, -1, 1, 2, 3)  # blocks that a move reaches most often
LEAST_SHARE = 0.05  # of the tokens that leave, by one rule: deciding costs something for each
OTHER_TOKENS, OTHER_METHOD, FAR = 0.1, 0.25, 0.4  # how often a move changes these


@dataclass(frozen=True)
class Rule:
    """One knob of a method that takes counts, and the method's other knobs."""

    method: str
    knob: str
    others: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Tokens that leave, by rule and block; all rules of a space in its order, each with a count for every block."""

    tokenizer: str  # a part of a setting; "": the model's own
    counts: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        """Tokens that leave in all."""
        return sum(map(sum, self.counts))


@dataclass(frozen=True)
class Tokenized:
    """What a tokenizer gives, as far as costs go."""

    backbone: Backbone  # one whose own grid has as many patches
    macs: float  #         of making the tokens, beyond what that backbone would spend


Cost = Callable[["Space", Schedule], float]


@dataclass(frozen=True)
class Space:
    """The schedules of a model that there are: tokenizers × rules × counts."""

    model: AdaptiveViT
    tokenizers: tuple[str, ...]
    rules: tuple[Rule, ...]
    known: Mapping[str, Tokenized]  # by tokenizer, what it gives

    @classmethod
    def of(cls, model: AdaptiveViT) -> Space:
        """All methods that take counts, and all tokenizers that leave the same number for every image."""
        found, backbone = registry(), model.backbone
        names = [name for name, entry in found.items() if entry.kind == "tokenizer"]
        tokenizers = [s for name in names for s in (found[name].finer or found[name].menu)(backbone)]
        rules = [rule for name in found for rule in rules_of(name, backbone)]
        given = {tokenizer: _tokenized(model, tokenizer) for tokenizer in ("", *tokenizers)}
        known = {tokenizer: tokenized for tokenizer, tokenized in given.items() if tokenized is not None}
        return cls(model, tuple(known), tuple(rules), known)

    def empty(self, tokenizer: str) -> Schedule:
        """A tokenizer, and no token that leaves."""
        return Schedule(tokenizer, ((0,) * self.depth,) * len(self.rules))

    @property
    def depth(self) -> int:
        """Blocks."""
        return self.model.backbone.depth

    def tokens(self, tokenizer: str) -> int:
        """Patch tokens that a tokenizer gives."""
        return self.known[tokenizer].backbone.num_patches

    def setting(self, schedule: Schedule) -> Setting:
        """As a setting, without what does nothing."""
        calls: dict[tuple, list[tuple[str, tuple[int, ...]]]] = {}
        for rule, counts in zip(self.rules, schedule.counts, strict=True):
            calls.setdefault((rule.method, rule.others), []).append((rule.knob, counts))
        made = [
            Call(method, (), (*((knob, _brief(counts)) for knob, counts in lists), *others))
            for (method, others), lists in calls.items()
            if any(sum(counts) for _, counts in lists)
        ]
        return Setting((*(Setting.parse(schedule.tokenizer).calls if schedule.tokenizer else ()), *made))

    def macs(self, schedule: Schedule) -> float:
        """Executed MACs of an image."""
        tokenized = self.known[schedule.tokenizer]
        return tokenized.macs + budget.macs(tokenized.backbone, *(method for _, method in self.methods(schedule)))

    def methods(self, schedule: Schedule) -> list[tuple[str, Method]]:
        """Its methods, and their names."""
        tokenized = self.known[schedule.tokenizer]
        known, calls = registry(), self.setting(replace(schedule, tokenizer="")).calls
        return [(call.name, known[call.name](tokenized.backbone, call.args, dict(call.kwargs))) for call in calls]

    def within(self, schedule: Schedule, cost: Cost, limit: float) -> Schedule | None:
        """The weakest multiple of a schedule that costs no more than a limit; None where none does."""
        most = 2 * self.depth * max(1, self.model.backbone.num_patches)
        if not schedule.total:
            return None

        def over(total: int) -> bool:
            return cost(self, self.scaled(schedule, total)) > limit

        low, high = 0, min(most, 4 * max(schedule.total, self.model.backbone.num_patches))
        if over(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if over(middle) else (low, middle)
        return self.scaled(schedule, low)

    def scaled(self, schedule: Schedule, total: int) -> Schedule:
        """The same shape with so many tokens in all: whole numbers, block by block."""
        whole = sum(map(sum, schedule.counts))
        by_block = [c * total / whole for block in zip(*schedule.counts, strict=True) for c in block]
        parts, rules = whole_parts(by_block, total), len(self.rules)
        return replace(schedule, counts=tuple(tuple(parts[rule::rules]) for rule in range(rules)))

    def tidied(self, schedule: Schedule) -> Schedule:
        """The same without rules by which hardly a token leaves: those leave by the one that takes the most."""
        sums = [sum(counts) for counts in schedule.counts]
        few, most = LEAST_SHARE * sum(sums), sums.index(max(sums))
        zero = (0,) * self.depth
        kept = [zero if r != most and sums[r] < few else counts for r, counts in enumerate(schedule.counts)]
        given = [c for r, c in enumerate(schedule.counts) if r != most and sums[r] < few]
        kept[most] = tuple(map(sum, zip(kept[most], *given, strict=True)))
        return replace(schedule, counts=tuple(kept))

    def shaped(self, tokenizer: str, rules: Mapping[Rule, float], profile: Sequence[float]) -> Schedule:
        """A thousand tokens by some rules in these shares, over the blocks as a profile says."""
        shares = [rules.get(rule, 0.0) for rule in self.rules]
        line = [1000 * share * p / (sum(shares) * sum(profile)) for share in shares for p in profile]
        flat = whole_parts(line, 1000)
        return Schedule(
            tokenizer, tuple(tuple(flat[i * self.depth : (i + 1) * self.depth]) for i in range(len(shares)))
        )

    def moved(self, schedule: Schedule, draw: random.Random) -> Schedule:
        """A little changed: some tokens leave at another block, or by another rule, or another tokenizer makes them."""
        counts = [list(rule) for rule in schedule.counts]
        for _ in range(draw.choice((1, 1, 2)) if schedule.total else 0):
            rule, block = draw.choice([(r, b) for r, row in enumerate(counts) for b, count in enumerate(row) if count])
            many = min(counts[rule][block], draw.choice(STEPS))
            to = rule, min(self.depth - 1, max(0, block + draw.choice(NEAR)))
            if draw.random() < FAR:
                to = rule, draw.randrange(self.depth)
            if draw.random() < OTHER_METHOD:
                to, many = (draw.randrange(len(counts)), block), draw.choice((many, counts[rule][block]))
            counts[rule][block] -= many
            counts[to[0]][to[1]] += many
        other = draw.choice(self.tokenizers) if draw.random() < OTHER_TOKENS else schedule.tokenizer
        return Schedule(other, tuple(map(tuple, counts)))


def _brief(counts: tuple[int, ...]) -> tuple[int, ...] | int:
    """A list without the zeros at its end, which methods add themselves; 0 for one of zeros."""
    last = max((block for block, count in enumerate(counts) if count), default=-1)
    return counts[: last + 1] if last >= 0 else 0


def rules_of(name: str, backbone: Backbone) -> list[Rule]:
    """The knobs of a method that take counts; beside others as its menu has them, where it does not go without."""
    if not (entry := registry()[name]).counts:
        return []
    call = Setting.parse((entry.menu(backbone) or [f"{name}()"])[0]).calls[0]
    given = dict(zip(entry.knobs, call.args, strict=False)) | dict(call.kwargs)
    menus = tuple((knob, value) for knob, value in given.items() if knob not in entry.counts)
    for others in ((), menus):
        with suppress(UserError):
            entry(backbone, (), {entry.counts[0]: (1,), **dict(others)})
            return [Rule(name, knob, others) for knob in entry.counts]
    return []


def _tokenized(model: AdaptiveViT, tokenizer: str) -> Tokenized | None:
    try:
        view = model.at(tokenizer or "dense").eval()
        weight = next(model.parameters())
        images = torch.zeros(1, model.backbone.channels, *view.input_size(), dtype=weight.dtype, device=weight.device)
        with torch.inference_mode():
            trace = view(images).trace
    except UserError:
        return None
    if view.tokenizer.varies or not trace.blocks:
        return None
    tokens = trace.blocks[0].static_counts[0] - model.backbone.num_prefix
    patch = model.backbone.patch_size
    backbone = replace(model.backbone, input_size=(patch[0] * tokens, patch[1]))
    return Tokenized(backbone, trace.macs().item() - budget.macs(backbone))


by_macs: Cost = Space.macs
