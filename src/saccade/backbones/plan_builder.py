"""From a setting and a backbone to a tokenizer and a plan, whose parameters all views of a model share."""

from __future__ import annotations

from torch import Tensor

from saccade.backbones.learned import Learned, require_apart, require_learned, require_same_start, share, slots
from saccade.core.plan import Backbone, Method, Plan, Tokenizer
from saccade.core.registry import registry, unknown
from saccade.errors import UserError
from saccade.setting import Call, Setting, presets
from saccade.tokenizers.grid import grid

__all__ = ["build", "share"]


def build(
    backbone: Backbone, setting: Setting, learned: dict[str, Tensor] | None = None, fresh: bool = False
) -> tuple[Tokenizer, Plan]:
    """Tokenizer and plan of a setting, for a backbone; what they learn is that of ``learned``, or is put there.

    Args:
        fresh: what a method lacks starts, to be trained, even where it has learned at other blocks.

    Raises:
        UserError: unknown names, knobs out of range, learned parameters of another shape; a method that has learned
            and not what this setting needs, that would learn twice in one place, or from two starts.
    """
    known, learned = registry(), Learned() if learned is None else learned
    tokenizers: list[tuple[Call, Tokenizer]] = []
    methods: list[tuple[Call, Method]] = []
    for call in setting.calls:
        if call.name not in known:
            raise unknown(call.name, presets())
        entry = known[call.name]
        built = entry(backbone, call.args, dict(call.kwargs))
        (tokenizers if entry.kind == "tokenizer" else methods).append((call, built))
    if len(tokenizers) > 1:
        raise UserError(f"a setting takes one tokenizer and {setting} names {len(tokenizers)}")
    if tokenizers and setting.calls[0] is not tokenizers[0][0]:
        raise UserError(f"the tokenizer comes first: write '{_tokenizer_first(setting, tokenizers[0][0])}'")
    parts = [*tokenizers, *methods]
    require_apart(setting, parts)
    if not fresh:
        require_learned((slot.name for call, part in parts for slot in slots(part, call.name)), learned)
    require_same_start(methods, learned)
    for call, part in parts:
        share(part, call.name, learned)
    tokenizer = tokenizers[0][1] if tokenizers else grid(backbone)
    return tokenizer, Plan(method for _, method in methods)


def with_tokenizer(setting: Setting, first: Call | None) -> Setting:
    """A setting that starts with a tokenizer where it names none; None: as it is."""
    known = registry()
    named = any(call.name in known and known[call.name].kind == "tokenizer" for call in setting.calls)
    return setting if first is None or named else Setting((first, *setting.calls))


def _tokenizer_first(setting: Setting, tokenizer: Call) -> Setting:
    return Setting((tokenizer, *(call for call in setting.calls if call is not tokenizer)))
