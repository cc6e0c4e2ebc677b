"""From a setting and a backbone to a tokenizer and a plan, whose parameters all views of a model share."""

from __future__ import annotations

from torch import Tensor, nn

from saccade.core.plan import Backbone, Method, Plan, Tokenizer
from saccade.core.registry import registry
from saccade.errors import UserError, nearest
from saccade.setting import Call, Setting
from saccade.tokenizers.grid import grid


def build(backbone: Backbone, setting: Setting, learned: dict[str, Tensor] | None = None) -> tuple[Tokenizer, Plan]:
    """Tokenizer and plan of a setting, for a backbone; what they learn is that of ``learned``, or is put there.

    Raises UserError for unknown names, knobs out of range, and learned parameters of another shape.
    """
    known = registry()
    tokenizers: list[tuple[Call, Tokenizer]] = []
    methods: list[tuple[Call, Method]] = []
    for call in setting.calls:
        if call.name not in known:
            raise UserError(f"there is no method {call.name!r}{nearest(call.name, known)}")
        entry = known[call.name]
        built = entry(backbone, call.args, dict(call.kwargs))
        share(built, call.name, {} if learned is None else learned)
        (tokenizers if entry.kind == "tokenizer" else methods).append((call, built))
    if len(tokenizers) > 1:
        raise UserError(f"a setting takes one tokenizer and {setting} names {len(tokenizers)}")
    if tokenizers and setting.calls[0] is not tokenizers[0][0]:
        raise UserError(f"the tokenizer comes first: write '{_tokenizer_first(setting, tokenizers[0][0])}'")
    tokenizer = tokenizers[0][1] if tokenizers else grid(backbone)
    return tokenizer, Plan(method for _, method in methods)


def share(module: nn.Module, name: str, learned: dict[str, Tensor]) -> None:
    """Make a method's parameters and buffers those of ``learned``, or put them there where it has none yet."""
    for part, owner in module.named_modules():
        for kind in (owner._parameters, owner._buffers):
            for key, own in list(kind.items()):
                path = ".".join(filter(None, (name, part, key)))
                if own is None or key in owner._non_persistent_buffers_set:
                    continue
                known = learned.setdefault(path, own)
                if isinstance(own, nn.Parameter) and not isinstance(known, nn.Parameter):  # as it came from a file
                    known = learned[path] = nn.Parameter(known.to(own.dtype))
                if known.shape != own.shape:
                    raise UserError(
                        f"{name}: what it has learned ({path}) has shape {tuple(known.shape)} and this setting needs "
                        f"{tuple(own.shape)}: use the knobs it was trained with"
                    )
                kind[key] = known  # type: ignore[assignment]


def _tokenizer_first(setting: Setting, tokenizer: Call) -> Setting:
    return Setting((tokenizer, *(call for call in setting.calls if call is not tokenizer)))
