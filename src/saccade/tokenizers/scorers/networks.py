"""Frozen networks that scorers look through: by name, from torchvision or timm, with weights that are asked for.

A model neither owns nor saves them: they are in no state dict and no optimiser, always in evaluation mode, shared by
all scorers that want the same one, and follow the images' device.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from operator import index
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from saccade.core.operator_counter import counted_macs
from saccade.errors import UserError, near_miss
from saccade.storage.folder_config import check_open
from saccade.storage.skeletons import without_values

WEIGHTS = "'pretrained', 'random' or a safetensors file with the network's own keys"
# Cuts of torchvision's ShuffleNets: the last of these parts that is kept, for each stride. The paper cuts before the
# classifier only.
SHUFFLENET = {4: "maxpool", 8: "stage2", 16: "stage3", 32: "conv5"}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


MOST_PARAMETERS = 200_000_000  # of a network that scores: more than the largest published one; in fp32 0.8 gigabytes


class Network:
    """One frozen network; pickled and copied by its name."""

    def __init__(self, name: str, stride: int | None, weights: str, blocks: int | None, module: nn.Module) -> None:
        self.key = name, stride, weights, blocks
        self.cpu = module
        cfg: Any = getattr(module, "pretrained_cfg", None) or {}
        self.mean, self.std = cfg.get("mean", IMAGENET[0]), cfg.get("std", IMAGENET[1])
        self._on: dict[torch.device, nn.Module] = {}
        self.on(torch.device("cpu"))  # now: a graph that is traced cannot copy modules

    def on(self, device: torch.device) -> nn.Module:
        """The network on a device, made once for each; one that was cut, in its fastest form."""
        if device not in self._on:
            with torch.inference_mode(False), torch.no_grad():
                made = copy.deepcopy(self.cpu)
                if self.key[1] is not None:  # twice as fast on a CPU
                    made = _folded(made).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                self._on[device] = made.to(device)
        return self._on[device]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels 0 … 1 [B, 3, H, W] as the network wants them."""
        mean, std = self.statistics(pixels)
        return (pixels - mean) / std

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation that the network wants, [3, 1, 1] each."""
        mean, std = (torch.tensor(v, dtype=like.dtype, device=like.device)[:, None, None] for v in self.stats)
        return mean, std

    @property
    def stats(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, as tuples."""
        return tuple(self.mean), tuple(self.std)

    def macs(self, height: int, width: int) -> int:
        """Per image, by torch's counter on a network without values."""
        name, stride, _, blocks = self.key
        return _counted(name, stride, blocks, index(height), index(width))  # where a compiler made them symbols

    def __reduce__(self) -> tuple:
        return open_network, self.key

    def __deepcopy__(self, memo: dict) -> Network:
        return self


def open_network(name: str, stride: int | None, weights: str, blocks: int | None = None) -> Network:
    """A network by its name, cut where its maps have a stride; None: the whole classifier.

    Args:
        name: torchvision's, or timm's; ``timm/…`` where both have it.
        weights: 'pretrained' fetches torchvision's or timm's own, 'random' is for measuring costs, or a file.
        blocks: of a ViT, whose maps all have one stride: cut after so many; None: after the last.

    Raises:
        UserError: unknown name or stride, weights that cannot be had.
    """
    if weights != "random":
        check_open(f"the weights of the scorer network {name!r} ({weights!r})")
    return _opened(name, stride, weights, blocks)


@lru_cache(maxsize=8)
def _opened(name: str, stride: int | None, weights: str, blocks: int | None) -> Network:
    if weights in ("pretrained", "random"):
        state = None
    else:
        from saccade.storage.weights import read_weights

        state = read_weights(weights)
    try:
        _check_size(name, stride, blocks)
        # A later caller may ask for gradients; and 'random' weights are the same each time.
        with torch.inference_mode(False), torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)
            module = _create(name, stride, blocks, weights == "pretrained", state)
    except UserError:
        raise
    except Exception as error:
        if weights != "pretrained":
            raise UserError(f"scorer network {name!r}: {_line(error)}") from None
        raise UserError(
            f"cannot fetch the weights of the scorer network {name!r} ({_line(error)}); give a safetensors file with "
            f"weights='net.safetensors', or take scorer='pixel', which needs none"
        ) from None
    return Network(name, stride, weights, blocks, module.eval().requires_grad_(False))


def _check_size(name: str, stride: int | None, blocks: int | None) -> None:
    """Raises UserError for a network of more parameters than a scorer may have, before memory is taken for them."""
    count = sum(p.numel() for p in skeleton(name, stride, blocks).parameters())
    if count > MOST_PARAMETERS:
        raise UserError(
            f"scorer network {name!r} has {count / 1e6:,.0f} million parameters, limit {MOST_PARAMETERS / 1e6:.0f}: "
            "a scorer should cost less than what it saves; take a smaller network"
        )


def skeleton(name: str, stride: int | None, blocks: int | None = None) -> nn.Module:
    """The same network without values, for shapes and costs."""
    try:
        with without_values():
            module = _create(name, stride, blocks, False, None)
    except NotImplementedError:  # its builder computes widths with tensors
        module = _create(name, stride, blocks, False, None).to("meta")
    return module.eval().requires_grad_(False)


def _create(
    name: str, stride: int | None, blocks: int | None, pretrained: bool, state: dict[str, Tensor] | None
) -> nn.Module:
    import torchvision.models as zoo

    own = name.removeprefix("timm/")
    vit = own in timm.list_models() and timm.models.is_model_in_modules(own, ("vision_transformer", "deit"))
    if blocks is not None and not vit:
        raise UserError(f"scorer network {name!r} is no ViT to be cut after {blocks} blocks: leave blocks out")
    if own == name and name in zoo.list_models(zoo) and (stride is None or name.startswith("shufflenet")):
        return _of_torchvision(name, stride, pretrained, state)
    if own not in timm.list_models():
        raise UserError(f"scorer network {name!r}: neither torchvision nor timm has it{_close(own)}")
    if stride is None:
        return _filled(timm.create_model(own, pretrained=pretrained), name, state)
    if vit:
        return _of_vit(own, stride, blocks, pretrained, state)
    info: Any = timm.create_model(own, features_only=True).feature_info
    strides = info.reduction()
    if stride not in strides:
        raise UserError(f"scorer network {name!r} has no maps of stride {stride}; it has {sorted(set(strides))}")
    last = len(strides) - 1 - strides[::-1].index(stride)
    trunk = timm.create_model(own, features_only=True, out_indices=(last,), pretrained=pretrained)
    return _OneMap(_filled(trunk, name, state), timm.get_pretrained_cfg(own))


def _of_vit(name: str, stride: int, blocks: int | None, pretrained: bool, state: dict[str, Tensor] | None) -> nn.Module:
    """The first blocks of a ViT, whose patch tokens are the map; for images of any size, as timm resizes positions."""
    at = -1 if blocks is None else blocks - 1
    ways: dict[str, Any] = {"dynamic_img_size": True, "dynamic_img_pad": True, "pretrained": pretrained}
    try:
        trunk: Any = timm.create_model(name, features_only=True, out_indices=(at,), **ways)
    except AssertionError:
        raise UserError(f"scorer network {name!r} has not {blocks} blocks: give fewer") from None
    if trunk.model.patch_embed.patch_size != (stride, stride):
        raise UserError(
            f"scorer network {name!r} has no maps of stride {stride}; it has {[trunk.model.patch_embed.patch_size[0]]}"
        )
    _filled(trunk.model, name, state)
    return _OneMap(trunk, timm.get_pretrained_cfg(name))


def _of_torchvision(name: str, stride: int | None, pretrained: bool, state: dict[str, Tensor] | None) -> nn.Module:
    import torchvision.models as zoo

    if stride is not None and stride not in SHUFFLENET:
        raise UserError(f"scorer network {name!r} has no maps of stride {stride}; it has {sorted(SHUFFLENET)}")
    model = zoo.get_model(name, weights=None)
    if pretrained:
        state = zoo.get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True, weights_only=True)
    model = _filled(model, name, state)
    if stride is None:
        return model
    names = ["conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"]
    return nn.Sequential(*(getattr(model, part) for part in names[: names.index(SHUFFLENET[stride]) + 1]))


class _OneMap(nn.Module):
    """The only map of a timm feature network."""

    def __init__(self, trunk: nn.Module, cfg: Any) -> None:
        super().__init__()
        self.trunk, self.pretrained_cfg = trunk, {} if cfg is None else cfg.to_dict()
        self.last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"

    def forward(self, x: Tensor) -> Tensor:
        (found,) = self.trunk(x)
        return found.permute(0, 3, 1, 2) if self.last else found


def _folded(module: nn.Module) -> nn.Module:
    """The same in evaluation, with batch normalisation put into the convolution before it, where one follows the
    other in a Sequential."""
    for part in module.modules():
        if not isinstance(part, nn.Sequential):
            continue
        for (name, conv), (following, norm) in pairwise(list(part.named_children())):
            if isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d:
                setattr(part, name, fuse_conv_bn_eval(conv, norm))
                setattr(part, following, nn.Identity())
    return module


def _filled(module: nn.Module, name: str, state: dict[str, Tensor] | None) -> nn.Module:
    """Load weights; what a cut network has no use for may be there too."""
    if state is not None:
        wrong = [k for k, v in module.state_dict().items() if k not in state or state[k].shape != v.shape]
        if wrong:
            raise UserError(
                f"these are no weights of the scorer network {name!r}: {wrong[0]} and {len(wrong) - 1} more tensors "
                "are missing or of another shape"
            )
        module.load_state_dict(state, strict=False)
    return module


@torch.compiler.assume_constant_result
def _counted(*key: Any) -> int:
    return _count(*key)


@lru_cache(maxsize=256)
def _count(name: str, stride: int | None, blocks: int | None, height: int, width: int) -> int:
    def run() -> int:
        module = skeleton(name, stride, blocks)
        with torch.no_grad():
            return counted_macs(lambda: module(torch.zeros(1, 3, height, width, device="meta")))

    with ThreadPoolExecutor(1) as clean:  # a tracer's modes stay behind
        return clean.submit(run).result()


def _close(name: str) -> str:
    return near_miss(name, timm.list_models()) or "; timm.list_models() lists those that it has"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
