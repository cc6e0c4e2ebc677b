"""``adavit(form="released")`` against slow, obvious code of what the released AdaViT computes and trains."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles import make_images, make_vit, relative
from saccade.errors import UserError
from saccade.execution.policy import Execution
from saccade.methods.adavit import AdaViT
from saccade.model import AdaptiveViT

SHAPE = {"depth": 4, "embed_dim": 48, "num_heads": 6, "img_size": 64}  # 17 tokens
SETTING = "adavit(form='released')"
TAU = 5.0


def opened(setting: str = SETTING, family: str = "deit", bias: float = 0.3) -> AdaptiveViT:
    """A model whose gates leave out some of everything."""
    model = AdaptiveViT(make_vit(family, **SHAPE), setting)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.learned.items():
            value.copy_(torch.randn(value.shape, generator=generator) * (0.15 if name.endswith("weight") else bias))
    return model


@dataclass
class Hand:
    """What one forward by hand gives."""

    logits: Tensor
    usage: Tensor  # the three misses, added up
    on: dict[str, float]  # shares of each axis


def hard(y: Tensor, threshold: float) -> Tensor:
    """Hard 0/1 whose gradient is that of y."""
    return (y > threshold).float() - y.detach() + y


def by_hand(model: AdaptiveViT, images: Tensor, training: bool, target: float = 0.5) -> Hand:
    """Image by image and head by head, with masked weights, as published."""
    vit, (method,) = model.vit, model.plan.methods
    steps = dict(zip(method.at, method.steps, strict=True))
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    count, tokens, dim = x.shape
    patches_on, heads_on, branches_on = [], [], []
    for i, block in enumerate(vit.blocks):
        attn, width = block.attn, dim // block.attn.num_heads

        def gate(axis: str, logits: Tensor, threshold: float) -> Tensor:
            if not training:
                return hard(logits.sigmoid(), threshold)
            noise = torch.rand(logits.shape).clamp(1e-7, 1 - 1e-7).logit()
            return hard(((logits + noise) / TAU).sigmoid(), threshold)

        layers = steps[i].layers
        patch = gate("patch", layers["patch"](block.norm1(x)[:, 1:]).squeeze(-1), 0.6)
        heads, branches = torch.ones(count, attn.num_heads), torch.ones(count, 2)
        if i > 0:
            heads = gate("head", layers["head"](x[:, 0]), 0.5)
            branches = gate("block", layers["block"](x[:, 0]), 0.5)
            heads_on += [heads[b].mean() for b in range(count) if branches[b, 0] > 0]
            branches_on.append(branches)
        s = torch.cat([torch.ones(count, 1), patch], dim=1)
        patches_on.append(s)

        rows = []
        for b in range(count):
            channels = heads[b].repeat_interleave(width)
            both = s[b].detach().outer(s[b].detach())
            apart = (both == 0) & ~torch.eye(tokens, dtype=torch.bool)
            weights, biases = attn.qkv.weight.view(3, dim, dim), attn.qkv.bias.view(3, dim)
            normed = block.norm1(x[b])
            q, k, v = (normed @ (w * channels[:, None]).T + c * channels for w, c in zip(weights, biases, strict=True))
            mixed = []
            for h in range(attn.num_heads):
                own = slice(h * width, (h + 1) * width)
                scores = (q[:, own] @ k[:, own].T / width**0.5 * both).masked_fill(apart, -torch.inf)
                mixed.append(scores.softmax(dim=-1) @ v[:, own])
            made = torch.cat(mixed, dim=1) @ (attn.proj.weight * channels).T + attn.proj.bias
            row = x[b] + branches[b, 0] * block.ls1(made) * s[b][:, None]
            hidden = block.norm2(row) @ (block.mlp.fc1.weight * channels).T + block.mlp.fc1.bias
            made = block.mlp.act(hidden) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
            rows.append(row + branches[b, 1] * block.ls2(made) * s[b][:, None])
        x = torch.stack(rows)
    means = torch.cat(patches_on, 1).mean(), torch.stack(heads_on).mean(), torch.stack(branches_on).mean()
    usage = (means[0] - target) ** 2 + (means[1] - target).abs() + (means[2] - target).abs()
    shares = dict(zip(("patch", "head", "block"), (float(mean.detach()) for mean in means), strict=True))
    return Hand(vit.forward_head(vit.norm(x)), usage, shares)


@torch.no_grad()
@pytest.mark.parametrize("skip", ["always", "auto", "never"])
def test_the_forward_is_the_released_one(skip):
    model = opened()
    images = make_images(model.vit, 5)
    found = by_hand(model, images, training=False)
    assert all(0.2 < share < 0.9 for share in found.on.values())
    view = AdaptiveViT(model.vit, SETTING, learned=model.learned, execution=Execution(skip=skip))
    out = view(images)
    assert relative(out.logits, found.logits) <= 1e-5
    assert relative(view.forward_head(view.forward_tokens(images, sparse=False)[0]), found.logits) <= 1e-5
    alone = torch.cat([view(image[None]).logits for image in images])
    assert relative(alone, found.logits) <= 1e-5
    masks = view.forward_tokens(images, sparse=False)[1]
    assert [block.gates.head is None for block in masks.blocks] == [True, False, False, False]
    other = AdaptiveViT(model.vit, "adavit(form='token')")
    for name, value in other.learned.items():
        value.copy_(model.learned[name.replace(".layers", ".released.layers")])
    assert relative(other(images).logits, found.logits) > 0.05, "the default form is another"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_and_its_gradient_are_the_released_ones(seed):
    model = opened()
    images, labels = make_images(model.vit, 5), torch.arange(5)
    own = dict(model.learned)
    parameters = {**own, **{f"vit.{name}": p for name, p in model.vit.named_parameters()}}

    torch.manual_seed(seed)
    hand = by_hand(model, images, training=True)
    assert all(0.05 < share < 0.95 for share in hand.on.values())
    wanted = F.cross_entropy(hand.logits, labels) + 2.0 * hand.usage
    gradients = torch.autograd.grad(wanted, list(parameters.values()), allow_unused=True)

    torch.manual_seed(seed)
    out = model.train()(images)
    (method,) = model.plan.methods
    (usage,) = method.loss(out.trace).values()
    loss = F.cross_entropy(out.logits, labels) + usage
    assert relative(out.logits.detach(), hand.logits.detach()) <= 1e-5
    assert float(usage.detach()) == pytest.approx(2.0 * float(hand.usage.detach()), rel=1e-5)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, a, b in zip(parameters, found, gradients, strict=True):
        assert (a is None) == (b is None) and (a is None or cosine(a, b) >= 0.999), name
    gates = [torch.cat([grad.flatten() for name, grad in zip(parameters, grads, strict=True) if name in own])
             for grads in (found, gradients)]  # fmt: skip
    assert cosine(*gates) >= 0.99999 and float(gates[0].norm()) == pytest.approx(float(gates[1].norm()), rel=1e-4)


def cosine(a: Tensor, b: Tensor) -> float:
    if float(b.norm()) < 1e-9:  # a key's bias: the softmax has no gradient for it
        return float(a.norm() < 1e-6)
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def test_it_starts_as_published_and_says_where_it_works():
    model = AdaptiveViT(make_vit("deit", **SHAPE), SETTING)
    (method,) = model.plan.methods
    assert isinstance(method, AdaViT) and method.at == (0, 1, 2, 3) and method.usage == dict.fromkeys(method.usage, 0.5)
    assert [sorted(step.layers) for step in method.steps] == [["patch"]] + [["block", "head", "patch"]] * 3
    for layer in (layer for step in method.steps for layer in step.layers.values()):
        assert isinstance(layer, nn.Linear) and layer.bias.abs().max() == 0
        assert 0.01 < float(layer.weight.detach().std()) < 0.03
    assert AdaptiveViT(model.vit, "adavit(form='released', at=0, axes='head')").plan.methods[0].at == ()


def test_a_patch_is_drawn_with_the_released_probability():
    """Above 0.6 at temperature 5: with probability sigmoid(logit - 5 log 1.5)."""
    (method,) = AdaptiveViT(make_vit("deit", **SHAPE), SETTING).plan.methods
    torch.manual_seed(0)
    for axis, logit, expected in (("patch", 1.0, 0.2636), ("head", 1.0, 0.7311)):
        share = float(method.steps[1].rule.chosen(axis, torch.full((100_000,), logit), True).mean())
        assert abs(share - expected) <= 4 * (expected * (1 - expected) / 100_000) ** 0.5 + 1e-4


@torch.no_grad()
def test_each_axis_has_its_own_threshold():
    model = opened()
    images = make_images(model.vit, 3)
    plain = model.forward_tokens(images, sparse=False)[1].blocks[1].gates
    same = model.at("adavit(form='released', threshold=(0.6, 0.5, 0.5))").forward_tokens(images, sparse=False)[1]
    other = model.at("adavit(form='released', threshold=(0.6, 0.99, 0.5))").forward_tokens(images, sparse=False)[1]
    assert torch.equal(same.blocks[1].gates.patch, plain.patch) and torch.equal(same.blocks[1].gates.head, plain.head)
    assert torch.equal(other.blocks[1].gates.patch, plain.patch) and other.blocks[1].gates.head.sum() < plain.head.sum()


def test_partial_heads_leave_the_mlp_alone_and_learn_beside_patches():
    model = opened("adavit(form='released', heads='partial')").train()
    out = model(make_images(model.vit, 3))
    assert not any(block.gates.mlp_heads for block in out.trace.blocks)
    out.logits.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.learned.items() if ".head." in name)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("adavit(form='released', gmacs=0.1, share=0.5)", ["gmacs", "share", "one of"]),
        ("adavit(threshold=(0.5, 0.6))", ["threshold=(0.5, 0.6)", "one for each axis"]),
        ("adavit(axes=('head', 'head'))", ["axes=('head', 'head')", "once"]),
    ],
)
def test_what_does_not_fit_is_refused(setting, words):
    with pytest.raises(UserError) as found:
        AdaptiveViT(make_vit("deit", **SHAPE), setting)
    assert all(word in str(found.value) for word in words)


def test_weights_of_one_form_are_not_run_by_the_other():
    model = opened()
    with pytest.raises(UserError, match=r"adavit has learned .*released.* and not "):
        model.at("adavit()")
