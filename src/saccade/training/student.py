"""What is trained: one ViT, and beside it what its settings learn."""

from __future__ import annotations

import os
from collections.abc import Sequence

import timm
import torch
from torch import nn

from saccade.assets import folder
from saccade.backbone import class_names_of, resize_of, set_class_names, set_resize
from saccade.checkpoint import create_model, load
from saccade.data import ImageSet, Labels, head_labels
from saccade.data.labels import evident, some
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.plan import ViT
from saccade.tokenizers.embed import ResizeSpec, resize_kernel, resize_positions
from saccade.training.config import Distill, Source
from saccade.weights import load_weights


class Student(nn.Module):
    """One ViT under several settings: ``views[i]`` runs the i-th; parameters are counted once.

    The state dict holds ``vit.*`` (timm's keys), what the model has ``beside`` it for all settings, such as
    ``decoder.*``, and for settings that learn ``settings.<i>.*``.
    """

    def __init__(self, model: AdaptiveViT, settings: Sequence[str]) -> None:
        super().__init__()
        self.vit: ViT = model.vit
        self.views = tuple(model if str(model.setting) == name else model.at(name) for name in settings)
        learned = {str(i): nn.ModuleList([view.tokenizer, view.plan]) for i, view in enumerate(self.views)}
        self.settings: nn.Module = nn.ModuleDict(learned)
        own = ("vit", "tokenizer", "plan")
        self.beside = tuple(name for name, _ in model.named_children() if name not in own)
        for name in self.beside:
            self.add_module(name, getattr(model, name))
        ways = {view.tokenizer.resize for view in self.views} - {None}
        if len(ways) > 1:
            raise UserError(f"the settings resize the patch kernel in {len(ways)} ways: train with one resize=")
        if ways and resize_of(self.vit) is None:
            set_resize(self.vit, ways.pop())  # from now on the weights belong to it, and are saved with it

    def train(self, mode: bool = True) -> Student:
        super().train(mode)
        for view in self.views:
            view.training = mode  # their modules are this one's
        return self

    @property
    def device(self) -> torch.device:
        return self.vit.patch_embed.proj.weight.device

    def macs(self) -> list[float]:
        """Forward MACs per image of each setting, for images of the model's own size (mean, where they differ)."""
        backbone = self.views[0].backbone
        images = torch.zeros(1, backbone.channels, *backbone.input_size, device=self.device)
        mode = self.training
        self.eval()
        with torch.no_grad():
            costs = [view(images).trace.macs().mean().item() for view in self.views]
        self.train(mode)
        return costs


def open_source(source: Source) -> AdaptiveViT:
    """The model that training starts from. Raises UserError for anything amiss."""
    if source.name == "scenes" and not os.path.isdir("scenes"):  # the model that comes with the package
        source = source.model_copy(update={"name": folder("scenes")})
    if os.path.isdir(source.name):
        if source.weights or source.pretrained or source.args:
            raise UserError(f"{source.name!r} is a model folder: leave out model.weights, model.pretrained, model.args")
        model = load(source.name, "dense", runner=None).float()
    else:
        model = create_model(source.name, weights=source.weights, pretrained=source.pretrained, **source.args)
    vit = model.vit
    if source.size is not None:
        size = (source.size, source.size) if isinstance(source.size, int) else source.size
        vit = vit if tuple(vit.patch_embed.img_size) == size else resized(vit, size)
    if source.crop_pct is not None:
        vit.pretrained_cfg = {**vit.pretrained_cfg, "crop_pct": source.crop_pct}
    return AdaptiveViT(vit, learned=model.learned)


def resized(vit: ViT, size: int | tuple[int, int]) -> ViT:
    """A ViT whose own input size is ``size`` pixels, or (h, w): its position table is resized, as ``grid`` does it."""
    patch, (h, w) = vit.patch_embed.patch_size, (size, size) if isinstance(size, int) else size
    if min(h, w) < 1 or h % patch[0] or w % patch[1]:
        raise UserError(f"model.size={size} is no multiple of the patch size {patch[0]}x{patch[1]}")
    old, new = tuple(vit.patch_embed.grid_size), (h // patch[0], w // patch[1])
    table, spec = vit.pos_embed, resize_of(vit) or ResizeSpec()
    vit.patch_embed.set_input_size(img_size=size)
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
        teacher: nn.Module = load(rule.teacher, "dense", runner=None).float().vit
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
        sides: list[ViT] = [teacher, student]
        old, new = (tuple(vit.patch_embed.grid_size) for vit in sides)
        prefix = 0 if student.no_embed_class else student.num_prefix_tokens
        state[table] = resize_positions(state[table], old, new, prefix, spec)
    wrong = [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)} for {tuple(own[wrong[0]].shape)}"
        raise UserError(f"distill.init: {wrong[0]} of the teacher has another shape, {shapes}")
    student.load_state_dict(state)
