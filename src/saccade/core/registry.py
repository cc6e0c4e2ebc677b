"""The registry, where each method's and tokenizer's own file puts the name that settings use."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any

from saccade.core.plan import Backbone, Method
from saccade.core.plugins import load_installed, origin_of
from saccade.errors import UserError, nearest


class KnobLearner(Method):
    """A method that learns, for a budget, what another one is told by knobs: in training, by masks with a gradient."""

    def found(self) -> dict[str, Any]:
        """The knobs as learned, within the budget."""
        raise NotImplementedError

    def moved(self, knobs: Mapping[str, Any], draw: random.Random) -> dict[str, Any]:
        """Such knobs a little changed, within the budget; the same where nothing can be changed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Entry:
    """A registered method or tokenizer."""

    name: str
    kind: str  # "method" or "tokenizer"
    build: Callable[..., Any]
    menu: Callable[[Backbone], list[str]]  # settings that `tune` tries, weakest first
    baseline: bool  # a control that stands beside the others, not a candidate
    range_filter: Callable[..., bool]  # whether a range should stop at these knobs
    sources: Mapping[str, str]  # by where defaults are from, the knobs; see ``source``
    before: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)  # see ``also``
    learner: Callable[..., KnobLearner] | None = None
    counts: tuple[str, ...] = ()  # knobs that take a list of tokens that leave, a count for each block
    finer: Callable[[Backbone], list[str]] | None = None  # see ``also``
    origin: str = ""  # what brings it: the plugin's file or package; "": this package

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.build) or "").split("\n", 1)[0]

    @property
    def knobs(self) -> dict[str, inspect.Parameter]:
        """Knobs of the setting: the factory's parameters after the backbone."""
        return dict(list(inspect.signature(self.build).parameters.items())[1:])

    def source(self, knob: str) -> str:
        """Where a knob's default is from: one of ``SOURCES``; what no source is named for is "ours"."""
        return next((source for source, knobs in self.sources.items() if knob in knobs.split()), "ours")

    @property
    def help(self) -> dict[str, str]:
        """What each knob is, by the docstring's ``Args``; each ends with where its default is from."""
        _, _, lines = (inspect.getdoc(self.build) or "").partition("Args:\n")
        found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", lines, re.MULTILINE)
        said = {knob: " ".join(text.split()) for knob, text in found}
        return {knob: f"{said.get(knob, '')} [{self.source(knob)}]".strip() for knob in self.knobs}

    def bound(self, backbone: Backbone, args: tuple, kwargs: dict) -> dict[str, Any] | None:
        """All knobs by name, defaults too, and the backbone; None where they do not fit, which building will tell."""
        try:
            found = inspect.signature(self.build).bind(backbone, *args, **kwargs)
        except TypeError:
            return None
        found.apply_defaults()
        return found.arguments

    def accepts(self, backbone: Backbone, args: tuple, kwargs: dict) -> bool:
        """Whether a range of a knob should stop at these values; what does not fit is for building to refuse."""
        knobs = self.bound(backbone, args, kwargs)
        try:
            return knobs is None or self.range_filter(**knobs)
        except TypeError:
            return True

    def __call__(self, backbone: Backbone, args: tuple, kwargs: dict) -> Any:
        for knob in kwargs:
            if knob not in self.knobs:
                raise UserError(f"{self.name} has no knob {knob!r}{nearest(knob, self.knobs)}")
        try:
            inspect.signature(self.build).bind(backbone, *args, **kwargs)
        except TypeError as error:
            knobs = ", ".join(str(p).replace("'", "") for p in self.knobs.values())
            raise UserError(f"{self.name}: {error}; its knobs are ({knobs})") from None
        try:
            return self.build(backbone, *args, **kwargs)
        except (TypeError, OverflowError) as error:
            raise UserError(f"{self.name}: a knob has the wrong type ({error})") from None


SOURCES = {  # of a knob's default
    "paper": "as published",
    "code": "as in the authors' released code",
    "fit": "inferred from published figures",
    "ours": "chosen here, or not published",
}
_REGISTRY: dict[str, Entry] = {}


def register(
    name: str,
    *,
    kind: str = "method",
    menu: Callable[[Backbone], list[str]] = lambda backbone: [],
    baseline: bool = False,
    range_filter: Callable[..., bool] = lambda backbone, **knobs: True,
    sources: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Callable], Callable]:
    """Put a factory ``build(backbone, **knobs)`` into the registry under the name that settings use.

    ``range_filter(backbone, **knobs)`` says whether a range of a knob (``8..40``) should stop at these values, and
    ``sources`` names the knobs whose defaults are another's, as ``{"paper": "keep at", "code": "tau"}``: ``SOURCES``.

    Raises UserError for a name that a method from elsewhere has already.
    """

    def add(build: Callable) -> Callable:
        origin = origin_of(build)
        if name in _REGISTRY and (other := _REGISTRY[name].origin) != origin:
            raise UserError(f"{origin or 'saccade'} registers {name!r}, which {other or 'saccade'} has: rename it")
        _REGISTRY[name] = Entry(name, kind, build, menu, baseline, range_filter, sources, origin=origin)
        return build

    return add


def also(
    *,
    before: Mapping[str, Mapping[Any, Any]] = MappingProxyType({}),
    learner: Callable[..., KnobLearner] | None = None,
    counts: tuple[str, ...] = (),
    finer: Callable[[Backbone], list[str]] | None = None,
) -> Callable[[Callable], Callable]:
    """What few factories have to say beside, above their ``register``.

    Args:
        before: by knob, values that had other names in folders of before, and what they are called now.
        learner: learns some of the knobs for a budget, from the others and ``gmacs``.
        counts: knobs that take a list of tokens that leave, a count for each block: schedules are searched for there.
        finer: of a tokenizer, the settings that a search for schedules may start from; None: its menu.
    """

    def add(build: Callable) -> Callable:
        entry = next(entry for entry in _REGISTRY.values() if entry.build is build)
        _REGISTRY[entry.name] = replace(entry, before=before, learner=learner, counts=counts, finer=finer)
        return build

    return add


def registry() -> dict[str, Entry]:
    """All registered names: every file of ``methods/`` and ``tokenizers/`` is looked at once."""
    _look()
    return dict(sorted(_REGISTRY.items()))


@cache
def _look() -> None:
    for package in ("saccade.tokenizers", "saccade.methods"):
        for module in iter_modules(import_module(package).__path__, package + "."):
            import_module(module.name)
    load_installed()


def unknown(name: str, others: Iterable[str] = ()) -> UserError:
    """The error for a name that is not registered, with what it may mean; ``others`` are known names beside methods."""
    near = nearest(name, [*registry(), *others])
    return UserError(f"there is no method {name!r}{near}; one of your own is read by --plugin or saccade.load_plugin")


def list_methods() -> list[str]:
    """Names that a setting may use."""
    return list(registry())
