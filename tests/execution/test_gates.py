"""Gates: masked and sparse execution are one definition."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saccade.execution.heads
from oracles import (
    RandomGates,
    add_gates,
    attention_by_hand,
    counted_macs,
    make_images,
    make_tokens,
    make_vit,
    relative,
    with_fields,
)
from saccade.core.gates import Gates, straight_through
from saccade.core.packing import Rows
from saccade.core.plan import Gater, Method, Plan
from saccade.execution import attention
from saccade.execution.mixing import Asked
from saccade.execution.policy import Execution
from saccade.execution.residual import residual
from saccade.model import AdaptiveViT

FAMILIES = ["vit", "deit3", "distilled", "dinov2-registers", "siglip", "class-average", "inner-norms", "dinov2-swiglu"]


class Fixed(Gater):
    """These gates, whatever comes."""

    def __init__(self, **gates: torch.Tensor) -> None:
        super().__init__()
        self.gates = Gates(**gates)

    def forward(self, tokens):
        return self.gates


@pytest.fixture(scope="module")
def vit():
    return make_vit("deit3", depth=3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", ["", "tome(r=2)"])
def test_masked_equals_sparse(family, setting):
    vit = make_vit(family, num_heads=6)
    gates = {block: RandomGates(block, 6) for block in range(3)}
    model = add_gates(AdaptiveViT(vit, setting), gates)
    images = make_images(vit, 5)
    with torch.no_grad():
        masked, sparse = (model.forward_tokens(images, sparse=way)[0] for way in (False, True))
        assert relative(sparse.x, masked.x) <= 1e-5
        assert relative(model.forward_head(sparse), model.forward_head(masked)) <= 1e-5
        assert masked.stats.gate_mask is sparse.stats.gate_mask is None, "gates are of one block only"
        plain, _ = AdaptiveViT(vit, setting).forward_tokens(images)
        assert relative(sparse.x, plain.x) > 0.01, "the gates do something"


@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_everything_off_is_the_identity(vit, sparse):
    images = make_images(vit, 3)
    off = Fixed(attn=torch.zeros(3), mlp=torch.zeros(3))
    tokens, trace = add_gates(AdaptiveViT(vit), dict.fromkeys(range(3), off)).forward_tokens(images, sparse=sparse)
    assert torch.equal(tokens.x, vit.norm_pre(vit._pos_embed(vit.patch_embed(images))))
    if sparse:
        assert trace.macs().tolist() == [trace.embed + trace.head] * 3


@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_everything_on_is_the_plain_block(vit, sparse):
    images = make_images(vit, 3)
    on = Fixed(patch=torch.ones(3, 16), head=torch.ones(3, 3), attn=torch.ones(3), mlp=torch.ones(3))
    tokens, _ = add_gates(AdaptiveViT(vit), dict.fromkeys(range(3), on)).forward_tokens(images, sparse=sparse)
    assert relative(tokens.x, AdaptiveViT(vit).forward_tokens(images)[0].x) <= 1e-6


@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_only_the_prefix_takes_part(vit, sparse):
    images = make_images(vit, 3)
    nobody = Fixed(patch=torch.zeros(3, 16))
    tokens, _ = add_gates(AdaptiveViT(vit), dict.fromkeys(range(3), nobody)).forward_tokens(images, sparse=sparse)
    start = vit._pos_embed(vit.patch_embed(images))
    assert torch.equal(tokens.patches, start[:, 1:]), "idle tokens ride the residual, bit by bit"
    assert relative(tokens.x[:, :1], vit.blocks(start[:, :1])) <= 1e-6


@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_without_heads_only_the_bias_of_the_projection_is_left(vit, sparse):
    images = make_images(vit, 2)
    none = Fixed(head=torch.zeros(2, 3), mlp=torch.zeros(2))
    tokens, _ = add_gates(AdaptiveViT(vit), {0: none}).forward_tokens(images, sparse=sparse)
    x = vit._pos_embed(vit.patch_embed(images))
    x = x + vit.blocks[0].ls1(vit.blocks[0].attn.proj.bias.expand_as(x))
    assert relative(tokens.x, vit.blocks[1:](x)) <= 1e-6


@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_a_head_that_is_off_gives_nothing(vit, sparse):
    """Equal to the block whose projection does not read that head's columns."""
    images = make_images(vit, 2)
    head = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    tokens, _ = add_gates(AdaptiveViT(vit), {0: Fixed(head=head, mlp=torch.zeros(2))}).forward_tokens(
        images, sparse=sparse
    )
    x = vit._pos_embed(vit.patch_embed(images))
    block, width = vit.blocks[0], vit.blocks[0].attn.head_dim
    rows = []
    for b in range(2):
        attn = make_vit("deit3", depth=1).blocks[0].attn
        attn.load_state_dict(block.attn.state_dict())
        for h in range(3):
            attn.proj.weight[:, h * width : (h + 1) * width] *= head[b, h]
        rows.append(x[b] + block.ls1(attention_by_hand(attn, block.norm1(x[b]))[0]))
    assert relative(tokens.x, vit.blocks[1:](torch.stack(rows))) <= 1e-5


@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_patches_that_take_part_are_a_smaller_block(vit, sparse):
    """A gate on patches equals timm's block on those tokens alone."""
    images = make_images(vit, 3)
    patch = (torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    patch[0] = 1
    tokens, _ = add_gates(AdaptiveViT(vit), {1: Fixed(patch=patch)}).forward_tokens(images, sparse=sparse)
    x = vit.blocks[0](vit._pos_embed(vit.patch_embed(images)))
    for b in range(3):
        places = [0, *(1 + patch[b].nonzero().squeeze(1)).tolist()]
        x[b, places] = vit.blocks[1](x[b : b + 1, places])[0]
    assert relative(tokens.x, vit.blocks[2](x)) <= 1e-5


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(vit):
    images = make_images(vit, 5)
    gates = RandomGates(0, 3)(make_tokens(5, 16))
    fields = {"patch": gates.patch, "head": gates.head, "attn": gates.attn, "mlp": gates.mlp}
    whole = add_gates(AdaptiveViT(vit), dict.fromkeys(range(3), Fixed(**fields)))(images).logits
    for b in range(5):
        mine = Fixed(**{name: value[b : b + 1] for name, value in fields.items()})
        alone = add_gates(AdaptiveViT(vit), dict.fromkeys(range(3), mine))(images[b : b + 1]).logits
        assert relative(alone, whole[b : b + 1]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    vit = make_vit("deit3", num_heads=6).to(dtype)
    model = add_gates(
        AdaptiveViT(vit, "tome(r=2)"), {block: RandomGates(block, 6, ("patch", "head", "mlp")) for block in (1, 2)}
    )
    images = make_images(vit, 4).to(dtype)
    masked, sparse = (model.forward_tokens(images, sparse=way)[0].x.float() for way in (False, True))
    assert masked.isfinite().all() and float((masked - sparse).norm() / masked.norm()) <= 2e-2


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_gather_and_scatter_are_exact(seed, images, patches, prefix, with_images):
    """With a branch that multiplies by three, masked and sparse differ in nothing, and idle rows stay bit by bit."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(images, patches, generator=generator) < 0.5).float()
    on = (torch.rand(images, generator=generator) < 0.7).float() if with_images else None
    tokens = make_tokens(images, patches, prefix, seed=seed, gate_mask=mask)

    def branch(x, bias, heads, rows):
        return 2 * x

    dense, _ = residual(tokens, branch, on=on)
    sparse, count = residual(tokens, branch, on=on, skipped="rows")
    assert torch.equal(dense, sparse)
    runs = tokens.pad_prefix(mask, 1.0) * (1 if on is None else on.unsqueeze(1))
    assert torch.equal(sparse, torch.where(runs.unsqueeze(-1) > 0, 3 * tokens.x, tokens.x))
    assert torch.equal(torch.as_tensor(count).expand(images), runs.sum(1).long())


def test_sparse_execution_computes_no_more_than_it_says(vit):
    seen = []

    def branch(x, bias, heads, rows):
        seen.append(tuple(x.shape))
        return torch.zeros_like(x)

    mask = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    tokens = make_tokens(3, 4, 2, gate_mask=mask)
    for on, counts, shape in (
        ([1, 1, 1], [4, 6, 3], (13, 8)),
        ([1, 0, 1], [4, 0, 3], (7, 8)),
        ([0, 0, 1], [0, 0, 3], (3, 8)),
    ):
        found = residual(tokens, branch, on=torch.tensor(on), skipped="rows")[1]
        assert torch.as_tensor(found).tolist() == counts
        assert seen.pop() == shape
    assert residual(tokens, branch, on=torch.zeros(3), skipped="rows")[1] == 0 and not seen
    found = residual(with_fields(tokens, gate_mask=None), branch, on=torch.tensor([0, 1, 0]), skipped="rows")[1]
    assert found == 6, "for each image that ran"
    assert seen.pop() == (1, 6, 8)


# --- heads ----------------------------------------------------------------------------------------------------------

HEADS = {  # of four images and six heads
    "each its own": [[1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]],
    "all alike": [[0, 1, 1, 0, 0, 1]] * 4,
    "two groups": [[1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 1, 1]] * 2,
    "none": [[0] * 6] * 4,
}


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit3", "qk-norm"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("lengths", [(9, 9, 9, 9), (9, 3, 0, 5)])
@pytest.mark.parametrize("way", ["fused", "unfused"])
@pytest.mark.parametrize("which", HEADS)
def test_heads_skipped_are_heads_left_out(family, own, lengths, way, which):
    """Sliced or grouped, with rows of images that differ: what computing all and multiplying gives."""
    attend = partial(attention.attend, execution=Execution(way))
    attn = make_vit(family, num_heads=6).blocks[0].attn
    heads = torch.tensor(HEADS[which], dtype=torch.float32)
    rows = Rows.of(torch.arange(9) < torch.tensor(lengths).unsqueeze(1))
    x = torch.randn(4, 9, 96, generator=torch.Generator().manual_seed(0))
    bias = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
    for b in (None, bias):
        skipped = attend(
            attn,
            rows.pack(x),
            None if b is None else rows.pack(b),
            ask=Asked(heads=heads, partial=own, rows=rows, skip=True),
        )
        for image, n in enumerate(lengths):
            if n:
                one = slice(image, image + 1)
                alone = attend(
                    attn, x[one, :n], None if b is None else b[one, :n], ask=Asked(heads=heads[one], partial=own)
                ).x
                assert relative(rows.unpack(skipped.x)[one, :n], alone) <= 1e-5
    whole = attend(attn, x, bias, ask=Asked(heads=heads, partial=own))
    assert relative(attend(attn, x, bias, ask=Asked(heads=heads, partial=own, skip=True)).x, whole.x) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit3", "inner-norms"])
@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("own", [False, True])
def test_skipped_heads_are_not_paid_for(family, seed, own, monkeypatch):
    """Random plans: masked equals sparse, and what is said to have run is what the operators ran."""
    monkeypatch.setattr(saccade.execution.heads, "MAX_HEAD_SHARE", 1e9)
    vit = make_vit(family, num_heads=6)
    gates = {block: Owning(10 * seed + block, own) for block in range(3)}
    model = add_gates(AdaptiveViT(vit), gates)
    images = make_images(vit, 5)
    masked, sparse = (model.forward_tokens(images, sparse=way)[0] for way in (False, True))
    assert relative(sparse.x, masked.x) <= 1e-5
    trace = model.forward_tokens(images, sparse=True)[1]
    counted = counted_macs(lambda: model.forward_tokens(images, sparse=True))
    assert float(trace.macs().sum()) - 5 * trace.head == pytest.approx(counted, rel=1e-3)
    skipped = [block.heads is not None for block in trace.blocks]
    assert skipped == [family != "inner-norms"] * 3, "a norm over all heads needs them all"
    if all(skipped):
        wanted = model.forward_tokens(images, sparse=False)[1].target_macs()
        assert relative(trace.macs().float(), wanted.float()) <= 1e-6, "all that is wanted to be skipped is"


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6)])
def test_at_the_shapes_of_vit_tiny_and_small(width, heads, monkeypatch):
    monkeypatch.setattr(saccade.execution.heads, "MAX_HEAD_SHARE", 1e9)
    vit = make_vit("deit", embed_dim=width, num_heads=heads, depth=12, img_size=224)
    model = add_gates(AdaptiveViT(vit), {block: RandomGates(block, heads) for block in range(1, 11)})
    images = make_images(vit, 3)
    masked, sparse = (model.forward_tokens(images, sparse=way)[0] for way in (False, True))
    assert relative(sparse.x, masked.x) <= 1e-5
    for b in range(3):
        alone = add_gates(AdaptiveViT(vit), {block: One(block, heads, b) for block in range(1, 11)})
        assert relative(alone.forward_tokens(images[b : b + 1])[0].x, sparse.x[b : b + 1]) <= 1e-5


class One(RandomGates):
    """What ``RandomGates`` decides for one image of three."""

    def __init__(self, seed: int, heads: int, image: int) -> None:
        super().__init__(seed, heads)
        self.image = image

    def forward(self, tokens):
        all_of_them = super().forward(make_tokens(3, tokens.num_patches))
        mine = slice(self.image, self.image + 1)
        return Gates(all_of_them.patch[mine], all_of_them.head[mine], all_of_them.attn[mine], all_of_them.mlp[mine])


class Owning(RandomGates):
    """Random gates of all axes; heads that are off pass their own values on, or nothing."""

    def __init__(self, seed: int, own: bool) -> None:
        super().__init__(seed, 6)
        self.own = own

    def forward(self, tokens):
        return replace(super().forward(tokens), partial=self.own)


@torch.no_grad()
def test_heads_are_skipped_where_that_pays(vit):
    def worth(heads: list[list[float]], on: list[float] | None = None) -> bool:
        given = None if on is None else torch.tensor(on)
        return saccade.execution.heads.should_skip_heads(
            vit.blocks[0].attn, Gates(head=torch.tensor(heads), attn=given)
        )

    assert worth([[1.0, 0, 1]]) and worth([[1.0, 0, 1]] * 4), "one slice of the weights"
    assert not worth([[1.0, 1, 1]] * 3), "there is nothing to skip"
    assert not worth([[1.0, 0, 1], [1, 1, 0]]) and worth([[1.0, 0, 0], [0, 0, 0]])
    assert worth([[1.0, 0, 1], [1, 1, 0]], on=[1.0, 0]), "of images that are on"
    assert not worth([[1.0, 0, 1], [1, 1, 0]], on=[0.0, 0])
    assert not saccade.execution.heads.should_skip_heads(
        make_vit("inner-norms").blocks[0].attn, Gates(head=torch.tensor([[1.0, 0, 0]]))
    )


@torch.no_grad()
def test_masked_execution_is_priced_as_dense(vit):
    gates = {block: RandomGates(block, 3) for block in range(3)}
    images = make_images(vit, 5)
    masked = add_gates(AdaptiveViT(vit), gates).forward_tokens(images, sparse=False)[1]
    assert torch.equal(masked.macs(), AdaptiveViT(vit).forward_tokens(images)[1].macs())
    assert (masked.target_macs() < masked.macs()).all()


@torch.no_grad()
def test_leaving_out_more_never_costs_more(vit, monkeypatch):
    """Token by token, head by head, branch by branch, from everything to nothing."""
    monkeypatch.setattr(saccade.execution.heads, "MAX_HEAD_SHARE", 1e9)
    images = make_images(vit, 2)
    gates = {"patch": torch.ones(2, 16), "head": torch.ones(2, 3), "attn": torch.ones(2), "mlp": torch.ones(2)}
    places = [(name, i) for name, gate in gates.items() for i in range(gate.numel())]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).tolist()
    before = torch.full((2,), torch.inf, dtype=torch.float64)
    for step in order:
        macs = (
            add_gates(AdaptiveViT(vit), {1: Fixed(**{k: v.clone() for k, v in gates.items()})})
            .forward_tokens(images)[1]
            .macs()
        )
        assert (macs <= before).all()
        before = macs
        name, i = places[step]
        gates[name].view(-1)[i] = 0
    none = add_gates(AdaptiveViT(vit), {1: Fixed(head=torch.zeros(2, 3))}).forward_tokens(images)[1]
    counted = counted_macs(
        lambda: add_gates(AdaptiveViT(vit), {1: Fixed(head=torch.zeros(2, 3))}).forward_tokens(images)
    )
    assert float(none.macs().sum()) - 2 * none.head == pytest.approx(counted, rel=1e-3), "no heads: the MLP still runs"


# --- straight-through -----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-40, 40), min_size=1, max_size=8), st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.9]))
def test_values_are_zero_or_one_and_the_gradient_is_the_sigmoids(values, threshold):
    logits = torch.tensor(values, requires_grad=True)
    gate = straight_through(logits, threshold)
    soft = logits.sigmoid()
    assert gate.tolist() == (soft > threshold).float().tolist()
    gate.sum().backward()
    torch.testing.assert_close(logits.grad, (soft * (1 - soft)).detach(), rtol=0, atol=1e-6)


def test_half_is_off():
    assert straight_through(torch.tensor([-1.0, 0.0, 1e-6, 3.0])).tolist() == [0, 0, 1, 1]


class Learned(Gater):
    """Linear gates on what comes in, as AdaViT's."""

    def __init__(self, width: int, heads: int, bias: float = 0.0) -> None:
        super().__init__()
        self.of_patch = torch.nn.Linear(width, 1)
        self.of_class = torch.nn.Linear(width, heads + 2)
        for layer in (self.of_patch, self.of_class):
            torch.nn.init.constant_(layer.bias, bias)

    def forward(self, tokens):
        patch = straight_through(self.of_patch(tokens.patches).squeeze(-1))
        other = straight_through(self.of_class(tokens.x[:, 0]))
        return Gates(patch, other[:, :-2], other[:, -2], other[:, -1])


@pytest.mark.parametrize("bias", [0.0, 50.0, -50.0])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_the_gates_and_nothing_is_nan(vit, bias, training):
    torch.manual_seed(0)
    gater = Learned(96, 3, bias)
    model = AdaptiveViT(vit)
    model.plan = Plan([Method([(1, gater)])])
    out = model.train(training)(make_images(vit, 4))
    out.logits.square().sum().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(grad is None or grad.isfinite().all() for grad in grads.values()) and out.logits.isfinite().all()
    if training and bias == 0:
        assert all(grads[f"plan.methods.0.steps.0.{name}"].abs().sum() > 0 for name, _ in gater.named_parameters())
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize("way", ["fused", "unfused"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("patch", [torch.zeros(2, 16), torch.ones(2, 16) * torch.tensor([[0.0], [1]])])
@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_nothing_takes_part(family, patch, sparse, way, monkeypatch):
    """No patch of an image, and in one of the two families no prefix token either."""
    monkeypatch.setenv("SACCADE_ATTENTION", way)
    vit = make_vit(family)
    gate = patch.clone().requires_grad_()
    tokens, _ = add_gates(AdaptiveViT(vit), {1: Fixed(patch=gate)}).forward_tokens(make_images(vit), sparse=sparse)
    assert tokens.x.isfinite().all()
    tokens.x.square().sum().backward()
    assert sparse or gate.grad.isfinite().all()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in vit.parameters())
    if family == "siglip":  # image 0 leaves the block as it came
        off = Fixed(attn=torch.zeros(2), mlp=torch.zeros(2))
        unchanged, _ = add_gates(AdaptiveViT(vit), {1: off}).forward_tokens(make_images(vit))
        assert relative(tokens.x[0], unchanged.x[0]) <= 1e-6


def test_the_gradient_of_a_gate_is_that_of_its_product(vit):
    """d/dg of ``x + g · branch(x)``: the branch's update, for the attention and for the MLP branch."""
    images = make_images(vit, 2)
    gates = {name: torch.ones(2, requires_grad=True) for name in ("attn", "mlp")}
    model = add_gates(AdaptiveViT(vit), {2: Fixed(**gates)})
    tokens, _ = model.forward_tokens(images, sparse=False)
    weight = torch.randn_like(tokens.x)
    (tokens.x * weight).sum().backward()
    block = vit.blocks[2]
    with torch.no_grad():
        x = vit.blocks[:2](vit._pos_embed(vit.patch_embed(images)))
        attended = block.ls1(block.attn(block.norm1(x)))
        x = x + attended
        updated = block.ls2(block.mlp(block.norm2(x)))
    assert relative(gates["mlp"].grad, (updated * weight).sum((1, 2))) <= 1e-5
    through_mlp = torch.func.jvp(lambda y: y + block.ls2(block.mlp(block.norm2(y))), (x,), (attended,))[1]
    assert relative(gates["attn"].grad, (through_mlp * weight).sum((1, 2)).detach()) <= 1e-4


# --- several methods ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_where_several_methods_gate_a_part_runs_where_all_agree(vit):
    images = make_images(vit, 4)
    one, two = RandomGates(1, 3, ("patch", "attn")), RandomGates(2, 3, ("attn", "mlp", "patch"))
    a, b = (gater(make_tokens(4, 16)) for gater in (one, two))
    both = Fixed(patch=a.patch * b.patch, attn=a.attn * b.attn, mlp=b.mlp)
    model = AdaptiveViT(vit)
    for order in ([one, two], [two, one]):
        model.plan = Plan([Method([(1, gater)]) for gater in order])
        expected = add_gates(AdaptiveViT(vit), {1: both})(images).logits
        assert torch.equal(model(images).logits, expected)
    model.plan = Plan([Method([(1, one), (1, two)])])
    assert torch.equal(model(images).logits, expected)


@torch.no_grad()
def test_training_multiplies_and_evaluation_skips(vit):
    model = add_gates(AdaptiveViT(vit), {block: RandomGates(block, 3) for block in range(3)})
    images = make_images(vit, 4)
    skipped = model(images)
    multiplied = model.train()(images)
    model.eval()
    assert relative(multiplied.logits, skipped.logits) <= 1e-5
    assert (multiplied.trace.macs() > skipped.trace.macs()).all()
    assert torch.equal(model.train()(images).logits, multiplied.logits)
    model.eval()
