"""Which settings ``tune`` looks at, and what each costs: everything registered, alone and two at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product

import torch

from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.evaluation.failures import described, is_systems
from saccade.evaluation.untrained import untrained
from saccade.methods.common import budget
from saccade.model import AdaptiveViT
from saccade.setting import Setting
from saccade.terminal.progress import Progress

RED, RIVAL = "reduction", "rival"
PAIRS = 40  # combinations that are raced, those priced nearest to the budget


@dataclass(frozen=True)
class Candidate:
    """A setting with its price."""

    setting: str
    family: str  #    "dense" (tokenizers alone, and the model itself), "reduction", "random" (baselines), "rival"
    macs: float  #    executed, per image
    combined: bool  # made of two registered parts
    tried: int = 0  #  settings that a search chose it from

    @property
    def is_baseline(self) -> bool:
        """Stands in the report whatever the race says: what reductions are compared with."""
        return self.family != RED


@dataclass(frozen=True)
class Priced:
    """All settings worth racing, dearest first, the dense model before all; and why others are not among them."""

    candidates: list[Candidate]
    failed: dict[str, str]  # setting -> its error
    untried: int = 0  #       settings that time did not suffice for


def candidates(
    model: AdaptiveViT,
    ratio: float | None = None,
    progress: Progress | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> Priced:
    """What there is to race on a model.

    Args:
        ratio: the MAC ratio aimed at; of the combinations only those near it are taken. None: no combinations.
        progress: where to show it; None: nowhere.
        enough: whether the time for pricing is over. What takes a forward is then left out, but for tokenizers alone,
            which reductions are compared with.
    """
    known, backbone = registry(), model.backbone
    menus = {name: entry.menu(backbone) for name, entry in known.items()}
    tokenizers = {name: entry for name, entry in known.items() if entry.kind == "tokenizer"}
    grids = [s for name, entry in tokenizers.items() if entry.baseline for s in menus[name]]
    adaptive = [s for name, entry in tokenizers.items() if not entry.baseline for s in menus[name]]
    controls = [s for n, entry in known.items() if entry.kind == "method" and entry.baseline for s in menus[n]]
    methods = {n: menus[n] for n, entry in known.items() if entry.kind == "method" and not entry.baseline}

    merging = [s for menu in methods.values() for s in menu]
    for setting in model.trained:
        calls = [known[call.name] for call in Setting.parse(setting).calls if call.name in known]
        plain = all(entry.kind == "tokenizer" and entry.baseline for entry in calls)
        own = grids if plain else adaptive if any(entry.kind == "tokenizer" for entry in calls) else merging
        if setting not in ("dense", *grids, *adaptive, *merging):
            own.append(setting)
    families = dict.fromkeys(grids, "dense") | dict.fromkeys(controls, "random")
    families |= dict.fromkeys(merging + adaptive, RED)
    dense = price(model, "dense")
    failed = _untrained(model, list(families))
    for setting in failed:
        del families[setting]
    cost = {"dense": dense} | _priced(
        model,
        list(families),
        progress,
        failed,
        lambda s: enough() and families[s] != "dense" and not _static(model.at(s)),
    )
    late = len([s for s in families if s not in cost and s not in failed])
    alone = [Candidate("dense", "dense", dense, False)]
    alone += [Candidate(s, families[s], cost[s], False) for s in families if cost.get(s, dense) < dense]
    if ratio is None:
        return Priced(sorted(alone, key=lambda c: -c.macs), failed, late)

    parts = [[s for s in menu if s not in failed] for menu in methods.values()]
    pairs = [" | ".join(pair) for a, b in combinations(parts, 2) for pair in product(a, b)]
    before, after = ([s for s in names if s not in failed] for names in (grids + adaptive, merging))
    pairs += [" | ".join(pair) for pair in product(before, after)]
    # Both save about what each saves alone: only combinations that may lie near the budget are priced by running them.
    guess = {p: math.prod(cost.get(s, dense) / dense for s in p.split(" | ")) for p in pairs}
    near = [p for p in pairs if 0.7 <= 1 / guess[p] / ratio <= 1.6]
    near.sort(key=lambda p: abs(1 / guess[p] / ratio - 1.05))
    found = _priced(model, near, progress, failed, lambda s: enough())
    combined = [Candidate(s, RED, macs, True) for s, macs in found.items() if 0.97 <= dense / macs / ratio <= 1.3]
    combined = sorted((c for c in combined if c.macs < dense), key=lambda c: abs(dense / c.macs / ratio - 1.05))
    untried = late + len([s for s in near if s not in found and s not in failed])
    return Priced(sorted(alone + combined[:PAIRS], key=lambda c: -c.macs), failed, untried)


def _untrained(model: AdaptiveViT, settings: list[str]) -> dict[str, str]:
    """Which of these settings learn, and have not, and why they are left out: nothing of theirs can be recommended."""
    found: dict[str, str] = {}
    for setting in settings:
        try:
            names = untrained(model, setting)
        except Exception as error:
            if is_systems(error):
                raise
            continue  # what is wrong with it is said where it is priced
        if names:
            found[setting] = f"{', '.join(names)} has learned nothing yet: train it, then tune"
    return found


def _priced(
    model: AdaptiveViT,
    settings: list[str],
    progress: Progress | None,
    failed: dict[str, str],
    too_late: Callable[[str], bool],
) -> dict[str, float]:
    """Executed MACs of settings, but for those that it is too late for; what fails is put into ``failed`` with its
    error."""
    found: dict[str, float] = {}
    step = (progress or Progress()).start("pricing settings", len(settings))
    for setting in settings:
        step(what=f"pricing {setting}")
        try:
            if not too_late(setting):
                found[setting] = price(model, setting)
        except Exception as error:
            if is_systems(error):
                raise
            failed[setting] = described(error)
    step.finish()
    return found


def price(model: AdaptiveViT, setting: str) -> float:
    """Executed MACs of one image (of noise, where the count depends on the image); by arithmetic where that will do."""
    view = model.at(setting)
    if _static(view):
        return float(budget.macs(model.backbone, *view.plan.methods))
    weight = next(model.parameters())
    noise = torch.randn(1, model.backbone.channels, *view.input_size(), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return view(noise.to(weight.device, weight.dtype)).trace.macs().item()


def _static(view: AdaptiveViT) -> bool:
    """Whether arithmetic gives the price of a setting: methods alone, whose counts do not depend on the image."""
    known = registry()
    plain = all(call.name in known and known[call.name].kind == "method" for call in view.setting.calls)
    return plain and budget.static(view.backbone, *view.plan.methods)


@dataclass(frozen=True)
class Target:
    """What ``tune`` aims at: one of a speed-up, a MAC budget, a latency, or an accuracy that may be given up."""

    kind: str  #     "speedup", "gmacs", "ms", "drop"
    value: float  #  times · 10^9 MACs an image · milliseconds a batch · a fraction (0.01: one point), or in the unit of
    #                a metric that is no share
    percent: bool = False  # a drop that was given in per cent

    @classmethod
    def of(
        cls,
        target: str | float | None = None,
        *,
        gmacs: float | None = None,
        ms: float | None = None,
        max_drop: str | float | None = None,
    ) -> Target:
        """One of them: ``"1.5x"``, ``gmacs=2.3``, ``ms=20``, ``max_drop="1%"`` (or 0.01); of none, ``ASSUMED``."""
        given = {"target": target, "gmacs": gmacs, "ms": ms, "max_drop": max_drop}
        named = {k: v for k, v in given.items() if v is not None}
        if not named:
            return ASSUMED
        if len(named) > 1:
            raise UserError(f"give one of target, gmacs, ms and max_drop; {len(named)} were given")
        (name, value) = named.popitem()
        unit = {"target": "x", "max_drop": "%"}.get(name, "")
        try:
            text = str(value).strip().lower()
            number = float(text.removesuffix(unit)) / (100 if unit == "%" and text.endswith(unit) else 1)
        except ValueError:
            raise UserError(f"{name}={value!r} is not a number; write it like 2x, 2.3 or 1%") from None
        kind = {"target": "speedup"}.get(name, name.removeprefix("max_"))
        low, high = {"speedup": (1.0, 100.0), "drop": (0.0, 1.0)}.get(kind, (1e-6, 1e6))
        if not low <= number <= high:
            raise UserError(f"{name}={value!r} is not in [{low:g}, {high:g}]")
        return cls(kind, number, percent=unit == "%" and text.endswith(unit))

    def __str__(self) -> str:
        if self.kind == "drop":
            return f"at most {100 * self.value:g}% lost"
        return {"speedup": "{:g}× faster", "gmacs": "{:g} GMACs", "ms": "{:g} ms"}[self.kind].format(self.value)


ASSUMED = Target("drop", 0.01)  # what is aimed at where nothing is said
