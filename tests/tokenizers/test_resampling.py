"""Resized kernels and position tables: optimality, closed forms, agreement with timm, precisions and compilers."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import combinations_with_replacement, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor

from saccade.core import constant_cache as constants
from saccade.core.operator_counter import counted_macs
from saccade.errors import UserError
from saccade.tokenizers.resize import matrices
from saccade.tokenizers.resize.matrices import MODES, pi_matrix, resize_matrix
from saccade.tokenizers.resize.resampling import (
    METHODS,
    PRESETS,
    ResizeSpec,
    choose,
    resize_kernel,
    resize_output,
    resize_positions,
)

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos50.zip"
SIZES = (8, 10, 12, 15, 16, 20, 24, 30, 40, 48)
DEFAULT, GOOGLE, TIMM = PRESETS["default"], PRESETS["google"], PRESETS["timm"]
# All four ways; the position table the opposite way, so that a mix-up of the two shows.
SPECS = [
    ResizeSpec(mode, antialias, other, not antialias)
    for (mode, other), antialias in product((MODES, MODES[::-1]), (False, True))
]
IDS = [f"{spec.kernel_mode}{'-antialias' * spec.kernel_antialias}" for spec in SPECS]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def smooth(*shape: int) -> Tensor:
    """Random kernels without high frequencies."""
    return F.interpolate(randn(*shape[:-2], 4, 4), size=shape[-2:], mode="bicubic")


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def image_resize(x: Tensor, size: tuple[int, int], spec: ResizeSpec) -> Tensor:
    """Torch's own resize of images [N, C, h, w]: what the matrices are judged by."""
    return F.interpolate(x, size=size, mode=spec.kernel_mode, antialias=spec.kernel_antialias)


def tokens(images: Tensor, kernels: Tensor) -> Tensor:
    return F.conv2d(images, kernels, stride=kernels.shape[-2:])


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.fixture
def fresh() -> Iterator[None]:
    """No matrix has been built yet."""
    constants.forget()
    yield
    constants.forget()


def photos() -> Tensor:
    from PIL import Image

    images = []
    with zipfile.ZipFile(PHOTOS) as archive:
        for name in sorted(n for n in archive.namelist() if n.lower().endswith((".jpeg", ".jpg")))[:12]:
            image = (
                Image.open(io.BytesIO(archive.read(name))).convert("RGB").resize((240, 240), Image.Resampling.BICUBIC)
            )
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 127.5 - 1)
    return torch.stack(images)


def noise() -> Tensor:
    """Noise with the statistics measured on photos50: amplitude f^-1.28, contrast 0.475, brightness ± 0.28."""
    f = torch.fft.fftfreq(240, dtype=torch.float64)
    radius = (f[:, None].square() + f.square()).sqrt()
    radius[0, 0] = math.inf
    grey_and_colours = randn(12, 4, 240, 240)
    spectrum = torch.fft.fft2(grey_and_colours[:, :1] + grey_and_colours[:, 1:] / 3) * radius**-1.28
    images = torch.fft.ifft2(spectrum).real
    return 0.475 * images / images.std() + 0.28 * randn(12, 1, 1, 1, seed=1)


@pytest.fixture(scope="module", params=["photos", "noise"])
def images(request: pytest.FixtureRequest) -> Tensor:
    if request.param == "photos" and not PHOTOS.exists():
        pytest.skip(f"{PHOTOS} is not there")
    return (photos if request.param == "photos" else noise)()


# enlarging is exact


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_upsampling_identity(spec: ResizeSpec, dtype: torch.dtype, bound: float) -> None:
    sides = combinations_with_replacement((5, 6, 8, 10, 12, 15, 16, 20, 24, 30, 40, 48), 2)
    pairs = [((s, s), (t, t)) for s, t in sides] + [((8, 10), (10, 12)), ((8, 6), (9, 15)), ((8, 6), (15, 9))]
    pairs += [((47, 47), (48, 48)), ((64, 64), (65, 65))]  # the worst conditioned
    for old, new in pairs:
        x, w = randn(4, 10, *old, seed=1, dtype=dtype), randn(8, 10, *old, seed=2, dtype=dtype)
        bigger, hat = image_resize(x, new, spec), resize_kernel(w, new, spec)
        for c in (1, 3, 10):
            got = bigger[:, :c].flatten(1) @ hat[:, :c].flatten(1).T
            assert relative(got, x[:, :c].flatten(1) @ w[:, :c].flatten(1).T) <= bound, (old, new, c)


def test_fails_for_the_other_methods() -> None:
    x, w = randn(4, 3, 8, 8, seed=1), randn(8, 3, 8, 8, seed=2)
    for how in ("vanilla", "area"):
        got = tokens(image_resize(x, (12, 12), DEFAULT), resize_kernel(w, (12, 12), DEFAULT, how))
        assert relative(got, tokens(x, w)) > 0.1, how


# shrinking is the best there is


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize(("old", "new"), [(32, 8), (32, 16), (32, 30), (16, 14), (24, 10)])
def test_downsampling_optimality(spec: ResizeSpec, old: int, new: int) -> None:
    b = resize_matrix(old, new, spec.kernel_mode, spec.kernel_antialias)
    w = randn(64, old, old)
    hat = resize_kernel(w, (new, new), spec)
    residual = w - b.T @ hat @ b
    assert (b @ residual @ b.T).norm() <= 1e-10 * w.norm()  # orthogonal to all that can be reached: a least-squares fit
    for seed in range(5):
        worse = w - b.T @ (hat + 1e-3 * randn(64, new, new, seed=seed + 1)) @ b
        assert (worse.flatten(1).norm(dim=1) > residual.flatten(1).norm(dim=1)).all()
    assert rms(residual) / rms(w) == pytest.approx(math.sqrt(1 - (new / old) ** 2), rel=0.03)


# two small matrices are one large one


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize(
    ("old", "new"),
    [((16, 16), (8, 8)), ((16, 16), (20, 20)), ((12, 12), (10, 10)), ((8, 6), (9, 15)), ((9, 14), (12, 5))],
)
def test_separable_is_full_pinv(spec: ResizeSpec, old: tuple[int, int], new: tuple[int, int]) -> None:
    basis = torch.eye(math.prod(old), dtype=torch.float64).reshape(-1, 1, *old)
    full = torch.linalg.pinv(image_resize(basis, new, spec).flatten(1))  # its rows are Bᵀ
    w = randn(3, 5, *old)
    want = (w.flatten(-2) @ full.T).unflatten(-1, new)
    assert relative(resize_kernel(w, new, spec), want) <= 1e-12


# agreement with timm


@pytest.mark.parametrize(
    ("old", "new"),
    [((32, 32), (8, 8)), ((32, 32), (16, 16)), ((16, 16), (14, 14)), ((16, 16), (24, 24)), ((16, 16), (12, 20))],
)
def test_agrees_with_timm(old: tuple[int, int], new: tuple[int, int]) -> None:
    w = randn(16, 3, *old, dtype=torch.float32)
    google, bicubic = resize_kernel(w, new, GOOGLE), resize_kernel(w, new, TIMM)
    assert relative(google, resample_patch_embed(w, list(new), "bilinear", antialias=False)) <= 2e-5
    assert relative(bicubic, resample_patch_embed(w, list(new), "bicubic", antialias=True)) <= 2e-5


@pytest.mark.parametrize("size", SIZES)
def test_negative_control(size: int) -> None:
    w = randn(16, 3, 32, 32)
    assert relative(resize_kernel(w, (size, size), TIMM), resize_kernel(w, (size, size), GOOGLE)) > 0.2


# golden closed forms


def test_golden_kernels() -> None:
    w = randn(4, 32, 32)
    assert relative(resize_kernel(w, (16, 16), GOOGLE), w.unfold(-2, 2, 2).unfold(-2, 2, 2).sum((-1, -2))) <= 1e-12
    centres = w.unfold(-2, 4, 4).unfold(-2, 4, 4)[..., 1:3, 1:3].sum((-1, -2))
    assert relative(resize_kernel(w, (8, 8), GOOGLE), centres) <= 1e-12


@pytest.mark.parametrize(("old", "new"), [(32, 8), (32, 15), (32, 48), (7, 5), (1, 4), (4, 1), (47, 48)])
def test_golden_matrix(old: int, new: int) -> None:
    want = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        source = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        left = min(int(source), old - 1)
        want[i, left] += 1 - (source - left)
        want[i, min(left + 1, old - 1)] += source - left
    assert (resize_matrix(old, new, "bilinear", False) - want).abs().max() <= 1e-12


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_every_row_of_a_matrix_is_right(spec: ResizeSpec) -> None:
    x = randn(2, 3, 16, 10)
    for new in ((7, 10), (16, 23), (5, 33)):
        assert relative(resize_kernel(x, new, spec, "vanilla"), image_resize(x, new, spec)) <= 1e-12


# the response to a constant


def test_upsampling_keeps_the_sum() -> None:
    for spec, (old, new) in product(SPECS, [(8, 16), (8, 10), (15, 16), (32, 48)]):
        w = randn(8, old, old)
        difference = resize_kernel(w, (new, new), spec).sum((-1, -2)) - w.sum((-1, -2))
        assert difference.abs().max() <= 1e-10, (spec, old, new)


def test_dc_gain() -> None:
    def gains(spec: ResizeSpec) -> list[float]:
        return [resize_kernel(torch.ones(32, 32).double(), (p, p), spec).sum().item() / 1024 for p in SIZES]

    assert gains(GOOGLE) == pytest.approx([0.25, 0.24, 0.36, 0.54, 1.0, 0.91, 1.0, 1.0, 1.0, 1.0], abs=0.005)
    assert all(0.985 <= gain <= 1.005 for gain in gains(DEFAULT))


# how many of the underlying taps are used


@pytest.mark.parametrize("size", SIZES)
def test_used_taps(size: int) -> None:
    def used(spec: ResizeSpec) -> int:
        w = torch.zeros(32, 32, dtype=torch.float64, requires_grad=True)
        resize_kernel(w, (size, size), spec).backward(randn(size, size))
        assert w.grad is not None
        return int((w.grad.abs() > 1e-9).sum())

    assert used(GOOGLE) == {8: 256, 10: 400, 12: 576, 15: 900}.get(size, 1024)
    assert used(DEFAULT) == 1024


# whole images


def test_token_rms(images: Tensor) -> None:
    for w in (randn(64, 3, 32, 32), smooth(64, 3, 32, 32)):
        base = rms(tokens(images, w))
        for p in SIZES:
            assert 0.95 <= rms(tokens(images, resize_kernel(w, (p, p), DEFAULT))) / base <= 1.10, p


def test_vanilla_scales_with_the_area(images: Tensor) -> None:
    w = smooth(64, 3, 32, 32)
    base = rms(tokens(images, w))
    for spec, p in product((DEFAULT, GOOGLE), SIZES):
        ratio = rms(tokens(images, resize_kernel(w, (p, p), spec, "vanilla"))) / base
        assert ratio == pytest.approx((p / 32) ** 2, rel=0.15), (spec, p)


@pytest.mark.parametrize("old", [8, 16])
def test_whole_image_consistency(images: Tensor, old: int) -> None:
    """Image and kernel at twice the size, relative RMS error of the tokens."""
    names, new, twice = ("pi", "area", "vanilla"), (2 * old, 2 * old), image_resize(images, (480, 480), GOOGLE)
    for kind, w in (("white", randn(32, 3, old, old)), ("smooth", smooth(32, 3, old, old))):
        want = tokens(images, w)
        error = {how: relative(tokens(twice, resize_kernel(w, new, GOOGLE, how)), want) for how in names}
        assert error["pi"] <= 0.05 and error["pi"] < error["area"] <= 0.15 and error["vanilla"] >= 2, (kind, error)


# resizes do not chain


@pytest.mark.parametrize("spec", [DEFAULT, GOOGLE], ids=["default", "google"])
def test_no_way_back(spec: ResizeSpec) -> None:
    w = randn(8, 32, 32)
    assert relative(resize_kernel(resize_kernel(w, (8, 8), spec), (32, 32), spec), w) > 0.9


# position tables


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("old", "new"), [((7, 7), (5, 5)), ((7, 7), (6, 6)), ((7, 7), (30, 30)), ((4, 9), (6, 6)), ((3, 8), (8, 3))]
)
def test_positions(spec: ResizeSpec, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> None:
    table = randn(1, prefix + math.prod(old), 16)
    grid = table[0, prefix:].T.reshape(1, 16, *old)
    want = F.interpolate(grid, size=new, mode=spec.pos_mode, antialias=spec.pos_antialias).flatten(2).mT
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        got = resize_positions(table.to(dtype), old, new, prefix, spec)
        assert got.shape == (1, prefix + math.prod(new), 16) and got.dtype == dtype
        assert torch.equal(got[:, :prefix], table[:, :prefix].to(dtype))
        assert (got[:, prefix:] - want).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_same_size_is_the_same_tensor(dtype: torch.dtype) -> None:
    table, kernel = randn(1, 50, 4).to(dtype), randn(2, 8, 6).to(dtype)
    assert resize_positions(table, (7, 7), (7, 7), 1, DEFAULT) is table
    assert resize_kernel(kernel, (8, 6), DEFAULT) is kernel
    assert resize_kernel(kernel, torch.Size([8, 6]), DEFAULT, "area") is kernel


def test_equal_counts_are_not_equal_grids() -> None:
    table = randn(1, 36, 4)
    assert not torch.equal(resize_positions(table, (4, 9), (9, 4), 0, DEFAULT), table)


def test_antialiasing_matters_to_small_grids() -> None:
    table = randn(1, 49, 64)
    plain = ResizeSpec(pos_antialias=False)
    small = [resize_positions(table, (7, 7), (5, 5), 0, spec) for spec in (plain, DEFAULT)]
    large = [resize_positions(table, (7, 7), (9, 9), 0, spec) for spec in (plain, DEFAULT)]
    assert relative(*small) > 0.3 and relative(*large) < 1e-12


# precisions, contexts, compilers


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=["bf16", "fp16"])
def test_half_precision_in_and_out(dtype: torch.dtype, bound: float) -> None:
    kernel, table = randn(8, 3, 32, 32).to(dtype), randn(1, 50, 8).to(dtype)
    for p in SIZES:
        got = resize_kernel(kernel, (p, p), DEFAULT)
        assert got.dtype == dtype
        assert torch.equal(got, resize_kernel(kernel.float(), (p, p), DEFAULT).to(dtype))  # computed in float32
        assert relative(got.double(), resize_kernel(kernel.double(), (p, p), DEFAULT)) <= bound
    got = resize_positions(table, (7, 7), (5, 6), 1, DEFAULT)
    assert got.dtype == dtype
    assert torch.equal(got, resize_positions(table.float(), (7, 7), (5, 6), 1, DEFAULT).to(dtype))


def test_autocast_changes_nothing(fresh: None) -> None:
    kernel, table = randn(8, 3, 32, 32, dtype=torch.float32), randn(1, 50, 8, dtype=torch.float32)

    def both() -> tuple[Tensor, Tensor]:
        return resize_kernel(kernel, (15, 12), DEFAULT), resize_positions(table, (7, 7), (5, 6), 1, DEFAULT)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = both()
        assert (kernel @ kernel).dtype == torch.bfloat16  # as it was
    assert all(torch.equal(a, b) for a, b in zip(inside, both(), strict=True))


def test_inference_mode_then_train(fresh: None) -> None:
    kernel = randn(4, 3, 32, 32, dtype=torch.float32).requires_grad_()
    with torch.inference_mode():
        first = resize_kernel(kernel, (12, 12), DEFAULT)
        pi_matrix(32, 20, "bilinear", True)
    assert not pi_matrix(32, 20, "bilinear", True).is_inference()
    second = resize_kernel(kernel, (12, 12), DEFAULT)
    second.square().sum().backward()
    assert torch.equal(first, second) and kernel.grad is not None and kernel.grad.norm() > 0


@pytest.mark.parametrize(
    "context",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["inference_mode", "no_grad", "autocast", "device"],
)
def test_first_use_in_a_context(context: Callable[[], AbstractContextManager[None]], fresh: None) -> None:
    def build() -> list[Tensor]:
        return [
            f(11, n, m, a) for f in (resize_matrix, pi_matrix) for n in (7, 13) for m in MODES for a in (False, True)
        ]

    with context():
        inside = build()
    constants.forget()
    for got, want in zip(inside, build(), strict=True):
        assert type(got) is Tensor and got.device.type == "cpu" and got.dtype == torch.float64
        assert not got.is_inference() and not got.requires_grad and torch.equal(got, want)


def test_first_use_with_another_default_dtype(fresh: None) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        inside = pi_matrix(11, 7, "bicubic", True)
    finally:
        torch.set_default_dtype(before)
    constants.forget()
    assert torch.equal(inside, pi_matrix(11, 7, "bicubic", True))


def test_first_use_under_torch_func(fresh: None) -> None:
    kernel = randn(4, 9, 9)
    gradient = torch.func.grad(lambda k: resize_kernel(k, (6, 6), DEFAULT).square().sum())(kernel)
    kernel.requires_grad_()
    resize_kernel(kernel, (6, 6), DEFAULT).square().sum().backward()
    assert kernel.grad is not None and torch.allclose(gradient, kernel.grad)
    vmapped = torch.func.vmap(lambda k: resize_kernel(k, (6, 6), DEFAULT))(kernel)
    assert torch.allclose(vmapped, resize_kernel(kernel, (6, 6), DEFAULT))


@pytest.mark.parametrize("warm", [True, False], ids=["prewarmed", "first use"])
def test_compile_fullgraph(warm: bool, fresh: None) -> None:
    kernel = randn(4, 3, 32, 32, dtype=torch.float32).requires_grad_()
    table = randn(1, 50, 8, dtype=torch.float32)

    def both(p: int) -> tuple[Tensor, Tensor]:
        return resize_kernel(kernel, (p, p), DEFAULT), resize_positions(table, (7, 7), (240 // p, 5), 1, DEFAULT)

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    sizes = (16, 8, 12)  # the second makes torch.compile try a symbolic size
    wants = [both(p) for p in sizes] if warm else []
    gots = [compiled(p) for p in sizes]
    for got, want in zip(gots, wants or [both(p) for p in sizes], strict=True):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(got, want, strict=True))
    (gradient,) = torch.autograd.grad(gots[1][0].sum(), kernel)
    assert torch.allclose(gradient, torch.autograd.grad(both(8)[0].sum(), kernel)[0], atol=1e-5)


def test_export_on_first_use(fresh: None) -> None:
    class Embed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = torch.nn.Parameter(randn(4, 3, 32, 32, dtype=torch.float32))

        def forward(self, x: Tensor) -> Tensor:
            return tokens(x, resize_kernel(self.kernel, (15, 15), DEFAULT))

    model, x = Embed().eval(), randn(1, 3, 30, 30, dtype=torch.float32)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), model(x), atol=1e-5)
    assert type(pi_matrix(32, 15, "bilinear", True)) is Tensor
    # Constants and products alone: nothing that computes a matrix, and no autocast, gets into the graph.
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {name for name in operators if any(s in name for s in ("eye", "pinv", "upsample", "svd", "autocast"))}


def test_meta_tensors_tell_shapes() -> None:
    assert resize_kernel(torch.empty(4, 3, 32, 32, device="meta"), (8, 6), DEFAULT).shape == (4, 3, 8, 6)


def test_resizing_is_a_hundredth_of_a_step() -> None:
    """Underlying 32, ViT-B at patch 48, batch 16: 0.28 GMACs once a step, beside 2.35 an image."""
    kernel = torch.empty(768, 3, 32, 32, device="meta")
    macs = counted_macs(lambda: resize_kernel(kernel, (48, 48), DEFAULT))
    assert macs == pytest.approx(0.28e9, rel=0.02)
    assert macs < 0.01 * 16 * 2.35e9


# Gradients, axes, the rest of the interface


@pytest.mark.parametrize("how", METHODS)
def test_gradcheck_kernel(how: str) -> None:
    kernel = randn(2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: resize_kernel(k, (7, 3), DEFAULT, how), kernel)


def test_gradcheck_positions() -> None:
    table = randn(1, 13, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: resize_positions(t, (3, 4), (5, 2), 1, DEFAULT), table)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_any_number_of_axes(lead: tuple[int, ...]) -> None:
    matrices = [pi_matrix(o, n, "bilinear", True) for o, n in ((4, 6), (8, 5), (6, 6))]
    t, h, w = matrices
    x = randn(*lead, 4, 8, 6)
    assert torch.allclose(resize_kernel(x, (6, 5, 6), DEFAULT), torch.einsum("...abc,ia,jb,kc->...ijk", x, t, h, w))
    assert torch.allclose(resize_kernel(x, (5, 6), DEFAULT), torch.einsum("...abc,jb->...ajc", x, h))
    assert torch.allclose(resize_kernel(x.mT, (5,), DEFAULT), torch.einsum("...abc,jb->...acj", x, h))


def test_3d_upsampling_identity() -> None:
    x, w = randn(2, 3, 2, 8, 8, seed=1), randn(4, 3, 2, 8, 8, seed=2)
    bigger = F.interpolate(x, size=(4, 10, 12), mode="trilinear")
    got = torch.einsum("nctij,octij->no", bigger, resize_kernel(w, (4, 10, 12), DEFAULT))
    assert relative(got, torch.einsum("nctij,octij->no", x, w)) <= 1e-12


def test_area_is_vanilla_times_the_old_area_over_the_new() -> None:
    w = randn(3, 12, 10)
    want = resize_kernel(w, (8, 15), DEFAULT, "vanilla") * (120 / 120)
    assert torch.allclose(resize_kernel(w, (8, 15), DEFAULT, "area"), want)
    want = resize_kernel(w, (18, 10), DEFAULT, "vanilla") * (120 / 180)
    assert torch.allclose(resize_kernel(w, (18, 10), DEFAULT, "area"), want)


# What the paper compares PI-resize with, and its optimum for correlated pixels


def ar1(size: int, rho: float) -> Tensor:
    """Covariance of pixels in a row, entry by entry."""
    return torch.tensor([[rho ** abs(i - j) for j in range(size)] for i in range(size)], dtype=torch.float64)


def full(old: tuple[int, int], new: tuple[int, int], spec: ResizeSpec) -> Tensor:
    """B over both axes at once, [new area, old area], from torch's resize of every basis image."""
    basis = torch.eye(math.prod(old), dtype=torch.float64).reshape(-1, 1, *old)
    return image_resize(basis, new, spec).flatten(1).T


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize("lead", [(6, 3), (6,), ()], ids=str)
def test_norm_keeps_the_norm_of_each_filter_and_its_direction(spec: ResizeSpec, lead: tuple[int, ...]) -> None:
    w = randn(*lead, 12, 10)
    for new in ((8, 15), (20, 20), (5, 10)):
        got, plain = resize_kernel(w, new, spec, "norm"), resize_kernel(w, new, spec, "vanilla")
        filters = [x.flatten(1) if lead else x.flatten()[None] for x in (w, got, plain)]
        norms = [x.norm(dim=1) for x in filters]
        assert (norms[1] - norms[0]).abs().max() <= 1e-12 * norms[0].max()
        assert torch.allclose(F.cosine_similarity(filters[1], filters[2]), torch.ones(len(filters[1])).double())


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize(("old", "new"), [((8, 8), (12, 12)), ((12, 10), (6, 5)), ((7, 8), (9, 8))])
def test_token_norm_keeps_the_mean_square_of_the_tokens(
    spec: ResizeSpec, rho: float, old: tuple[int, int], new: tuple[int, int]
) -> None:
    """Over patches drawn with that covariance, by the formula tr(W Σ Wᵀ) and by drawing."""
    w = randn(5, 3, *old)
    got = resize_kernel(w, new, spec, "token_norm", rho)
    sigma, b = torch.kron(ar1(old[0], rho), ar1(old[1], rho)), full(old, new, spec)
    before, after = w.flatten(0, 1).flatten(1), got.flatten(0, 1).flatten(1)
    energy = torch.trace(before @ sigma @ before.T), torch.trace(after @ b @ sigma @ b.T @ after.T)
    assert energy[1].item() == pytest.approx(energy[0].item(), rel=1e-10)
    plain = resize_kernel(w, new, spec, "vanilla")
    ratio = got / plain
    assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio)), "one number for the whole kernel"
    x = (randn(4_000, 3, math.prod(old), seed=3) @ torch.linalg.cholesky(sigma).T).unflatten(-1, old)
    drawn = [rms(tokens(x, w)), rms(tokens(image_resize(x, new, spec), got))]
    assert drawn[1] == pytest.approx(drawn[0], rel=0.03)


def test_filters_of_zeros_stay_zeros_and_have_gradients() -> None:
    for how in METHODS:
        w = torch.zeros(2, 3, 8, 8, requires_grad=True)
        got = resize_kernel(w, (12, 12), DEFAULT, how)
        got.sum().backward()
        assert (got == 0).all() and w.grad is not None and w.grad.isfinite().all(), how


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize(
    ("old", "new"), [((12, 12), (6, 6)), ((9, 10), (7, 4)), ((8, 8), (12, 10)), ((8, 12), (12, 8))]
)
def test_sigma_is_the_best_linear_guess(
    spec: ResizeSpec, rho: float, old: tuple[int, int], new: tuple[int, int]
) -> None:
    """Against (BΣBᵀ)⁺BΣ w of both axes at once, and no small change makes the mean squared error smaller."""
    w, b = randn(4, *old), full(old, new, spec)
    sigma = torch.kron(ar1(old[0], rho), ar1(old[1], rho))
    got = resize_kernel(w, new, spec, "sigma", rho)
    if all(n <= o for o, n in zip(old, new, strict=True)):
        want = torch.linalg.solve(b @ sigma @ b.T, b @ sigma @ w.flatten(1).T).T
        assert relative(got.flatten(1), want) <= 1e-9

    def error(kernel: Tensor) -> Tensor:
        rest = w.flatten(1) - kernel.flatten(1) @ b
        return ((rest @ sigma) * rest).sum(1)

    for seed in range(5):
        assert (error(got + 1e-3 * randn(4, *new, seed=seed + 1)) > error(got)).all()
    assert (error(got) <= error(resize_kernel(w, new, spec)) * (1 + 1e-9) + 1e-18).all()


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_sigma_is_pi_for_white_patches_and_when_enlarging(spec: ResizeSpec) -> None:
    w = randn(3, 16, 16)
    assert relative(resize_kernel(w, (10, 9), spec, "sigma", 0.0), resize_kernel(w, (10, 9), spec)) <= 1e-10
    assert relative(resize_kernel(w, (20, 31), spec, "sigma", 0.9), resize_kernel(w, (20, 31), spec)) <= 1e-10
    assert relative(resize_kernel(w, (10, 9), spec, "sigma", 0.9), resize_kernel(w, (10, 9), spec)) > 0.01


def test_sigma_pays_without_antialiasing_and_hardly_with_it() -> None:
    """Published for rho = 0.9, 32 → 8, white kernels, mean squared error 0.788 → 0.210; antialiased 0.169
    and 0.159."""
    w, sigma = randn(256, 32, 32), ar1(32, 0.9)

    def error(spec: ResizeSpec, how: str) -> float:
        b = resize_matrix(32, 8, spec.kernel_mode, spec.kernel_antialias)
        rest = w - b.T @ resize_kernel(w, (8, 8), spec, how, 0.9) @ b
        return (((sigma @ rest @ sigma) * rest).sum() / ((sigma @ w @ sigma) * w).sum()).item()

    found = [error(spec, how) for spec in (GOOGLE, DEFAULT) for how in ("pi", "sigma")]
    assert found == pytest.approx([0.788, 0.210, 0.169, 0.159], abs=0.03)


# Other dimensions, and the way back to pixels


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_1d_upsampling_identity(spec: ResizeSpec) -> None:
    """Audio: a kernel over time. 2-D resizing of a single row is 1-D resizing."""
    x, w = randn(4, 2, 1, 20, seed=1), randn(8, 2, 20, seed=2)
    bigger = F.interpolate(x, size=(1, 48), mode=spec.kernel_mode, antialias=spec.kernel_antialias)
    got = F.conv1d(bigger[:, :, 0], resize_kernel(w, (48,), spec), stride=48)
    assert relative(got, F.conv1d(x[:, :, 0], w, stride=20)) <= 1e-12


def test_3d_kernels_over_time_and_space_apart() -> None:
    w = randn(4, 3, 2, 16, 16)
    frames = resize_kernel(w, (8, 8), DEFAULT)
    assert torch.equal(resize_kernel(w, (2, 8, 8), DEFAULT), frames), "the same number of frames: each as an image"
    longer = resize_kernel(w, (4, 16, 16), DEFAULT)
    assert torch.allclose(longer.sum(2), w.sum(2)), "a still video gives the token it gave"


def nd_resize(x: Tensor, new: tuple[int, ...], spec: ResizeSpec) -> Tensor:
    """Pixels [..., *old] resized by torch, axis by axis, as rows of an image."""
    for axis, size in zip(range(-len(new), 0), new, strict=True):
        rows = x.movedim(axis, -1)
        flat = F.interpolate(
            rows.reshape(1, 1, -1, rows.shape[-1]),
            size=(rows.numel() // rows.shape[-1], size),
            mode=spec.kernel_mode,
            antialias=spec.kernel_antialias,
        )
        x = flat.reshape(*rows.shape[:-1], size).movedim(-1, axis)
    return x


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize(
    ("old", "new"), [((12,), (18,)), ((8, 8), (12, 12)), ((8, 6), (5, 9)), ((16, 16), (4, 4)), ((2, 6, 8), (4, 8, 6))]
)
def test_a_decoders_pixels_are_the_old_ones_resized(
    spec: ResizeSpec, old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    channels, width = 3, 7
    features = randn(5, width)
    for layout, shape in (("last", (*old, channels)), ("first", (channels, *old))):
        weight, bias = randn(math.prod(shape), width, seed=1), randn(math.prod(shape), seed=2)

        def pixels(weight: Tensor, bias: Tensor, patch: tuple[int, ...], last: bool = layout == "last") -> Tensor:
            out = F.linear(features, weight, bias)  # [5, pixels and channels]
            return out.unflatten(1, (*patch, -1)).movedim(-1, 1) if last else out.unflatten(1, (-1, *patch))

        bigger = [resize_output(part, old, new, spec, layout) for part in (weight, bias)]
        want = nd_resize(pixels(weight, bias, old), new, spec)
        assert relative(pixels(*bigger, new), want) <= 1e-12, layout
    kernel = randn(width, channels, *old, seed=3)
    apart = resize_output(kernel, old, new, spec, "apart")
    want = nd_resize(torch.einsum("bd,dc...->bc...", features, kernel), new, spec)
    assert relative(torch.einsum("bd,dc...->bc...", features, apart), want) <= 1e-12


def test_a_decoders_pixels_as_images() -> None:
    """MAE's unpatchify and a transposed convolution, whole: each patch of the image is its old one, resized."""
    features, weight, bias = randn(2, 6, 5), randn(4 * 4 * 3, 5, seed=1), randn(48, seed=2)

    def unpatchify(p: int, weight: Tensor, bias: Tensor) -> Tensor:
        out = F.linear(features, weight, bias).reshape(2, 2, 3, p, p, 3)
        return torch.einsum("nhwpqc->nchpwq", out).reshape(2, 3, 2 * p, 3 * p)

    small = unpatchify(4, weight, bias)
    large = unpatchify(6, *(resize_output(part, (4, 4), (6, 6), GOOGLE) for part in (weight, bias)))
    for i, j in product(range(2), range(3)):
        patch, bigger = small[..., 4 * i :, 4 * j :][..., :4, :4], large[..., 6 * i :, 6 * j :][..., :6, :6]
        assert relative(bigger, image_resize(patch, (6, 6), GOOGLE)) <= 1e-12
    kernel, cells = randn(5, 3, 4, 4), features.mT.reshape(2, 5, 2, 3)
    small = F.conv_transpose2d(cells, kernel, stride=4)
    large = F.conv_transpose2d(cells, resize_output(kernel, (4, 4), (6, 6), GOOGLE, "apart"), stride=6)
    assert relative(large[..., :6, 6:12], image_resize(small[..., :4, 4:8], (6, 6), GOOGLE)) <= 1e-12


def test_in_and_out_together_are_exact_when_enlarging() -> None:
    """A patch autoencoder: encode with (Bᵀ)⁺, decode with B, and the enlarged patch comes back as the old one did."""
    x, encoder, decoder = randn(6, 3, 8, 8), randn(10, 3, 8, 8, seed=1), randn(8 * 8 * 3, 10, seed=2)
    back = F.linear(tokens(x, encoder).flatten(1), decoder).unflatten(1, (8, 8, 3)).movedim(-1, 1)
    wide = tokens(image_resize(x, (12, 12), DEFAULT), resize_kernel(encoder, (12, 12), DEFAULT)).flatten(1)
    bigger = F.linear(wide, resize_output(decoder, (8, 8), (12, 12), DEFAULT)).unflatten(1, (12, 12, 3)).movedim(-1, 1)
    assert relative(bigger, image_resize(back, (12, 12), DEFAULT)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_output_keeps_its_type_and_itself(dtype: torch.dtype) -> None:
    weight = randn(48, 5).to(dtype)
    assert resize_output(weight, (4, 4), (4, 4), DEFAULT) is weight
    got = resize_output(weight, (4, 4), (6, 8), DEFAULT)
    assert got.dtype == dtype and got.shape == (144, 5) and got.is_contiguous()


def test_gradcheck_output() -> None:
    weight = randn(24, 2).requires_grad_()
    for layout in ("last", "first"):
        assert torch.autograd.gradcheck(lambda w, a=layout: resize_output(w, (3, 4), (5, 2), DEFAULT, a), weight)


def test_the_argument_is_left_alone() -> None:
    kernel, table = randn(2, 16, 16), randn(1, 16, 4)
    copies = kernel.clone(), table.clone()
    resize_kernel(kernel, (8, 8), DEFAULT), resize_positions(table, (4, 4), (3, 3), 0, DEFAULT)
    assert torch.equal(kernel, copies[0]) and torch.equal(table, copies[1])


def test_matrices_of_ten_sizes_are_small(fresh: None) -> None:
    """benchmarks/resize.py times them."""
    made = [pi_matrix(32, size, "bilinear", True) for size in SIZES]
    assert sum(m.numel() * 4 for m in made) < 30_000  # bytes in float32


def test_matrices_are_built_once(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[float] = []
    plain = matrices.AXES["pi"]
    monkeypatch.setitem(matrices.AXES, "pi", lambda b, rho: (built.append(rho), plain(b, rho))[1])
    for _ in range(3):
        resize_kernel(randn(3, 32, 32), (8, 8), DEFAULT)
    assert len(built) == 1
    assert pi_matrix(32, 8, "bilinear", True) is pi_matrix(32, 8, "bilinear", True)


def test_the_spec_of_the_weights_comes_first() -> None:
    odd = ResizeSpec(pos_antialias=False)
    assert choose("x", None, None) == DEFAULT and choose("x", "timm", None) == TIMM
    assert choose("x", None, odd) == odd and choose("x", "google", GOOGLE) == GOOGLE
    assert str(GOOGLE) == "google" and str(odd) == "kernel bilinear antialiased, positions bilinear not antialiased"


def test_presets() -> None:
    assert ResizeSpec.preset("default") == ResizeSpec() == ResizeSpec("bilinear", True, "bilinear", True)
    assert ResizeSpec.preset("google") == ResizeSpec("bilinear", False, "bilinear", True)
    assert ResizeSpec.preset("timm") == ResizeSpec("bicubic", True, "bicubic", True)
    for spec in PRESETS.values():
        assert ResizeSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ResizeSpec.preset("gogle"), "did you mean 'google'"),
        (lambda: ResizeSpec(kernel_mode="bilinaer"), "did you mean 'bilinear'"),
        (lambda: ResizeSpec(pos_mode="nearest-exact"), "unknown resize mode"),
        (lambda: ResizeSpec.from_dict({**DEFAULT.to_dict(), "kernel_mod": 1}), "did you mean 'kernel_mode'"),
        (lambda: ResizeSpec.from_dict({"kernel_mode": "bilinear"}), "lacks kernel_antialias, pos_mode, pos_antialias"),
        (lambda: resize_matrix(4, 8, "cubic", True), "did you mean 'bicubic'"),
        (lambda: pi_matrix(4, 0, "bilinear", True), "at least 1"),
        (lambda: resize_kernel(randn(3, 8, 8), (4, 4), DEFAULT, "aera"), "did you mean 'area'"),
        (lambda: resize_kernel(randn(3, 8, 8), (8, 8), DEFAULT, "best"), "unknown kernel resize"),
        (lambda: resize_kernel(randn(3, 8, 8), (4, 4), DEFAULT, "sigma", 1.0), r"rho=1.0 is not in \[0, 0.999\]"),
        (lambda: ResizeSpec(kernel_antialias="yes"), "kernel_antialias='yes'"),  # type: ignore[arg-type]
        (lambda: ResizeSpec.from_dict("google"), "it is not 'google'"),  # type: ignore[arg-type]
        (lambda: choose("x", "gogle", None), "x: resize='gogle' is not one of default, google, timm"),
        (lambda: choose("x", "timm", GOOGLE), r"not how these weights were trained \(google\): leave it out"),
        (lambda: resize_output(randn(48, 5), (4, 4), (8, 8), DEFAULT, "middle"), "unknown layout"),
        (lambda: resize_output(randn(50, 5), (4, 4), (8, 8), DEFAULT), r"shape \(50, 5\) does not hold \(4, 4\)"),
        (lambda: resize_output(randn(5, 3, 4, 5), (4, 4), (8, 8), DEFAULT, "apart"), "does not hold"),
        (lambda: resize_output(randn(48, 5), (4, 4), (8,), DEFAULT), "as many sizes"),
        (lambda: resize_output(randn(48, 5), (4, 4), (8, 0), DEFAULT), "at least 1"),
        (lambda: resize_kernel(randn(3, 8, 8), (8, 0), DEFAULT), "at least 1"),
        (lambda: resize_kernel(randn(8, 8), (4, 4, 4), DEFAULT), "2 axes"),
        (lambda: resize_kernel(randn(8, 8), (), DEFAULT), "2 axes"),
        (lambda: resize_positions(randn(1, 50, 4), (7, 7), (7, 7), 0, DEFAULT), "50 entries"),
        (lambda: resize_positions(randn(1, 49, 4), (7, 7), (0, 7), 0, DEFAULT), "at least 1"),
    ],
)
def test_errors(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        wrong()
