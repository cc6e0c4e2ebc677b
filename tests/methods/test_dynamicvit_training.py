"""``dynamicvit`` learns by the published gradient: an oracle of its masked training, one formula after the other.

DynamicViT, arXiv 2106.02034: attention alone leaves out what is dropped, nothing else is masked, and a decision is
multiplied with those before it. Here the mask is exact, and the oracle says so with a plain softmax over what is there.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import saccade.methods.dynamicvit
from oracles import make_images, make_tokens, make_vit, relative
from saccade.core.reduction import Reduction, hide
from saccade.core.softmax import LARGEST, masked_softmax
from saccade.core.tokens import Hidden
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.training.config import Distill
from saccade.training.loss import Teacher, TeacherOutput, method_losses, terms, token_loss

AT, KEEP = (1, 2, 3), 0.7


def spread_vit(scale: float = 2.0):
    """A small ViT whose attention is far from uniform, so that dropped keys may have the highest scores."""
    vit = make_vit("vit", depth=5)
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight[: 2 * 96].mul_(scale)
    return vit


def unsure(model: AdaptiveViT) -> AdaptiveViT:
    """Predictors that keep most of the tokens, and are not all alike."""
    with torch.no_grad():
        for i, step in enumerate(model.plan.methods[0].steps):
            step.predictor.outer[-1].bias.fill_(1.5)
            step.predictor.outer[-1].weight.mul_(3.0 + i)
    return model


def published(vit, predictors, images: torch.Tensor, uniform: list[torch.Tensor]):
    """Logits, normed patch tokens, and the decisions D [B, N] after each stage."""
    x = vit._pos_embed(vit.patch_embed(images))
    batch, length, dim = x.shape
    kept, stages = torch.ones(batch, length - 1), []
    for i, block in enumerate(vit.blocks):
        if i in AT:
            p, noise = predictors[len(stages)], uniform[len(stages)]
            z = F.gelu(p.inner(p.norm(x[:, 1:])))
            half = dim // 2
            mean = (kept.unsqueeze(2) * z[..., half:]).sum(1, keepdim=True) / kept.sum(1)[:, None, None]
            keep_logit = p.outer(torch.cat([z[..., :half], mean.expand(-1, length - 1, -1)], dim=2))[..., 0]
            two = torch.stack([keep_logit + torch.log(noise / (1 - noise)), torch.zeros_like(keep_logit)], dim=2)
            soft = two.softmax(2)  # the difference of two Gumbel variables is logistic
            hard = F.one_hot(two.argmax(2), 2).float()
            kept = kept * (hard - soft.detach() + soft)[..., 0]
            stages.append(kept)
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        key = torch.cat([torch.ones(batch, 1), kept], dim=1)[:, None, :]
        pairs = key + (1 - key) * torch.eye(length)  # [B, query, key]
        weights = (scores - scores.masked_fill(pairs[:, None] == 0, -1e9).amax(3, keepdim=True)).exp() * pairs[:, None]
        shares = weights / weights.sum(3, keepdim=True)
        x = x + block.attn.proj((shares @ v).transpose(1, 2).reshape(batch, length, dim))
        x = x + block.mlp(block.norm2(x))
    x = vit.norm(x)
    return vit.head(x[:, 0]), x[:, 1:], stages


def losses(logits, tokens, stages, targets, teacher: TeacherOutput) -> torch.Tensor:
    """Task, 2 times the ratio, 0.5 times KL to the teacher's logits, 0.5 times the error of the tokens kept last."""
    ratio = sum(((d.mean(1) - KEEP ** (i + 1)) ** 2).mean() for i, d in enumerate(stages)) / len(stages)
    kl = (teacher.logits.softmax(1) * (teacher.logits.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()
    there = stages[-1] > 0.5
    distilled = ((tokens[there] - teacher.patches[there]) ** 2).mean()
    return F.cross_entropy(logits, targets) + 2 * ratio + 0.5 * kl + 0.5 * distilled


def gradients(model: AdaptiveViT) -> list[torch.Tensor]:
    """Of each stage's predictor, in a row; and they are cleared."""
    found = []
    for step in model.plan.methods[0].steps:
        found.append(torch.cat([p.grad.flatten() for p in step.predictor.parameters()]))
    model.zero_grad()
    return found


def both(model: AdaptiveViT):
    """Logits and the predictors' gradients: ours, and the oracle's, of the same draws."""
    vit, images = model.vit, make_images(model.vit, 4)
    targets = torch.tensor([0, 3, 5, 9])
    teacher = Teacher(make_vit("vit", depth=5), saccade.data.Preprocess.of(vit))(images)
    steps = model.plan.methods[0].steps
    torch.manual_seed(1)
    uniform = [torch.rand(4, 16) for _ in steps]
    torch.manual_seed(1)
    out = model.train()(images, whole=True)
    rule = Distill(weight=0.5, labels=1.0, tokens=0.5)
    parts = terms(model, out, F.one_hot(targets, 10).float(), teacher, rule, nn.Identity(), 4)
    (sum(parts.values()) + sum(method_losses(model, out, 1.0).values())).backward()
    model.eval()
    ours = gradients(model)
    logits, tokens, stages = published(vit, [step.predictor for step in steps], images, uniform)
    losses(logits, tokens, stages, targets, teacher).backward()
    return (out, ours), ((logits, tokens, stages), gradients(model))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_forward_and_gradient_are_the_published_ones(scale):
    model = unsure(AdaptiveViT(spread_vit(scale), f"dynamicvit({KEEP}, at={AT})"))
    (out, ours), ((logits, tokens, stages), theirs) = both(model)
    kept = out.tokens.keep_mask
    assert torch.equal(kept, stages[-1]) and bool((kept.sum(1) > 0).all())
    assert 0.2 < float(kept.detach().mean()) < 0.7, "many are dropped, and not all"
    assert relative(out.logits, logits) <= 1e-5
    assert relative(model.vit.norm(out.tokens.patches), tokens) <= 1e-5, "what is dropped goes on being computed"
    assert all(cosine(a, b) >= 0.999 for a, b in zip(ours, theirs, strict=True))
    assert all(0.99 <= float(a.norm() / b.norm()) <= 1.01 for a, b in zip(ours, theirs, strict=True))


def test_another_training_form_has_another_gradient(monkeypatch):
    """What is dropped left as it is, and drawn no more: the oracle tells them apart."""
    model = unsure(AdaptiveViT(spread_vit(), f"dynamicvit({KEEP}, at={AT})"))

    def frozen(*args, freeze: bool, **kwargs) -> Reduction:
        return Reduction(*args, **kwargs)

    monkeypatch.setattr(saccade.methods.dynamicvit, "Reduction", frozen)
    (out, ours), ((logits, *_), theirs) = both(model)
    assert relative(out.logits, logits) <= 1e-5, "the answer is the same"
    assert min(cosine(a, b) for a, b in zip(ours, theirs, strict=True)) < 0.95


def test_a_key_that_is_dropped_has_the_gradient_of_all_that_it_would_get():
    """Not capped by the best key that is kept; at scores that no fp32 holds it is finite."""
    scores, keep = torch.tensor([[0.0, -1.0, 6.0]]), torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    values = torch.tensor([1.0, 2.0, 5.0])
    (found,) = torch.autograd.grad((masked_softmax(scores, keep, LARGEST) @ values).sum(), keep)
    total = 1 + torch.tensor(-1.0).exp()
    mean = (1 + 2 * torch.tensor(-1.0).exp()) / total
    assert float(found[0, 2]) == pytest.approx(float(torch.tensor(6.0).exp() / total * (5 - mean)), rel=1e-4)
    far = torch.tensor([[0.0, 1000.0]], requires_grad=True)
    gate = torch.tensor([[1.0, 0.0]], requires_grad=True)
    shares = masked_softmax(far, gate, LARGEST)
    shares[0, 0].backward()
    assert shares.tolist() == [[1.0, 0.0]] and gate.grad.isfinite().all() and far.grad.isfinite().all()
    half = masked_softmax(scores.half(), keep.detach(), LARGEST)
    assert half.dtype == torch.float16 and relative(half.float(), masked_softmax(scores, keep.detach())) <= 1e-3


def test_the_dense_map_of_masked_training_is_that_of_dropping(monkeypatch):
    """A dropped cell has the features that it had when it was dropped, whatever its token becomes."""
    vit = spread_vit()
    model = unsure(AdaptiveViT(vit, f"dynamicvit({KEEP}, at={AT}, threshold=0.7)"))
    images = make_images(vit, 3)
    with torch.no_grad():
        dropped = model.feature_map(images)
        choose = saccade.methods.dynamicvit.choose
        monkeypatch.setattr(saccade.methods.dynamicvit, "choose", lambda x, *_, **__: choose(x, 0.0, threshold=0.7))
    hidden = model.train().feature_map(images)
    model.eval()
    assert relative(hidden, dropped) <= 1e-5
    hidden.square().sum().backward()
    assert all(float(grad.abs().sum()) > 0 and grad.isfinite().all() for grad in gradients(model))


def test_blocks_update_what_one_method_drops_and_not_what_another_does():
    tokens = make_tokens(1, 4)
    gate = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    other = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    keep = torch.arange(4).unsqueeze(0)
    for first in (True, False):
        pair = [Reduction(keep, gate=gate, freeze=False), Reduction(keep, gate=other)]
        found = tokens
        for reduction in pair if first else pair[::-1]:
            found = hide(found, reduction)
        assert found.keep_mask.tolist() == [[1, 0, 0, 1]] and found.is_updated().tolist() == [[1, 1, 0, 1]]
    alone = hide(tokens, Reduction(keep, gate=other))
    assert alone.update_mask is None and alone.is_updated().tolist() == other.tolist()


def test_token_distillation_counts_kept_tokens_by_the_cells_they_stand_for():
    """By hand, for each token: padding, what is dropped and what a mask drops count nothing."""
    vit = make_vit("vit")
    model = AdaptiveViT(vit)
    out = model(make_images(vit, 2), whole=True)
    owner = torch.arange(16).expand(2, -1).clone()
    owner[0, 1], owner[1, 3] = 0, -1  # one stands for two cells, another is gone
    gate = torch.ones(2, 16)
    gate[1, 5] = 0
    out = replace(out, tokens=replace(out.tokens, owner=owner, hidden=Hidden(gate)))
    target = torch.randn(2, 16, 96)
    normed, errors = vit.norm(out.tokens.patches), []
    for b in range(2):
        for i in range(16):
            cells = [c for c in range(16) if owner[b, c] == i]
            if cells and gate[b, i]:
                errors.append((normed[b, i] - target[b, cells].mean(0)).square().mean())
    assert len(errors) == 15 + 14
    found = token_loss(model, out, target, nn.Identity())
    assert found.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    with pytest.raises(UserError, match="the teacher has 9 patch tokens and the student's grid 16 cells"):
        token_loss(model, out, target[:, :9], nn.Identity())


@pytest.mark.parametrize(("keep", "expected"), [(0.65, [127, 82, 53]), (0.75, [147, 110, 82]), (0.55, [107, 59, 32])])
def test_counts_are_whole_parts_of_powers(keep, expected):
    """int(N · keepⁱ), not a share of what the stage before left; another number of patches keeps the nearest."""
    model = AdaptiveViT(make_vit("vit", img_size=112), f"dynamicvit({keep}, at={AT[:2]})")
    drops = [saccade.methods.dynamicvit.Drop(keep, i, 196, 96, 0, 1.0, None) for i in range(3)]
    n, found = 196, []
    for drop in drops:
        n = drop.count(n)
        found.append(n)
    assert found == expected == [int(196 * keep**i) for i in (1, 2, 3)]
    assert drops[1].count(100) == round(keep * 100)
    first, second = (step.count for step in model.plan.methods[0].steps)
    assert second(first(49)) == int(49 * keep**2)
