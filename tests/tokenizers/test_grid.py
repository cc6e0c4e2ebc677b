"""The grid tokenizer: any patch size, any image size, one set of weights.

The numbers of the resized kernel are
checked in ``test_resampling.py``.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import tracemalloc

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from oracles import counted_macs, make_images, make_vit, relative
from saccade.backbones.vit import set_resize
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.tokenizers.resize.resampling import METHODS, PRESETS, ResizeSpec, resize_kernel
from saccade.tokenizers.resize.weight_cache import _KEPT, MOST, kept_bytes

PATCHES = (8, 10, 12, 15, 16, 20, 24, 30, 40, 48, 60)


@pytest.fixture(scope="module")
def vit():
    return make_vit("flexivit", img_size=240, depth=2)


@pytest.fixture
def images(vit):
    return make_images(vit, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["vit", "deit3", "distilled", "dinov2-registers", "clip", "siglip", "oblong", "no-positions"]
)
def test_native_grid_is_timm_exactly(family):
    vit = make_vit(family)
    images = make_images(vit)
    (ph, pw), (h, w) = vit.patch_embed.patch_size, vit.patch_embed.img_size
    for setting in (
        "grid()",
        f"grid(({ph}, {pw}))",
        f"grid(size=({h}, {w}))",
        "grid(resize='timm')",
        "grid(fit='error')",
    ):
        model = AdaptiveViT(vit, setting)
        assert torch.equal(model.forward_head(model.forward_tokens(images)[0]), vit(images)), setting


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit3", "dinov2-registers", "distilled"])
@pytest.mark.parametrize("factor", [0.5, 2])
def test_13_equals_a_timm_model_of_that_patch_size(family, factor):
    """``grid(32)`` of a 16-pixel kernel is timm's patch-32 model with timm's own resampling of the weights."""
    native = make_vit(family).patch_embed.patch_size[0]
    size = 8 * native
    vit, patch = make_vit(family, img_size=size), int(native * factor)
    other = make_vit(family, img_size=size, patch_size=patch)
    state = vit.state_dict()
    state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"], [patch, patch])
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], [size // patch] * 2, num_prefix_tokens=0 if vit.no_embed_class else vit.num_prefix_tokens
    )
    other.load_state_dict(state, strict=True)
    images = make_images(vit)
    found = AdaptiveViT(vit, f"grid({patch}, resize='timm')")(images)
    assert relative(found.logits, other(images)) <= 1e-4
    assert found.trace.grid == (size // patch, size // patch)
    assert relative(AdaptiveViT(vit, f"grid({patch})")(images).logits, other(images)) > 1e-4, "the preset matters"


@torch.no_grad()
def test_14_equals_timms_flexivit_with_weights_read_at_another_patch(vit):
    """timm resizes when it loads; we resize in the forward pass."""
    for patch in (8, 24, 30):
        other = timm.create_model(
            "flexivit_small", patch_size=patch, img_size=240, depth=2, embed_dim=96, num_heads=3, num_classes=10
        ).eval()
        state = timm.models.vision_transformer.checkpoint_filter_fn(vit.state_dict(), other, interpolation="bicubic")
        other.load_state_dict(state)
        images = make_images(vit, 1)
        assert relative(AdaptiveViT(vit, f"grid({patch}, resize='timm')")(images).logits, other(images)) <= 1e-4


@torch.no_grad()
def test_15_token_counts(vit, images):
    for patch, side in zip(PATCHES, (30, 24, 20, 16, 15, 12, 10, 8, 6, 5, 4), strict=True):
        tokens, trace = AdaptiveViT(vit, f"grid({patch})").forward_tokens(images)
        assert tokens.num_patches == side**2 and trace.grid == tokens.grid == (side, side)
        assert torch.equal(tokens.owner[0], torch.arange(side**2))


@torch.no_grad()
def test_10_every_patch_size_and_then_the_first_again(vit, images):
    """Bit-identical logits and an unchanged state dict; the same through many image sizes."""
    before = copy.deepcopy(vit.state_dict())
    first = AdaptiveViT(vit, "grid(8)")
    expected = first(images).logits
    for patch in PATCHES[1:]:
        AdaptiveViT(vit, f"grid({patch})")(images)
    assert torch.equal(first(images).logits, expected)
    for side in range(64, 256, 8):
        first(F.interpolate(images, side))
    assert torch.equal(first(images).logits, expected)
    assert torch.equal(AdaptiveViT(vit, "grid(8)")(images).logits, expected)
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())
    assert before.keys() == vit.state_dict().keys()


@torch.no_grad()
def test_12_what_is_kept_is_bounded_and_serves_what_would_be_made(images):
    vit = make_vit("flexivit", img_size=240, depth=2)
    model = AdaptiveViT(vit, "grid(12)")
    for side in range(60, 60 + 12 * 40, 12):
        resized = F.interpolate(images, (side, 96))
        first = model(resized).logits
        assert torch.equal(model(resized).logits, first)
        assert torch.equal(AdaptiveViT(copy.deepcopy(vit), "grid(12)")(resized).logits, first)
    assert kept_bytes(vit) <= MOST


@torch.no_grad()
def test_12_views_share_what_is_kept_and_a_vit_that_is_gone_takes_it_along(monkeypatch):
    made = []

    def spied(*arguments):
        made.append(arguments)
        return resize_kernel(*arguments)

    monkeypatch.setattr("saccade.tokenizers.grid.resize_kernel", spied)
    gc.collect()
    before, vit = len(_KEPT), make_vit(img_size=96)
    images = make_images(vit)
    for _ in range(3):
        for setting in ("grid(24)", "grid(24, fit='pad') | tome(r=1)", "grid(12)", "grid(24, stride=12)"):
            AdaptiveViT(vit).at(setting)(images)
    assert len(made) == 2, "24 and 12"
    AdaptiveViT(vit, "grid(24, how='vanilla')")(images), AdaptiveViT(vit, "grid(24, resize='timm')")(images)
    assert len(made) == 4 and len(_KEPT) == before + 1
    del vit
    gc.collect()
    assert len(_KEPT) == before


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
def test_12_a_step_of_training_is_seen(optimiser, fused):
    """Fused optimisers write without a new version of the tensor."""
    vit = make_vit(img_size=96)
    images, model = make_images(vit), AdaptiveViT(vit, "grid(24)")
    step = optimiser(vit.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        with torch.no_grad():
            before = model(images).logits
        AdaptiveViT(vit, "grid(12)")(images).logits.square().sum().backward()
        step.step()
        with torch.no_grad():
            assert torch.equal(model(images).logits, AdaptiveViT(copy.deepcopy(vit), "grid(24)")(images).logits)
            assert not torch.equal(model(images).logits, before)


@torch.no_grad()
def test_12_new_weights_are_seen():
    """In place, by loading, by assignment, by exchanging the data and after a change of dtype there and back."""
    vit, other = make_vit(img_size=96), make_vit(img_size=96, seed=1)
    images = make_images(vit)
    model = AdaptiveViT(vit, "grid(24)")

    def fresh() -> torch.Tensor:
        return AdaptiveViT(copy.deepcopy(vit), "grid(24)")(images).logits

    model(images)
    kernel, table = vit.patch_embed.proj.weight, vit.pos_embed
    kernel.mul_(1.5)
    assert torch.equal(model(images).logits, fresh())
    table.add_(0.1)
    assert torch.equal(model(images).logits, fresh())
    vit.load_state_dict(other.state_dict())
    assert torch.equal(model(images).logits, fresh())
    vit.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert torch.equal(model(images).logits, fresh())
    for factor in (0.5, 3.0, 0.7, 1.1):
        vit.patch_embed.proj.weight.data = vit.patch_embed.proj.weight.data * factor
        assert torch.equal(model(images).logits, fresh()), "an old address, and new values behind it"
    vit.bfloat16().float()
    assert torch.equal(model(images).logits, fresh())


def test_12_inference_mode_and_then_training(vit, images):
    model = AdaptiveViT(vit, "grid(24)")
    with torch.inference_mode():
        expected = model(images).logits.clone()
    with torch.no_grad():
        assert torch.equal(model(images).logits, expected)
    for name in ("vit.patch_embed.proj.weight", "vit.pos_embed", "vit.cls_token", "vit.patch_embed.proj.bias"):
        model.get_parameter(name).grad = None
    out = model.train()(images)
    out.logits.sum().backward()
    assert torch.equal(out.logits, expected)
    for name in ("vit.patch_embed.proj.weight", "vit.pos_embed", "vit.cls_token", "vit.patch_embed.proj.bias"):
        grad = model.get_parameter(name).grad
        assert grad is not None and grad.isfinite().all() and grad.abs().sum() > 0, name
    model.eval()


@pytest.mark.parametrize("patch", [12, 16, 20, 48])
def test_15_every_value_of_the_kernel_and_the_positions_learns(patch):
    """With antialiasing; Google's preset reads a part of the kernel's values at small patches."""
    vit = make_vit("flexivit", img_size=240, depth=1)
    AdaptiveViT(vit, f"grid({patch})")(make_images(vit, 1)).logits.sum().backward()
    assert (vit.patch_embed.proj.weight.grad != 0).all() and (vit.pos_embed.grad != 0).all()


@torch.no_grad()
def test_12_deepcopy_and_pickle(vit, images):
    model = AdaptiveViT(vit, "grid(20)")
    expected = model(images).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.vit not in _KEPT, "what can be made again is not carried along"
        assert torch.equal(twin(images).logits, expected)
        twin.vit.patch_embed.proj.weight.mul_(2)
        assert not torch.equal(twin(images).logits, expected)
    assert torch.equal(model(images).logits, expected)


@torch.no_grad()
def test_12_bf16_and_autocast(vit, images):
    expected = AdaptiveViT(vit, "grid(20)")(images).logits
    half = copy.deepcopy(vit).bfloat16()
    assert float((AdaptiveViT(half, "grid(20)")(images.bfloat16()).logits - expected).norm() / expected.norm()) <= 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        first = AdaptiveViT(vit, "grid(20)")(images).logits
    assert float((first - expected).norm() / expected.norm()) <= 2e-2
    assert relative(AdaptiveViT(vit.double(), "grid(20)")(images.double()).logits.float(), expected) <= 1e-4
    vit.float()


@torch.no_grad()
def test_12_compile_and_export_at_a_fixed_patch(vit, images):
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AdaptiveViT(vit, "grid(20)")

        def forward(self, x):
            return self.model(x).logits

    model = Logits().eval()
    expected = model(images)
    torch._dynamo.reset()
    assert relative(torch.compile(model, fullgraph=True, backend="eager")(images), expected) <= 1e-5
    program = torch.export.export(model, (make_images(vit, 2),), dynamic_shapes=({0: torch.export.Dim("b")},))
    assert relative(program.module()(images), expected) <= 1e-5
    other = make_vit("flexivit", img_size=240, depth=2, seed=5)
    assert not torch.equal(AdaptiveViT(other, "grid(20)")(images).logits, expected)


def test_16_threads_and_more_sizes_than_the_cache_holds(vit):
    model = AdaptiveViT(vit, "grid(24)")
    sizes = [(72 + 24 * (i % 6), 72 + 24 * (i // 6)) for i in range(24)]
    inputs = [make_images(vit, 1, size) for size in sizes]
    with torch.no_grad():
        expected = [AdaptiveViT(vit, "grid(24)")(x).logits for x in inputs]
    wrong: list = []

    def work(start: int) -> None:
        with torch.no_grad():
            for step in range(24):
                i = (start * 7 + step) % 24
                try:
                    if not torch.equal(model(inputs[i]).logits, expected[i]):
                        wrong.append(i)
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(_KEPT[vit]) <= MOST + 16


def test_16_ten_sizes_of_one_model_in_sixteen_threads(vit):
    """Every thread takes another size each time, from a view of its own: bit for bit what one thread gives."""
    model, images = AdaptiveViT(vit), make_images(vit, 1)
    settings = [f"grid({patch})" for patch in PATCHES[:10]]
    with torch.no_grad():
        expected = [AdaptiveViT(copy.deepcopy(vit), setting)(images).logits for setting in settings]
    wrong: list = []

    def work(start: int) -> None:
        with torch.no_grad():
            for step in range(10):
                i = (start * 3 + step * 7) % 10
                try:
                    if not torch.equal(model.at(settings[i])(images).logits, expected[i]):
                        wrong.append(i)
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Operators(TorchDispatchMode):
    """What torch is asked to run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_switching_the_patch_size_costs_next_to_nothing():
    """After first use a switch makes a view: kilobytes of Python, no tensor, and weights that are only compared."""
    vit = make_vit("flexivit", img_size=240, depth=1, embed_dim=384, num_heads=6, patch_size=32)
    model = AdaptiveViT(vit)

    def weights(patch: int) -> tuple[torch.Tensor, torch.Tensor]:
        view = model.at(f"grid({patch})")
        return view.tokenizer.weights(vit, (240 // patch, 240 // patch))

    with Operators() as made:
        first = {patch: weights(patch) for patch in PATCHES[:10]}
    assert made.seen
    gc.collect()
    tracemalloc.start()
    for patch in PATCHES[:10]:
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        with Operators() as run:
            again = weights(patch)
        assert set(run.seen) <= {torch.ops.aten.equal.default, torch.ops.aten.detach.default}, "only compared"
        assert tracemalloc.get_traced_memory()[1] - held < 2**20
        assert all(a is b for a, b in zip(first[patch], again, strict=True))
    tracemalloc.stop()


# --- overlapping patches --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit3", "dinov2-registers", "distilled", "siglip", "no-positions"])
@pytest.mark.parametrize(("patch", "stride", "size"), [(16, 8, (64, 96)), (12, (4, 6), (60, 72)), (20, 10, (50, 70))])
def test_flexible_stride_is_a_convolution_with_another_stride(family, patch, stride, size):
    """By hand: unfold the image, multiply by the kernel, add positions resized to the grid of the places."""
    vit = make_vit(family)
    images = make_images(vit, 2, size)
    model = AdaptiveViT(vit, f"grid({patch}, stride={stride}, resize='timm')")
    tokens, trace = model.forward_tokens(images)
    sh, sw = (stride, stride) if isinstance(stride, int) else stride
    grid = (size[0] - patch) // sh + 1, (size[1] - patch) // sw + 1
    assert tokens.grid == trace.grid == grid and torch.equal(tokens.owner[1], torch.arange(grid[0] * grid[1]))
    kernel, bias = resample_patch_embed(vit.patch_embed.proj.weight, [patch, patch]), vit.patch_embed.proj.bias
    seen = F.unfold(images, patch, stride=(sh, sw)).transpose(1, 2)
    x = seen @ kernel.flatten(1).T + (0 if bias is None else bias)
    prefix, table = [getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token")], vit.pos_embed
    prefix = [token.expand(2, -1, -1) for token in prefix if token is not None]
    if table is not None:
        inside = 0 if vit.no_embed_class else vit.num_prefix_tokens
        table = resample_abs_pos_embed(table, list(grid), old_size=[4, 4], num_prefix_tokens=inside)
        x = torch.cat([*prefix, x], 1) + table if inside else torch.cat([*prefix, x + table], 1)
    else:
        x = torch.cat([*prefix, x], 1)
    assert relative(tokens.x, vit.blocks(vit.norm_pre(x))) <= 1e-4
    dense = model.feature_map(images)
    assert dense.shape == (2, 96, *grid)
    assert relative(dense.flatten(2).mT, vit.norm(tokens.patches)) <= 1e-5
    assert float(trace.macs().sum()) - 2 * trace.head == pytest.approx(
        counted_macs(lambda: model.forward_tokens(images)), rel=1e-3
    )


@torch.no_grad()
def test_a_stride_of_the_patch_size_is_no_stride():
    vit = make_vit()
    images = make_images(vit, 2, (70, 45))
    for fit in ("resize", "pad", "crop"):
        plain = AdaptiveViT(vit, f"grid(12, fit='{fit}')")(images)
        found = AdaptiveViT(vit, f"grid(12, fit='{fit}', stride=12)")(images)
        assert torch.equal(found.logits, plain.logits) and torch.equal(found.trace.macs(), plain.trace.macs())


@torch.no_grad()
@pytest.mark.parametrize(
    ("fit", "pixels"),
    [("resize", (68, 56)), ("pad", (68, 68)), ("crop", (56, 56)), ("error", None)],
)
def test_overlapping_patches_that_do_not_end_at_the_border(fit, pixels):
    """Patches of 32 every 12: 32, 44, 56, 68 … pixels are covered without a rest."""
    vit = make_vit()
    images = make_images(vit, 1, (64, 60))
    model = AdaptiveViT(vit, f"grid(32, stride=12, fit='{fit}')")
    if pixels is None:
        with pytest.raises(UserError, match="32x32 do not divide 64x60"):
            model(images)
        return
    tokens, _ = model.forward_tokens(images)
    assert tokens.grid == ((pixels[0] - 20) // 12, (pixels[1] - 20) // 12)
    assert tokens.x.isfinite().all()
    small, _ = model.forward_tokens(make_images(vit, 1, (5, 40)))
    assert small.grid[0] == 1


def test_overlapping_patches_export_and_learn():
    vit = make_vit()
    images = make_images(vit)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AdaptiveViT(vit, "grid(16, stride=8)")

        def forward(self, x):
            return self.model(x).logits

    model = Logits().eval()
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("b")},))
    with torch.no_grad():
        assert relative(program.module()(images[:1]), model(images[:1])) <= 1e-5
    model(images).sum().backward()
    assert vit.patch_embed.proj.weight.grad.abs().sum() > 0 and vit.pos_embed.grad.abs().sum() > 0


# --- how, and with which spec -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("how", METHODS)
def test_a_setting_chooses_how_the_kernel_is_resized(vit, images, how):
    model = AdaptiveViT(vit, f"grid(10, how='{how}', rho=0.8)")
    kernel, _ = model.tokenizer.weights(vit, (24, 24))
    expected = resize_kernel(vit.patch_embed.proj.weight, (10, 10), PRESETS["default"], how, 0.8)
    assert torch.equal(kernel, expected)
    assert torch.equal(model(images).logits, AdaptiveViT(vit, "grid(10)")(images).logits) == (how == "pi")


def test_weights_that_were_trained_with_a_spec_are_resized_by_it():
    vit = make_vit()
    images = make_images(vit)
    with torch.no_grad():
        free, google = (AdaptiveViT(vit, setting)(images).logits for setting in ("grid(8)", "grid(8, resize='google')"))
        assert not torch.equal(free, google)
        set_resize(vit, PRESETS["google"])
        model = AdaptiveViT(vit)
        assert model.backbone.resize == PRESETS["google"]
        for setting in ("grid(8)", "grid(8, resize='google')", "grid(8, resize=None)"):
            assert torch.equal(model.at(setting)(images).logits, google)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin.at("grid(8)")(images).logits, google)
    with pytest.raises(UserError, match=r"grid: resize='timm' is not how these weights were trained \(google\)"):
        model.at("grid(8, resize='timm')")
    set_resize(vit, ResizeSpec(pos_antialias=False))
    with pytest.raises(UserError, match=r"kernel bilinear antialiased, positions bilinear not antialiased"):
        AdaptiveViT(vit, "grid(8, resize='default')")
    set_resize(vit, None)
    with torch.no_grad():
        assert torch.equal(AdaptiveViT(vit, "grid(8)")(images).logits, free)


@torch.no_grad()
@pytest.mark.parametrize(("size", "patch"), [(60, 16), ((50, 70), 16), (63, (9, 20))])
def test_a_vit_whose_patches_do_not_divide_its_own_input_is_timm_exactly(size, patch):
    """timm leaves the rest out, so the unreduced model does too; SigLIP's 384 pixels by patches of 14 are like this."""
    vit = make_vit(img_size=size, patch_size=patch)
    images = make_images(vit)
    for setting in ("", "grid()", f"grid({patch})"):
        model = AdaptiveViT(vit, setting)
        assert torch.equal(model.forward_head(model.forward_tokens(images)[0]), vit(images))
    assert not torch.equal(AdaptiveViT(vit, "grid(fit='resize')")(images).logits, model(images).logits)


# --- sizes that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "size", "grid"),
    [
        ("resize", (64, 64), (3, 3)),  # 2.67 patches: three
        ("resize", (48, 72), (2, 3)),
        ("resize", (50, 58), (2, 2)),
        ("resize", (10, 200), (1, 8)),
        ("pad", (64, 64), (3, 3)),
        ("pad", (49, 48), (3, 2)),
        ("pad", (10, 25), (1, 2)),
        ("crop", (64, 71), (2, 2)),
        ("crop", (72, 95), (3, 3)),
        ("crop", (30, 100), (1, 4)),
        ("error", (48, 96), (2, 4)),
    ],
)
@torch.no_grad()
def test_images_that_patches_do_not_divide(fit, size, grid):
    vit = make_vit()
    images = make_images(vit, 2, size)
    h, w = (24 * side for side in grid)
    fitted = {
        "resize": lambda: F.interpolate(images, (h, w), mode="bicubic", antialias=True),
        "pad": lambda: F.pad(images, (0, w - size[1], 0, h - size[0])),
        "crop": lambda: images[..., :h, :w],
        "error": lambda: images,
    }[fit]()
    found = AdaptiveViT(vit, f"grid(24, fit='{fit}')").forward_tokens(images)[0]
    assert found.grid == grid
    expected = AdaptiveViT(vit, "grid(24, fit='error')").forward_tokens(images if size == (h, w) else fitted)[0]
    assert torch.equal(found.x, expected.x)


@torch.no_grad()
def test_an_image_smaller_than_a_patch_is_enlarged_where_nothing_can_be_cropped():
    vit = make_vit()
    images = make_images(vit, 1, (10, 50))
    tokens, _ = AdaptiveViT(vit, "grid(24, fit='crop')").forward_tokens(images)
    assert tokens.grid == (1, 2) and tokens.x.isfinite().all()


def test_not_dividing_is_an_error_on_request():
    model = AdaptiveViT(make_vit(), "grid(24, fit='error')")
    with pytest.raises(UserError, match=r"24x24 do not divide 64x64.*fit='resize'"):
        model(torch.zeros(1, 3, 64, 64))


@torch.no_grad()
@pytest.mark.parametrize(
    "setting", ["grid(size=96)", "grid(24, size=96)", "grid(size=(96, 64))", "grid(24, 60, fit='pad')"]
)
def test_size_is_what_images_are_brought_to(setting):
    vit = make_vit()
    model = AdaptiveViT(vit, setting)
    size = model.input_size()
    assert size == {"grid(size=(96, 64))": (96, 64), "grid(24, 60, fit='pad')": (60, 60)}.get(setting, (96, 96))
    images = make_images(vit, 1, (80, 112))
    resized = F.interpolate(images, size, mode="bicubic", antialias=True)
    assert torch.equal(model.forward_tokens(images)[0].x, model.forward_tokens(resized)[0].x)
    assert AdaptiveViT(vit).input_size() == (64, 64)


@torch.no_grad()
@pytest.mark.parametrize("patch", [(16, 8), (8, 32), (10, 20)])
def test_oblong_patches_and_images(patch):
    """Against timm's own resampling of kernel and positions, and its own convolution."""
    vit = make_vit()
    images = make_images(vit, 2, (80, 160))
    tokens, _ = AdaptiveViT(vit, f"grid({patch}, resize='timm')").forward_tokens(images)
    grid = [80 // patch[0], 160 // patch[1]]
    kernel = resample_patch_embed(vit.patch_embed.proj.weight, list(patch))
    x = F.conv2d(images, kernel, vit.patch_embed.proj.bias, stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([vit.cls_token.expand(2, -1, -1), x], 1)
    x = x + resample_abs_pos_embed(vit.pos_embed, grid, old_size=[4, 4], num_prefix_tokens=1)
    assert tokens.grid == tuple(grid)
    assert relative(tokens.x, vit.blocks(x)) <= 1e-4


def test_positions_of_another_grid_with_as_many_cells_are_resized():
    """2 x 8 cells are not 4 x 4, though their counts agree."""
    vit = make_vit()
    images = make_images(vit, 1, (32, 128))
    square = AdaptiveViT(vit)(torch.zeros(1, 3, 64, 64))
    flat = AdaptiveViT(vit)(torch.zeros_like(images))
    assert flat.trace.grid == (2, 8) and square.trace.grid == (4, 4)
    assert relative(flat.logits, square.logits) > 1e-3


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("grid(0)", r"patch=0 .*\[1, 256\]"),
        ("grid(-16)", r"patch=-16"),
        ("grid(257)", r"patch=257 .*\[1, 256\]"),
        ("grid((16, 0))", r"patch=\(16, 0\)"),
        ("grid((16, 16, 16))", r"patch=\(16, 16, 16\)"),
        ("grid(True)", r"patch=True"),
        ("grid(16.5)", r"wrong type"),
        ("grid('16')", r"patch='16'"),
        ("grid(16, 0)", r"size=0 .*\[1, 8192\]"),
        ("grid(16, 10000)", r"size=10000 .*\[1, 8192\]"),
        ("grid(16, (64,))", r"size=\(64,\)"),
        ("grid(resize='cubic')", r"resize='cubic' is not one of default, google, timm"),
        ("grid(fit='stretch')", r"fit='stretch' is not one of resize, pad, crop, error"),
        ("grid(how='best')", r"how='best' is not one of pi, vanilla, area, norm, token_norm, sigma"),
        ("grid(rho=1)", r"rho=1 .*\[0, 0.999\]"),
        ("grid(stride=17)", r"stride=17 is larger than the patch of 16x16"),
        ("grid(8, stride=(8, 9))", r"stride=\(8, 9\) is larger than the patch of 8x8"),
        ("grid(stride=0)", r"stride=0 .*\[1, 256\]"),
        ("grid(stride=4.0)", r"wrong type"),
    ],
)
def test_knobs_out_of_range(setting, says):
    with pytest.raises(UserError, match=rf"^grid: .*{says}|^grid: {says}"):
        AdaptiveViT(make_vit(), setting)


def test_menu_of_a_model_runs():
    vit = make_vit(img_size=96)
    model = AdaptiveViT(vit)
    from saccade.core.registry import registry

    menu = registry()["grid"].menu(model.backbone)
    assert len(menu) > 2
    with torch.no_grad():
        costs = [float(model.at(setting)(make_images(vit, 1)).trace.macs()) for setting in menu]
    assert all(cost <= float(model(make_images(vit, 1)).trace.macs()) for cost in costs)
