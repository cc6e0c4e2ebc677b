"""timm's modules as their users left them: hooks run, and a layer that is not exactly timm's own is called.

Where the library restates a module's forward (attention whose statistics are read, a block with tokens merged inside,
a patch embedding at another size), the module's hooks run around the restatement as torch would run them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import BackwardHook

from saccade.core.lazy import changed
from saccade.core.timm_types import TimmBlock, ViT
from saccade.core.tokens import Tokens
from saccade.errors import UserError

Result = TypeVar("Result")
M = TypeVar("M", bound=nn.Module)


def hooked(module: nn.Module) -> bool:
    """Whether this module itself has a hook."""
    m = module
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def any_hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these modules has a hook."""
    return any(map(hooked, modules))


ATTENTIONS = (Attention, EvaAttention, AttentionRope)  # timm's, whose forward is restated here
BLOCKS = (Block, EvaBlock, EvaBlockPostNorm)  # timm's, that are run in parts


def exact(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the forward of a module is its class' own: no subclass, no parametrization, none on the instance."""
    return type(module) in kinds and "forward" not in module.__dict__


def plain_linear(module: nn.Module) -> bool:
    """Whether a layer is ``x Wᵀ + b`` and no more, so that some of its rows may be computed without calling it.

    Pruning and weight normalisation compute the weight in a hook; quantisation puts another kind of tensor there.
    """
    if not exact(module, nn.Linear) or hooked(module):
        return False
    return not is_traceable_wrapper_subclass(module.weight)


def plain_block(block: TimmBlock) -> bool:
    """Whether a block may be run in parts: its own forward, and that of its attention, are timm's."""
    return exact(block, *BLOCKS) and exact(block.attn, *ATTENTIONS)


def watched(block: TimmBlock) -> bool:
    """Whether a block has to see all tokens of all images side by side, [B, N, D], as timm's hooks and forwards do."""
    attn = block.attn
    return not plain_block(block) or any_hooked((block, attn, attn.attn_drop))


def untouched(module: nn.Module) -> bool:
    """Whether a module and all in it are a library's own, unhooked: they do with a token what they do with many."""
    waiting = [module]
    while waiting:
        one = waiting.pop()
        if not type(one).__module__.startswith(("torch.nn.modules.", "timm.")) or "forward" in one.__dict__:
            return False
        for inside in one._modules.values():
            if inside is not None:
                waiting.append(inside)
        if hooked(one):
            return False
    return True


def applied(x: Tensor, *modules: nn.Module) -> Tensor:
    """x through some modules, one after the other.

    An identity, or dropout outside of training, is only called where it is heard: at batch 1 such calls count.
    """
    for m in modules:
        nothing = type(m) is nn.Identity or (type(m) is nn.Dropout and not m.training)
        if not nothing or "forward" in m.__dict__ or is_heard(m):
            x = m(x)
    return x


# Methods of a timm ViT that are restated here: a user's own in their place would not be called.
FEATURES = ("forward", "forward_features", "_pos_embed")
# Methods that are called, unless tokens count differently or a method has logits of its own.
HEAD = ("forward_head", "pool")


def replaced(module: nn.Module, names: Iterable[str]) -> str | None:
    """Which of these methods is not the library's, on the module itself or by a subclass; None: all are."""
    kind = parametrize.type_before_parametrizations(module)
    library = next((k for k in kind.__mro__ if k.__module__.startswith(("timm.", "torch."))), kind)
    for name in names:
        if name in module.__dict__ or getattr(kind, name, None) is not getattr(library, name, None):
            return name
    return None


def patched(root: nn.Module) -> str | None:
    """The first method in a tree that was replaced on an object, as ``blocks.1.forward``; None: there is none.

    Such a function holds on to the object: a copy of that would run the original's weights.
    """
    for path, module in root.named_modules():
        for name, value in module.__dict__.items():
            if callable(value) and callable(getattr(type(module), name, None)) and not name.startswith("__"):
                return f"{path}.{name}".lstrip(".")
    return None


def copied(module: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy. UserError where it would not be one, since a method was replaced on an object."""
    if found := patched(module):
        raise UserError(
            f"{found} was replaced, and a copy of this model, as another number type or device needs it, would run the "
            "original's: put the library's back, or move the model itself by .to(…)"
        )
    return copy.deepcopy(module, memo)


def require_features(vit: ViT) -> None:
    """UserError where a timm ViT has a forward of the user's own, which the loop over its blocks does not run."""
    owner, name = "vit", replaced(vit, FEATURES)
    if name is None:
        owner, name = "vit.blocks", replaced(vit.blocks, ("forward",))
    if name is not None:
        raise UserError(
            f"{owner}.{name} was replaced, and this runs timm's own, block by block: use a hook, which is heard, or "
            f"put timm's back (del model.{owner}.{name})"
        )


def require_head(vit: nn.Module) -> None:
    """UserError where a ViT has a head of the user's own, and what goes in is not what timm's would be given."""
    if name := replaced(vit, HEAD):
        raise UserError(
            f"vit.{name} was replaced, and this setting's tokens count differently, or have a head of their own: put "
            f"timm's back (del model.vit.{name}), or take 'dense'"
        )


def require_plain(module: nn.Module, name: str, *kinds: type[nn.Module]) -> None:
    """UserError where a module's forward was replaced and what is asked for works inside of it."""
    if not exact(module, *kinds):
        what = f"is a {type(module).__name__}" if type(module) not in kinds else "has a forward of its own"
        raise UserError(
            f"{name} {what}, and this setting works inside a {kinds[0].__name__}: put timm's own back, or 'dense'"
        )


def kernel_of(proj: nn.Module, name: str) -> Tensor:
    """The weight of a patch embedding's convolution, to be resized; UserError where its forward is more than that."""
    if parametrize.type_before_parametrizations(proj) is not nn.Conv2d or "forward" in proj.__dict__:
        raise UserError(
            f"{name}: patch_embed.proj is a {type(proj).__name__} with a forward of its own, which has no kernel to "
            "resize: merge it into a Conv2d first, or use the weights' own patch size"
        )
    weight: Any = proj.weight
    return weight


def layer_in(module: nn.Module, kind: type[nn.Module], fact: str) -> Any:
    """The layer that has a fact (``in_features``): the module, or what it wraps (an adapter, say)."""
    found = next((m for m in module.modules() if hasattr(m, fact) or isinstance(m, kind)), None)
    if found is None:
        raise UserError(f"a {type(module).__name__} has no {kind.__name__} in it: its {fact} is not known")
    return found


def around(module: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """``module(*args)`` with ``forward`` in the place of its own: the module's hooks run, and the global ones.

    The module itself is not touched, so that threads may share it.
    """
    if not is_heard(module):
        return forward(*args)
    glob = torch_modules
    kwargs: dict[str, Any] = {}
    for key, hook in (*glob._global_forward_pre_hooks.items(), *module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
        elif (given := hook(module, args)) is not None:
            args = given if isinstance(given, tuple) else (given,)
    full, plain = module._get_backward_hooks()
    before = module._get_backward_pre_hooks()
    backward: Any = BackwardHook(module, full, before) if full or before else None
    args = args if backward is None else backward.setup_input_hook(args)
    result = forward(*args, **kwargs)
    for key, hook in (*glob._global_forward_hooks.items(), *module._forward_hooks.items()):
        named = key in module._forward_hooks_with_kwargs or key in glob._global_forward_hooks_with_kwargs
        found = hook(module, args, kwargs, result) if named else hook(module, args, result)
        result = result if found is None else found
    result = result if backward is None else backward.setup_output_hook(result)
    if plain and isinstance(result, Tensor) and result.grad_fn is not None:
        for hook in plain:
            result.grad_fn.register_hook(lambda got, given, hook=hook: hook(module, got, given))
    return result


def is_heard(module: nn.Module) -> bool:
    """Whether a hook would run around a module: one of its own, or one of all modules."""
    g, m = torch_modules, module
    own = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return bool(own or g._global_forward_hooks or g._global_forward_pre_hooks or g._global_backward_hooks)


def through(module: nn.Module, run: Callable[[Tokens], tuple[Tokens, Result]], tokens: Tokens) -> tuple[Tokens, Result]:
    """``run`` on tokens, as the forward of a module of which hooks see the features [B, N, D] that go in and come out.

    UserError where a hook returns features of another shape.
    """
    if not is_heard(module):
        return run(tokens)
    kept: list[tuple[Tokens, Result]] = []

    def forward(x: Tensor) -> Tensor:
        kept.append(run(changed(tokens, x=_like(x, tokens.x, module))))
        return kept[-1][0].x

    x = around(module, forward, tokens.x)
    after, result = kept[-1]
    return (after if x is after.x else changed(after, x=_like(x, after.x, module))), result


def _like(x: Tensor, known: Tensor, module: nn.Module) -> Tensor:
    if x.shape != known.shape:
        raise UserError(
            f"a hook on {type(module).__name__} gave features of shape {tuple(x.shape)} for {tuple(known.shape)}: "
            "it has to keep the shape"
        )
    return x
