"""``check_method``: what the package asks of every method and tokenizer, for those from elsewhere.

    from saccade.testing import check_method

    check_method("mine(0.5)")

Each check is a function of a model and images; an AssertionError says what does not hold, of which setting.
"""

from __future__ import annotations

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from saccade.backbones.saving import save
from saccade.checkpoint import load_model
from saccade.core.operator_counter import counted_macs
from saccade.core.plan import Reducer
from saccade.core.registry import registry
from saccade.model import AdaptiveViT
from saccade.setting import Setting

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 96, "num_heads": 6, "img_size": 128, "num_classes": 10}
CLOSE = 1e-5  # of logits and features, over the largest


def check_method(setting: str, vit: nn.Module | None = None, images: Tensor | None = None) -> None:
    """Run all checks on one setting.

    Args:
        setting: that names the method, strong enough to leave some tokens out.
        vit: a timm ViT to try it on; None: a small one with random weights.
        images: [3, C, h, w], normalised; None: noise.

    Raises:
        AssertionError: a check that does not hold. UserError: a setting that cannot be built.
    """
    given = vit if vit is not None else _small()
    model = AdaptiveViT(given, setting).eval()
    if images is None:
        size = (3, model.backbone.channels, *model.input_size())
        images = torch.randn(size, generator=torch.Generator().manual_seed(0))
    for check in CHECKS:
        try:
            check(model, images)
        except AssertionError as error:
            said = str(error).splitlines()[0] if str(error) else (check.__doc__ or "").splitlines()[0]
            raise AssertionError(f"{setting}: {check.__name__.replace('_', ' ')}: {said}") from error


def the_setting_prints_as_it_was_read(model: AdaptiveViT, images: Tensor) -> None:
    """Text -> setting -> text is the same, and all knobs are explained."""
    assert Setting.parse(str(model.setting)) == model.setting
    for call in model.setting.calls:
        for knob, text in registry()[call.name].help.items():
            assert not text.startswith("["), f"knob {knob!r} of {call.name} is not in its docstring's Args"


@torch.inference_mode()
def counts_are_as_announced(model: AdaptiveViT, images: Tensor) -> None:
    """``count(n)`` is what is left, where it is a number at all."""
    sites = {"block": 0, "attn": 1}
    _, trace = model.forward_tokens(images)
    prefix = model.backbone.num_prefix
    left: int | None = int(trace.first.max()) + 1
    for at, block in enumerate(trace.blocks):
        for site in sites:
            for method in model.plan.methods:
                steps = [s for b, s in zip(method.at, method.steps, strict=True) if b == at and isinstance(s, Reducer)]
                for step in (s for s in steps if s.site == site and left is not None):
                    left = step.count(cast(int, left))
            if left is not None:
                found = block.static_counts[sites[site]] - prefix
                assert found == left, f"block {at} has {found} patch tokens and count() says {left}"


@torch.inference_mode()
def every_cell_is_owned_or_dropped(model: AdaptiveViT, images: Tensor) -> None:
    """Owner maps are whole, and nothing that was dropped comes back."""
    tokens, trace = model.forward_tokens(images)
    assert tokens.x.isfinite().all(), "features are not finite"
    cells = tokens.grid[0] * tokens.grid[1]
    assert torch.equal(tokens.area().sum(1) + (tokens.owner < 0).sum(1), torch.full((len(images),), cells))
    dropped = torch.zeros_like(tokens.owner, dtype=torch.bool)
    for block in trace.blocks:
        assert int(block.owner.max()) < max(block.static_counts), "an owner that is no token"
        assert ((block.owner < 0) >= dropped).all(), "a dropped cell comes back"
        dropped = block.owner < 0


@torch.inference_mode()
def macs_are_those_of_the_operators(model: AdaptiveViT, images: Tensor) -> None:
    """The trace's MACs, deciding included, are what an operator counter finds."""
    counted, told = counted_macs(lambda: model(images)), float(model(images).trace.macs().sum())
    assert abs(told - counted) <= 1e-3 * counted, f"{told:.0f} MACs in the trace and {counted:.0f} in the operators"


@torch.inference_mode()
def a_batch_equals_its_images(model: AdaptiveViT, images: Tensor) -> None:
    """One by one, and in another order: no image depends on its neighbours."""
    together = model(images).logits
    for i, image in enumerate(images):
        assert _near(model(image[None]).logits, together[i : i + 1]), f"image {i} alone gives other logits"
    assert _near(model(images.flip(0)).logits.flip(0), together), "another order gives other logits"


@torch.inference_mode()
def a_run_repeats(model: AdaptiveViT, images: Tensor) -> None:
    """The same images give the same, to the last bit, whatever the seed."""
    first = model(images).logits
    torch.manual_seed(1)
    assert torch.equal(model(images).logits, first)


def gradients_are_finite(model: AdaptiveViT, images: Tensor) -> None:
    """A step of training has a finite loss and finite gradients."""
    training = AdaptiveViT(model.vit, model.setting).train()
    try:
        out = training(images)
        loss = out.logits.square().sum()
        for method in training.plan.methods:
            loss = loss + sum(method.loss(out.trace).values())
        grads = torch.autograd.grad(loss, [p for p in training.parameters() if p.requires_grad], allow_unused=True)
        assert loss.isfinite() and all(g is None or g.isfinite().all() for g in grads)
    finally:
        training.eval()


@torch.inference_mode()
def a_folder_gives_it_back(model: AdaptiveViT, images: Tensor) -> None:
    """Saved and loaded it is the same function."""
    with TemporaryDirectory() as folder:
        save(model, f"{folder}/model")
        loaded = load_model(f"{folder}/model", runner=None)
    assert loaded.setting == model.setting and torch.equal(loaded(images).logits, model(images).logits)


Check = Callable[[AdaptiveViT, Tensor], None]
CHECKS: tuple[Check, ...] = (
    the_setting_prints_as_it_was_read,
    counts_are_as_announced,
    every_cell_is_owned_or_dropped,
    macs_are_those_of_the_operators,
    a_batch_equals_its_images,
    a_run_repeats,
    gradients_are_finite,
    a_folder_gives_it_back,
)


def _small() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vit = timm.create_model("deit_tiny_patch16_224", **SMALL).eval()
        for weight in vit.parameters():  # timm's zeros and ones hide what is wrong
            weight.data += 0.05 * torch.randn_like(weight)
    return vit


def _near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= CLOSE * expected.abs().max())
