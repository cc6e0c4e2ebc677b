"""What learning to classify minimises: labels, and a teacher's output for the same view; what methods ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.operator_counter import counted_macs
from saccade.core.output import Output
from saccade.data import Preprocess
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.training.config import Distill


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher makes of a batch."""

    logits: Tensor  #   [b, K]
    features: Tensor  # [b, D]  pooled, before the head
    patches: Tensor | None = None  # [b, G, D]  normed patch tokens, one a cell; None: not computed


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
        """Images as the student's normalisation left them, [b, 3, h, w] -> its output, without gradient."""
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
            patches = features[:, self.module.num_prefix_tokens :]  # type: ignore[misc]
            return TeacherOutput(logits if self.order is None else logits[:, self.order], pooled, patches)


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


def token_loss(model: AdaptiveViT, out: Output, target: Tensor, project: nn.Module) -> Tensor:
    """Mean squared error of the patch tokens that are kept to the end, to the teacher's, all normed (DynamicViT).

    target [b, G, D'], one a cell: a token that stands for several cells is compared with their mean. A token that is
    dropped counts nothing, and whether it is has no gradient. UserError where the teacher has another grid.
    """
    tokens = out.tokens
    if target.shape[1] != tokens.owner.shape[1]:
        raise UserError(
            f"distill.tokens: the teacher has {target.shape[1]} patch tokens and the student's grid "
            f"{tokens.owner.shape[1]} cells: give a teacher of the same patch and input size, or distill.tokens=0"
        )
    area = tokens.area()
    slots, width = tokens.owner + 1, target.shape[2]
    sums = target.new_zeros(len(target), area.shape[1] + 1, width, dtype=torch.float32)
    sums = sums.scatter_add(1, slots.unsqueeze(2).expand_as(target), target.float())[:, 1:]
    counts = (area > 0).float()
    for known in (tokens.valid, tokens.keep_mask):
        counts = counts if known is None else counts * known.detach()
    error = project(model.vit.norm(tokens.patches)).float() - sums / area.clamp(min=1).unsqueeze(2)
    return (error.square().mean(2) * counts).sum() / counts.sum().clamp(min=1)


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
        teacher_out: the teacher's output; None: labels only.
        project: brings features to the teacher's width.
    """
    logp = out.logits.float().log_softmax(-1)
    share = 0.0 if teacher_out is None else rule.weight
    found = {"label": label_weight(rule, teacher_out) * -(targets * logp).sum() / full}
    if teacher_out is not None:
        found["teacher"] = share * from_teacher(out.logits.float(), teacher_out.logits.float(), rule) / full
        if rule.features:
            likeness = F.cosine_similarity(project(pooled(model, out)).float(), teacher_out.features.float(), dim=-1)
            found["features"] = rule.features * (1 - likeness).sum() / full
        if rule.tokens and teacher_out.patches is not None:
            error = token_loss(model, out, teacher_out.patches, project)
            found["tokens"] = rule.tokens * error * (len(targets) / full)
    return found


def method_losses(model: AdaptiveViT, out: Output, share: float) -> dict[str, Tensor]:
    """What the methods of a setting ask for, times ``share`` of a whole batch."""
    found: dict[str, Tensor] = {}
    for method in model.plan.methods:
        for name, value in method.loss(out.trace).items():
            found[name] = found.get(name, 0.0) + value * share
    return found


def label_weight(rule: Distill, teacher_out: TeacherOutput | None) -> float:
    """What the labels weigh in the loss."""
    if teacher_out is None:
        return 1.0
    return 1 - rule.weight if rule.labels is None else rule.labels


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
