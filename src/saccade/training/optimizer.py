"""The optimiser: who learns at which rate, the cosine, averaged weights, gradients over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from saccade.core.head import PREFIX
from saccade.training.config import Optim
from saccade.training.multi_setting import MultiSettingModel


def build_optimizer(student: MultiSettingModel, extra: nn.Module, rule: Optim) -> torch.optim.AdamW:
    """AdamW with groups for backbone, head and methods, each with and without weight decay.

    Biases, norms, position tables, tokens and whatever timm's ``no_weight_decay`` names do not decay. The head of a
    task, and ``extra`` (of training alone), learn at the rate of the ViT's own head. Each group keeps its factor on
    ``lr`` as ``scale``.
    """
    spared = {f"vit.{name}" for name in student.vit.no_weight_decay()}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    named = [(_part(name), name, parameter) for name, parameter in student.named_parameters()]
    named += [("head", name, parameter) for name, parameter in extra.named_parameters()]
    for part, name, parameter in named:
        decays = parameter.ndim > 1 and name not in spared and not name.endswith(("_token", "_tokens", "pos_embed"))
        groups.setdefault((part, decays), []).append(parameter)
    made = [
        {
            "params": parameters,
            "part": part,
            "scale": getattr(rule, part),
            "weight_decay": rule.weight_decay if decays else 0.0,
        }
        for (part, decays), parameters in groups.items()
        if getattr(rule, part) > 0
    ]
    for (part, _), parameters in groups.items():
        if getattr(rule, part) == 0:
            for parameter in parameters:
                parameter.requires_grad_(False)
    return torch.optim.AdamW(made, lr=rule.lr, betas=rule.betas, fused=True)


def _part(name: str) -> str:
    """What a parameter of the student belongs to."""
    if name.startswith(("vit.head.", "vit.head_dist.", PREFIX)):
        return "head"
    return "backbone" if name.startswith("vit.") else "methods"


def rate(step: int, steps: int, rule: Optim) -> float:
    """The learning rate of a step: a linear warm-up, then half a cosine down to ``final · lr``."""
    warm = math.ceil(rule.warmup * steps)
    if step < warm:
        return rule.lr * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return rule.lr * (rule.final + (1 - rule.final) * 0.5 * (1 + math.cos(math.pi * done)))


def set_rate(optimizer: torch.optim.Optimizer, lr: float, frozen: bool) -> None:
    """Give every group its rate; a frozen backbone neither learns nor decays nor costs a backward pass."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
        if group["part"] == "backbone":
            for parameter in group["params"]:
                if parameter.requires_grad == frozen:
                    parameter.requires_grad_(not frozen)
                    parameter.grad = None


def average_gradients(parameters: Iterable[Tensor], world: int) -> None:
    """Mean of all processes' gradients, in one exchange. All must have run the same settings."""
    if world == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    torch.distributed.all_reduce(flat)
    flat /= world
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that the optimiser remembers, by the place of the parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, held in state.items() for name, value in held.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        place, name = key.split(".")
        state.setdefault(int(place), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
