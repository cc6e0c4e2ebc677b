"""A device's latency curve: what a block takes by its number of tokens, and what deciding takes by method.

Measured once, by a handful of settings in one interleaved run. Then a setting is priced in milliseconds from the tokens
in its blocks (``evaluation/work.py``), without being timed: a block's time lies on the line between measured numbers of
tokens, attention's part of it by MACs; a method's deciding takes a time for each site, one for each token that comes to
it, and one for each block behind, whose attention goes by sizes. A kernel may take longer for 79 tokens than for 101,
so what tokenizers give are measured numbers too: there the first blocks are, and often most.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from saccade.core.record import BlockCost
from saccade.core.registry import registry
from saccade.evaluation.interleaved import interleaved
from saccade.evaluation.schedule import Schedule, Space
from saccade.evaluation.work import Work, attention_share, static_work, work_of
from saccade.methods.cut import calls
from saccade.model import AdaptiveViT
from saccade.runners.exported import has_fixed_counts
from saccade.runners.runner import EAGER, FP32, Runner
from saccade.setting import Setting
from saccade.terminal.progress import Progress

SIDES = [k / 14 for k in (13, 12, 11, 10, 9, 8, 5)]  # of the model's grid: blocks are timed at as many tokens


@dataclass(frozen=True)
class LatencyCurve:
    """Milliseconds of a batch, of one model in one runner.

    Attributes:
        tokens: numbers of tokens, prefix included, in order; block: what a block of so many takes.
        tokenizers: by family of tokenizers, embedding, head and all else that no block does, by tokens, fewest first;
            what lies between is on the line. "": grids, and the model's own.
        methods: by method, what deciding takes for a site, for each token that comes to it, and for each block from
            its first site on.
    """

    runner: str
    batch: int
    cost: BlockCost
    tokens: tuple[float, ...]
    block: tuple[float, ...]
    tokenizers: dict[str, tuple[tuple[float, float], ...]]
    methods: dict[str, tuple[float, float, float]]

    def predict(self, model: AdaptiveViT) -> float | None:
        """Of a batch under a model's setting; None where the curve does not know a part of it, and where a runner masks
        what PyTorch skips."""
        if masked(model, Runner.of(self.runner)):
            return None
        tokenizer, _ = split(model.setting)
        return self.of(tokenizer, work_of(model))

    def of(self, tokenizer: str, work: Work) -> float | None:
        """Of a batch of tokens by a tokenizer, and this work; None where a part is not known."""
        outside = self.outside(tokenizer, work)
        if outside is None or not self.methods.keys() >= work.deciding.keys():
            return None
        return outside + self.in_blocks(work) + self.deciding(work)

    def outside(self, tokenizer: str, work: Work) -> float | None:
        """Of all that is in no block; None where the tokenizer is not known."""
        if (alike := self.tokenizers.get(family(tokenizer))) is None:
            return None
        return float(np.interp(work.attention[0], [n for n, _ in alike], [ms for _, ms in alike]))

    def scaled(self, factor: float) -> LatencyCurve:
        """The same where everything takes so many times as long: a machine is not as fast in every hour."""
        return replace(
            self,
            block=tuple(factor * ms for ms in self.block),
            tokenizers={name: tuple((n, factor * ms) for n, ms in pairs) for name, pairs in self.tokenizers.items()},
            methods={name: (factor * a, factor * b, factor * c) for name, (a, b, c) in self.methods.items()},
        )

    def in_blocks(self, work: Work) -> float:
        """Of the blocks alone."""
        return sum(
            weight * time for weight, time in zip(weights(self.cost, self.tokens, work), self.block, strict=True)
        )

    def deciding(self, work: Work) -> float:
        """Of deciding alone. Blocks that are behind two methods go by sizes once."""
        known = [(self.methods[name], asked) for name, asked in work.deciding.items()]
        at_sites = sum(site * sites + token * tokens for (site, token, _), (sites, tokens, _) in known)
        return at_sites + max((each * behind for (*_, each), (*_, behind) in known), default=0.0)

    def decision_ms(self) -> dict[str, float]:
        """By method, what one decision among all of the model's own tokens takes."""
        return {name: site + token * self.tokens[-1] for name, (site, token, _) in self.methods.items()}

    def schedule_ms(self, space: Space, schedule: Schedule) -> float:
        """Of a schedule: a ``schedule.Cost``; infinite where a part is not known."""
        backbone = space.known[schedule.tokenizer].backbone
        found = self.of(schedule.tokenizer, static_work(backbone, space.methods(schedule)))
        return float("inf") if found is None else found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> LatencyCurve:
        """The inverse. Raises TypeError, ValueError, KeyError for what is no curve."""
        tokens, block = (tuple(map(float, told[name])) for name in ("tokens", "block"))
        some = {str(name): pairs for name, pairs in told["tokenizers"].items()}
        tokenizers = {name: tuple((float(n), float(ms)) for n, ms in pairs) for name, pairs in some.items()}
        methods = {str(name): (float(a), float(b), float(c)) for name, (a, b, c) in told["methods"].items()}
        if len(tokens) < 2 or len(tokens) != len(block):
            raise ValueError
        cost = BlockCost(**{name: int(value) for name, value in told["cost"].items()})
        return cls(str(told["runner"]), int(told["batch"]), cost, tokens, block, tokenizers, methods)


def weights(cost: BlockCost, tokens: Sequence[float], work: Work) -> list[float]:
    """How often each measured block is in a work: the time of its blocks is the sum of these times the blocks'."""
    found = [0.0] * len(tokens)
    for counts, part in ((work.attention, attention_share), (work.mlp, lambda c, n: 1 - attention_share(c, n))):
        for n in counts:
            i = min(max(bisect_right(tokens, n), 1), len(tokens) - 1)
            span = tokens[i] - tokens[i - 1]
            along = (n - tokens[i - 1]) / span if span else 0.0  # of a model of one patch there is one number
            share = part(cost, n)
            found[i - 1] += (1 - along) * share
            found[i] += along * share
    return found


def masked(model: AdaptiveViT, runner: Runner) -> bool:
    """Whether a runner's graph of a setting masks, as its counts depend on the image, what PyTorch skips."""
    return runner.engine != EAGER and not has_fixed_counts(model)


def split(setting: Setting) -> tuple[str, Setting]:
    """Tokenizer ("": the model's own) and methods of a setting."""
    known = registry()
    tokenizers = tuple(c for c in setting.calls if known[c.name].kind == "tokenizer")
    return str(Setting(tokenizers)) if tokenizers else "", Setting(
        tuple(c for c in setting.calls if c not in tokenizers)
    )


def decides_nothing(tokenizer: str) -> bool:
    """Whether a tokenizer is a grid, of whatever size: it treats all images, and all of an image, alike."""
    return bool(tokenizer) and all(registry()[call.name].baseline for call in Setting.parse(tokenizer).calls)


def family(tokenizer: str) -> str:
    """What tokenizers have in common that differ in their number of tokens: their name and what else they are told by
    name. All grids, of whatever size, are one: ""."""
    if not tokenizer or decides_nothing(tokenizer):
        return ""
    return str(Setting(tuple(replace(call, args=()) for call in Setting.parse(tokenizer).calls)))


def measure(
    model: AdaptiveViT,
    settings: Iterable[str],
    *,
    runner: Runner = FP32,
    batch: int = 8,
    seconds: float = 10.0,
    progress: Progress | None = None,
) -> LatencyCurve:
    """Time what a curve is made of.

    Args:
        settings: those that methods and tokenizers are known from: of a method two to which other numbers of tokens
            come.
        seconds: of timed runs, all together; never fewer than 7 of each.
    """
    base, some = model.deploy(replace(runner, batch=batch)).eval(), [*settings]
    views = {name: base.at(name).eval() for name in points(model, some)}
    timed, _ = interleaved(views, batch, seconds, progress)
    return fitted(model, some, {name: 1000 * found.p50 for name, found in timed.items()}, runner, batch)


def points(model: AdaptiveViT, settings: Iterable[str]) -> list[str]:
    """What is timed for a curve: dense, half of the blocks, blocks at some numbers of tokens, and these settings."""
    return list(dict.fromkeys(["dense", _shorter(model), *_cuts(model), *settings]))


def _shorter(model: AdaptiveViT) -> str:
    return f"depth({max(1, model.backbone.depth // 2)})"


def _cuts(model: AdaptiveViT) -> list[str]:
    """All blocks with fewer tokens, without deciding which: as many as smaller grids have."""
    high, wide = (side // patch for side, patch in zip(model.input_size(), model.backbone.patch_size, strict=True))
    counts = {max(1, round(high * s)) * max(1, round(wide * s)) for s in SIDES} - {model.backbone.num_patches}
    return [str(Setting(calls("block", [(0, count)]))) for count in sorted(counts)]


def fitted(
    model: AdaptiveViT, settings: Iterable[str], times: Mapping[str, float], runner: Runner, batch: int
) -> LatencyCurve:
    """The curve by milliseconds of its ``points``, of one interleaved run; what is not among them is not known."""
    bare = [name for name in points(model, []) if name in times]
    some = [s for s in settings if s in times and not masked(model.at(s).eval(), runner)]
    works = {name: work_of(model.at(name).eval()) for name in dict.fromkeys([*bare, *some])}
    parts = {name: split(Setting.parse(name)) for name in some}
    alone = {name: family(first) for name, (first, methods) in parts.items() if first and not methods.calls}
    alike = [*bare, *(name for name, kind in alone.items() if not kind)]
    curve = _blocks(LatencyCurve(str(runner), batch, model.backbone.cost, (), (), {}, {}), alike, works, times)
    left = {name: times[name] - curve.in_blocks(work) for name, work in works.items()}
    for kind in dict.fromkeys(filter(None, alone.values())):
        pairs = sorted((works[name].attention[0], left[name]) for name, own in alone.items() if own == kind)
        curve = replace(curve, tokenizers={**curve.tokenizers, kind: tuple(pairs)})
    outside = {name: curve.outside(first, works[name]) for name, (first, _) in parts.items()}
    names = {name: next(iter(works[name].deciding)) for name in some if len(works[name].deciding) == 1}
    methods = dict[str, tuple[float, float, float]]()
    for method in dict.fromkeys(names.values()):
        own = [(n, out) for n in names if names[n] == method and (out := outside[n]) is not None]
        if own:
            methods[method] = _deciding([works[n].deciding[method] for n, _ in own], [left[n] - out for n, out in own])
    return replace(curve, methods=methods)


def _blocks(
    curve: LatencyCurve, some: Sequence[str], works: Mapping[str, Work], times: Mapping[str, float]
) -> LatencyCurve:
    """With the time of a block at each number of tokens that comes to the first block of some settings, and of all that
    is in no block, alike in all of them, by least squares.

    The last block of a model that reads its class token alone has fewer tokens than come to it."""
    blocks = [works[name].attention for name in some]
    least = min(2, max(map(len, blocks)))
    tokens = tuple(sorted({float(round(counts[0])) for counts in blocks if len(counts) >= least}))
    rows = torch.tensor([[1.0, *weights(curve.cost, tokens, works[name])] for name in some], dtype=torch.float64)
    y = torch.tensor([times[name] for name in some], dtype=torch.float64)
    rest, *block = torch.linalg.lstsq(rows, y).solution.tolist()
    return replace(curve, tokens=tokens, block=tuple(block), tokenizers={"": ((tokens[-1], rest),)})


def _deciding(asked: list[tuple[float, float, float]], left: list[float]) -> tuple[float, float, float]:
    """Time for a site, for a token, and for a block behind, by what is left of some settings' times: the least squares
    of which none is below zero, for what is told of other numbers is then between them. Where fewer of the three tell
    as much, the others are nothing."""
    rows, y = torch.tensor(asked, dtype=torch.float64), torch.tensor(left, dtype=torch.float64)
    best, error = (0.0, 0.0, 0.0), y.square().sum().item()
    for columns in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        if len(columns) > len(asked):
            continue
        found = torch.zeros(3, dtype=torch.float64)
        found[columns] = torch.linalg.lstsq(rows[:, columns], y).solution
        far = (rows @ found - y).square().sum().item()
        if (found >= 0).all() and far < error - 1e-9 * y.square().sum().item():
            site, token, behind = found.tolist()
            best, error = (site, token, behind), far
    return best
