"""The empty setting is timm, on every supported family; what is not supported is refused by name.

And the pooling of reduced tokens.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch.nn.utils import prune

from oracles import FAMILIES, counted_macs, make_images, make_vit, randomise, relative
from saccade.backbones.vit import backbone_of
from saccade.core.merging import Merge
from saccade.core.reduction import Reduction, reduce
from saccade.errors import UserError
from saccade.model import AdaptiveViT

POOLING = [name for name in FAMILIES if "average" in name or name in ("siglip", "registers-map")]


class GatedAttention(Attention):
    """Only to give timm's own ``Attention`` its options that no VisionTransformer argument reaches."""

    def __new__(cls, dim, **kwargs):
        return Attention(dim, gated=True, attn_head_dim=20, **kwargs)


SPECIAL = {"gated, narrow heads": {"attn_layer": GatedAttention}, "no bias": {"qkv_bias": False, "proj_bias": False}}


@pytest.fixture(params=[*FAMILIES, *SPECIAL])
def vit(request) -> VisionTransformer:
    return make_vit(request.param) if request.param in FAMILIES else make_vit(**SPECIAL[request.param])


@torch.no_grad()
def test_empty_setting_is_timm(vit):
    images = make_images(vit, 3)
    model, expected = AdaptiveViT(vit), vit(images)
    assert expected.std() > 0.1, "the random weights do not reach the logits"
    tokens, _ = model.forward_tokens(images)
    assert torch.equal(tokens.x, vit.blocks(vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))))
    assert torch.equal(model.forward_head(tokens), expected)
    assert relative(model(images).logits, expected) <= 1e-5
    features = model.feature_map(images)
    reference = vit.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0]
    assert torch.equal(features, reference)


@pytest.mark.parametrize("family", ["vit", "deit3", "siglip", "distilled"])
def test_training_is_timms_too(family):
    """The same random numbers are drawn for every kind of dropout, in the same order."""
    rates = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
    vit = make_vit(family, **dict.fromkeys(rates, 0.3)).train()
    images = make_images(vit)
    torch.manual_seed(0)
    expected = vit(images)
    torch.manual_seed(0)
    model = AdaptiveViT(vit)
    assert torch.equal(model.forward_head(model.forward_tokens(images)[0]), expected)
    assert relative(vit.eval()(images), expected) > 0.1, "dropout does something"


def test_macs_are_those_of_the_operators(vit):
    vit.requires_grad_(False)  # torch's counter stumbles over views of parameters that require a gradient
    images = make_images(vit, 2)
    model = AdaptiveViT(vit)
    assert model(images).trace.macs().sum() == pytest.approx(counted_macs(lambda: model(images)), rel=1e-3)
    whole = counted_macs(lambda: model.forward_head(model.forward_tokens(images)[0]))
    assert model.forward_tokens(images)[1].macs().sum() == pytest.approx(whole, rel=1e-3)
    assert whole == pytest.approx(counted_macs(lambda: vit(images)), rel=1e-6)


def test_nothing_of_the_timm_model_changes(vit):
    before, modules = copy.deepcopy(vit.state_dict()), dict(vit.named_modules())
    model = AdaptiveViT(vit, "tome(r=2)")
    model(make_images(vit))
    assert dict(vit.named_modules()) == modules
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())
    stripped = {name.removeprefix("vit."): value for name, value in model.state_dict().items()}
    twin = copy.deepcopy(vit)
    randomise(twin, seed=1)
    twin.load_state_dict(stripped, strict=True)
    images = make_images(vit)
    with torch.no_grad():
        assert torch.equal(twin(images), vit(images))


def test_deepcopy_and_pickle(vit):
    images = make_images(vit)
    model = AdaptiveViT(vit, "tome(r=2)")
    with torch.no_grad():
        expected = model(images).logits
        assert torch.equal(copy.deepcopy(model)(images).logits, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images).logits, expected)


def test_facts_of_the_backbone():
    found = backbone_of(make_vit("dinov2-registers", num_heads=4))
    assert (found.depth, found.dim, found.heads, found.head_dim) == (3, 96, 4, 24)
    assert (found.num_prefix, found.has_class_token, found.pool) == (5, True, "token")
    assert (found.patch_size, found.input_size) == ((14, 14), (56, 56))


@pytest.mark.parametrize("depth", range(1, 33))
def test_default_stages_are_blocks_of_the_model(depth):
    stages = replace(backbone_of(make_vit(depth=1)), depth=depth).stages()
    assert all(0 <= block < depth for block in stages)
    assert stages == tuple(sorted(set(stages)))
    assert stages == (3, 6, 9) or depth != 12


@torch.no_grad()
@pytest.mark.parametrize("part", ["blocks.2.attn.qkv", "patch_embed.proj"])
def test_a_weight_that_a_hook_makes_is_the_one_that_is_used(part):
    """``torch.nn.utils.prune`` writes ``weight`` before each call of the layer. Refusing such a model would do too."""
    vit = make_vit()
    layer = vit.get_submodule(part)
    prune.random_unstructured(layer, "weight", amount=0.5)
    layer.weight_orig.mul_(3)
    images = make_images(vit)
    try:
        found = AdaptiveViT(vit)(images).logits
    except UserError:
        return
    assert relative(found, vit(images)) <= 1e-5


# --- pooling of reduced tokens --------------------------------------------------------------------------------------


def merged_tokens(model: AdaptiveViT, images: torch.Tensor):
    """All tokens after the last block of an unreduced run, with four merged into two afterwards: sizes 3, 2 and 1."""
    tokens, _ = model.forward_tokens(images)
    keep = torch.tensor([0, 2, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15]).expand(len(images), -1)
    src = torch.tensor([1, 3, 7]).expand(len(images), -1)
    dst = torch.tensor([0, 0, 3]).expand(len(images), -1)
    return reduce(tokens, Reduction(keep, Merge(src, dst)))


@torch.no_grad()
@pytest.mark.parametrize("family", POOLING)
def test_a_merged_token_counts_as_often_as_it_has_patches(family):
    vit = make_vit(family)
    model = AdaptiveViT(vit)
    tokens = merged_tokens(model, make_images(vit))
    repeats = tokens.size[0].long()
    assert repeats.tolist() == [3, 1, 1, 2] + [1] * 9
    copies = tokens.patches.repeat_interleave(repeats, dim=1)
    replicated = torch.cat([tokens.x[:, : tokens.num_prefix], copies], dim=1)
    expected = vit.forward_head(vit.norm(replicated))
    assert relative(model.forward_head(tokens), expected) <= 1e-5
    assert relative(model.forward_head(replace(tokens, size=None)), expected) > 1e-3, "sizes make no difference here"


@torch.no_grad()
@pytest.mark.parametrize("family", POOLING)
@pytest.mark.parametrize("merged", [False, True])
def test_padding_is_not_pooled(family, merged):
    vit = make_vit(family)
    model = AdaptiveViT(vit)
    images = make_images(vit)
    tokens = merged_tokens(model, images) if merged else model.forward_tokens(images)[0]
    valid = torch.ones(2, tokens.num_patches, dtype=torch.bool)
    valid[0, -4:] = False
    valid[1, [0, 3]] = False
    padded = model.forward_head(replace(tokens, valid=valid))
    for b in range(2):
        rows = torch.cat([tokens.x[b, : tokens.num_prefix], tokens.patches[b, valid[b]]])
        size = None if tokens.size is None else tokens.size[b : b + 1, valid[b]]
        alone = replace(tokens, x=rows.unsqueeze(0), owner=tokens.owner[b : b + 1], size=size)
        assert relative(padded[b : b + 1], model.forward_head(alone)) <= 1e-5


# --- refusals -------------------------------------------------------------------------------------------------------

TINY = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 2}
REFUSED = {
    "shared keys": ("vit_small_patch16_rope_224", {**TINY, "num_kv_heads": 1, "qkv_fused": False}, "num_kv_heads"),
    "rotations of three axes": (
        "vit_small_patch16_rope_224",
        {**TINY, "embed_dim": 192, "rope_type": "mrope", "rope_grid_indexing": "ij"},
        "RotaryEmbeddingMRope",
    ),
    "beit": ("beit_base_patch16_224", TINY, "Beit"),
    "cait": ("cait_xxs24_224", TINY, "Cait"),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)},
        "SwinTransformer",
    ),
    "relative positions": ("vit_relpos_small_patch16_224", TINY, "VisionTransformerRelPos"),
    "naflex": ("naflexvit_base_patch16_gap", {"depth": 1, "embed_dim": 48, "num_heads": 3}, "NaFlexVit"),
    "sam": ("samvit_base_patch16", {**TINY, "img_size": 64}, "VisionTransformerSAM"),
    "convnet": ("resnet10t", {}, "ResNet"),
    "post-norm blocks": ("vit_base_patch16_rpn_224", TINY, "ResPostBlock"),
    "parallel blocks": ("vit_small_patch16_18x2_224", TINY, "ParallelThingsBlock"),
    "scaled parallel blocks": (
        "vit_tiny_patch16_224",
        {**TINY, "block_fn": ParallelScalingBlock},
        "ParallelScalingBlock",
    ),
    "differential attention": ("vit_tiny_patch16_224", {**TINY, "attn_layer": "diff"}, "DiffAttention"),
    "hybrid": ("vit_tiny_r_s16_p8_224", TINY, "HybridEmbed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_models_are_refused_by_name(case):
    name, kwargs, culprit = REFUSED[case]
    with pytest.raises(UserError, match=culprit):
        AdaptiveViT(timm.create_model(name, **kwargs))


@pytest.mark.parametrize("pool", ["max", "avgmax", "prr", ""])
def test_other_poolings_are_refused(pool):
    with pytest.raises(UserError, match=f"global_pool='{pool}'"):
        AdaptiveViT(make_vit(global_pool=pool))


def test_patch_dropout_is_refused():
    with pytest.raises(UserError, match="patch_drop_rate"):
        AdaptiveViT(make_vit(patch_drop_rate=0.5))


def test_a_model_without_image_size_is_refused():
    with pytest.raises(UserError, match="img_size"):
        AdaptiveViT(VisionTransformer(**{**TINY, "img_size": None}, pos_embed="", no_embed_class=True))


def test_a_subclass_is_refused_since_its_forward_may_differ():
    class Other(VisionTransformer):
        pass

    with pytest.raises(UserError, match="Other"):
        AdaptiveViT(Other(**TINY))


@pytest.mark.parametrize("family", ["siglip", "siglip-average", "registers-average", "registers-map"])
@pytest.mark.parametrize("method", ["evit(0.5{})", "imagepiece(keep=0.5{})"])
def test_class_attention_needs_a_class_token(family, method):
    vit = make_vit(family)
    with pytest.raises(UserError, match=r"no class token.*score='received'"):
        AdaptiveViT(vit, method.format(""))
    out = AdaptiveViT(vit, method.format(", score='received'"))(make_images(vit))
    assert out.logits.isfinite().all() and out.tokens.num_patches < 16


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)],
    ids=["no batch", "one channel", "bytes"],
)
def test_wrong_images_are_refused_with_their_shape(images):
    with pytest.raises(UserError, match=r"expected float \[B, 3, h, w\]"):
        AdaptiveViT(make_vit())(images)
