"""Ragged batches: packed rows compute what each image alone computes, and nothing for padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saccade.checkpoint
import saccade.core.packing
from oracles import counted_macs, make_images, make_vit, relative
from saccade.core.packing import Rows, packed, padded
from saccade.core.plan import Method, Plan, Reducer
from saccade.core.reduction import Reduction
from saccade.core.softmax import masked_softmax
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.execution.loop import encode
from saccade.execution.policy import Execution
from saccade.model import AdaptiveViT, share

FAMILIES = ["vit", "deit3", "distilled", "dinov2-registers", "siglip", "class-average", "qk-norm", "inner-norms"]


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 9))
def test_rows_go_and_come_back(seed, images, length):
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(images, length, generator=generator) < 0.5
    x = torch.randn(images, length, 3, generator=generator)
    rows = Rows.of(present)
    assert rows.lengths == tuple(present.sum(1).tolist()) and torch.equal(rows.pack(x), x[present])
    assert torch.equal(rows.unpack(rows.pack(x)), x * present.unsqueeze(-1))
    assert torch.equal(rows.add(x, rows.pack(x)), torch.where(present.unsqueeze(-1), 2 * x, x))
    assert torch.equal(torch.as_tensor(rows.count()).expand(images), present.sum(1))


def ragged(vit, images: int = 4, seed: int = 0, sizes: bool = False) -> Tokens:
    """Tokens of images that keep different numbers of patches, in random places; padding holds rubbish."""
    tokens, _ = AdaptiveViT(vit).forward_tokens(make_images(vit, images))
    generator = torch.Generator().manual_seed(seed)
    n = tokens.num_patches
    counts = torch.tensor([3 + (5 * b) % (n - 3) for b in range(images)])
    valid = torch.arange(n) < counts.unsqueeze(1)
    valid = valid.gather(1, torch.rand(images, n, generator=generator).argsort(1))
    x = tokens.x.clone()
    x[:, tokens.num_prefix :][~valid] = 1e3
    size = torch.randint(1, 4, (images, n), generator=generator).float() if sizes else None
    return replace(tokens, x=x, valid=valid, size=size)


def alone(tokens: Tokens, b: int) -> Tokens:
    """Image b by itself, without its padding."""
    real = tokens.valid[b]
    x = torch.cat([tokens.x[b, : tokens.num_prefix], tokens.patches[b][real]])
    size = None if tokens.size is None else tokens.size[b : b + 1, real]
    cells = torch.arange(int(real.sum())).unsqueeze(0)
    return Tokens(x.unsqueeze(0), cells, (1, cells.shape[1]), tokens.num_prefix, size=size)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("way", ["fused", "unfused"])
def test_packed_is_each_image_alone(family, sizes, way):
    execution = Execution(way)
    vit = make_vit(family)
    tokens = ragged(vit, sizes=sizes)
    model = AdaptiveViT(vit)
    together, trace = encode(vit, tokens, Plan(), execution=execution)
    assert type(together) is Tokens and together.x.shape == tokens.x.shape
    logits = model.forward_head(together)
    for b in range(4):
        single, cost = encode(vit, alone(tokens, b), Plan(), execution=execution)
        real = torch.cat([torch.ones(tokens.num_prefix, dtype=torch.bool), tokens.valid[b]])
        assert relative(together.x[b : b + 1, real], single.x) <= 1e-5
        assert relative(logits[b : b + 1], model.forward_head(single)) <= 1e-5
        assert [float(run.macs()[b]) for run in trace] == [float(run.macs()) for run in cost], "nothing for padding"


@torch.no_grad()
def test_the_counter_agrees():
    vit = make_vit("deit")
    tokens = ragged(vit)
    _, trace = encode(vit, tokens, Plan())
    assert sum(float(run.macs().sum()) for run in trace) == pytest.approx(
        counted_macs(lambda: encode(vit, tokens, Plan())), rel=1e-3
    )


@torch.no_grad()
@pytest.mark.parametrize("sizes", [False, True])
def test_packed_equals_padded(sizes, monkeypatch):
    vit = make_vit("deit3")
    tokens = ragged(vit, sizes=sizes)
    assert packed(tokens).x.ndim == 2 and torch.equal(padded(packed(tokens)).valid, tokens.valid)
    found, _ = encode(vit, tokens, Plan())
    monkeypatch.setattr(saccade.core.packing, "MAX_LIVE_SHARE", 0.0)
    expected, _ = encode(vit, tokens, Plan())
    real = tokens.pad_prefix(tokens.valid, 1.0) > 0
    assert relative(found.x[real], expected.x[real]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("setting", ["evit(0.5, at=1)", "evit(0.5, at=[0, 1], score='received')", "random(0.5, at=1)"])
def test_reducers_see_a_rectangle(setting):
    vit = make_vit("deit")
    found, trace = encode(vit, ragged(vit), AdaptiveViT(vit, setting).plan)
    assert found.x.isfinite().all() and found.valid is not None and found.valid.shape[1] == found.num_patches
    assert all(isinstance(run.macs(), torch.Tensor) for run in trace)


class Above(Reducer):
    """Keeps the tokens whose first feature is above a threshold: another number in every image."""

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = torch.nn.Parameter(torch.tensor(threshold))

    def count(self, n):
        return None

    def forward(self, tokens):
        score = tokens.patches[..., 0] - self.threshold
        hard = (score > 0).float()
        gate = hard - score.sigmoid().detach() + score.sigmoid()
        if tokens.valid is not None:
            hard = hard * tokens.valid
        order = (-hard).argsort(dim=1, stable=True)[:, : max(1, int(hard.sum(1).max()))]
        return Reduction(order, valid=hard.gather(1, order) > 0, gate=gate)


def thresholds(vit, at=(0, 1)) -> AdaptiveViT:
    model = AdaptiveViT(vit)
    model.plan = Plan([Method((i, Above(0.2 + 0.3 * i)) for i in at)])
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit3", "distilled", "dinov2-registers", "class-average"])
def test_a_reduction_by_threshold_is_the_same_masked_and_sparse(family, monkeypatch):
    monkeypatch.setattr(saccade.core.packing, "MAX_LIVE_SHARE", 1.0)
    vit = make_vit(family)
    model, images = thresholds(vit), make_images(vit, 5)
    masked, _ = model.forward_tokens(images, sparse=False)
    sparse, _ = model.forward_tokens(images, sparse=True)
    assert len(set(sparse.valid.sum(1).tolist())) > 1 and bool((masked.keep_mask.sum(1) == sparse.valid.sum(1)).all())
    assert relative(model.forward_head(sparse), model.forward_head(masked)) <= 1e-5
    for b in range(5):
        assert relative(model(images[b : b + 1]).logits, model(images).logits[b : b + 1]) <= 1e-5
    gone = (sparse.owner < 0).sum(1) + sparse.area().sum(1)
    assert (gone == sparse.owner.shape[1]).all() and (sparse.owner < 0).any()
    dense = model.feature_map(images)
    tokens, _ = model._forward_tokens(images, whole=True, sparse=False, dense=True)
    assert (
        relative(
            dense.flatten(2).transpose(1, 2), vit.norm(tokens.scatter_to_grid(tokens.patches, tokens.dropped_features))
        )
        <= 1e-5
    )


def test_dropping_is_learned_through_attention(monkeypatch):
    monkeypatch.setattr(saccade.core.packing, "MAX_LIVE_SHARE", 1.0)
    vit = make_vit("vit")
    model = thresholds(vit).train()
    out = model(make_images(vit, 4))
    out.logits.square().sum().backward()
    grads = [step.threshold.grad for method in model.plan.methods for step in method.steps]
    assert all(grad.isfinite() and grad != 0 for grad in grads)
    wanted = out.trace.target_macs()
    assert (wanted < out.trace.macs()).all()
    model.zero_grad()
    model(make_images(vit, 4)).trace.target_macs().sum().backward()
    assert all(step.threshold.grad < 0 for method in model.plan.methods for step in method.steps), "higher is cheaper"
    with torch.no_grad():
        ran = model.eval()(make_images(vit, 4)).trace.macs()
    whole = model.forward_tokens(make_images(vit, 4), sparse=False)[1].target_macs()
    short = model.forward_tokens(make_images(vit, 4), sparse=True)[1].macs()
    assert relative(whole.detach(), short) <= 1e-6 and (ran < whole).all()


@pytest.mark.parametrize("std", [1.0, 3.0, 6.0, 12.0, 60.0])
def test_masked_softmax_is_exact(std):
    """The ε-smoothed form of the field is wrong by 0.5 at a standard deviation of 6."""
    generator = torch.Generator().manual_seed(0)
    scores = (std * torch.randn(3, 2, 9, 9, generator=generator)).requires_grad_()
    alive = (torch.rand(3, 1, 1, 9, generator=generator) < 0.5).float()
    alive[..., 0] = 1
    gate = alive.clone().requires_grad_()
    found = masked_softmax(scores, gate)
    assert (found - scores.masked_fill(alive == 0, -torch.inf).softmax(-1)).abs().max() <= 1e-6
    found.square().sum().backward()
    assert gate.grad.isfinite().all() and scores.grad.isfinite().all()
    nobody = masked_softmax(scores.detach(), torch.zeros_like(alive))
    assert (nobody == 0).all()


def test_a_method_has_the_same_parameters_in_every_setting():
    learned: dict[str, torch.Tensor] = {}
    one, two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    share(one, "gate", learned)
    share(two, "gate", learned)
    assert two.weight is one.weight and set(learned) == {"gate.weight", "gate.bias"}
    other = torch.nn.Linear(3, 2)
    share(other, "other", learned)
    assert other.weight is not one.weight
    with pytest.raises(UserError, match=r"gate\.weight.*\(2, 3\).*\(2, 4\)"):
        share(torch.nn.Linear(4, 2), "gate", learned)
    vit = make_vit("vit")
    model = AdaptiveViT(vit, "depth(2, head='own')")
    again = model.at("evit(0.5)").at("depth(2, head='own')")
    assert [id(p) for p in again.plan.parameters()] == [id(p) for p in model.plan.parameters()]
    assert len(list(model.at("depth(1, head='own')").plan.parameters())) == 4 and len(model.learned) == 8


@torch.no_grad()
def test_depth_is_the_first_blocks():
    vit = make_vit("deit3")
    images = make_images(vit)
    shallow = make_vit("deit3")
    shallow.blocks = shallow.blocks[:2]
    shallow.load_state_dict({k: v for k, v in vit.state_dict().items() if not k.startswith("blocks.2")})
    out = AdaptiveViT(vit, "depth(2)")(images)
    assert relative(out.logits, shallow(images)) <= 1e-5 and len(out.trace.blocks) == 2
    own = AdaptiveViT(vit, "depth(2, head='own')")
    assert torch.equal(own(images).logits, AdaptiveViT(vit, "depth(2, head='own')")(images).logits)
    assert relative(own(images).logits, out.logits) > 0.1


@torch.no_grad()
def test_what_methods_learned_goes_into_a_folder_once_and_comes_back(tmp_path):
    vit = make_vit("vit")
    model = AdaptiveViT(vit)
    view = model.at("depth(2, head='own')")
    for weight in view.plan.parameters():
        weight.normal_()
    images = make_images(vit)
    saccade.checkpoint.save(model, tmp_path / "model")
    found = saccade.checkpoint.load(tmp_path / "model")
    assert torch.equal(found.at("depth(2, head='own')")(images).logits, view(images).logits)
    again = saccade.checkpoint.load(tmp_path / "model", "depth(2, head='own')")
    assert torch.equal(again(images).logits, view(images).logits)
    saccade.checkpoint.save(view, tmp_path / "view")
    there = saccade.checkpoint.load(tmp_path / "view")
    assert str(there.setting) == "depth(2, head='own')" and torch.equal(there(images).logits, view(images).logits)
