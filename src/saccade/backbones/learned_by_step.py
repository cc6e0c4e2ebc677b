"""Earlier folders, in which a method's parameters have the number of its step in their name, and not the block.

Then settings shared them by that number, whatever their blocks. The settings that a folder was trained for tell which
blocks a step had; where they contradict each other, its parameters keep their old names, and settings that need them
are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from torch import Tensor

from saccade.backbones.learned import STEPS, slots
from saccade.core.plan import Backbone
from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.setting import Call, Setting

BY_STEP = re.compile(r"(\w+)\." + re.escape(STEPS) + r"([0-9]{1,4})\.(.+)")


def methods_by_step(names: Iterable[str]) -> frozenset[str]:
    """The methods that some names of what was learned are of, where they are by step."""
    return frozenset(found[1] for name in names if (found := BY_STEP.fullmatch(name)))


def as_now(setting: str, methods: frozenset[str]) -> str:
    """A setting of such a folder, in which some values of these methods' knobs had other names."""
    calls = _calls([setting])
    if not any(call.name in methods for call in calls):
        return setting
    return str(Setting(tuple(_as_now(call) if call.name in methods else call for call in calls)))


def _as_now(call: Call) -> Call:
    entry = registry().get(call.name)
    if entry is None or not entry.before:
        return call
    names = list(entry.knobs)
    given = [(names[i], value) for i, value in enumerate(call.args) if i < len(names)]
    args = [entry.before.get(knob, {}).get(value, value) for knob, value in given]
    kwargs = tuple((knob, entry.before.get(knob, {}).get(value, value)) for knob, value in call.kwargs)
    return replace(call, args=(*args, *call.args[len(args) :]), kwargs=kwargs)


def by_block(
    state: Mapping[str, Tensor], trained: Sequence[str], setting: str, backbone: Backbone
) -> dict[str, Tensor]:
    """What was learned, by block where it was by step and the blocks are known.

    Args:
        state: what methods have learned, by name.
        trained: settings that it was trained for.
        setting: of the folder, which counts where none of those names a method.
    """
    found = dict(state)
    old = [match for name in state if (match := BY_STEP.fullmatch(name))]
    for method in {match[1] for match in old}:
        steps = {match[0]: (int(match[2]), match[3]) for match in old if match[1] == method}
        where = _places(method, trained, setting, backbone, 1 + max(step for step, _ in steps.values()))
        for name, (step, rest) in steps.items():
            if places := [place for place, of in where.items() if of == step]:
                value = found.pop(name)  # one parameter may have served several blocks
                found |= {f"{method}.{place}.{rest}": value.clone() for place in places}
    return found


def _places(method: str, trained: Sequence[str], setting: str, backbone: Backbone, steps: int) -> dict[str, int]:
    """The step that each place of a method had; empty where that cannot be known."""
    calls = [call for call in _calls(trained) if call.name == method]
    alone = not calls
    calls = calls or [call for call in _calls([setting]) if call.name == method]
    entry, where = registry().get(method), dict[str, int]()
    if entry is None:
        return {}
    for call in calls:
        try:
            built = entry(backbone, call.args, dict(call.kwargs))
        except UserError:  # not of this version
            return {}
        if not any(True for _ in slots(built, method)):
            continue
        places = built.places()
        if alone and len(places) != steps:  # a view that was saved, at other blocks than those of training
            return {}
        for step, place in enumerate(places):
            if where.setdefault(place, step) != step:
                return {}
    return where


def _calls(settings: Iterable[str]) -> list[Call]:
    """The parts of all settings that can be read."""
    found: list[Call] = []
    for text in settings:
        with suppress(UserError):
            found += Setting.parse(text).calls
    return found
