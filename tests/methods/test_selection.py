"""Methods that select what is computed, thresholds for a budget.

Masked against sparse execution is in `test_gates` and `test_packing`; all here also keep
the contract of `test_contract` (cost, batches, gradients, half precision, other shapes).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.nn import functional as F

import saccade.core.packing
import saccade.execution.heads
import saccade.methods.dynamicvit
from data_helpers import encode, picture, write_folder
from oracles import attention_by_hand, block_macs, counted_macs, make_images, make_tokens, make_vit, relative
from saccade.core.costs import block_cost
from saccade.core.fingerprint import FINGERPRINT
from saccade.core.gates import Gates
from saccade.core.packing import Rows
from saccade.errors import UserError
from saccade.evaluation.calibrate import bisect, by_count, calibrate, fixed_levels, sigmoid, with_threshold
from saccade.execution import attention
from saccade.execution.attention import attend
from saccade.execution.loop import encode as run_blocks
from saccade.execution.mixing import Asked
from saccade.execution.policy import Execution
from saccade.methods.adavit import usage_of
from saccade.methods.ats import Sample, sample
from saccade.methods.common.matching import KeepAttended
from saccade.methods.common.sampling import choose, keep_where, with_best
from saccade.methods.dynamicvit import Drop, Predictor
from saccade.methods.ltmp import Prune
from saccade.methods.random_plus import Blind
from saccade.model import AdaptiveViT
from saccade.training.checkpoints import read_state, write_state
from saccade.training.multi_setting import MultiSettingModel

# --- choices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 1.0, 5.0])
def test_how_often_does_not_depend_on_the_temperature(tau):
    torch.manual_seed(0)
    draws = 200_000
    for value in (-2.0, 0.0, 1.0, 3.0):
        share = float(choose(torch.full((draws,), value), 1.0, tau).mean())
        expected = 1 / (1 + math.exp(-value))
        assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / draws)


@pytest.mark.parametrize("tau", [0.5, 1.0, 5.0])
def test_exactly_zero_or_one_with_the_gradient_of_the_noisy_sigmoid(tau):
    logits = torch.linspace(-6, 6, 500).requires_grad_()
    torch.manual_seed(3)
    gate = choose(logits, 1.0, tau)
    assert set(gate.tolist()) == {0.0, 1.0}
    gate.sum().backward()
    torch.manual_seed(3)
    u = torch.rand(500).clamp(1e-7, 1 - 1e-7)
    y = torch.sigmoid((logits.detach() + u.log() - (1 - u).log()) / tau)
    torch.testing.assert_close(logits.grad, y * (1 - y) / tau, rtol=0, atol=1e-6)


def test_without_noise_a_choice_is_a_threshold():
    logits = torch.tensor([-50.0, -1.0, 0.0, 1e-6, 3.0, 50.0, -torch.inf])
    assert choose(logits, 0.0).tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert choose(logits, 0.0, threshold=0.9).tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert choose(logits, 0.0, threshold=1.0).sum() == 0 and choose(logits, 0.0, threshold=0.0).sum() == 6


def test_keeping_what_is_chosen():
    chosen = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)
    found = keep_where(chosen)
    assert found.valid.tolist() == [[True, True, True], [True, False, False]]
    assert found.keep[0].tolist() == [1, 3, 4] and found.keep[1, 0] == 2
    assert keep_where(chosen[:0]).keep.shape == (0, 5)
    score = torch.tensor([[1.0, 3, 2], [5, 4, 6]])
    assert with_best(torch.zeros(2, 3), score).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert with_best(torch.ones(2, 3), score).tolist() == [[1, 1, 1], [1, 1, 1]]


# --- dynamicvit -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_predictor_by_hand():
    predictor = Predictor(8, seed=0)
    x, weights = torch.randn(2, 5, 8), torch.tensor([[1.0, 0, 2, 1, 0], [1, 1, 1, 1, 1]])
    for given in (weights, None):
        found = predictor(x, given)
        for b in range(2):
            inner = [F.gelu(predictor.inner(predictor.norm(row))) for row in x[b]]
            counts = [1.0] * 5 if given is None else given[b].tolist()
            mean = sum(c * z[4:] for c, z in zip(counts, inner, strict=True)) / sum(counts)
            for i in range(5):
                assert relative(predictor.outer(torch.cat([inner[i][:4], mean]))[0], found[b, i]) <= 1e-5


@pytest.mark.parametrize(
    ("keep", "counts", "gmacs"),
    [
        (0.9, [176, 158, 142], 4.04),
        (0.8, [156, 125, 100], 3.46),
        (0.7, [137, 96, 67], 2.98),
        (0.6, [117, 70, 42], 2.56),
        (0.5, [98, 49, 24], 2.23),
    ],
)
def test_counts_and_cost_are_the_published_ones(keep, counts, gmacs):
    """DeiT-S, predictors included; selection §1."""
    n, found, total = 196, [], 0.0
    for block in range(12):
        if block in (3, 6, 9):
            drop = Drop(keep, len(found), 196, 384, 0, 1.0, None)
            total += drop.macs(n)
            n = drop.count(n)
            found.append(n)
        total += block_macs(n + 1, n + 1, 384)
    assert found == counts == [int(196 * keep**i) for i in (1, 2, 3)]
    total += 196 * 3 * 16**2 * 384 + 384 * 1000
    assert total / 1e9 == pytest.approx(gmacs, abs=0.01)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_training_hides_what_evaluation_drops(scale, monkeypatch):
    """Masked training without noise is ragged evaluation; larger scores leak no more."""
    monkeypatch.setattr(saccade.core.packing, "MAX_LIVE_SHARE", 1.0)
    vit = make_vit("vit")
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight[: 2 * 96].mul_(scale)
    model = AdaptiveViT(vit, "dynamicvit(0.5, at=[0, 1], threshold=0.95)")
    images = make_images(vit, 4)
    with torch.no_grad():
        dropped = model(images)
    assert dropped.trace.macs().unique().numel() > 1, "another number of tokens in every image"
    monkeypatch.setattr(
        saccade.methods.dynamicvit, "choose", lambda logits, *_, **__: choose(logits, 0.0, threshold=0.95)
    )
    masked = model.train()(images)
    model.eval()
    assert relative(masked.logits, dropped.logits) <= 2e-5
    for hidden, gone in zip(masked.trace.blocks[:2], dropped.trace.blocks[:2], strict=True):
        assert relative(hidden.target_macs.detach() - hidden.aux_macs, (gone.macs() - gone.aux_macs).float()) <= 1e-6


def test_the_ratio_loss_and_its_gradient():
    vit = make_vit("vit")
    model = AdaptiveViT(vit, "dynamicvit(0.5, at=[0, 2])").train()
    (method,) = model.plan.methods
    kept = [torch.tensor([0.5, 0.7]), torch.tensor([0.25, 0.15])]
    blocks = [SimpleNamespace(kept=kept[0]), SimpleNamespace(kept=kept[0]), SimpleNamespace(kept=kept[1])]
    loss = method.loss(SimpleNamespace(images=2, blocks=blocks))["ratio"]
    assert float(loss) == pytest.approx(2.0 * (0 + 0.2**2 + 0 + 0.1**2) / 4, abs=1e-7)
    out = model(make_images(vit, 3))
    sum(method.loss(out.trace).values()).backward()
    model.eval()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.steps.parameters())
    assert all(step.predictor.outer[-1].bias.grad > 0 for step in method.steps), "it keeps too many at first"
    assert method.loss(model(make_images(vit, 2)).trace) == {}, "nothing is masked in evaluation"


@pytest.mark.parametrize("family", ["vit", "siglip"])
@pytest.mark.parametrize("training", [True, False])
def test_when_everything_is_given_up_the_best_token_stays(family, training):
    vit = make_vit(family)
    model = AdaptiveViT(vit, "dynamicvit(0.5, at=[0, 1], threshold=0.5)").train(training)
    with torch.no_grad():
        for step in model.plan.methods[0].steps:
            step.predictor.outer[-1].bias.fill_(-50.0)
    out = model(make_images(vit, 3))
    out.logits.square().sum().backward()
    model.eval()
    assert out.logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    if training:
        assert torch.equal(out.trace.blocks[1].kept.detach(), torch.full((3,), 1 / 16))


# --- adavit ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("way", ["fused", "unfused", "packed"])
def test_a_head_that_is_partly_off_passes_its_own_values(way):
    attend = partial(attention.attend, execution=Execution("fused" if way == "fused" else "unfused"))
    attn = make_vit("vit").blocks[0].attn
    x, width = torch.randn(2, 5, 96), attn.head_dim
    heads = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    if way == "packed":
        rows = Rows.of(torch.ones(2, 5, dtype=torch.bool))
        found = attend(attn, x.flatten(0, 1), ask=Asked(heads=heads, partial=True, rows=rows)).x.unflatten(0, (2, 5))
    else:
        found = attend(attn, x, ask=Asked(heads=heads, partial=True)).x
    values = attn.qkv(x)[..., 2 * 96 :]
    mixed = values.clone()
    shares = attention_by_hand(attn, x[0])[1]
    mixed[0, :, :width] = shares[0] @ values[0, :, :width]
    assert relative(found, attn.proj(mixed)) <= 1e-5


@pytest.mark.parametrize("form", ["token", "paper"])
def test_gates_read_the_class_token_and_each_patch(form):
    vit = make_vit("vit")
    model = AdaptiveViT(vit, f"adavit(threshold=0.98, form={form!r})")
    tokens = make_tokens(3, 16, width=96)
    (gater,) = model.plan.methods[0].steps  # the first block has none, the last of three computes the class token alone
    with torch.no_grad():
        gates = gater(tokens)
        for b in range(3):
            rows = [(row - row.mean()) / (row.var(unbiased=False) + 1e-6).sqrt() for row in tokens.x[b]]
            places = gater.layers["patch"](rows[0]) if form == "paper" else map(gater.layers["patch"], rows[1:])
            patch = [float(logit.sigmoid() > 0.98) for logit in places]
            head = (gater.layers["head"](rows[0]).sigmoid() > 0.98).float()
            attn, mlp = (gater.layers["block"](rows[0]).sigmoid() > 0.98).float().tolist()
            assert gates.patch[b].tolist() == patch and torch.equal(gates.head[b], head)
            assert (float(gates.attn[b]), float(gates.mlp[b])) == (attn, mlp)
    assert 0 < float(gates.patch.mean()) < 1
    start = AdaptiveViT(vit, "adavit()").plan.methods[0].steps[0](tokens)
    assert all(bool((gate == 1).all()) for gate in (start.patch, start.head, start.attn, start.mlp))


def test_the_usage_loss_by_hand():
    (method,) = AdaptiveViT(make_vit("vit"), "adavit((0.5, 0.75, 1.0), weight=2.0)").plan.methods
    patch, head = torch.tensor([[1.0, 0, 1], [1, 1, 0]]), torch.tensor([[1.0, 1], [1, 0]])
    ones = torch.ones(2)

    def loss(**gates) -> float:
        block = SimpleNamespace(gates=Gates(**gates))
        return float(method.loss(SimpleNamespace(images=2, blocks=[None, block]))["usage"])

    found = loss(patch=patch, head=head, attn=ones, mlp=torch.tensor([1.0, 0]))
    assert found == pytest.approx(2 * ((4 / 6 - 0.5) ** 2 + 0 + (0.75 - 1) ** 2), abs=1e-7)
    assert loss(patch=torch.tensor([[1.0, 0], [1, 0]]), head=head, attn=ones, mlp=ones) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("axes", [("patch",), ("head",), ("block",), ("patch", "head", "block")])
def test_the_budget_is_the_price_of_the_gates(axes):
    vit = make_vit("vit")
    model = AdaptiveViT(vit, f"adavit(axes={axes!r}, share=0.5, weight=3.0)").train()
    (method,) = model.plan.methods
    torch.manual_seed(0)
    trace = model(make_images(vit, 4)).trace
    loss = method.loss(trace)["budget"]
    model.eval()
    miss = float(trace.target_macs().detach().mean()) / (0.5 * float(trace.macs(nominal=True).mean())) - 1
    assert float(loss) == pytest.approx(3 * miss**2, rel=1e-5)
    loss.backward()
    for step in method.steps:
        for layer in step.layers.values():
            assert float(layer.bias.grad.min()) > 0, "more is dearer"


@pytest.mark.parametrize("heads", ["full", "partial"])
def test_every_axis_learns_from_the_task(heads):
    vit = make_vit("vit", depth=4)
    model = AdaptiveViT(vit, f"adavit(heads={heads!r})").train()
    model(make_images(vit, 4)).logits.square().sum().backward()
    model.eval()
    grads = {name: p.grad for name, p in model.plan.named_parameters()}
    assert len(grads) == 2 * 3 * 2 and all(g.isfinite().all() and g.abs().sum() > 0 for g in grads.values())


def learn(setting: str, steps: int, rate: float = 0.05, depth: int = 3) -> tuple[AdaptiveViT, torch.Tensor, list, list]:
    """Gates alone, with nothing but their own loss, at a falling rate: model, images, usage and MACs step by step."""
    torch.manual_seed(0)
    vit = make_vit("vit", depth=depth, embed_dim=48, num_heads=3).requires_grad_(False)
    model = AdaptiveViT(vit, setting).train()
    (method,) = model.plan.methods
    optimizer, images, usage, macs = torch.optim.Adam(method.parameters(), rate), make_images(vit, 16), [], []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        trace = model(images).trace
        usage.append(used_by(trace))
        macs.append(float(trace.target_macs().detach().mean()))
        optimizer.zero_grad()
        sum(method.loss(trace).values()).backward()
        optimizer.step()
        schedule.step()
    return model.eval(), images, usage, macs


def used_by(trace) -> list[float]:
    gates = trace.blocks[1].gates
    return [
        float(usage.detach()) if (usage := usage_of(gates, axis)) is not None else 1.0
        for axis in ("patch", "head", "block")
    ]


@pytest.mark.parametrize("wanted", [(0.5, 0.7, 0.6), (0.7, 0.5, 0.5)])
def test_usage_goes_where_it_is_asked_to(wanted):
    _, _, usage, _ = learn(f"adavit({wanted}, tau=1.0)", 300)
    assert usage[0][0] > 0.9
    assert (torch.tensor(usage[-100:]).mean(0) - torch.tensor(wanted)).abs().max() <= 0.03


def test_macs_go_where_they_are_asked_to_and_evaluation_agrees():
    """With little noise left, evaluation runs what training ran, without another threshold."""
    setting = "adavit(share=0.7, tau=1.0, weight=3.0, axes=('patch', 'block'), noise=0.3)"
    model, images, usage, macs = learn(setting, 300, 0.02, depth=5)
    with torch.no_grad():
        wanted = 0.7 * float(model.at("dense")(images).trace.macs(nominal=True).mean())
        ran = float(model(images).trace.macs().mean())
        evaluated = used_by(model.forward_tokens(images, sparse=False)[1])
    assert float(torch.tensor(macs[-50:]).mean()) == pytest.approx(wanted, rel=0.03)
    assert ran == pytest.approx(wanted, rel=0.03)
    assert (torch.tensor(usage[-50:]).mean(0) - torch.tensor(evaluated)).abs().max() <= 0.05


@pytest.mark.parametrize(("noise", "logit"), [(0.5, 1.0), (0.25, -0.5)])
def test_less_noise_is_a_surer_draw(noise, logit):
    torch.manual_seed(0)
    share = float(choose(torch.full((100_000,), logit), noise).mean())
    expected = 1 / (1 + math.exp(-logit / noise))
    assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / 100_000)


@torch.no_grad()
def test_settings_of_one_method_learn_the_same_and_are_saved_once(tmp_path):
    """Training may go through several settings of a method, ever cheaper; its checkpoints hold what they share."""
    model = AdaptiveViT(make_vit("vit"))
    student = MultiSettingModel(model, ["adavit(0.9)", "adavit(0.7)"])
    (one,), (two,) = (view.plan.methods for view in student.views)
    assert one.steps[0].layers["patch"].weight is two.steps[0].layers["patch"].weight
    write_state(tmp_path / "state", dict(student.state_dict()), {"step": 0})
    saved, _ = read_state(tmp_path / "state")
    assert saved.keys() == student.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in student.state_dict().items())


# --- every method that selects --------------------------------------------------------------------------------------

BY_CONTENT = [
    "evit(0.5, at=1)",
    "topk(0.5, at=1)",
    "dynamicvit(0.5, at=[0, 1])",
    "dynamicvit(at=1, threshold=0.95)",
    "adavit(threshold=0.98)",
    "diffrate(3, 4)",
    "ats(0.7, at=[0, 1])",
    "avit(gamma=1, beta=-0.5)",
    "ltmp(start=0.8, merge=None)",
]
PER_IMAGE = [
    "ats(0.7, at=[0, 1])",
    "avit(gamma=2, beta=2)",
    "ltmp(start=0.7, merge=0.6)",
    "dynamicvit(at=[0, 1], threshold=0.95)",
    "adavit(threshold=0.98)",
    "adavit(threshold=0.98, heads='partial')",
]


@torch.no_grad()
@pytest.mark.parametrize("text", BY_CONTENT)
def test_where_a_patch_stands_in_the_sequence_makes_no_difference(text):
    """Patches change places with their positions: the logits stay."""
    vit = make_vit("vit")
    model = AdaptiveViT(vit, text)
    tokens = model.tokenizer(vit, make_images(vit, 3))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        tokens, x=torch.cat([tokens.x[:, :1], tokens.patches[:, order]], 1), owner=order.argsort().expand(3, -1)
    )
    (found, ran), (expected, as_ran) = (run_blocks(vit, t, model.plan) for t in (shuffled, tokens))
    assert relative(model.forward_head(found), model.forward_head(expected)) <= 1e-5
    assert [float(b.macs().sum()) if isinstance(b.macs(), torch.Tensor) else b.macs() for b in ran] == [
        float(b.macs().sum()) if isinstance(b.macs(), torch.Tensor) else b.macs() for b in as_ran
    ]


@torch.no_grad()
@pytest.mark.parametrize("text", PER_IMAGE)
@pytest.mark.parametrize("ladder", [0.0, 0.95, 2.0])
def test_an_image_gets_what_it_needs_whatever_is_beside_it(text, ladder, monkeypatch):
    """One by one, in a batch, padded or packed, heads skipped or computed: the same logits."""
    monkeypatch.setattr(saccade.core.packing, "MAX_LIVE_SHARE", ladder)
    monkeypatch.setattr(saccade.execution.heads, "MAX_HEAD_SHARE", 1e9 * ladder)
    vit = make_vit("vit", num_heads=6)
    model, images = AdaptiveViT(vit, text), make_images(vit, 5)
    together = model(images)
    assert ladder == 0 or together.trace.macs().unique().numel() > 1, "images differ in cost"
    for b in range(5):
        assert relative(model(images[b : b + 1]).logits, together.logits[b : b + 1]) <= 1e-5


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("keep", "plain", "fused"),
    [
        (0.9, ([177, 160, 144], 3.99), ([178, 162, 147], 4.02)),
        (0.8, ([157, 126, 101], 3.44), ([158, 128, 104], 3.48)),
        (0.7, ([138, 97, 68], 3.00), ([139, 99, 71], 3.03)),
        (0.6, ([118, 71, 43], 2.61), ([119, 73, 45], 2.64)),
        (0.5, ([98, 49, 25], 2.28), ([99, 51, 27], 2.31)),
    ],
)
def test_evit_counts_and_costs_what_its_paper_says(keep, plain, fused, fuse):
    """DeiT-S, selection §1; reading class attention is not counted there."""
    counts, gmacs = fused if fuse else plain
    n, found, total = 196, [], 0.0
    for block in range(12):
        before = n
        if block in (3, 6, 9):
            n = KeepAttended(keep, "cls_attn", fuse).count(n)
            found.append(n)
        total += block_macs(before + 1, n + 1, 384)
    assert found == counts
    assert (total + 196 * 3 * 16**2 * 384 + 384 * 1000) / 1e9 == pytest.approx(gmacs, abs=0.01)


@pytest.mark.parametrize(("name", "gmacs"), [("tiny", 1.25), ("small", 4.60), ("base", 17.56)])
def test_dense_deit_costs_what_its_formula_says(name, gmacs):
    width = {"tiny": 192, "small": 384, "base": 768}[name]
    with torch.device("meta"):
        cost = block_cost(timm.create_model(f"deit_{name}_patch16_224").blocks[0])
    total = 12 * (cost.attention(197, 197) + 197 * cost.mlp) + 196 * 3 * 16**2 * width + width * 1000
    assert total / 1e9 == pytest.approx(gmacs, abs=0.01)


@torch.no_grad()
def test_padding_is_paid_for_where_it_is_computed(monkeypatch):
    """Ragged counts as a rectangle: every image costs as much as the longest."""
    monkeypatch.setattr(saccade.core.packing, "MAX_LIVE_SHARE", 0.0)
    vit = make_vit("vit")
    model, images = AdaptiveViT(vit, "dynamicvit(at=0, threshold=0.95)"), make_images(vit, 4)
    padded = model(images).trace.macs()
    assert padded.unique().numel() == 1
    assert float(padded.sum()) == pytest.approx(counted_macs(lambda: model(images)), rel=1e-3)
    monkeypatch.setattr(saccade.core.packing, "MAX_LIVE_SHARE", 0.95)
    assert float(model(images).trace.macs().sum()) < float(padded.sum())


# --- topk and the random control ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_topk_is_the_mean_over_heads_of_q_times_k(family):
    vit = make_vit(family)
    tokens, _ = AdaptiveViT(vit).forward_tokens(make_images(vit, 3))
    block, prefix = vit.blocks[1], tokens.num_prefix
    gater = AdaptiveViT(vit, "topk(0.3, at=1)").plan.methods[0].steps[0]
    found = gater.gates_for(block, tokens).patch
    for b in range(3):
        x = block.norm1(tokens.x[b])
        q, k, _ = block.attn.qkv(x).view(-1, 3, block.attn.num_heads, block.attn.head_dim).unbind(1)
        asker = q[0] if prefix else q.mean(0)
        score = [float((asker * k[j]).sum(-1).mean()) for j in range(prefix, len(x))]
        best = sorted(range(len(score)), key=lambda j: -score[j])[:5]  # ⌈0.3 · 16⌉
        assert sorted(best) == found[b].nonzero().squeeze(1).tolist()


@torch.no_grad()
def test_topk_runs_as_a_rectangle_and_everybody_may_come_back():
    vit = make_vit("vit", depth=4)
    model = AdaptiveViT(vit, "topk(0.5, at=[1, 2])")
    out = model(make_images(vit, 3))
    middle = out.trace.blocks[1:3]
    assert all(run.queries == run.keys == run.mlp == 9 and isinstance(run.queries, int) for run in middle)
    assert all((run.owner >= 0).all() for run in out.trace.blocks), "nothing is dropped for good"


@torch.no_grad()
def test_random_plus_runs_the_share_it_says():
    tokens = make_tokens(3, 20, width=96)
    tokens = replace(tokens, state={FINGERPRINT: torch.tensor([5, 6, 5])})
    gater = Blind(0.7, ("patch", "head", "block"), 10, (1, 3), seed=5)
    gates = gater.eval()(tokens)
    assert gates.patch.sum(1).tolist() == [14.0] * 3 and gates.head.sum(1).tolist() == [7.0] * 3
    for gate in (gates.patch, gates.head):
        assert torch.equal(gate[0], gate[2]) and not torch.equal(gate[0], gate[1])
    torch.manual_seed(0)
    gates = gater.train()(make_tokens(300, 20, width=96))
    for gate in (gates.patch, gates.head, torch.stack([gates.attn, gates.mlp])):
        assert abs(float(gate.mean()) - 0.7) <= 4 * math.sqrt(0.21 / gate.numel())


@torch.no_grad()
def test_random_plus_draws_for_each_image_and_the_same_in_every_batch():
    vit = make_vit("vit", depth=6)
    images = make_images(vit, 40)
    model = AdaptiveViT(vit, "random_plus(0.5)")
    gates = [block.gates for block in model.forward_tokens(images, sparse=False)[1].blocks[1:5]]
    branches = torch.stack([branch for g in gates for branch in (g.attn, g.mlp)], dim=1)
    assert branches.sum(1).tolist() == [4.0] * 40, "of all blocks together"
    for draws in (branches, gates[0].patch, gates[2].head):
        assert len(draws.unique(dim=0)) > 2 and abs(float(draws.mean(0).sub(draws.mean()).abs().max())) < 0.35
    assert not torch.equal(gates[0].patch, gates[1].patch) and not torch.equal(gates[0].head, gates[1].head)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    again = model.forward_tokens(images[order], sparse=False)[1].blocks[1].gates
    assert torch.equal(again.patch, gates[0].patch[order])
    other = model.at("random_plus(0.5, seed=1)").forward_tokens(images, sparse=False)[1].blocks[1].gates
    assert not torch.equal(other.patch, gates[0].patch)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("dynamicvit(1.5)", ["keep=1.5", "[0.001, 1]"]),
        ("dynamicvit(threshold=2)", ["threshold=2", "[0, 1]"]),
        ("dynamicvit(tau=0)", ["tau=0"]),
        ("adavit((0.5, 0.5))", ["usage=(0.5, 0.5)", "one for each axis"]),
        ("adavit(axes='patches')", ["axes='patches'", "patch, head, block"]),
        ("adavit(gmacs=1, share=0.5)", ["one of gmacs, share and speed"]),
        ("adavit(gmacs=-1)", ["gmacs=-1"]),
        ("adavit(form='code')", ["form='code'", "released"]),
        ("topk((0.5, 0.5), at=1)", ["2 values of keep for 1 blocks"]),
        ("topk(asks='head')", ["asks='head'", "class, mean"]),
        ("random_plus(2)", ["usage=2"]),
    ],
)
def test_knobs_out_of_range_are_named(setting, words):
    with pytest.raises(UserError) as error:
        AdaptiveViT(make_vit("vit"), setting)
    assert all(word in str(error.value) for word in words), str(error.value)


@torch.no_grad()
def test_the_papers_form_needs_the_models_own_grid():
    vit = make_vit("vit")
    with pytest.raises(UserError, match="16 places and there are 4"):
        AdaptiveViT(vit, "grid(32) | adavit(form='paper', axes='patch')")(make_images(vit, 1))


# --- controls ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("norm", "rows"),
    [
        ("l1", ["....", ".##.", ".##.", "...."]),
        ("linf", ["....", ".##.", ".##.", "...."]),
        ("l2", [".##.", "####", "####", ".##."]),
    ],
)
def test_radial_keeps_the_middle(norm, rows):
    text = "".join(rows)
    vit = make_vit("vit")
    setting = f"radial({text.count('#') / 16}, at=1, norm={norm!r})"
    owner = AdaptiveViT(vit, setting).forward_tokens(make_images(vit, 2))[1].blocks[1].owner
    assert ["".join("#" if o >= 0 else "." for o in image) for image in owner.tolist()] == [text, text]


# --- calibrate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.3, 0.55, 0.9])
def test_bisection_meets_a_budget_closely_and_never_misses_it(budget):
    seen = []

    def cost(threshold: float) -> float:
        seen.append(threshold)
        return 0.2 + 0.8 * (1 - threshold) ** 3

    found = bisect(cost, budget)
    assert 0.98 * budget <= cost(found) <= budget and len(seen) <= 15
    assert bisect(cost, 2.0) < 1e-5, "no need to leave anything out"
    with pytest.raises(UserError, match=r"gmacs=0\.1 .* least is 0\.2"):
        bisect(cost, 0.1)


@pytest.mark.parametrize(
    ("setting", "changed"),
    [
        ("dynamicvit(0.7)", "dynamicvit(0.7, threshold=0.25)"),
        ("dynamicvit(0.7, None, 0.5)", "dynamicvit(0.7, None, 0.25)"),
        ("grid(32) | adavit(threshold=0.9, tau=1.0)", "grid(32) | adavit(tau=1.0, threshold=0.25)"),
    ],
)
def test_only_the_threshold_changes(setting, changed):
    assert with_threshold(setting, 0.25) == changed


@pytest.mark.parametrize("setting", ["evit(0.5)", "dense", "dynamicvit() | adavit()"])
def test_a_setting_without_one_threshold_is_refused(setting):
    with pytest.raises(UserError, match="cannot be calibrated"):
        with_threshold(setting, 0.5)


def test_calibrate_on_images(tmp_path):
    images = write_folder(tmp_path / "photos", {f"{i}.png": encode(picture(seed=i)) for i in range(6)})
    vit = make_vit("vit")
    model = AdaptiveViT(vit)
    dense = float(model(make_images(vit, 1)).trace.macs()) / 1e9
    budget = 0.85 * dense
    found = calibrate(model, str(images), "dynamicvit(0.7)", budget, cache=tmp_path / "cache")
    assert found.gmacs <= budget and found.images == 6
    assert len(found.threshold) == 2 and all(0 < threshold < 1 for threshold in found.threshold), "one for each stage"
    assert found.gmacs_p50 <= found.gmacs_p95 and found.gmacs_dense == pytest.approx(dense, rel=1e-6)
    assert with_threshold(found.setting, found.threshold) == found.setting
    again = calibrate(model, str(images), "dynamicvit(0.7)", budget, cache=tmp_path / "cache")
    assert again == found, "read from the cache"
    with pytest.raises(UserError, match="out of reach"):
        calibrate(model, str(images), "dynamicvit(0.7)", 0.01 * dense)


@torch.no_grad()
def test_calibration_starts_where_fixed_counts_lie():
    """A threshold for each stage, at which as many tokens stay there over all images as by a fixed count."""
    vit = make_vit("vit", depth=4, img_size=96)
    model, images = AdaptiveViT(vit), make_images(vit, 16)
    fixed = model.at("dynamicvit(0.6, at=(1, 2))").eval()
    levels = fixed_levels(fixed, lambda: fixed(images))
    assert len(levels) == 2 and not any(step._forward_hooks for step in fixed.plan.methods[0].steps)
    limits = tuple(sigmoid(level) for level in levels)
    ragged = fixed.at(f"dynamicvit(0.6, at=(1, 2), threshold={limits})").eval()
    first, second = (trace.blocks for trace in (fixed(images).trace, ragged(images).trace))
    kept = [torch.as_tensor(block.mlp).float().mean().item() - 1 for block in second]
    wanted = [block.mlp - 1 for block in first]
    assert kept[1] == pytest.approx(wanted[1], abs=1.0), "over all images, at the first stage exactly"
    assert wanted[1] < 36 and torch.as_tensor(second[1].mlp).unique().numel() > 1, "but not in each"
    assert fixed_levels(model.at("adavit()").eval(), lambda: None) == []
    assert by_count(model, "dynamicvit()") is not None
    assert by_count(model, "adavit()") is by_count(model, "grid(32)") is None


@pytest.mark.parametrize("threshold", ["(0.5,)", "(0.5, 1.5)", "(0.5, 0.5, 0.5)", "'x'"])
def test_thresholds_that_do_not_fit_are_refused(threshold):
    with pytest.raises(UserError, match="dynamicvit"):
        AdaptiveViT(make_vit("vit"), f"dynamicvit(0.6, at=(1, 2), threshold={threshold})")


# --- ats and ltmp ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("levels", ["text", "code"])
@pytest.mark.parametrize("keep", [1.0, 0.5, 0.1])
def test_ats_samples_the_cumulative_score(keep, levels):
    """Level by level, one image at a time; another number of tokens in every image."""
    tokens = make_tokens(4, 20, cls_attn=torch.rand(4, 20) ** 3, value_norm=torch.rand(4, 20) + 0.5)
    valid = torch.arange(20) < torch.tensor([[20], [13], [7], [1]])
    for given in (tokens, replace(tokens, valid=valid)):
        found = Sample(keep, "cls_attn", levels)(given)
        for b in range(4):
            n = 20 if given.valid is None else int(valid[b].sum())
            score = (tokens.stats.cls_attn * tokens.stats.value_norm)[b, :n].double()
            order = sorted(range(n), key=lambda j: float(score[j]))
            cdf = [sum(float(score[j]) for j in order[: i + 1]) / float(score.sum()) for i in range(n)]
            count = math.ceil(round(keep * n, 9))
            wanted = [(k + 0.5) / count for k in range(count)]
            if levels == "code":
                cdf = [(c - cdf[0]) / max(1 - cdf[0], 1e-30) for c in cdf]
                start = min((c for c in cdf if c > 0), default=1.0)
                wanted = [start + (1 - start) * k / max(count - 1, 1) for k in range(count)]
            expected = {order[min(range(n), key=lambda i: abs(cdf[i] - u))] for u in wanted}
            expected.add(max(range(n), key=lambda j: float(score[j])))
            assert set(found.keep[b][found.valid[b]].tolist()) == expected


@torch.no_grad()
def test_attention_tells_how_long_values_are():
    attn = make_vit("vit").blocks[0].attn
    x = torch.randn(2, 5, 96)
    expected = attn.qkv(x)[..., 2 * 96 :].norm(dim=-1)
    rows = Rows.of(torch.ones(2, 5, dtype=torch.bool))
    assert relative(attend(attn, x, ask=Asked(read=frozenset({"value_norm"}))).stats.value_norm, expected) <= 1e-5
    packed = attend(attn, x.flatten(0, 1), ask=Asked(read=frozenset({"value_norm"}), rows=rows))
    assert relative(packed.stats.value_norm.view(2, 5), expected) <= 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_ltmp_drops_what_receives_too_little(training):
    received = torch.rand(3, 16) / 17
    tokens = make_tokens(3, 16, attn_received=received)
    reducer = Prune(0.6).train(training)
    found = reducer(tokens)
    expected = received * 17 > 0.6
    assert expected.any(1).all() and not expected.all()
    if training:
        assert torch.equal(found.gate.detach() > 0, expected)
        found.gate.sum().backward()
        soft = ((received * 17 - 0.6) / 0.1).sigmoid()
        assert float(reducer.threshold.grad) == pytest.approx(-float((soft * (1 - soft)).sum()) / 0.1, rel=1e-4)
    else:
        for b in range(3):
            assert found.keep[b][found.valid[b]].tolist() == expected[b].nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8, 9], [0, 2, 3, 5, 6, 8, 9]])
def test_ats_padding_takes_no_place_among_sorted_scores(places):
    """Half of the tokens have no score, as those that gates leave out; padding stands behind, before and between."""
    wanted = (torch.arange(7, dtype=torch.float64)[None] + 0.5) / 7
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(1, 7, generator=generator) * (torch.rand(1, 7, generator=generator) < 0.5)
        padded = torch.full((1, 10), -torch.inf)
        padded[:, places] = score
        found = sample(padded, wanted)
        assert torch.equal(found[:, places], sample(score, wanted)) and found.sum() == found[:, places].sum(), seed
