"""Compiled and exported, a model gives what it gives eagerly.

Where a setting's token counts are static: one graph without breaks, and a program for any batch size.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from oracles import counted_macs, make_images, make_vit, relative
from registered_settings import settings_of
from saccade.core.registry import registry
from saccade.model import AdaptiveViT

ONE_EACH = [("vit", settings_of(name)[2]) for name in registry()]
TOGETHER = ("vit", "grid(24) | imagepiece(p=0.6, merge=0.2) | evit(0.7, fuse=True, at=2) | tome(r=1)")
MERGING = (
    "vit",
    "algm(0.5, 0) | pitome(0.95) | tofu(r=[1, 1]) | mctf(r=2, at=1) | token_pooling(0.9, at=1)"
    " | dpc_knn(0.9, at=2) | kth(2, at=1, merge=True) | tokenlearner(3, at=2) | patchmerger(2, at=2)",
)
COMPANY = TOGETHER[1] + MERGING[1]
ALONE = [case for case in ONE_EACH if case[1].split("(")[0] not in COMPANY]
AMONG = [case for case in ONE_EACH if case not in ALONE]
POOLED = ("siglip-average", "imagepiece(p=0.6, merge=0.2, keep=0.8, score='received')")
FAMILIES = [
    ("vit", "tome(r=3)"),
    ("distilled", "tome(r=2)"),
    ("dinov2-registers", "evit(0.6, fuse=True)"),
    ("siglip", "tome(r=2)"),
]


def slow(cases: list[tuple[str, str]]) -> list:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


class Logits(nn.Module):
    """What is exported: images -> logits."""

    def __init__(self, family: str, setting: str) -> None:
        super().__init__()
        self.model = AdaptiveViT(make_vit(family), setting)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "setting"), [("vit", ""), TOGETHER, *slow([*ONE_EACH, POOLED, *FAMILIES])])
def test_compiled_in_one_graph(family, setting, backend):
    module = Logits(family, setting)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for count in (2, 3):
        images = make_images(module.model.vit, count)
        assert relative(compiled(images), module(images)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("vit", ""),
        *ALONE,
        TOGETHER,
        pytest.param(*MERGING, id="merging"),
        POOLED,
        *slow([*FAMILIES, *AMONG]),
    ],
)
def test_exported_for_any_batch(family, setting):
    module = Logits(family, setting)
    example = make_images(module.model.vit, 2)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (1, 2, 5):
        images = make_images(module.model.vit, count, seed=count)
        assert relative(loaded(images), module(images)) <= 1e-5


@torch.no_grad()
def test_a_graph_skips_what_fixed_counts_leave_out():
    """Patches chosen anew in each block are gathered in a graph too: it computes what eager execution does."""
    module = Logits("vit", "topk(0.4, at=(0, 1))")
    images = make_images(module.model.vit, 2)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    dense = Logits("vit", "")
    graph, eager, whole = (counted_macs(lambda way=way: way(images)) for way in (program, module, dense))
    assert graph == eager < whole


@pytest.mark.slow
def test_training_compiles_and_has_the_same_gradients():
    module, twin = Logits(*TOGETHER).train(), Logits(*TOGETHER).train()
    images = make_images(module.model.vit, 2)
    torch.compile(twin, fullgraph=True, backend="aot_eager")(images).square().sum().backward()
    module(images).square().sum().backward()
    for (name, a), b in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert relative(b.grad, a.grad) <= 1e-4, name
