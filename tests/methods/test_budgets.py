"""What a budget means to methods whose cost follows from what they learn or draw, or differs from image to image."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from oracles import make_images, make_vit
from saccade.core.gates import Gates
from saccade.core.plan import Gater, Method, Plan
from saccade.errors import UserError
from saccade.methods.common.budget import Used, gated, macs
from saccade.methods.common.sampling import keep_where
from saccade.methods.topk import price
from saccade.model import AdaptiveViT

SHAPE = {"depth": 6, "embed_dim": 96, "num_heads": 6, "img_size": 128}  # 65 tokens
SPEED = 1.5


@pytest.fixture(scope="module")
def vit():
    return make_vit("deit", **SHAPE).requires_grad_(False)


def dense_macs(vit) -> float:
    return float(AdaptiveViT(vit)(make_images(vit, 1)).trace.macs())


def both(vit, name: str, knobs: str = "") -> list[AdaptiveViT]:
    """By speed, and by as many GMACs."""
    budget = dense_macs(vit) / SPEED / 1e9
    return [AdaptiveViT(vit, f"{name}({knobs}{knob})") for knob in (f"speed={SPEED}", f"gmacs={budget!r}")]


@torch.no_grad()
@pytest.mark.parametrize("levels", ["text", "code"])
def test_ats_costs_no_image_more_and_uses_it_up_where_levels_meet_tokens_of_their_own(vit, levels):
    for model in both(vit, "ats", f"levels={levels!r}, "):
        keep = {step.keep for step in model.plan.methods[0].steps}
        assert len(keep) == 1 and max(keep) < 1
        cost = model(make_images(vit, 8)).trace.macs()
        assert float(cost.max()) <= dense_macs(vit) / SPEED
        steps = model.plan.methods[0].steps
        for step in steps:
            step.forward = partial(most, step.keep)
        full = float(model(make_images(vit, 1)).trace.macs())
        assert 0.97 * dense_macs(vit) / SPEED <= full <= dense_macs(vit) / SPEED


def most(keep: float, tokens):
    """As many tokens as there are levels."""
    chosen = torch.arange(tokens.num_patches) < -(-keep * tokens.num_patches // 1)
    return keep_where(chosen.expand(tokens.x.shape[0], -1))


@torch.no_grad()
@pytest.mark.parametrize("axes", ["('patch', 'head', 'block')", "'patch'", "'block'", "'head'"])
def test_random_plus_leaves_on_what_the_budget_pays(vit, axes):
    for speed in (1.1, 1.4) if axes != "'head'" else (1.1,):
        model = AdaptiveViT(vit, f"random_plus(axes={axes}, speed={speed})")
        wanted = model.forward_tokens(make_images(vit, 200), sparse=False)[1].target_macs()
        mean = float(wanted.mean()) - float(AdaptiveViT(vit).forward_tokens(make_images(vit, 1))[1].macs())
        mean += dense_macs(vit)  # with its last block short, as a forward runs it
        error = 3 * float(wanted.std()) / 200**0.5
        assert mean <= dense_macs(vit) / speed * 1.001 + error
        assert mean >= dense_macs(vit) / speed * 0.9 - error, "whole heads are coarse"


@pytest.mark.parametrize("axes", ["('patch', 'head', 'block')", "('patch',)", "('patch', 'block')"])
@pytest.mark.parametrize("heads", ["full", "partial"])
def test_the_released_adavit_gets_the_usage_that_costs_as_much(vit, axes, heads):
    """Every part on with this probability: the mean of what is wanted is the budget."""
    knobs = f"form='released', axes={axes}, heads={heads!r}, "
    share = AdaptiveViT(vit, f"adavit({knobs}share={1 / SPEED})")
    for model in [*both(vit, "adavit", knobs), share]:
        (method,) = model.plan.methods
        (usage,) = set(method.usage.values())
        assert method.budget is None and 0.3 < usage < 0.95
        generator = torch.Generator().manual_seed(0)
        for block, step in zip(method.at, method.steps, strict=True):
            step.gates_for = partial(drawn, step, usage, generator)
            assert block == 0 or sorted(step.layers) == sorted(method.usage)
        trace = model.forward_tokens(make_images(vit, 300), sparse=False)[1]
        wanted = float(trace.target_macs().mean()) - sum(step.macs(64) for step in method.steps)
        assert wanted == pytest.approx(dense_macs(vit) / SPEED, rel=0.02)


def drawn(step, usage: float, generator: torch.Generator, block, tokens) -> Gates:
    """Parts on with a probability; of the tokens the prefix is."""
    images, n, heads = tokens.x.shape[0], tokens.num_patches, tokens.x.shape[-1] // 16

    def some(*shape: int, share: float = usage) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator) < share).float()

    prefix = tokens.num_prefix
    patch = some(images, n, share=(usage * (n + prefix) - prefix) / n) if "patch" in step.layers else None
    head = some(images, heads) if "head" in step.layers else None
    attn, mlp = (some(images), some(images)) if "block" in step.layers else (None, None)
    return Gates(patch, head, attn, mlp, partial=step.rule.partial)


@pytest.mark.parametrize("name", ["adavit", "ltmp"])
def test_training_aims_at_a_budget(vit, name):
    """The loss is 0 exactly where the masks leave on what the budget pays."""
    shared = AdaptiveViT(vit, f"{name}(share={1 / SPEED})")
    for model in (*both(vit, name), shared):
        trace = model.train()(make_images(vit, 4)).trace
        model.eval()
        (loss,) = model.plan.methods[0].loss(trace).values()
        nominal = float(trace.macs(nominal=True).mean())
        wanted = float(trace.target_macs().mean().detach())
        goal = nominal / SPEED if "gmacs" not in str(model.setting) else dense_macs(vit) / SPEED
        expected = {"adavit": 2 * (wanted / goal - 1) ** 2, "ltmp": 10 * ((wanted - goal) / nominal) ** 2}[name]
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_avit_centres_its_prior_where_halting_costs_as_much(vit):
    n = 64
    for model in both(vit, "avit"):
        target = model.plan.methods[0].target
        ran = {i: Used(n if i + 1 <= target else n * max(0.0, target - i)) for i in range(6)}
        assert 1 < target < 6 and gated(model.backbone, ran, short=True) == pytest.approx(
            dense_macs(vit) / SPEED, rel=1e-3
        )
    assert AdaptiveViT(vit, "avit(speed=1)").plan.methods[0].target == 6


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.3, 0.71])
def test_a_price_of_gates_is_that_of_the_run(vit, keep):
    model = AdaptiveViT(vit, f"topk({keep}, at=(2, 4, 5))")
    ran = float(model(make_images(vit, 1)).trace.macs())
    assert price(model.backbone, (2, 4, 5), keep) == pytest.approx(ran, rel=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("passing", [True, False])
def test_a_price_of_masks_is_that_of_the_record(passing):
    """Block by block, against what a forward with such gates says that it wanted."""
    model = AdaptiveViT(make_vit("siglip", **SHAPE))
    gates = Gates(torch.tensor([[1.0] * 16 + [0.0] * 48]), torch.tensor([[1.0, 1, 0, 0, 0, 0]]), partial=passing)
    used = dict.fromkeys((1, 5), Used(16, 1 / 3))
    model.plan = Plan([Method((i, Fixed(gates)) for i in used)])
    trace = model.forward_tokens(make_images(model.vit, 1), sparse=False)[1]
    assert gated(model.backbone, used, passing) == pytest.approx(float(trace.target_macs()), rel=1e-9)
    assert gated(model.backbone, {}) == macs(model.backbone)


class Fixed(Gater):
    """The same gates for every image."""

    def __init__(self, gates: Gates) -> None:
        super().__init__()
        self.gates = gates

    def forward(self, tokens) -> Gates:
        return self.gates


def test_a_budget_beyond_the_last_usage_is_refused(vit):
    with pytest.raises(UserError, match=r"^adavit: speed=40 is out of reach, the most is"):
        AdaptiveViT(vit, "adavit(form='released', speed=40, axes='patch')")
    with pytest.raises(UserError, match="give one of gmacs, share and speed, not gmacs and speed"):
        AdaptiveViT(vit, "adavit(gmacs=0.1, speed=2)")
