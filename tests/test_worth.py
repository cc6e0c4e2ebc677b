"""Skipping where it pays, masks where it does not, timm's own block where nothing is asked."""

from __future__ import annotations

import pytest
import torch

import saccade.worth
from oracles import RandomGates, add_gates, make_images, make_vit, relative
from saccade.encoder import whole_block
from saccade.gates import Gates
from saccade.model import AdaptiveViT
from saccade.plan import Gater
from saccade.worth import Kind, images_that_run, pays, rows_that_run


class On(Gater):
    """Everything runs, said by gates."""

    def forward(self, tokens):
        images, patches = len(tokens.x), tokens.num_patches
        return Gates(patch=torch.ones(images, patches), attn=torch.ones(images), mlp=torch.ones(images))


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.delenv("SACCADE_SKIP", raising=False)
    monkeypatch.setattr(saccade.worth, "_LIMITS", {})


@pytest.fixture(scope="module")
def vit():
    return make_vit("deit3", depth=3)


def gated(vit, on=0.6, parts=("patch", "attn", "mlp")):
    return add_gates(AdaptiveViT(vit), {block: RandomGates(block, 3, parts, on) for block in range(3)})


@torch.no_grad()
def test_the_same_answers_either_way_and_the_price_of_what_ran(vit, monkeypatch):
    model, images, found = gated(vit), make_images(vit, 4), {}
    for pinned in ("always", "never"):
        monkeypatch.setenv("SACCADE_SKIP", pinned)
        found[pinned] = model.encode(images)
    (skipped, cheap), (masked, dear) = found["always"], found["never"]
    assert relative(skipped.x, masked.x) <= 1e-5
    plain = AdaptiveViT(vit).encode(images)[1].macs()
    assert bool((cheap.macs() < plain).all())
    assert torch.equal(dear.macs(), plain), "what is masked is computed"
    assert all(name.endswith(", masked") for name in dear.kernels)
    assert not any(name.endswith(", masked") for name in cheap.kernels)


@torch.no_grad()
@pytest.mark.parametrize("limit", [0.0, 0.3, 0.7, 1.0])
def test_the_measured_limit_decides(vit, measured, monkeypatch, limit):
    """Blocks that would compute more than the limit are computed whole."""
    model, images = gated(vit, 0.5, ("patch",)), make_images(vit, 4)
    monkeypatch.setattr(saccade.worth, "_limit", lambda *_: limit)
    tokens, trace = model.encode(images)
    prefix, patches = tokens.num_prefix, tokens.num_patches
    for block, ran in enumerate(trace.blocks):
        on = RandomGates(block, 3, ("patch",), 0.5)(tokens).patch
        part = (prefix + on.sum(1)).mean().item() / (prefix + patches)
        assert ran.kernel.endswith(", masked") == (part > limit)


@torch.no_grad()
def test_it_is_measured_once_for_each_kind(vit, measured, monkeypatch):
    calls, real = [], saccade.worth._limit
    monkeypatch.setattr(saccade.worth, "_limit", lambda *a: calls.append(a) or real(*a))
    model = gated(vit)
    for images in (4, 4, 16, 1, 1):
        model(make_images(vit, images))
    assert len(calls) == 3, "patches and branches of four, who are a sample of sixteen; one image's patches"
    assert all(0 <= limit <= 1 for limit in saccade.worth._LIMITS.values())
    assert all(isinstance(kind, Kind) for kind in saccade.worth._LIMITS)


@torch.no_grad()
def test_the_line_through_half_and_whole(vit, measured, monkeypatch):
    """With times of which all is known: sparse = 2 ms + 10 ms × share, whole 10 ms, masked 12 ms."""
    now = [0.0]
    monkeypatch.setattr(saccade.worth.time, "perf_counter", lambda: now[0])
    tokens = AdaptiveViT(vit).encode(make_images(vit, 4))[0]
    gates = Gates(patch=torch.ones(4, tokens.num_patches))

    def run(sample, chosen, sparse):
        now[0] += (
            0.002 + 0.010 * rows_that_run(sample, chosen) if sparse else 0.012 if chosen.patch is not None else 0.010
        )

    limit = (0.95 * 12 - 2) / 10
    assert pays(limit - 0.01, tokens, gates, run) and not pays(limit + 0.01, tokens, gates, run)


@torch.no_grad()
def test_gates_that_leave_nothing_out_cost_nothing(vit, measured):
    images = make_images(vit, 3)
    plain, before = AdaptiveViT(vit).encode(images)
    tokens, trace = add_gates(AdaptiveViT(vit), dict.fromkeys(range(3), On())).encode(images)
    assert torch.equal(tokens.x, plain.x)
    assert torch.equal(trace.macs(), before.macs()) and not saccade.worth._LIMITS


@torch.no_grad()
def test_share_by_hand(vit):
    tokens = AdaptiveViT(vit).encode(make_images(vit, 2))[0]
    prefix, patches = tokens.num_prefix, tokens.num_patches
    half = torch.zeros(2, patches)
    half[0] = 1
    assert rows_that_run(tokens, Gates(patch=half)) == pytest.approx((2 * prefix + patches) / (2 * (prefix + patches)))
    assert images_that_run(Gates(attn=torch.tensor([1.0, 0]))) == 0.75
    assert images_that_run(Gates(attn=torch.tensor([0.0, 1]), mlp=torch.tensor([1.0, 0]))) == 0.5
    assert rows_that_run(tokens, Gates(head=torch.zeros(2, 3))) == images_that_run(Gates(patch=half)) == 1.0
    places = torch.arange(3).expand(2, -1)
    one = Gates(patch=torch.zeros(2, patches).scatter(1, places, 1.0), places=places)
    assert rows_that_run(tokens, one) == pytest.approx((prefix + 3) / (prefix + patches))


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 4])
def test_branches_are_skipped_where_packing_does_not_pay(vit, measured, monkeypatch, images):
    """Tokens are masked and images left out: the same answer, at the price of whole images."""
    model, batch = gated(vit), make_images(vit, images)
    monkeypatch.setattr(saccade.worth, "_limit", lambda tokens, count, gates, run: float(gates.patch is None))
    tokens, trace = model.encode(batch)
    masked, _ = model.encode(batch, sparse=False)
    assert relative(tokens.x, masked.x) <= 1e-5
    whole = AdaptiveViT(vit).encode(batch)[1]
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
    by_places, cheap = model.encode(images)
    masked, _ = model.encode(images, sparse=False)
    of = saccade.plan.Plan.gates

    def without(self, *args):
        gates, cost = of(self, *args)
        return (None if gates is None else Gates(patch=gates.patch)), cost

    monkeypatch.setattr(saccade.plan.Plan, "gates", without)
    packed, same = model.encode(images)
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
    _, trace = AdaptiveViT(vit, "evit(0.7, at=1)").eval().encode(make_images(vit, 2))
    handle.remove()
    assert heard == [0]
    start = AdaptiveViT(vit).encode(make_images(vit, 2))[0]
    out, ran = whole_block(vit.blocks[1], lambda block, x: block(x), start)
    assert torch.equal(out.x, vit.blocks[1](start.x))
    assert ran.macs() == AdaptiveViT(vit).encode(make_images(vit, 2))[1].blocks[1].macs() == ran.macs(nominal=True)
    assert trace.blocks[0].macs() == ran.macs()
