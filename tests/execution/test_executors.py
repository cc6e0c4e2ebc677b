"""Skipping where it is faster, masks where it is not, timm's own block where nothing is asked."""

from __future__ import annotations

import pytest
import torch

import saccade.core.plan
from oracles import RandomGates, add_gates, make_images, make_vit, relative
from saccade.core.gates import Gates
from saccade.core.packing import padded
from saccade.core.plan import Gater
from saccade.core.program import lower
from saccade.execution.executors import (
    Gathered,
    Images,
    Masked,
    Parts,
    PrefixOnly,
    Rows,
    Straight,
    Whole,
    executor_for,
)
from saccade.execution.policy import LIMITS, Execution, images_that_run, rows_that_run
from saccade.model import AdaptiveViT


class On(Gater):
    """Everything runs, said by gates."""

    def forward(self, tokens):
        images, patches = len(tokens.x), tokens.num_patches
        return Gates(patch=torch.ones(images, patches), attn=torch.ones(images), mlp=torch.ones(images))


@pytest.fixture(scope="module")
def vit():
    return make_vit("deit3", depth=3)


def gated(vit, on=0.6, parts=("patch", "attn", "mlp"), execution="auto"):
    model = add_gates(AdaptiveViT(vit), {block: RandomGates(block, 3, parts, on) for block in range(3)})
    model.execution = Execution(skip=execution)
    return model


@torch.no_grad()
def test_the_same_answers_either_way_and_the_price_of_what_ran(vit):
    images = make_images(vit, 4)
    (skipped, cheap), (masked, dear) = (gated(vit, execution=way).encode(images) for way in ("always", "never"))
    assert relative(skipped.x, masked.x) <= 1e-5
    plain = AdaptiveViT(vit).forward_tokens(images)[1].macs()
    assert bool((cheap.macs() < plain).all())
    assert torch.equal(dear.macs(), plain), "what is masked is computed"
    assert all(name.endswith(", masked") for name in dear.kernels)
    assert not any(name.endswith(", masked") for name in cheap.kernels)


@torch.no_grad()
@pytest.mark.parametrize("limit", [0.0, 0.3, 0.7, 1.0])
def test_the_written_limit_decides(vit, monkeypatch, limit):
    """Blocks that would compute more than the limit are computed whole."""
    model, images = gated(vit, 0.5, ("patch",)), make_images(vit, 4)
    monkeypatch.setitem(LIMITS, "rows", limit)
    tokens, trace = model.forward_tokens(images)
    prefix, patches = tokens.num_prefix, tokens.num_patches
    for block, ran in enumerate(trace.blocks):
        on = RandomGates(block, 3, ("patch",), 0.5)(tokens).patch
        part = (prefix + on.sum(1)).mean().item() / (prefix + patches)
        assert ran.kernel.endswith(", masked") == (part > limit)


@torch.no_grad()
def test_gates_that_leave_nothing_out_cost_nothing(vit):
    images = make_images(vit, 3)
    plain, before = AdaptiveViT(vit).forward_tokens(images)
    model = add_gates(AdaptiveViT(vit), dict.fromkeys(range(3), On()))
    model.execution = Execution()
    tokens, trace = model.forward_tokens(images)
    assert torch.equal(tokens.x, plain.x)
    assert torch.equal(trace.macs(), before.macs())


@torch.no_grad()
def test_share_by_hand(vit):
    tokens = AdaptiveViT(vit).forward_tokens(make_images(vit, 2))[0]
    prefix, patches = tokens.num_prefix, tokens.num_patches
    half = torch.zeros(2, patches)
    half[0] = 1
    assert rows_that_run(tokens, Gates(patch=half)) == pytest.approx((2 * prefix + patches) / (2 * (prefix + patches)))
    assert images_that_run(Gates(attn=torch.tensor([1.0, 0]))) == 0.75
    assert images_that_run(Gates(attn=torch.tensor([0.0, 1]), mlp=torch.tensor([1.0, 0]))) == 0.5
    assert rows_that_run(tokens, Gates(head=torch.zeros(2, 3))) == images_that_run(Gates(patch=half)) == 1.0
    places = torch.arange(3).expand(2, -1)
    one = Gates(patch=torch.zeros(2, patches).scatter(1, places, 1.0), patch_indices=places)
    assert rows_that_run(tokens, one) == pytest.approx((prefix + 3) / (prefix + patches))


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 4])
def test_branches_are_skipped_where_packing_does_not_pay(vit, monkeypatch, images):
    """Tokens are masked and images left out: the same answer, at the price of whole images."""
    model, batch = gated(vit), make_images(vit, images)
    monkeypatch.setitem(LIMITS, "rows", 0.0)
    monkeypatch.setitem(LIMITS, "images", 1.0)
    tokens, trace = model.forward_tokens(batch)
    masked, _ = model.forward_tokens(batch, sparse=False)
    assert relative(tokens.x, masked.x) <= 1e-5
    whole = AdaptiveViT(vit).forward_tokens(batch)[1]
    drawn = [RandomGates(block, 3, ("patch", "attn", "mlp"), 0.6)(tokens) for block in range(3)]
    for ran, plain, gates in zip(trace.blocks, whole.blocks, drawn, strict=True):
        attention = plain.cost.attention(plain.queries, plain.keys)
        assert torch.equal(
            ran.macs() + torch.zeros(images), gates.attn * attention + gates.mlp * (plain.macs() - attention)
        )
        assert ran.kernel.endswith(", masked")


@torch.no_grad()
@pytest.mark.parametrize("setting", ["topk(0.5)", "tome(r=2) | topk(0.5, at=(1, 2))", "topk(0.3, asks='mean')"])
@pytest.mark.parametrize("family", ["vit", "deit3", "distilled", "siglip", "class-average"])
def test_by_places_or_by_a_mask(family, setting, monkeypatch):
    """Fixed counts go by index; the same choice as a mask is packed, or multiplied: one answer."""
    vit = make_vit(family, depth=4)
    if family == "siglip" and "asks" not in setting:
        setting = setting.replace("topk(0.5", "topk(0.5, asks='mean'")
    model, images = AdaptiveViT(vit, setting).eval(), make_images(vit, 3)
    by_places, cheap = model.forward_tokens(images)
    masked, _ = model.forward_tokens(images, sparse=False)
    of = saccade.core.plan.Plan.gates

    def without(self, *args):
        gates, cost = of(self, *args)
        return (None if gates is None else Gates(patch=gates.patch)), cost

    monkeypatch.setattr(saccade.core.plan.Plan, "gates", without)
    packed, same = model.forward_tokens(images)
    assert relative(by_places.x, packed.x) <= 1e-5 and relative(by_places.x, masked.x) <= 1e-5
    assert torch.equal(cheap.macs(), same.macs())
    for places, mask in zip(cheap.blocks, same.blocks, strict=True):
        assert torch.as_tensor(places.queries).max() == torch.as_tensor(mask.queries).max()


@torch.no_grad()
def test_no_images_by_places():
    vit = make_vit("vit")
    assert AdaptiveViT(vit, "topk(0.5)").eval()(make_images(vit, 2)[:0]).logits.shape == (0, 10)


@torch.no_grad()
def test_a_block_of_which_nothing_is_asked_is_timms(vit):
    """Hooks on a block are heard there, and the numbers are timm's to the last bit."""
    heard = []
    handle = vit.blocks[0].register_forward_hook(lambda *_: heard.append(0))
    _, trace = AdaptiveViT(vit, "evit(0.7, at=1)").eval().forward_tokens(make_images(vit, 2))
    handle.remove()
    assert heard == [0]
    model = AdaptiveViT(vit)
    start, every = model.forward_tokens(make_images(vit, 2))
    out, ran = Whole().execute(lower(vit, model.plan, whole=True, masked=False)[1], start)
    assert torch.equal(out.x, vit.blocks[1](start.x))
    assert ran.macs() == every.blocks[1].macs() == ran.macs(nominal=True)
    assert trace.blocks[0].macs() == ran.macs()


WAYS = [
    ("", None, False, [Whole, Whole, PrefixOnly]),
    ("", None, True, [Whole, Whole, PrefixOnly]),
    ("evit(0.7, at=1)", None, False, [Whole, Straight, PrefixOnly]),
    ("evit(0.7, at=1)", None, True, [Whole, Masked, PrefixOnly]),
    ("topk(0.5, at=(0, 1))", None, False, [Gathered, Gathered, PrefixOnly]),
    ("topk(0.5, at=(0, 1))", "never", False, [Masked, Masked, PrefixOnly]),
    ("topk(0.5, at=(0, 1)) | evit(0.7, at=0)", None, False, [Rows, Gathered, PrefixOnly]),
]


@torch.no_grad()
@pytest.mark.parametrize(("setting", "skip", "masked", "expected"), WAYS)
def test_the_executor_of_each_block(setting, skip, masked, expected):
    """A setting's blocks run as the table of ``executors`` says; a hooked block shows all of its tokens."""
    vit = make_vit("vit", depth=3)
    model = AdaptiveViT(vit, setting).eval()
    start = model.tokenizer(vit, make_images(vit, 2))
    steps, execution = lower(vit, model.plan, whole=False, masked=masked), Execution(skip=skip or "always")
    assert [type(executor_for(step, start, execution)) for step in steps] == expected
    handle = vit.blocks[0].attn.register_forward_hook(lambda *_: None)
    shown = executor_for(lower(vit, model.plan, whole=False, masked=masked)[0], start, execution)
    handle.remove()
    assert not isinstance(shown, (Rows, Gathered)) and not isinstance(shown, PrefixOnly)


@torch.no_grad()
def test_branches_alone_leave_out_images(vit):
    model, start = gated(vit, 0.5, ("attn", "mlp"), "always"), AdaptiveViT(vit).forward_tokens(make_images(vit, 4))[0]
    steps = lower(vit, model.plan, whole=True, masked=False)
    assert {type(executor_for(step, start, model.execution)) for step in steps} <= {Rows, Images, Parts}
    assert {type(executor_for(step, start, Execution(skip="never"))) for step in steps} <= {Masked, Parts}


@torch.no_grad()
@pytest.mark.parametrize(
    "setting", ["tome(r=3)", "evit(0.5, at=(0, 1, 2), fuse=True)", "ats(0.5, at=(0, 1, 2))", "tofu(r=3)"]
)
def test_the_straight_way_is_the_way_of_parts(vit, setting):
    """Features, sizes, owners and the record of a block: ``Parts`` knows masks and packing, and needs neither here."""
    model, tokens = AdaptiveViT(vit, setting).eval(), AdaptiveViT(vit).tokenizer(vit, make_images(vit, 3))
    for step in lower(vit, model.plan, whole=True, masked=False):
        (one, ran), (other, same) = (
            way.execute(step, tokens)
            for way in (Straight(model.execution, step.between(tokens).read), Parts(model.execution))
        )
        assert isinstance(executor_for(step, tokens, model.execution), Straight if tokens.complete else Parts)
        assert relative(padded(one).x, padded(other).x) <= 1e-6 and torch.equal(one.owner, other.owner)
        assert (one.size is None) is (other.size is None) and (one.size is None or torch.equal(one.size, other.size))
        assert torch.equal(torch.as_tensor(ran.macs()), torch.as_tensor(same.macs()))
        assert (ran.kernel, ran.static_counts) == (same.kernel, same.static_counts)
        tokens = padded(one)
        if not tokens.complete:
            break  # what follows is for ``Parts``
