"""The convolutional stem, and what a pretrained ViT makes of a fitted one."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import saccade
from command_line import Run, place, run  # noqa: F401  (fixtures)
from data_helpers import write_folder
from oracles import FAMILIES, counted_macs, make_images, make_vit, nominal_gmacs, relative
from saccade.backbones.saving import save
from saccade.backbones.vit import backbone_of
from saccade.checkpoint import load
from saccade.conversion.stem_fit import Moments, fit_stem, keep_best, token_error
from saccade.data.scenes import scenes
from saccade.errors import UserError
from saccade.methods.common.budget import macs
from saccade.model import AdaptiveViT
from saccade.tasks.segmentation.segmenter import segmenter
from saccade.training import train as training
from small_runs import files

SIDES = {8: 8, 12: 16, 14: 16, 16: 16, 20: 32, 32: 32}


def smooth(count: int, side: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Pictures in which neighbours are alike, as in photos: sums of noise at several scales."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(count, channels, s, s, generator=generator) for s in (4, 8, 16, 32, side)]
    return sum(2.0**-i * F.interpolate(part, (side, side), mode="bilinear") for i, part in enumerate(parts))


# --- shapes, cost, reach ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [("deit_small_patch16_224", 1.02e6, 0.435), ("deit_tiny_patch16_224", 0.256e6, 0.113)],
)
def test_four_convolutions_and_one_by_one_at_the_published_cost(name, parameters, gmacs):
    with torch.device("meta"):
        model = AdaptiveViT(timm.create_model(name).eval(), "stem()")
        tokens = model.tokenizer(model.vit, torch.empty(1, 3, 224, 224))
    stem, dim = model.tokenizer, model.backbone.dim
    assert sum(p.numel() for p in stem.parameters()) == pytest.approx(parameters, rel=0.01)
    assert stem.macs(model.vit, tokens) / 1e9 == pytest.approx(gmacs, abs=0.0006)
    assert [conv.out_channels for conv in stem.convs] == [dim // 8, dim // 4, dim // 2, dim]
    assert all(conv.kernel_size == (3, 3) for conv in stem.convs) and stem.last.kernel_size == (1, 1)
    assert tokens.grid == (14, 14) and tokens.num_patches == 196


@pytest.mark.parametrize(("name", "gmacs"), [("deit_small_patch16_224", 2.916), ("deit_tiny_patch16_224", 0.770)])
def test_imagepiece_with_its_stem(name, gmacs):
    assert nominal_gmacs(name, "stem() | imagepiece(keep=0.8)") == pytest.approx(gmacs, abs=0.0006)


def test_trajectory_with_the_stem():
    vit = make_vit(depth=12, embed_dim=24, img_size=224)
    trace = AdaptiveViT(vit, "stem() | imagepiece(keep=0.8)")(make_images(vit, 1)).trace
    expected = [181, 167, 154, 124, 115, 106, 85, 79, 73, 59, 59, 59]
    assert trace.tokens() == [count + 1 for count in expected]


@torch.no_grad()
@pytest.mark.parametrize("patch", [8, 12, 14, 16, 20, 32])
def test_every_patch_size_has_its_grid_and_its_price(patch):
    vit = make_vit(img_size=4 * patch, patch_size=patch)
    model = AdaptiveViT(vit, "stem()")
    images = make_images(vit, 2)
    tokens = model.tokenizer(vit, images)
    assert tokens.grid == (4, 4) and tokens.x.shape == (2, 17, 96)
    assert model.tokenizer.fitted(images).shape[-1] == 4 * SIDES[patch]
    counted = counted_macs(lambda: model.tokenizer(vit, images))
    assert 2 * model.tokenizer.macs(vit, tokens) == pytest.approx(counted, rel=1e-3)
    assert model(images).trace.macs().sum() == pytest.approx(counted_macs(lambda: model(images)), rel=1e-3)


@torch.no_grad()
def test_it_is_what_timms_layers_give_by_hand():
    vit = make_vit("deit")
    model = AdaptiveViT(vit, "stem()")
    images, stem = make_images(vit), model.tokenizer
    x = images
    for conv in stem.convs:
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1).clamp(min=0)
    x = F.conv2d(x, stem.last.weight, stem.last.bias)
    rows = [torch.cat([vit.cls_token[0], image.flatten(1).T]) + vit.pos_embed[0] for image in x]
    torch.testing.assert_close(model.tokenizer(vit, images).x, torch.stack(rows))
    expected = vit.forward_head(vit.norm(vit.blocks(torch.stack(rows))))
    assert relative(model(images).logits, expected) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("patch", [8, 16, 32])
def test_a_pixel_at_a_border_reaches_more_than_one_token(patch):
    vit = make_vit(img_size=4 * patch, patch_size=patch)
    model = AdaptiveViT(vit, "stem()")
    images = make_images(vit, 1)
    changed = images.clone()
    changed[..., 2 * patch - 1, 2 * patch - 1] += 5.0
    moved = (model.tokenizer(vit, changed).patches - model.tokenizer(vit, images).patches).abs().amax(-1)[0] > 0
    assert moved.sum() >= 2
    plain = AdaptiveViT(vit)
    moved = (plain.tokenizer(vit, changed).patches - plain.tokenizer(vit, images).patches).abs().amax(-1)[0] > 0
    assert moved.sum() == 1, "the negative control: a patch embedding does not look over the border"


@torch.no_grad()
@pytest.mark.parametrize(
    ("setting", "grid"),
    [("stem()", (6, 5)), ("stem(32)", (3, 2)), ("stem(size=64)", (4, 4)), ("stem((8, 16), 48)", (6, 3))],
)
def test_any_size_of_image_and_patch(setting, grid):
    vit = make_vit("deit")
    model = AdaptiveViT(vit, setting)
    size = (96, 80) if model.tokenizer.size is None else model.tokenizer.size
    tokens = model.tokenizer(vit, make_images(vit, 2, size))
    assert tokens.grid == grid
    assert model(make_images(vit, 2, size)).logits.isfinite().all()


@torch.no_grad()
def test_the_patch_embedding_stays_beside_it():
    vit = make_vit("deit")
    images = make_images(vit)
    model = AdaptiveViT(vit, "stem()")
    assert torch.equal(model.at("grid()")(images).logits, AdaptiveViT(vit)(images).logits)
    assert relative(model(images).logits, vit(images)) > 0.1
    assert model.at("stem() | evit(0.5)").tokenizer.convs[0].weight is model.tokenizer.convs[0].weight


def test_freezing_is_refused():
    with pytest.raises(UserError, match=r"^'stem\(\)' cannot be frozen"):
        AdaptiveViT(make_vit(), "stem()").freeze()


@pytest.mark.parametrize(
    ("family", "setting", "says"),
    [
        ({"patch_size": 40, "img_size": 160}, "stem()", r"patches of 40 pixels \(at most 32\)"),
        ({"embed_dim": 60}, "stem()", r"width 60 \(no multiple of 8\)"),
        ({}, "stem(0)", r"patch=0 .*\[1, 256\]"),
        ({}, "stem(16, size=0)", r"size=0 .*\[1, 8192\]"),
        ({}, "stem((1, 2, 3))", r"patch=\(1, 2, 3\)"),
        ({}, "grid(16) | stem()", "one tokenizer"),
    ],
)
def test_what_is_refused(family, setting, says):
    with pytest.raises(UserError, match=says):
        AdaptiveViT(make_vit(**family), setting)


# --- fitting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "count", "outputs"), [(12, 5, 3), (12, 12, 20), (9, 4, 40)])
def test_the_best_readings_lose_no_more_than_any_others(width, count, outputs):
    """Against random readings, and against what the Eckart-Young theorem says is left."""
    generator = torch.Generator().manual_seed(width)
    made = torch.randn(outputs, width, generator=generator, dtype=torch.float64)
    root = torch.randn(width, width, generator=generator, dtype=torch.float64)
    covariance = root @ root.T

    def left(reading: torch.Tensor) -> float:
        """Mean square error of the best linear function of what is read."""
        seen = reading @ covariance @ reading.T
        best = made @ covariance @ reading.T @ torch.linalg.pinv(seen)
        wrong = made - best @ reading
        return float((wrong @ covariance @ wrong.T).trace())

    reading, found = keep_best(made, covariance, count)
    wrong = made - found @ reading
    error = float((wrong @ covariance @ wrong.T).trace())
    singular = torch.linalg.svdvals(made @ torch.linalg.cholesky(covariance))
    scale = float((made @ covariance @ made.T).trace())
    assert error == pytest.approx(float(singular[count:].square().sum()), abs=1e-6 * scale)
    assert error == pytest.approx(left(reading), abs=1e-6 * scale)
    others = (torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(20))
    assert all(left(other) >= error * (1 - 1e-9) for other in others)
    torch.testing.assert_close(reading @ covariance @ reading.T, torch.eye(count, dtype=torch.float64))


def test_more_readings_than_values_lose_nothing():
    made = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reading, found = keep_best(made, torch.eye(4, dtype=torch.float64), 10)
    assert reading.shape == (10, 4) and torch.allclose(found @ reading, made)
    assert (reading.norm(dim=1) > 0.1).all(), "spare readings are mixtures, not zeros: they can learn"


def test_moments_are_those_of_all_rows_together():
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3
    moments = Moments(6)
    for part in rows.split(17):
        moments.add(part)
    torch.testing.assert_close(moments.mean(), rows.double().mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(moments.covariance(), rows.double().T.cov(correction=0), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("family", "patch", "dim", "most"), [
    ("deit", 16, 384, 1e-3),  # nothing is lost in the widths 48, 96, 192, 384
    ("deit", 8, 96, 0.02),
    ("distilled", 16, 192, 0.06),
    ("deit", 14, 192, 0.08),
    ("deit", 32, 384, 0.15),
    ("siglip", 16, 192, 0.06),
])  # fmt: skip
def test_a_fitted_stem_gives_the_tokens_of_the_patch_embedding(family, patch, dim, most):
    vit = make_vit(family, depth=1, img_size=64 if patch != 14 else 56, patch_size=patch, embed_dim=dim)
    kernel = vit.patch_embed.proj.weight  # smooth, as those of trained ViTs are
    kernel.copy_(F.avg_pool2d(kernel, 3, 1, 1) * 3)
    side = vit.patch_embed.img_size[0]
    images, others = smooth(48, side), smooth(8, side, seed=1)
    model = fit_stem(vit, images)
    assert str(model.setting) == "stem()" and token_error(model, others) < most
    assert token_error(AdaptiveViT(vit, "stem()"), others) > 0.5, "the negative control: unfitted"
    tokens, expected = (m.tokenizer(vit, others).patches for m in (model, model.at("dense")))
    wrong = (tokens - expected).square().sum() / (expected - expected.mean((0, 1))).square().sum()
    assert wrong < 3 * most
    assert torch.equal(vit.patch_embed.proj.weight, kernel)


@torch.no_grad()
def test_a_model_survives_its_fitted_stem():
    vit = make_vit("deit", embed_dim=384, num_heads=6)
    images, others = smooth(48, 64), smooth(16, 64, seed=1)
    model = fit_stem(vit, images)
    near, far = model(others).logits, AdaptiveViT(vit, "stem()")(others).logits
    assert relative(near, vit(others)) < 0.02 < 0.3 < relative(far, vit(others))


def test_fitting_changes_nothing_of_the_source_and_is_repeatable():
    vit = make_vit("deit")
    source = AdaptiveViT(vit, "dense", learned={"other.weight": torch.ones(2)})
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    images = smooth(20, 64)
    one, two = fit_stem(source, images), fit_stem(source, images)
    assert set(source.learned) == {"other.weight"} and "other.weight" in one.learned
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    assert all(torch.equal(v, two.learned[k]) for k, v in one.learned.items())
    assert all(p.requires_grad for p in one.tokenizer.parameters())


def test_it_fits_on_folders_and_on_the_built_in_scenes(tmp_path):
    vit = make_vit("deit", depth=1)
    for where in (write_folder(tmp_path / "photos", files(each=4)), scenes("val", counts={"val": 12})):
        assert token_error(fit_stem(vit, where, limit=10), smooth(4, 64)) < 1.0
    with pytest.raises(UserError, match="limit=0"):
        fit_stem(vit, "scenes", limit=0)
    with pytest.raises(UserError, match=r"shape \(2, 3, 8, 8\)"):
        fit_stem(vit, smooth(2, 64)[..., :8, :8])
    with pytest.raises(UserError, match="2 channels"):
        fit_stem(make_vit("oblong", patch_size=16, img_size=64), "scenes")


def test_features_stay_off_the_kink_where_it_was_fitted():
    """Then the stem is linear there, and gradients reach every convolution."""
    model = fit_stem(make_vit("deit", depth=1), smooth(30, 64))
    with torch.no_grad():
        levels = model.tokenizer.levels(smooth(8, 64, seed=2))
    assert all((level == 0).double().mean() < 0.01 for level in levels[1:])
    model.train()(smooth(4, 64)).logits.square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.tokenizer.parameters())


# --- folders, command, training --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_folder_holds_the_stem_and_a_plain_vit(tmp_path):
    vit = make_vit("deit")
    images = smooth(4, 64)
    model = fit_stem(vit, smooth(20, 64))
    save(model, tmp_path / "model")
    found = load(tmp_path / "model")
    assert str(found.setting) == "stem()"
    for setting in ("stem()", "dense", "stem() | evit(0.5)", "stem(8)"):
        assert torch.equal(found.at(setting)(images).logits, model.at(setting)(images).logits)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["saccade"]["setting"] == "stem()"
    assert load(tmp_path / "model", "grid()").learned.keys() == model.learned.keys()


def test_the_price_by_arithmetic_is_of_the_patch_embedding():
    """``budget.macs`` knows methods; the stem's own MACs come on top, as a trace says."""
    vit = make_vit("deit")
    model = AdaptiveViT(vit, "stem() | tome(r=2)")
    trace = model(make_images(vit, 1)).trace
    plain = model.at("tome(r=2)")(make_images(vit, 1)).trace
    assert macs(backbone_of(vit), *model.plan.methods) == plain.macs()[0] == trace.macs()[0] - trace.embed + plain.embed


def test_the_verb_writes_a_model_that_evaluates(run: Run, tmp_path):
    photos = write_folder(tmp_path / "photos", files(each=6))
    AdaptiveViT(make_vit("deit")).save(str(tmp_path / "plain"))
    code, out, _ = run("stem", tmp_path / "plain", photos, "--out", tmp_path / "made", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["images"] == 15 and 0 <= facts["error"] < 0.5
    assert str(load(tmp_path / "made").setting) == "stem()"


@pytest.mark.parametrize("fitted", [True, False])
def test_it_trains_by_config(fitted, tmp_path):
    photos = write_folder(tmp_path / "photos", files(each=8))
    vit = make_vit("deit", num_classes=3)
    source = fit_stem(vit, smooth(20, 64)) if fitted else AdaptiveViT(vit)
    source.save(str(tmp_path / "source"))
    before = {k: v.clone() for k, v in load(tmp_path / "source", "stem()").learned.items()}
    config = {
        "model": {"name": str(tmp_path / "source")},
        "data": {"path": str(photos), "holdout": 0.0, "workers": 0},
        "sampling": {"settings": ["stem() | evit(0.7)"]},
        "run": {"steps": 3, "batch": 8, "threads": 1},
    }
    trained = training.train(config, out=tmp_path / "run").model
    assert str(trained.setting) == "stem() | evit(0.7)"
    after = load(tmp_path / "run" / "model").learned
    moved = {k: float((after[k] - before[k]).detach().abs().max()) for k in before}
    assert all(0 < change < 0.01 for change in moved.values()), f"it goes on from what it was given: {moved}"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_with_a_stem(family):
    vit = make_vit(family)
    model, images = AdaptiveViT(vit, "stem()"), make_images(vit)
    tokens = model.tokenizer(vit, images)
    assert tokens.grid == tuple(vit.patch_embed.grid_size) and model(images).logits.isfinite().all()
    # timm's own forward, given these tokens, gives what the model gives
    expected = vit.forward_head(vit.norm(vit.blocks(tokens.x)))
    assert relative(model(images).logits, expected) <= 1e-5


def test_it_learns_from_scratch():
    torch.manual_seed(0)
    model = AdaptiveViT(make_vit("deit", depth=1, num_classes=2), "stem()").train()
    images, labels = smooth(32, 64), torch.arange(32) % 2
    images[labels == 1] = images[labels == 1].flip(1) * 1.5
    optimizer = torch.optim.AdamW(model.tokenizer.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_the_api_by_its_name():
    assert saccade.fit_stem is fit_stem


def test_a_segmenter_keeps_its_stem_in_every_view_and_folder(tmp_path):
    model = segmenter(fit_stem(make_vit("deit", depth=1), smooth(20, 64)), ("a", "b"), "linear").eval()
    weight = model.tokenizer.convs[0].weight
    assert model.at("stem() | tome(r=2)").tokenizer.convs[0].weight is weight
    save(model, tmp_path / "model")
    found, images = load(tmp_path / "model"), smooth(2, 64)
    with torch.no_grad():
        for setting in ("stem()", "dense", "stem() | tome(r=2)"):
            assert torch.equal(found.at(setting)(images).logits, model.at(setting)(images).logits)
