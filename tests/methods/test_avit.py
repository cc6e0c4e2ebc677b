"""``avit``: halting, token by token (A-ViT, arXiv 2112.07658).

Cost, batches, gradients, half precision and company are in `test_contract`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import saccade.core.packing
from oracles import attention_by_hand, make_images, make_tokens, make_vit, relative
from saccade.errors import UserError
from saccade.methods.avit import LEFT, OUTPUT, Halt
from saccade.model import AdaptiveViT

BEFORE = ["", "quadtree(threshold=7.7) | ", "tome(r=[20]) | ", "ltmp(start=0.6, merge=0.4) | "]
LIVELY = ["avit(gamma=1, beta=-0.5)", "avit(gamma=2, beta=-3)", "avit(at=[2], gamma=1, beta=0)"]


@torch.no_grad()
def by_hand(vit, image: torch.Tensor, gamma: float, beta: float, at: tuple[int, ...]) -> tuple[torch.Tensor, list[int]]:
    """One image, token by token: logits, and patches in each block."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image.unsqueeze(0))))[0]
    rows, used = [x[i] for i in range(len(x))], [0.0] * len(x)
    answer, halted, counts = 0.0, False, []
    for i, block in enumerate(vit.blocks):
        if i in at:
            scores = [float(torch.sigmoid(gamma * row[0] + beta)) for row in rows]
            last = [u + h >= 0.99 for u, h in zip(used, scores, strict=True)]
            if not halted:
                answer = answer + (1 - used[0] if last[0] else scores[0]) * rows[0]
                halted = last[0]
            used = [u + h for u, h in zip(used, scores, strict=True)]
            best = min(range(1, len(rows)), key=lambda j: used[j])
            stay = [j for j in range(len(rows)) if j == 0 or not last[j] or (j == best and all(last[1:]))]
            rows, used = [rows[j] for j in stay], [used[j] for j in stay]
        counts.append(len(rows) - 1)
        x = torch.stack(rows)
        x = x + block.ls1(attention_by_hand(block.attn, block.norm1(x))[0])
        x = x + block.ls2(block.mlp(block.norm2(x)))
        rows = [x[j] for j in range(len(x))]
    answer = answer if halted else answer + (1 - used[0]) * rows[0]
    return vit.forward_head(vit.norm(answer[None, None]))[0], counts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("gamma", "beta", "at"), [(1.0, -0.5, (1, 2)), (2.0, -3.0, (1, 2)), (1.0, 0.0, (2,))])
def test_halting_by_hand(gamma, beta, at, training):
    """Dropped in evaluation and masked in training: the same logits, which are those of a loop over tokens."""
    vit = make_vit("vit")
    images = make_images(vit, 4)
    model = AdaptiveViT(vit, f"avit(at={list(at)}, gamma={gamma}, beta={beta})").train(training)
    with torch.no_grad():
        tokens, _ = model.forward_tokens(images)
        logits = model(images).logits
    model.eval()
    expected = [by_hand(vit, image, gamma, beta, at) for image in images]
    assert relative(logits, torch.stack([found for found, _ in expected])) <= 1e-5
    left = tokens.valid.sum(1) if tokens.valid is not None else tokens.keep_mask.sum(1)
    assert left.tolist() == [counts[-1] for _, counts in expected]
    assert len(set(left.tolist())) > 1 and left.min() < 16, "images differ, and tokens do halt"


@torch.no_grad()
@pytest.mark.parametrize("text", LIVELY)
@pytest.mark.parametrize("before", BEFORE)
def test_masked_is_skipped_whatever_stands_before(text, before, monkeypatch):
    monkeypatch.setattr(saccade.core.packing, "MAX_LIVE_SHARE", 1.0)
    vit = make_vit("deit", depth=4, img_size=128)
    model, images = AdaptiveViT(vit, before + text), make_images(vit, 3)
    sparse, masked = model(images), model.train()(images)
    model.eval()
    assert relative(masked.logits, sparse.logits) <= 1e-5
    for hidden, gone in zip(masked.trace.blocks[1:-1], sparse.trace.blocks[1:-1], strict=True):
        wanted = hidden.macs() if hidden.target_macs is None else hidden.target_macs
        ran = torch.as_tensor(gone.macs() - gone.aux_macs).float().expand(3)
        assert relative(torch.as_tensor(wanted - hidden.aux_macs).float().expand(3), ran) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "distilled", "siglip", "siglip-average"])
@pytest.mark.parametrize("training", [False, True])
def test_when_everything_halts_at_once_the_answer_is_that_of_the_first_block(family, training):
    vit = make_vit(family)
    images = make_images(vit, 3)
    model = AdaptiveViT(vit, "avit(gamma=0, beta=100)").train(training)
    tokens, _ = model.forward_tokens(images)
    found = model.forward_head(tokens)
    model.eval()
    remaining = tokens.keep_mask.sum(1) if training else torch.tensor([tokens.num_patches] * 3)
    assert remaining.tolist() == [1, 1, 1] and found.isfinite().all()
    if vit.global_pool == "token":
        assert relative(found, AdaptiveViT(vit, "depth(1)")(images).logits) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "distilled", "registers-average"])
def test_a_model_that_never_halts_is_the_dense_one(family):
    vit = make_vit(family)
    images = make_images(vit, 2)
    assert relative(AdaptiveViT(vit, "avit(gamma=0, beta=-100)")(images).logits, vit(images)) <= 1e-5


@torch.no_grad()
def test_what_is_left_follows_the_cells():
    """A token that owns several cells has their mean; one that owns none starts anew; a dropped cell keeps its own."""
    tokens = make_tokens(1, 4, prefix=0)
    left = torch.tensor([[[0.8], [0.4], [0.5], [0.02], [0.3]]])  # of five cells
    owner = torch.tensor([[0, 0, 1, 2, -1]])
    tokens = replace(tokens, owner=owner, grid=(1, 5), state={LEFT: left, OUTPUT: torch.zeros(1, 0, 8)})
    found = Halt(0.0, math.log(0.1 / 0.9))(tokens)  # a score of 0.1 for everyone
    expected = torch.tensor([[0.5, 0.5, 0.4, 0.0, 0.3]])
    noted = found.state[LEFT]
    assert torch.allclose(noted[..., 1], expected, atol=1e-6) and torch.equal(noted[..., :1], left)
    assert found.keep[found.valid].tolist() == [0, 1, 3], "the third has nothing left"


def test_the_loss_by_hand():
    """Two images of two cells, three blocks: what is spent adds up to 1, and so does the prior."""
    (method,) = AdaptiveViT(make_vit("vit"), "avit(ponder=2.0, prior=3.0, target=2)").plan.methods
    left = torch.tensor([[[1, 0.9], [0.6, 0.5], [0, 0]], [[0.3, 0.2], [0.7, 0], [0.9, 0.8]]], requires_grad=True)
    block = SimpleNamespace(kept=torch.ones(2), owner=torch.tensor([[0, 1], [0, -1]]))  # another method dropped a cell
    trace = SimpleNamespace(
        state={LEFT: left}, images=2, blocks=[block] * 3, first=torch.zeros(2, 2, dtype=torch.int64)
    )
    found = method.loss(trace)
    cells = [(0.6, 0.5), (0.0, 0.0), (0.7, 0.0)]  # after the prefix token
    ponder = [3 + 0.5, 1 + 1.0, 2 + 0.7]
    assert float(found["ponder"].detach()) == pytest.approx(2 * sum(ponder) / 3, abs=1e-6)
    spent = [sum(parts) / 3 for parts in zip(*((1 - a, a - b, b) for a, b in cells), strict=True)]
    assert sum(spent) == pytest.approx(1)
    prior = [math.exp(-((i - 2) ** 2) / 2) for i in (1, 2, 3)]
    divergence = sum(p * math.log(p / (q / sum(prior))) for p, q in zip(spent, prior, strict=True))
    assert float(found["halting"].detach()) == pytest.approx(3 * divergence, abs=1e-5) and divergence > 0
    found["ponder"].backward()
    assert left.grad[0, 1].tolist() == pytest.approx([0, 2 / 3]), "the part that the last block gets"


def test_the_first_channel_learns_when_to_halt():
    vit = make_vit("vit")
    model = AdaptiveViT(vit, "avit(gamma=1, beta=-3)").train()
    out = model(make_images(vit, 3))
    terms = model.plan.methods[0].loss(out.trace)
    model.eval()
    assert set(terms) == {"ponder", "halting"} and all(float(value) > 0 for value in terms.values())
    channel = vit.blocks[0].mlp.fc2.bias
    for term in (*terms.values(), out.logits.square().sum(), out.trace.target_macs().sum()):
        (grad,) = torch.autograd.grad(term, channel, retain_graph=True)
        assert grad.isfinite().all() and grad[0] != 0
    (cost,) = torch.autograd.grad(terms["ponder"], channel, retain_graph=True)
    assert cost[0] < 0, "a larger first channel halts earlier"
    assert model.plan.methods[0].loss(model(make_images(vit, 2)).trace) == {}, "nothing is masked in evaluation"
    assert not list(model.plan.parameters()), "no parameters of its own"


def test_offsets_are_the_published_ones():
    for width, beta in ((192, -30.0), (384, -75.0)):
        method = AdaptiveViT(make_vit("vit", embed_dim=width, depth=6), "avit()").plan.methods[0]
        assert method.at == (1, 2, 3, 4, 5) and method.target == 4
        assert {(step.gamma, step.beta) for step in method.steps} == {(10.0, beta)}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("avit(at=7)", ["block 7"]),
        ("avit(ponder=-1)", ["ponder=-1", "[0, 1e+06]"]),
        ("avit(target=9)", ["target=9", "[1, 3]"]),
        ("avit(beta=True)", ["beta=True"]),
    ],
)
def test_knobs_out_of_range_are_named(setting, words):
    with pytest.raises(UserError) as error:
        AdaptiveViT(make_vit("vit"), setting)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("text", ["avit() | depth(2, head='own')", "depth(2, head='own') | avit()"])
def test_a_second_head_is_refused(text):
    vit = make_vit("vit", depth=4)
    model = AdaptiveViT(vit, text).eval()
    with pytest.raises(UserError, match="two of its methods give the logits by a head of their own"):
        model(make_images(vit, 1))
    assert AdaptiveViT(vit, "avit() | depth(2)").eval()(make_images(vit, 1)).logits.shape == (1, 10)
