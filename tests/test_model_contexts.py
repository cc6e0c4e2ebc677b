"""What a model makes outlives the contexts of the caller: inference mode, default devices and types, random numbers."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import saccade
from oracles import make_images, make_vit
from saccade.core.registry import registry
from saccade.model import AdaptiveViT

SHAPE = {"depth": 3, "embed_dim": 48, "num_heads": 4, "img_size": 64}
SETTINGS = [
    *registry(),
    "depth(2, head='own')",
    "dpc_knn(0.5, at=1, learned=True)",
    "quadtree(7, size_embedding=True, detail=True)",
    "quadtree(7, scorer='gate')",
    "tokenlearner(3, at=1, version='1.0')",
    "adavit(0.5, form='paper')",
]


@contextmanager
def default_type(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS = {
    "inference mode": torch.inference_mode,
    "meta device": lambda: torch.device("meta"),
    "double by default": lambda: default_type(torch.float64),
    "half by default": lambda: default_type(torch.bfloat16),
    "no gradient": torch.no_grad,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_model_made_in_a_context_is_that_made_outside(setting, context):
    """Its first forward too: parameters that can be trained, of the same values, on the model's device."""
    vit = make_vit(**SHAPE)
    images, plain = make_images(vit), AdaptiveViT(make_vit(**SHAPE), setting).eval()
    model = AdaptiveViT(vit)
    with CONTEXTS[context]():
        view = model.at(setting).eval()
        view(images)
    for name, value in plain.learned.items():
        made = model.learned[name]
        assert not made.is_inference() and made.device == value.device and made.dtype == value.dtype
        assert torch.equal(made, value) and made.requires_grad == value.requires_grad
    assert torch.equal(view(images).logits, plain(images).logits)
    trained = model.at(setting).train()
    trained(images).logits.sum().backward()
    assert sum(p.grad is not None for p in trained.parameters()) > 20
    vit.eval()


@pytest.mark.parametrize("setting", ["dynamicvit(0.5)", "quadtree(7)", "grid(8)", "stem"])
def test_learning_goes_on_after_a_forward_in_inference_mode(setting):
    model = AdaptiveViT(make_vit(**SHAPE))
    images = make_images(model.vit)
    with torch.inference_mode():
        model.at(setting).eval()(images)
    view = model.at(setting).train()
    step = torch.optim.SGD(view.parameters(), lr=0.01)
    before = {name: value.clone() for name, value in view.named_parameters()}
    view(images).logits.square().sum().backward()
    step.step()
    assert any(not torch.equal(before[name], value) for name, value in view.named_parameters())


def test_a_model_created_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        model = saccade.create_model("vit_tiny_patch16_224", "dynamicvit(0.5)", **SHAPE)
    assert not any(p.is_inference() for p in model.parameters())
    model.train()(make_images(model.vit)).logits.sum().backward()


def test_a_loaded_model_can_be_trained(tmp_path):
    AdaptiveViT(make_vit(**SHAPE), "dynamicvit(0.5)").save(str(tmp_path / "m"))
    with torch.inference_mode():
        model = saccade.load(str(tmp_path / "m"))
        model.eval()(make_images(model.vit))
    assert not any(p.is_inference() for p in model.parameters())
    assert not any(value.is_inference() for value in model.learned.values())
    model.train()(make_images(model.vit)).logits.sum().backward()


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_random_number_is_taken(setting):
    """In evaluation: neither making a view nor running it moves torch's generator."""
    vit = make_vit(**SHAPE)
    images, model = make_images(vit), AdaptiveViT(vit)
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    model.at(setting).eval()(images)
    assert torch.equal(torch.get_rng_state(), expected)
