"""What learning to classify minimises: labels, and a teacher's opinion of the same view; what methods ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.operator_counter import counted_macs
from saccade.core.output import Output
from saccade.data import Preprocess
from saccade.model import AdaptiveViT
from saccade.training.config import Distill


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher makes of a batch."""

    logits: Tensor  #   [b, K]
    features: Tensor  # [b, D]  pooled, before the head


class Teacher:
    """A frozen timm model that looks at the student's very views, at its own input size and normalisation."""

    def __init__(self, module: nn.Module, student: Preprocess, order: Sequence[int] | None = None) -> None:
        """``order`` says where each of the student's classes is among the module's; None: they are the same."""
        self.order = None if order is None else list(order)
        self.module, self.student, self.own = module, student, Preprocess.of(module)
        image = torch.zeros(1, 3, *student.size, device=next(module.parameters()).device)
        self.macs = counted_macs(lambda: self(image))
        self.width: int = module.num_features  # type: ignore[assignment]

    def __call__(self, images: Tensor) -> TeacherOutput:
        """Images as the student's normalisation left them, [b, 3, h, w] -> its opinion, without gradient."""
        with torch.no_grad():
            seen = sized(images, self.own.size)
            if (self.student.mean, self.student.std) != (self.own.mean, self.own.std):
                old, new = (
                    (seen.new_tensor(p.mean)[:, None, None], seen.new_tensor(p.std)[:, None, None])
                    for p in (self.student, self.own)
                )
                seen = (seen * old[1] + old[0] - new[0]) / new[1]
            features = self.module.forward_features(seen)  # type: ignore[operator]
            pooled = self.module.forward_head(features, pre_logits=True)  # type: ignore[operator]
            logits = self.module.forward_head(features)  # type: ignore[operator]
            return TeacherOutput(logits if self.order is None else logits[:, self.order], pooled)


def sized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [b, 3, h, w] at another size."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


def pooled(model: AdaptiveViT, out: Output) -> Tensor:
    """Features of a forward pass as its head sees them, [b, D]."""
    tokens, vit = out.tokens, model.vit
    if vit.global_pool == "token":
        return vit.norm(tokens.x[:, 0])
    weights = tokens.weights()
    patches = vit.norm(tokens.patches)
    if weights is None:
        return patches.mean(1)
    share = (weights / weights.sum(1, keepdim=True)).to(patches.dtype)
    return (share.unsqueeze(-1) * patches).sum(1)


def terms(
    model: AdaptiveViT,
    out: Output,
    targets: Tensor,
    teacher_out: TeacherOutput | None,
    rule: Distill,
    project: nn.Module,
    full: int,
) -> dict[str, Tensor]:
    """The parts of the loss by name, as ``Task.terms`` gives them.

    Args:
        targets: float [b, K], rows sum to 1.
        taught: the teacher's opinion; None: labels only.
        project: brings features to the teacher's width.
    """
    logp = out.logits.float().log_softmax(-1)
    share = 0.0 if teacher_out is None else rule.weight
    found = {"label": (1 - share) * -(targets * logp).sum() / full}
    if teacher_out is not None:
        found["teacher"] = share * from_teacher(out.logits.float(), teacher_out.logits.float(), rule) / full
        if rule.features:
            likeness = F.cosine_similarity(project(pooled(model, out)).float(), teacher_out.features.float(), dim=-1)
            found["features"] = rule.features * (1 - likeness).sum() / full
    return found


def method_losses(model: AdaptiveViT, out: Output, share: float) -> dict[str, Tensor]:
    """What the methods of a setting ask for, times ``share`` of a whole batch."""
    found: dict[str, Tensor] = {}
    for method in model.plan.methods:
        for name, value in method.loss(out.trace).items():
            found[name] = found.get(name, 0.0) + value * share
    return found


def from_teacher(student: Tensor, teacher: Tensor, rule: Distill) -> Tensor:
    """KL(teacher ‖ student) · T², or the cross-entropy with the teacher's best class, summed over images.

    Hinton et al., arXiv 1503.02531; hard labels as in DeiT, arXiv 2012.12877.
    """
    if rule.kind == "hard":
        return F.cross_entropy(student, teacher.argmax(-1), reduction="sum")
    t = rule.temperature
    return F.kl_div((student / t).log_softmax(-1), (teacher / t).log_softmax(-1), reduction="sum", log_target=True) * (
        t * t
    )
