"""``gradcam``: where a large classifier sees the class — the paper's oracle (Quadformer, arXiv 2304.00287, §4).

Grad-CAM (arXiv 1610.02391): the channels of the last feature map, weighted by the mean gradient of the class's logit.
An upper bound for scorers, not a scorer to deploy: it knows the label and costs more than the ViT.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.plan import Backbone
from saccade.core.timm_types import ViT
from saccade.errors import UserError
from saccade.tokenizers.mosaic.geometry import Geometry
from saccade.tokenizers.scorers.base import Scene, Scorer, current, pooled, register_scorer
from saccade.tokenizers.scorers.networks import Network, open_network, skeleton

# Hooks stay where they are, on a network that threads share, and do nothing unless their own thread listens to them:
# the module that is listened to, and what it gave.
_LISTENING: ContextVar[tuple[nn.Module, list[Tensor]] | None] = ContextVar("gradcam", default=None)


class GradCam(Scorer):
    """Mean over each block of a classifier's class activation map."""

    def __init__(self, network: Network, layer: str) -> None:
        super().__init__()
        self.network, self.layer = network, layer or last_map(network.key[0])

    def macs(self, vit: ViT, geometry: Geometry) -> int:
        h, w = (side * geometry.patch for side in geometry.cells)
        heads = [m for m in self.network.cpu.modules() if isinstance(m, nn.Linear)][-1:]
        back = sum(head.in_features * head.out_features for head in heads)  # the gradient goes no further than the map
        return self.network.macs(h, w) + back

    def forward(self, scene: Scene) -> list[Tensor]:
        if scene.images.shape[1] != 3:
            raise UserError(f"scorer gradcam needs 3 channels, images have {scene.images.shape[1]}: take 'pixel'")
        maps = class_maps(self.network, scene.pixels(), current().labels, self.layer)
        # As published: enlarged smoothly to the finest cells, then the mean over a block.
        cells = F.interpolate(maps.unsqueeze(1), size=scene.geometry.cells, mode="bilinear").squeeze(1)
        return pooled(cells, scene.geometry)


def class_maps(network: Network, pixels: Tensor, labels: Tensor | None, layer: str) -> Tensor:
    """Class activation maps, 0 … 1, of the labels [B] or of what the network takes the images for: [B, h, w] fp32."""
    net = network.on(pixels.device)
    target = dict(net.named_modules())[layer]
    if not any(hook is _listen for hook in target._forward_hooks.values()):
        target.register_forward_hook(_listen)
    heard: list[Tensor] = []
    token = _LISTENING.set((target, heard))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            logits = net(network.normalised(pixels.clone()).float())
            chosen = logits.argmax(-1) if labels is None else labels.to(logits.device)
            if chosen.shape != logits.shape[:1]:
                raise UserError(f"scorer gradcam: {len(chosen)} labels for {logits.shape[0]} images")
            (slope,) = torch.autograd.grad(logits.gather(1, chosen.unsqueeze(1)).sum(), heard[-1:])
    finally:
        _LISTENING.reset(token)
    features, slope = (_as_map(x, net) for x in (heard[-1].detach(), slope))
    cam = (slope.mean((2, 3), keepdim=True) * features).sum(1).relu()
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    return (cam - low) / (high - low).clamp(min=1e-12)


def _listen(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """Cut the graph below the map, so that the gradient need not go further."""
    listening = _LISTENING.get()
    if listening is None or listening[0] is not module:
        return None
    leaf = output.detach().requires_grad_()
    listening[1].append(leaf.view_as(leaf))  # torch's counter of operators cannot follow a gradient that ends in a leaf
    return listening[1][-1]


def _as_map(x: Tensor, net: nn.Module) -> Tensor:
    """Features of any layout as [B, C, h, w]."""
    if x.ndim == 3:  # tokens
        vit = cast(ViT, net)
        return x[:, vit.num_prefix_tokens :].mT.unflatten(2, vit.patch_embed.grid_size)
    return x.permute(0, 3, 1, 2) if getattr(net, "output_fmt", "NCHW") == "NHWC" else x


@lru_cache(maxsize=64)
def last_map(name: str) -> str:
    """The module whose output is the last map before pooling, by running the network without values."""

    def run() -> str:
        net, found = skeleton(name, None), []
        blocks = getattr(net, "blocks", None)
        if blocks is not None and hasattr(net, "num_prefix_tokens"):  # a ViT: its last block's patches are not read
            return f"blocks.{len(blocks) - 1}.norm1"

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[1:]) > 1:
                found.append(module)

        for module in net.modules():
            module.register_forward_hook(note)
        size = (getattr(net, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
        with torch.no_grad():
            net(torch.zeros(1, *size, device="meta"))
        if not found:
            raise UserError(f"scorer gradcam: {name!r} makes no feature map; name a module by layer=")
        return next(path for path, module in net.named_modules() if module is found[-1])

    with ThreadPoolExecutor(1) as clean:
        return clean.submit(run).result()


@register_scorer("gradcam")
def gradcam(
    backbone: Backbone, network: str = "regnet_y_32gf", weights: str = "pretrained", layer: str = ""
) -> GradCam:
    """Class activation maps of a large classifier, of labels given with ``scorers.given(labels=...)``: the oracle.

    Args:
        network: any classifier of torchvision or timm.
        weights: 'pretrained', 'random' or a safetensors file.
        layer: the module whose map is read; '': the last before pooling.
    """
    found = open_network(network, None, weights)
    if layer and layer not in dict(found.cpu.named_modules()):
        raise UserError(f"scorer gradcam: {network!r} has no module {layer!r}")
    return GradCam(found, layer)
