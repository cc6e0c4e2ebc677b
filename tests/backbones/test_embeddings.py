"""Embeddings and intermediate features: timm's own where nothing is reduced, and what they should be where it is."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from oracles import FAMILIES, make_images, make_vit, relative
from saccade.errors import UserError
from saccade.model import AdaptiveViT

SETTINGS = ("", "tome(r=2)", "evit(0.5, at=1)", "imagepiece()", "quadtree(28, sizes=(8, 16))", "topk(0.5)", "ats()")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_is_timm_s(family):
    vit = make_vit(family).eval()
    model, images = AdaptiveViT(vit), make_images(vit)
    assert relative(model.embed(images), vit.forward_head(vit.forward_features(images), pre_logits=True)) <= 1e-6
    for how in ({}, {"norm": True}, {"indices": 2, "output_fmt": "NLC"}, {"indices": [0, 2]}):
        final, maps = model.forward_intermediates(images, return_prefix_tokens=True, **how)
        expected_final, expected = vit.forward_intermediates(images, return_prefix_tokens=True, **how)
        flat, expected_flat = ([x for one in said for x in (one if isinstance(one, tuple) else [one])]
                               for said in (maps, expected))  # fmt: skip
        assert relative(final, expected_final) <= 1e-6 and [x.shape for x in flat] == [x.shape for x in expected_flat]
        assert all(relative(a, b) <= 1e-6 for a, b in zip(flat, expected_flat, strict=True))
    only = model.forward_intermediates(images, 1, intermediates_only=True)
    assert len(only) == 1 and only[0].ndim == 4
    named = model.forward_intermediates(images, 1, output_dict=True, return_prefix_tokens=True)
    assert named.keys() == vit.forward_intermediates(images, 1, output_dict=True, return_prefix_tokens=True).keys()


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS)
def test_maps_of_every_block_under_a_setting(setting):
    """The last is the feature map; the first blocks are as dense until the first reduction; the answer is the same."""
    vit = make_vit("vit").eval()
    model, images = AdaptiveViT(vit, setting).eval(), make_images(vit)
    before = model(images, whole=True).logits
    final, maps = model.forward_intermediates(images, norm=True)
    assert len(maps) == len(vit.blocks)
    assert torch.allclose(maps[-1], model.feature_map(images), atol=1e-6)
    assert relative(model.forward_head(model.forward_features(images)), before) <= 1e-5
    assert final.shape[0] == len(images) and all(m.isfinite().all() for m in maps)


@torch.no_grad()
def test_a_merged_cell_has_its_tokens_features_and_a_dropped_one_its_last():
    vit = make_vit("vit").eval()
    images = make_images(vit)
    (first, second) = AdaptiveViT(vit, "evit(0.5, at=1, fuse=False)").forward_intermediates(
        images, [0, 1], output_fmt="NLC", intermediates_only=True
    )
    _, dense = vit.forward_intermediates(images, [0, 1], output_fmt="NLC")
    tokens, _ = AdaptiveViT(vit, "evit(0.5, at=1, fuse=False)").forward_tokens(images)
    dropped = tokens.owner < 0
    assert torch.equal(first, dense[0]) and dropped.any()
    assert not torch.allclose(second[~dropped], dense[0][~dropped])
    merged, _ = AdaptiveViT(vit, "tome(r=4)").forward_tokens(images)
    *_, last = AdaptiveViT(vit, "tome(r=4)").forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    assert all(torch.equal(last[0, a], last[0, b]) == bool(merged.owner[0, a] == merged.owner[0, b])
               for a in range(last.shape[1]) for b in range(a))  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS)
def test_pooling(setting):
    """A mean weighs merged patches by their number, and leaves out the class token, registers and what was dropped."""
    vit = make_vit("dinov2-registers" if "quadtree" not in setting else "vit").eval()
    model, images = AdaptiveViT(vit, setting).eval(), make_images(vit)
    tokens, _ = model.forward_tokens(images)
    x = vit.norm(tokens.x)
    assert torch.equal(model.embed(images, "token"), x[:, 0])
    weights = tokens.weights()
    weights = torch.ones(x.shape[0], tokens.num_patches) if weights is None else weights
    expected = torch.stack([
        sum(w * p for w, p in zip(row, patches, strict=True)) / row.sum()
        for row, patches in zip(weights, x[:, tokens.num_prefix :], strict=True)
    ])  # fmt: skip
    assert relative(model.embed(images, "mean"), expected) <= 1e-5
    length = model.embed(images, normalise=True).norm(dim=1)
    assert torch.allclose(length, torch.ones_like(length))


@torch.no_grad()
def test_each_family_pools_its_own_way():
    for family in FAMILIES:
        vit = make_vit(family).eval()
        model, images = AdaptiveViT(vit, "tome(r=1)" if vit.cls_token is not None else "").eval(), make_images(vit)
        own = {"token": "token", "avg": "mean", "map": "map"}[vit.global_pool]
        if type(vit).__name__ == "VisionTransformer" and not (own == "mean" and vit.pool_include_prefix):
            assert relative(model.embed(images), model.embed(images, own)) <= 1e-5, family


def test_what_cannot_be_given():
    vit = make_vit("vit").eval()
    model, images = AdaptiveViT(vit), make_images(vit)
    with pytest.raises(UserError, match="pool='max' is not one of own, token, mean, map"):
        model.embed(images, "max")
    with pytest.raises(UserError, match="no pooling by attention"):
        model.embed(images, "map")
    with pytest.raises(UserError, match="NCHW, NLC"):
        model.forward_intermediates(images, output_fmt="NHWC")
    with pytest.raises(UserError, match=r"runs blocks 0 to 0, 1 in all"):
        model.at("depth(1)").forward_intermediates(images, [1])


def test_gradients_reach_the_first_block():
    vit = make_vit("vit")
    model, images = AdaptiveViT(vit, "tome(r=2)"), make_images(vit)
    F.cosine_similarity(*model.embed(images, normalise=True)[:2], dim=0).backward()
    assert vit.patch_embed.proj.weight.grad.abs().sum() > 0
