"""What is trained: one ViT, and beside it what its settings learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from saccade.backbones.vit import resize_of, set_resize
from saccade.core.timm_types import ViT
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.renamed.model_names import OldWeightNames


class MultiSettingModel(OldWeightNames):
    """One ViT under several settings: ``views[i]`` runs the i-th; parameters are counted once.

    The state dict holds ``vit.*`` (timm's keys), ``settings.<i>.*`` for settings that learn, and ``task_head.*`` where
    the model has a head, which all settings share.
    """

    def __init__(self, model: AdaptiveViT, settings: Sequence[str]) -> None:
        super().__init__()
        self.vit: ViT = model.vit
        self.views = tuple(model if str(model.setting) == name else model.at(name, fresh=True) for name in settings)
        learned = {str(i): nn.ModuleList([view.tokenizer, view.plan]) for i, view in enumerate(self.views)}
        self.settings: nn.Module = nn.ModuleDict(learned)
        self.task_head = model.task_head
        ways = {view.tokenizer.resize for view in self.views} - {None}
        if len(ways) > 1:
            raise UserError(f"the settings resize the patch kernel in {len(ways)} ways: train with one resize=")
        if ways and resize_of(self.vit) is None:
            set_resize(self.vit, ways.pop())  # from now on the weights belong to it, and are saved with it

    def train(self, mode: bool = True) -> MultiSettingModel:
        super().train(mode)
        for view in self.views:
            view.training = mode  # their modules are this one's
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
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
