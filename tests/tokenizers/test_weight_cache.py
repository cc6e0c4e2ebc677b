"""Resized weights are kept between requests: never older than the weights, never more bytes than there is room for."""

from __future__ import annotations

import copy

import pytest
import torch

from oracles import make_images, make_vit
from saccade.model import AdaptiveViT
from saccade.tokenizers.resize import weight_cache as shelves
from saccade.tokenizers.resize.weight_cache import MOST, kept_bytes

SETTINGS = ("grid(8)", "grid(24)", "quadtree(7, sizes=(8, 16, 32))")


def adam(weight):
    step = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.ones_like(weight)
    step.step()


EDITS = {
    "data": lambda w: w.data.mul_(0.5),
    "one value of data": lambda w: w.data.view(-1)[-1].add_(1.0),
    "data, negated": lambda w: w.data.neg_(),
    "data, rows swapped": lambda w: w.data.copy_(w.data.flip(0) if w.shape[0] > 1 else w.data.flip(1)),
    "data replaced": lambda w: setattr(w, "data", w.data * 0.5),
    "copy_": lambda w: w.copy_(w * 0.5),
    "set_": lambda w: w.set_((w * 0.5).clone()),
    "numpy": lambda w: w.detach().numpy().__imul__(0.5),
    "swap": lambda w: torch.utils.swap_tensors(w, torch.nn.Parameter(w.detach() * 0.5)),
    "fused optimiser": adam,
    "foreach": lambda w: torch._foreach_mul_([w.data], 0.5),
    "averaging": lambda w: w.data.lerp_(torch.zeros_like(w), 0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("which", ["kernel", "positions"])
def test_every_edit_of_a_weight_is_seen(edit, which):
    vit = make_vit(img_size=64)
    model, images = AdaptiveViT(vit), make_images(vit)
    before = {setting: model.at(setting)(images).logits for setting in SETTINGS}
    assert kept_bytes(vit)
    EDITS[edit](vit.patch_embed.proj.weight if which == "kernel" else vit.pos_embed)
    for setting in SETTINGS:
        found = model.at(setting)(images).logits
        assert torch.equal(found, AdaptiveViT(copy.deepcopy(vit), setting)(images).logits)
        assert not torch.equal(found, before[setting])


@torch.no_grad()
def test_loaded_weights_are_seen():
    vit, other = make_vit(img_size=64), make_vit(img_size=64, seed=1)
    model, images = AdaptiveViT(vit, "grid(8)"), make_images(vit)
    for assign in (False, True):
        model(images)
        vit.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(model(images).logits, AdaptiveViT(other, "grid(8)")(images).logits)
        other = make_vit(img_size=64, seed=2)


@torch.no_grad()
def test_an_edit_is_seen_under_inference_mode_and_back():
    vit = make_vit(img_size=64)
    model, images = AdaptiveViT(vit, "grid(8)"), make_images(vit)
    with torch.inference_mode():
        before = model(images).logits.clone()
    vit.patch_embed.proj.weight.data.mul_(2)
    with torch.inference_mode():
        assert not torch.equal(model(images).logits, before)
    assert torch.equal(model(images).logits, AdaptiveViT(copy.deepcopy(vit), "grid(8)")(images).logits)


def test_what_is_kept_is_used(monkeypatch):
    vit, made = make_vit(img_size=64), []
    real = shelves.torch.equal
    monkeypatch.setattr(
        "saccade.tokenizers.grid.resize_kernel", lambda w, *a: (made.append(a), w.new_zeros(w.shape))[1]
    )
    with torch.no_grad():
        for _ in range(3):
            AdaptiveViT(vit, "grid(16, how='area', stride=8)")(make_images(vit))
    assert len(made) == 1 and real is torch.equal


@torch.no_grad()
def test_bytes_are_bounded():
    """By bytes, not by entries: large kernels push others out, the latest used stay, a giant is not kept at all."""
    vit = make_vit(img_size=64)
    model = AdaptiveViT(vit)
    sizes = [(8 * i, 8 * j) for i in range(1, 17) for j in range(1, 17)]
    most = 0
    for patch in sizes:
        model.at(f"grid({patch}, size=128)").tokenizer.weights(vit, (3, 3))
        most = max(most, kept_bytes(vit))
    assert most <= MOST
    last = model.at("grid((128, 128), size=128)").tokenizer
    assert last.weights(vit, (3, 3))[0] is last.weights(vit, (3, 3))[0]


@torch.no_grad()
@pytest.mark.parametrize("room", [0, 1000, 200_000, 1_000_000])
def test_any_room_will_do(monkeypatch, room):
    monkeypatch.setattr(shelves, "MOST", room)
    vit = make_vit(img_size=64)
    model, images = AdaptiveViT(vit), make_images(vit)
    for patch in (8, 12, 20, 24, 8, 20):
        found = model.at(f"grid({patch})")(images).logits
        assert torch.equal(found, AdaptiveViT(copy.deepcopy(vit), f"grid({patch})")(images).logits)
        assert kept_bytes(vit) <= room
