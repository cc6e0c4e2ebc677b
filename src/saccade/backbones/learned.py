"""What methods learn: by method, block and part, so that all settings that name these share it, and no others do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.core.plan import Method
from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.setting import Call, Setting
from saccade.storage.weights import some

STEPS = "steps."  # where a ``Method`` has its reducers and gaters


class Learned(dict[str, Tensor]):
    """Parameters and buffers by ``<method>.<block>[.<part>].<name>``; ``starts``: what those began as that are known.

    What learns outside of a block has no block in its name: ``stem.convs.0.weight``, ``depth.heads.8.1.bias``.
    """

    def __init__(self, found: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(found or {})
        self.starts: dict[str, Tensor] = {}

    def has_learned(self, name: str) -> bool:
        """Whether this is no longer what it began as, or came from elsewhere."""
        start, now = self.starts.get(name), self[name]
        return start is None or not torch.equal(start.to(now.dtype), now.detach().cpu())

    @classmethod
    def without(cls, learned: Mapping[str, Tensor], method: str) -> Learned:
        """What was learned, but by one method or tokenizer."""
        found = cls({name: value for name, value in learned.items() if not name.startswith(f"{method}.")})
        found.starts |= learned.starts if isinstance(learned, Learned) else {}
        return found


@dataclass(frozen=True)
class Slot:
    """A place in a module for something that is learned."""

    name: str  # in ``Learned``
    kind: dict[str, Tensor | None]  # the parameters or the buffers of a module, one of which it is
    key: str

    @property
    def own(self) -> Tensor:
        """What is there now."""
        found = self.kind[self.key]
        assert found is not None
        return found


def slots(module: nn.Module, method: str) -> Iterator[Slot]:
    """All that a method or a tokenizer learns."""
    places = module.places() if isinstance(module, Method) else ()
    for path, owner in module.named_modules():
        if places and path.startswith(STEPS):
            step, _, rest = path.removeprefix(STEPS).partition(".")
            path = f"{places[int(step)]}.{rest}"
        for kind in (owner._parameters, owner._buffers):
            for key, own in kind.items():
                if own is not None and key not in owner._non_persistent_buffers_set:
                    yield Slot(".".join(filter(None, (method, *path.split("."), key))), kind, key)


def share(module: nn.Module, method: str, learned: dict[str, Tensor]) -> None:
    """Make what a module learns that of ``learned``, or put it there where that has none yet.

    Raises UserError where what is known has another shape.
    """
    for slot in slots(module, method):
        own = slot.own
        known = learned.setdefault(slot.name, own)
        if isinstance(own, nn.Parameter) and not isinstance(known, nn.Parameter):  # as it came from a file
            known = learned[slot.name] = nn.Parameter(known.to(own.dtype))
        if known.shape != own.shape:
            raise UserError(
                f"{method}: what it has learned ({slot.name}) has shape {tuple(known.shape)} and this setting needs "
                f"{tuple(own.shape)}: use the knobs it was trained with"
            )
        if known is own and isinstance(learned, Learned) and isinstance(module, Method):
            learned.starts[slot.name] = own.detach().clone()
        slot.kind[slot.key] = known


def require_apart(setting: Setting, parts: Iterable[tuple[Call, nn.Module]]) -> None:
    """Raises UserError where two parts of a setting would learn in one place."""
    taken: set[str] = set()
    for call, module in parts:
        names = {slot.name for slot in slots(module, call.name)}
        if both := sorted(taken & names):
            raise UserError(
                f"{setting}: {call.name} stands twice and would have one set of parameters for both, "
                f"{_listed(_begun(both, 2))}: give each its own blocks, or name it once"
            )
        taken |= names


def require_learned(names: Iterable[str], learned: Mapping[str, Tensor]) -> None:
    """Raises UserError where some of these are missing of a method that has learned elsewhere.

    Where a method has learned nothing at all, what is missing may start; and so it may of a tokenizer, whose scorer
    may come with its weights.
    """
    missing: dict[str, list[str]] = {}
    for name in names:
        if name not in learned and registry()[name.partition(".")[0]].kind == "method":
            missing.setdefault(name.partition(".")[0], []).append(name)
    for method, wanted in missing.items():
        known = [name for name in learned if name.startswith(f"{method}.") and _has_learned(learned, name)]
        if by_step := [name for name in known if name.startswith(f"{method}.{STEPS}")]:
            raise UserError(
                f"what {method} has learned was saved by the number of its step ({by_step[0]}), and the settings of "
                f"this folder do not tell the blocks that it belongs to: rename its tensors ({wanted[0]}), or train "
                "it again"
            )
        if known:
            has, lacks = map(_listed, _apart(known, wanted))
            raise UserError(
                f"{method} has learned {has} and not {lacks}: ask for what it has learned, or train the rest "
                "first (saccade train; in Python, model.at(setting, fresh=True))"
            )


def require_same_start(parts: Iterable[tuple[Call, nn.Module]], learned: Mapping[str, Tensor]) -> None:
    """Raises UserError where a knob says what a parameter begins as, and one that has not learned began otherwise.

    What a setting learns is that of all settings: it would run, and be trained, from where another one began.
    """
    if not isinstance(learned, Learned):
        return
    for call, module in parts:
        for slot in slots(module, call.name):
            start = learned.starts.get(slot.name)
            if start is None or slot.name not in learned or learned.has_learned(slot.name):
                continue
            if start.shape == slot.own.shape and not torch.equal(start, slot.own.detach().to(start)):
                raise UserError(
                    f"{call}: {slot.name} has begun otherwise in another setting of this model, and has learned "
                    "nothing since: give both the same knobs, or each a model of its own"
                )


def _has_learned(learned: Mapping[str, Tensor], name: str) -> bool:
    return not isinstance(learned, Learned) or learned.has_learned(name)


def _apart(one: list[str], other: list[str]) -> tuple[list[str], list[str]]:
    """The beginnings of two lists of names, long enough to tell them apart."""
    for depth in range(2, 9):
        a, b = _begun(one, depth), _begun(other, depth)
        if not {*a} & {*b}:
            return a, b
    return one, other


def _begun(names: Iterable[str], depth: int) -> list[str]:
    return list(dict.fromkeys(".".join(name.split(".")[:depth]) for name in names))


def _listed(names: list[str]) -> str:
    """``at blocks 3, 6``; or by name, where it is not blocks alone."""
    ends = [name.partition(".")[2] for name in names]
    if not all(map(str.isdecimal, ends)):
        return some(names, 3)
    return f"at block{'s'[: len(ends) > 1]} {', '.join(map(str, sorted(map(int, ends))))}"
