"""ATen operators and Python calls of one forward: what a small batch pays for beside arithmetic; no machine decides."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.model import AdaptiveViT

BUDGETS = {
    "dense": 232,
    "evit(0.7)": 320,
    "dynamicvit(0.7)": 345,
    "tome(r=13)": 650,
    "imagepiece() | evit(0.8)": 750,
    "topk(0.5)": 380,
    "adavit(0.7)": 500,
    "quadtree(100)": 340,
}


CALLS = {"dense": 1.4, "evit(0.7)": 1.7, "tome(r=13)": 2.3}  # of Python functions, over those of timm's own forward


class Operators(TorchDispatchMode):
    """Counts the operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(run) -> Counter[str]:
    run()  # what is built once is there afterwards
    with Operators() as operators:
        run()
    return operators.seen


@pytest.fixture(scope="module")
def model() -> AdaptiveViT:
    return AdaptiveViT(timm.create_model("deit_tiny_patch16_224").eval())


@torch.inference_mode()
@pytest.mark.parametrize("setting", BUDGETS)
def test_a_forward_stays_within_its_operators(model, setting):
    """One image, inference mode, DeiT-Ti."""
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    view = model.at(setting).eval()
    seen = count(lambda: view(images))
    assert seen.total() <= BUDGETS[setting], seen.most_common(12)


def calls(run) -> int:
    """Python functions that are called."""
    seen = [0]
    run()

    def note(frame, event, argument):
        seen[0] += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return seen[0]


@torch.inference_mode()
@pytest.mark.parametrize("setting", CALLS)
def test_a_forward_stays_within_its_calls_of_python(model, setting):
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    view = model.at(setting).eval()
    assert calls(lambda: view(images)) <= CALLS[setting] * calls(lambda: model.vit(images))


@torch.inference_mode()
def test_dense_adds_a_handful_to_timm(model):
    images = torch.randn(1, 3, 224, 224)
    assert count(lambda: model(images)).total() <= count(lambda: model.vit(images)).total() + 5


@torch.inference_mode()
@pytest.mark.parametrize("setting", ["tome(r=13)", "evit(0.7)", "imagepiece()", "dynamicvit(0.7)", "random(0.5)"])
def test_provenance_costs_nothing_until_it_is_read(model, setting):
    """A larger batch costs few operators more, and none makes an owner map; reading one makes it."""
    view = model.at(setting).eval()
    images = torch.randn(3, 3, 224, 224)
    alone, together = count(lambda: view(images[:1])).total(), count(lambda: view(images)).total()
    assert alone <= together <= alone + 4 * 12
    out = view(images)
    with Operators() as read:
        owner = out.trace.blocks[-1].owner
    assert read.seen.total() > 0 and owner.shape == (3, 196)
    with Operators() as again:
        assert out.trace.blocks[-1].owner is owner
    assert not again.seen


@torch.inference_mode()
@pytest.mark.parametrize("setting", [s for s in BUDGETS if "quadtree" not in s])
def test_no_operator_that_does_not_export(model, setting):
    """Merging is a scatter_add: engines have no index_add."""
    seen = count(lambda: model.at(setting).eval()(torch.randn(2, 3, 224, 224)))
    assert not any("index_add" in name for name in seen)
