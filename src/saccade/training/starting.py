"""What training starts from: the model that a config names, its head, and its teacher."""

from __future__ import annotations

import os
from typing import cast

import timm
from torch import nn

from saccade.assets import folder
from saccade.backbones.vit import class_names_of, resize_of, set_class_names
from saccade.checkpoint import create_model, load_model
from saccade.core.timm_types import ViT
from saccade.data import ImageSet, Labels, head_labels
from saccade.data.labels import evident, some
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.storage.weights import load_weights
from saccade.tokenizers.resize.resampling import ResizeSpec, resize_kernel, resize_positions
from saccade.training.config import Distill, Source


def open_source(source: Source) -> AdaptiveViT:
    """The model that training starts from, with its folder's head. Raises UserError for anything amiss."""
    if source.name == "scenes" and not os.path.isdir("scenes"):  # the model that comes with the package
        source = source.model_copy(update={"name": folder("scenes")})
    if os.path.isdir(source.name):
        if source.weights or source.pretrained or source.args:
            raise UserError(f"{source.name!r} is a model folder: leave out model.weights, model.pretrained, model.args")
        model = load_model(source.name, "dense", runner=None).float()
        if source.new_head:
            model.vit.reset_classifier(0)
    else:
        args = source.args | ({"num_classes": 0} if source.new_head else {})
        model = create_model(source.name, weights=source.weights, pretrained=source.pretrained, **args)
    vit = model.vit
    if source.size is not None:
        size = (source.size, source.size) if isinstance(source.size, int) else source.size
        vit = vit if tuple(vit.patch_embed.img_size) == size else resized(vit, size)
    if source.crop_pct is not None:
        vit.pretrained_cfg = {**vit.pretrained_cfg, "crop_pct": source.crop_pct}
    return AdaptiveViT(vit, learned=model.learned, head=model.task_head)


def left_behind(source: Source, start: AdaptiveViT, task: str) -> list[str]:
    """A line for the user where a folder's head is for another task, which begins with a new one; else none."""
    head = start.task_head
    if head is None:
        return []
    return [f"{source.name} was trained for task {head.task!r}: its ViT is taken, and {task!r} begins with a new head"]


def resized(vit: ViT, size: int | tuple[int, int]) -> ViT:
    """A ViT whose own input size is ``size`` pixels, or (h, w): its position table is resized, as ``grid`` does it."""
    patch, (h, w) = vit.patch_embed.patch_size, (size, size) if isinstance(size, int) else size
    if min(h, w) < 1 or h % patch[0] or w % patch[1]:
        raise UserError(f"model.size={size} is no multiple of the patch size {patch[0]}x{patch[1]}")
    old, new = vit.patch_embed.grid_size, (h // patch[0], w // patch[1])
    table, spec = vit.pos_embed, resize_of(vit) or ResizeSpec()
    vit.patch_embed.set_input_size(img_size=(h, w))
    if table is not None:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        vit.pos_embed = nn.Parameter(resize_positions(table.detach(), old, new, prefix, spec))
    return vit


def fit_head(vit: ViT, images: ImageSet) -> Labels:
    """The class of each image for the model's head, which is renewed (with zeros) unless it knows all of the folders.

    Afterwards the model carries the names of its classes. Raises UserError for an unlabelled set.
    """
    classes = images.classes
    if images.labels is None or classes is None:
        raise UserError(f"no labels in {images.path}: training needs images laid out as class/name.jpg")
    names, count = class_names_of(vit), vit.num_classes
    try:
        found = head_labels(images, vit)
    except UserError:
        found = None
    if found is not None and evident(classes, names):
        if names is None and len(classes) == count:
            set_class_names(vit, classes)
        fewer = f"the head keeps its {count} classes; the images are of {len(classes)} of them"
        return Labels(
            found.indices, "; ".join([*([fewer] if len(classes) < count else []), *filter(None, [found.how])])
        )
    vit.reset_classifier(len(classes))
    for head in (vit.head, getattr(vit, "head_dist", None)):
        if isinstance(head, nn.Linear):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
    set_class_names(vit, classes)
    place = f" in place of that of {count}" if count else ""
    return Labels(images.labels, f"a new head for {len(classes)} classes ({some(classes)}){place}")


def open_teacher(rule: Distill) -> nn.Module:
    """A timm model of any kind, frozen, in evaluation mode."""
    if os.path.isdir(rule.teacher):
        teacher: nn.Module = load_model(rule.teacher, "dense", runner=None).float().vit
    elif rule.teacher.split(".")[0] in timm.list_models():
        if not (rule.teacher_weights or rule.teacher_pretrained):
            raise UserError(f"the teacher {rule.teacher} would have random weights: give distill.teacher_weights")
        teacher = timm.create_model(rule.teacher, pretrained=rule.teacher_pretrained)
        if rule.teacher_weights:
            load_weights(teacher, rule.teacher_weights)
    else:
        raise UserError(f"there is no teacher {rule.teacher!r}: give a folder or a timm model name")
    return teacher.eval().requires_grad_(False)


def start_from(student: ViT, teacher: nn.Module) -> None:
    """Give a ViT its teacher's weights; patch kernel and position table are resized to its own.

    Raises UserError where another tensor has another shape.
    """
    state = dict(teacher.state_dict())
    own = student.state_dict()
    if not hasattr(teacher, "patch_embed") or own.keys() != state.keys():
        raise UserError(f"distill.init: {type(teacher).__name__} and the student are not the same architecture")
    kernel, table = "patch_embed.proj.weight", "pos_embed"
    spec = resize_of(student) or ResizeSpec()
    if own[kernel].shape != state[kernel].shape:
        state[kernel] = resize_kernel(state[kernel], tuple(own[kernel].shape[-2:]), spec)
    if table in own and own[table].shape != state[table].shape:
        old, new = (vit.patch_embed.grid_size for vit in (cast(ViT, teacher), student))
        prefix = 0 if student.no_embed_class else student.num_prefix_tokens
        state[table] = resize_positions(state[table], old, new, prefix, spec)
    wrong = [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)} for {tuple(own[wrong[0]].shape)}"
        raise UserError(f"distill.init: {wrong[0]} of the teacher has another shape, {shapes}")
    student.load_state_dict(state)
