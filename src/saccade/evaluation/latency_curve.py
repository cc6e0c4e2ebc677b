"""A device's latency curve: what a block takes by its number of tokens, and what deciding takes by method.

Measured once, by a handful of settings in one interleaved run. Then a setting is priced in milliseconds from the tokens
in its blocks (``evaluation/work.py``), without being timed: a block's time lies on the line between measured numbers of
tokens, attention's part of it by MACs; a method's deciding takes a time for each site and one for each token that comes
to it; a tokenizer takes what is left of its own setting's time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from saccade.core.record import BlockCost
from saccade.core.registry import registry
from saccade.evaluation.interleaved import interleaved
from saccade.evaluation.schedule import Schedule, Space
from saccade.evaluation.work import Work, attention_share, static_work, work_of
from saccade.methods.cut import calls
from saccade.model import AdaptiveViT
from saccade.runners.runner import FP32, Runner
from saccade.setting import Setting
from saccade.terminal.progress import Progress

SHARES = (0.85, 0.7, 0.55, 0.4, 0.25, 0.12)  # of the model's tokens, at which blocks are timed beside all of them


@dataclass(frozen=True)
class LatencyCurve:
    """Milliseconds of a batch, of one model in one runner.

    Attributes:
        tokens: numbers of tokens, prefix included, in order; block: what a block of so many takes.
        tokenizers: by tokenizer, embedding, head and all else that no block does; "": the model's own.
        methods: by method, what deciding takes for a site, and for each token that comes to it.
    """

    runner: str
    batch: int
    cost: BlockCost
    tokens: tuple[float, ...]
    block: tuple[float, ...]
    tokenizers: dict[str, float]
    methods: dict[str, tuple[float, float]]

    def predict(self, model: AdaptiveViT) -> float | None:
        """Of a batch under a model's setting; None where the curve does not know a part of it."""
        tokenizer, _ = split(model.setting)
        return self.of(tokenizer, work_of(model))

    def of(self, tokenizer: str, work: Work) -> float | None:
        """Of a batch of tokens by a tokenizer, and this work; None where a part is not known."""
        if tokenizer not in self.tokenizers or not self.methods.keys() >= work.deciding.keys():
            return None
        return self.tokenizers[tokenizer] + self.in_blocks(work) + self.deciding(work)

    def in_blocks(self, work: Work) -> float:
        """Of the blocks alone."""
        return sum(
            weight * time for weight, time in zip(weights(self.cost, self.tokens, work), self.block, strict=True)
        )

    def deciding(self, work: Work) -> float:
        """Of deciding alone."""
        known = [(self.methods[name], asked) for name, asked in work.deciding.items()]
        return sum(site * sites + token * tokens for (site, token), (sites, tokens) in known)

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
        tokenizers = {str(name): float(ms) for name, ms in told["tokenizers"].items()}
        methods = {str(name): (float(site), float(token)) for name, (site, token) in told["methods"].items()}
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
            along = (n - tokens[i - 1]) / (tokens[i] - tokens[i - 1])
            share = part(cost, n)
            found[i - 1] += (1 - along) * share
            found[i] += along * share
    return found


def split(setting: Setting) -> tuple[str, Setting]:
    """Tokenizer ("": the model's own) and methods of a setting."""
    known = registry()
    tokenizers = tuple(c for c in setting.calls if known[c.name].kind == "tokenizer")
    return str(Setting(tokenizers)) if tokenizers else "", Setting(
        tuple(c for c in setting.calls if c not in tokenizers)
    )


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
        settings: those that methods and tokenizers are known from: of a method two of different strength.
        seconds: of timed runs, all together; never fewer than 7 of each.
    """
    base, n = model.deploy(runner).eval(), model.backbone.num_patches
    counts = sorted({max(1, round(share * n)) for share in SHARES})
    cuts = [str(Setting(calls("block", [(0, count)]))) for count in counts]
    shorter = f"depth({max(1, model.backbone.depth // 2)})"
    named = list(dict.fromkeys(["dense", shorter, *cuts, *settings]))
    timed, _ = interleaved({name: base.at(name).eval() for name in named}, batch, seconds, progress)
    times = {name: 1000 * _median(found.seconds) for name, found in timed.items()}
    tokens = tuple(float(model.backbone.num_prefix + count) for count in (*counts, n))
    works = {name: work_of(model.at(name).eval()) for name in times}
    cost = model.backbone.cost
    block, rest = _blocks(cost, tokens, {name: works[name] for name in ("dense", shorter, *cuts)}, times)
    bare = LatencyCurve(str(runner), batch, cost, tokens, block, {"": rest}, {})
    left = {name: times[name] - bare.in_blocks(works[name]) for name in times}
    alone = {name: split(Setting.parse(name)) for name in times}
    tokenizers = {first: left[name] for name, (first, methods) in alone.items() if first and not methods.calls}
    names = {name: next(iter(works[name].deciding)) for name in times if len(works[name].deciding) == 1}
    methods = {}
    for method in dict.fromkeys(names.values()):
        own = [name for name in names if names[name] == method and not alone[name][0] and name not in cuts]
        if own:
            methods[method] = _deciding([works[o].deciding[method] for o in own], [left[o] - rest for o in own])
    return LatencyCurve(str(runner), batch, cost, tokens, block, {"": rest, **tokenizers}, methods)


def _blocks(
    cost: BlockCost, tokens: tuple[float, ...], works: dict[str, Work], times: dict[str, float]
) -> tuple[tuple[float, ...], float]:
    """Time of a block at each number of tokens, and of all that is in no block: by least squares."""
    rows = torch.tensor([[1.0, *weights(cost, tokens, works[name])] for name in works], dtype=torch.float64)
    found = torch.linalg.lstsq(rows, torch.tensor([times[name] for name in works], dtype=torch.float64)).solution
    rest, *block = found.tolist()
    return tuple(block), rest


def _deciding(asked: list[tuple[float, float]], left: list[float]) -> tuple[float, float]:
    """Time for a site and for a token, by what is left of some settings' times; by sites alone where they are alike."""
    rows, y = torch.tensor(asked, dtype=torch.float64), torch.tensor(left, dtype=torch.float64)
    site = ((rows[:, 0] @ y) / (rows[:, 0] @ rows[:, 0])).item()
    if len(asked) < 2 or torch.linalg.cond(rows / rows.norm(dim=0)) > 20:
        return site, 0.0
    first, second = torch.linalg.lstsq(rows, y).solution.tolist()
    return first, second


def _median(seconds: list[float]) -> float:
    return torch.tensor(seconds, dtype=torch.float64).quantile(0.5).item()
