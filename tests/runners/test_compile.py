"""Compiled, one model serves images of many sizes, with fixed and with symbolic shapes; what it holds has a bound.

``torch.compile`` meets the third size with symbols for what varied so far: a constant that a size calls for must not
become one.
"""

from __future__ import annotations

import io
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from oracles import make_images, make_vit, relative
from saccade.core import constant_cache as constants
from saccade.model import AdaptiveViT
from saccade.tokenizers.resize.resampling import PRESETS, resize_kernel, resize_output, resize_positions
from saccade.tokenizers.scorers.networks import open_network
from slow_cases import cases

SIZES = ((64, 64), (80, 64), (96, 128), (112, 64))
BRIEF = ((64, 64), (96, 128), (112, 64))  # both sides become symbols at once
SETTINGS = ["dense", "tome(r=2)", "evit(0.6, fuse=True)", "grid(24) | topk(0.5)", "imagepiece(p=0.6, merge=0.2)"]
MOSAICS = ["quadtree(13)", "quadtree(13) | tome(r=1)"]  # their constants depend on the grid
MOSAIC_SIZES = ((64, 64), (112, 64), (160, 64), (64, 112))  # which all can have 13 tokens
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model(setting: str, family: str = "vit", depth: int = 2) -> AdaptiveViT:
    return AdaptiveViT(make_vit(family, depth=depth), setting).eval()


def agrees(plain: AdaptiveViT, compiled, sizes=None) -> None:
    for size in sizes or (MOSAIC_SIZES if str(plain.setting).startswith("quadtree") else SIZES):
        images = make_images(plain.vit, 2, size)
        assert relative(compiled(images).logits, plain(images).logits) <= 1e-5, size


@torch.no_grad()
@pytest.mark.parametrize(
    ("setting", "dynamic"),
    cases([("dense", None)], product([*SETTINGS, *MOSAICS], [None, True])),
)
def test_one_model_over_sizes(setting: str, dynamic: bool | None) -> None:
    plain = model(setting, depth=1 if setting == "dense" else 2)
    backend = "eager" if dynamic else "aot_eager"  # which takes a minute with symbols
    agrees(plain, torch.compile(plain, backend=backend, fullgraph=True, dynamic=dynamic))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("setting", [*SETTINGS, *MOSAICS])
def test_one_model_over_sizes_without_symbols(setting: str) -> None:
    plain = model(setting)
    agrees(plain, torch.compile(plain, backend="eager", fullgraph=True, dynamic=False))


@torch.no_grad()
@pytest.mark.parametrize("family", [pytest.param("siglip-average", marks=SLOW), "no-positions", "dynamic-size"])
@pytest.mark.parametrize(("depth", "sizes"), [(1, BRIEF), pytest.param(2, SIZES, marks=SLOW)])
def test_families_over_sizes(family: str, depth: int, sizes: tuple) -> None:
    plain = model("tome(r=2)", family, depth)
    agrees(plain, torch.compile(plain, backend="eager", fullgraph=True), sizes)


@torch.no_grad()
def test_settings_of_one_model_share_constants() -> None:
    """Two views, compiled one after the other and used in turn, over patch sizes of which each has its matrices."""
    views = [model("dense").at(f"grid({side})").eval() for side in (12, 24)]
    compiled = [torch.compile(view, backend="eager", fullgraph=True) for view in views]
    for _ in range(2):
        for view, fast in zip(views, compiled, strict=True):
            agrees(view, fast, ((96, 96),))


@pytest.mark.parametrize(
    ("how", "dynamic"),
    cases(
        [("pi", True), ("sigma", None)],
        product(["pi", "sigma", "token_norm"], [None, True]),
    ),
)
def test_resizing_over_sizes_and_correlations(how: str, dynamic: bool | None) -> None:
    """Also a number that is no size, which a compiler makes a symbol too."""
    kernel = torch.randn(4, 3, 16, 16)

    def resized(side: int, rho: float) -> Tensor:
        return resize_kernel(kernel, (side, side + 1), PRESETS["default"], how, rho)

    compiled = torch.compile(resized, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for side, rho in ((8, 0.9), (12, 0.8), (20, 0.7), (9, 0.6), (8, 0.5)):
        assert relative(compiled(side, rho), resized(side, rho)) <= 1e-5


def test_positions_and_outputs_over_sizes() -> None:
    table, weight = torch.randn(1, 50, 8), torch.randn(48, 8)

    def both(h: int, w: int) -> tuple[Tensor, Tensor]:
        spec = PRESETS["timm"]
        return resize_positions(table, (7, 7), (h, w), 1, spec), resize_output(weight, (4, 4), (h, w), spec)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for size in ((5, 6), (6, 5), (8, 9), (12, 3), (9, 8)):
        for found, wanted in zip(compiled(*size), both(*size), strict=True):
            assert relative(found, wanted) <= 1e-5


def test_macs_of_a_network_over_sizes() -> None:
    """A plain number that is counted once for each size."""
    network = open_network("timm/vit_tiny_patch16_224", 16, "random", blocks=1)

    def priced(x: Tensor) -> tuple[Tensor, int]:
        return x + 1, network.macs(*x.shape[-2:])

    compiled = torch.compile(priced, backend="eager")
    for size in ((64, 64), (80, 64), (96, 128), (112, 64)):
        images = torch.zeros(1, 3, *size)
        assert compiled(images)[1] == priced(images)[1]


@torch.no_grad()
@pytest.mark.parametrize(
    ("setting", "strict"),
    cases(
        [("grid(24) | evit(0.6)", False), ("quadtree(15)", False)],
        product(["grid(24) | evit(0.6)", "quadtree(15)"], [False, True]),
    ),
)
def test_exported_with_its_constants(setting: str, strict: bool) -> None:
    """At another size than its own; read back, the program needs nothing of ours."""
    if strict and torch.__version__ < (2, 14):
        pytest.skip(f"torch {torch.__version__} loses traced constants in strict export; its default way keeps them")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model(setting)

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).logits

    module, size = Logits().eval(), (96, 144)
    example, batch = make_images(module.model.vit, 2, size), torch.export.Dim("batch")
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=strict), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    images = make_images(module.model.vit, 3, size)
    assert relative(loaded(images), module(images)) <= 1e-5


def test_constants_are_plain_tensors_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is of bytes; the one not used for longest goes first."""
    built: list[int] = []

    @constants.constant
    def ramp(count: int) -> Tensor:
        built.append(count)
        return torch.arange(count, dtype=torch.float64)

    cpu = torch.device("cpu")
    constants.forget()
    monkeypatch.setattr(constants, "LIMIT", 3 * 8 * 100)
    for count in (100, 99, 98, 100, 97, 100, 99):
        assert type(ramp(count, cpu)) is Tensor and len(ramp(count, cpu)) == count
    assert built == [100, 99, 98, 97, 99]
    held = sum(t.nbytes for t in constants._KEPT.values())
    assert held <= constants.LIMIT
    assert len(ramp(1000, cpu)) == 1000  # larger than the bound: given all the same
    constants.forget()
