"""An ``AdaptiveViT`` and its output where code was written for a timm model and its logits."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn import functional as F

import saccade
from oracles import FAMILIES, make_images, make_vit
from saccade.core.output import Output
from saccade.errors import UserError
from saccade.model import AdaptiveViT

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}


def small(setting: str = "", **changes) -> AdaptiveViT:
    torch.manual_seed(0)
    return saccade.create_model("vit_tiny_patch16_224", setting, **{**SMALL, **changes})


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_answer_as_timm_does(family):
    vit = make_vit(family)
    model = AdaptiveViT(vit)
    names = ["num_classes", "num_features", "embed_dim", "global_pool", "pretrained_cfg", "default_cfg"]
    for name in [*names, "feature_info", "num_prefix_tokens", "head_hidden_size"]:
        assert getattr(model, name) == getattr(vit, name)
    assert model.get_classifier() == vit.get_classifier()
    images = make_images(vit)
    with torch.no_grad():
        features = model.forward_features(images)
        assert torch.allclose(features, vit.forward_features(images), atol=1e-5)
        assert torch.allclose(model.forward_head(features), vit(images), atol=1e-5)
        expected = vit.forward_head(vit.forward_features(images), pre_logits=True)
        assert torch.allclose(model.forward_head(features, pre_logits=True), expected, atol=1e-5)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("setting", ["dense", "tome(r=2)", "evit(0.5, fuse=True)", "ats(at=1)", "quadtree(7)"])
def test_features_and_head_are_the_forward_under_every_setting(pool, setting, images):
    model = small(setting, global_pool=pool).eval()
    with torch.no_grad():
        features = model.forward_features(images)
        assert torch.allclose(model.forward_head(features), model(images).logits, atol=1e-5)
        assert features.ndim == 3 and features.shape[2] == 48
        features[:, 1:] = 0  # an edit counts
        assert torch.allclose(model.forward_head(features), model(images).logits, atol=1e-5) is (pool == "token")


@pytest.mark.parametrize(
    "setting, pool, fails",
    [
        ("dense", "avg", False),
        ("dense", "token", False),
        ("tome(r=2)", "token", False),
        ("tome(r=2)", "avg", True),
        ("quadtree(7)", "avg", True),
        ("depth(2, head='own')", "token", True),
    ],
)
def test_a_head_of_changed_features_is_right_or_refused(setting, pool, fails, images):
    model = small(setting, global_pool=pool).eval()
    features = model.forward_features(images) * 1.0
    if fails:
        with pytest.raises(UserError, match="forward_head cannot tell what the"):
            model.forward_head(features)
    else:
        assert torch.allclose(model.forward_head(features), model(images).logits, atol=1e-5)


def test_the_classifier_is_reset_in_place(images):
    model = small("tome(r=2)")
    model.vit.pretrained_cfg = {**model.vit.pretrained_cfg, "label_names": list("abcde")}
    assert model.class_names == tuple("abcde")
    model.reset_classifier(7)
    assert (model.num_classes, model.backbone.num_classes, model(images).logits.shape) == (7, 7, (2, 7))
    model.reset_classifier(5)
    assert model.class_names is None  # a new head of as many classes is no head of these classes
    model.reset_classifier(0, "avg")
    assert model.global_pool == model.backbone.pool == "avg"
    assert torch.allclose(model(images).logits, model.forward_head(model.forward_features(images)), atol=1e-5)


def test_timm_finds_its_way(images):
    model = small()
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == model.pretrained_cfg["mean"]
    named = {name for name, _ in model.named_parameters()}
    assert {"vit.cls_token", "vit.pos_embed"} <= model.no_weight_decay() & named
    groups = param_groups_weight_decay(model, no_weight_decay_list=model.no_weight_decay())
    assert sum(len(group["params"]) for group in groups) == len(named)
    model.set_grad_checkpointing()
    assert model.vit.grad_checkpointing
    with pytest.raises(AttributeError, match=r"its timm module has: model.vit.blocks"):
        model.blocks  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        model.nothing  # noqa: B018
    assert not hasattr(model, "patch_embed")


# The output


def test_losses_take_an_output(images):
    model, targets = small("evit(0.5)"), torch.tensor([1, 3])
    out = model(images)
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1), nn.MultiMarginLoss()):
        assert torch.equal(loss(out, targets), loss(out.logits, targets))
    F.cross_entropy(out, targets).backward()
    assert model.vit.patch_embed.proj.weight.grad is not None
    kl = F.kl_div(out.log_softmax(-1), target=out.softmax(-1), reduction="batchmean")
    assert kl.abs() < 1e-6


def test_an_output_is_its_logits_to_torch(images):
    out = small()(images)
    assert torch.equal(out.argmax(1), out.logits.argmax(1))
    assert torch.equal(torch.softmax(out, -1), out.logits.softmax(-1))
    assert torch.equal(torch.stack([out, out]), torch.stack([out.logits] * 2))
    assert (out.shape, out.dtype, len(out)) == ((2, 5), torch.float32, 2)
    assert torch.equal(out[0], out.logits[0])
    with pytest.raises(AttributeError, match="it has logits, tokens, trace"):
        out.label  # noqa: B018
    for twin in (copy.copy(out), pickle.loads(pickle.dumps(small().eval()(images)))):
        assert isinstance(twin, Output) and twin.logits.shape == (2, 5)


@pytest.mark.parametrize("setting", ["dense", "tome(r=2)", "evit(0.5)", "random_plus(0.7)"])
def test_torch_sees_the_tensors_in_an_output(setting, images):
    out = small(setting).eval()(images)
    leaves, spec = torch.utils._pytree.tree_flatten(out)
    assert any(leaf is out.logits for leaf in leaves) and any(leaf is out.tokens.x for leaf in leaves)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert again.logits is out.logits and torch.equal(again.trace.macs(), out.trace.macs())


def test_a_bare_model_can_be_exported(images):
    model = small("tome(r=2)").eval()
    given = torch.export.export(model, (images,)).module()(images)
    assert torch.allclose(given.logits, model(images).logits, atol=1e-5)
    assert torch.equal(given.trace.macs(), model(images).trace.macs())
