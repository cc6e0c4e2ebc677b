"""timm's ``Eva``, exact and under every method: EVA, EVA-02, DINOv3, Perception Encoder, ViTs with rotary positions."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import product

import pytest
import timm
import torch
from torch import Tensor, nn

import saccade
from oracles import counted_macs, make_images, randomise, relative
from saccade.core.lazy import changed
from saccade.core.merging import Merge
from saccade.core.packing import padded
from saccade.core.reduction import Fuse, Reduction, SoftReduction, reduce
from saccade.core.registry import registry
from saccade.core.rotation import FORMS, ROPE, Rotations
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.model import AdaptiveViT

MODELS = {
    "vit_small_patch16_dinov3": {},
    "vit_7b_patch16_dinov3": {},  # SwiGLU
    "eva_giant_patch14_clip_224": {"img_size": 56},  # no rotations
    "eva02_tiny_patch14_224": {"img_size": 56},  # a table and rotations; norms inside
    "eva02_base_patch16_clip_224": {},
    "vit_pe_core_tiny_patch16_384": {},  # pools by attention
    "vit_pe_spatial_tiny_patch16_512": {},
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_mixed_224": {},  # rotations of each block and head, learned
    "vit_small_patch16_rope_mixed_ape_224": {},
}
TWO = ("vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224")


def make(name: str, **kwargs) -> nn.Module:
    small = {"img_size": 64, "embed_dim": 96, "num_heads": 3, "depth": 3, "num_classes": 10}
    return randomise(timm.create_model(name, **{**small, **MODELS[name], **kwargs})).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_dense_is_timm_s(name):
    vit = make(name)
    model, images = AdaptiveViT(vit), make_images(vit)
    expected = vit(images)
    assert torch.equal(model(images, whole=True).logits, expected)
    assert relative(model(images).logits, expected) <= 1e-6  # the last block for the class token alone
    for setting in ("tome(r=0) | tome(r=0)", "adavit(1.0, threshold=0.0)"):  # block by block, and in parts
        assert relative(model.at(setting).eval()(images).logits, expected) <= 1e-5, setting
    _, maps = model.forward_intermediates(images)
    _, theirs = vit.forward_intermediates(images)
    assert all(relative(a, b) <= 1e-6 for a, b in zip(maps, theirs, strict=True))


LARGE = (256, 512, (256, 512))  # pixels; of patches of 14 the nearest below


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("size", LARGE, ids=str)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "eva_giant_patch14_clip_224"])
def test_dense_is_timm_s_at_any_size(name, size):
    """Made by timm for that size, and made for another and asked for that size."""
    patch = 14 if "patch14" in name else 16
    sides = tuple(side // patch * patch for side in ((size, size) if isinstance(size, int) else size))
    vit = make(name, img_size=sides)
    model, images = AdaptiveViT(vit), make_images(vit)
    assert images.shape[-2:] == sides
    expected = vit(images)
    assert torch.equal(model(images, whole=True).logits, expected)
    for setting in ("dense", "tome(r=0) | tome(r=0)", "adavit(1.0, threshold=0.0)"):
        assert relative(model.at(setting).eval()(images).logits, expected) <= 1e-5, setting


@torch.no_grad()
@pytest.mark.parametrize("post", [False, True])
def test_other_forms_of_a_block(post):
    """Norms after the branches; separate projections, biases and gates."""
    for kwargs in ({"use_post_norm": post}, {"use_post_norm": post, "qkv_fused": False, "scale_attn_inner": True}):
        torch.manual_seed(0)
        shape = {"img_size": 64, "embed_dim": 96, "num_heads": 3, "depth": 3, "num_classes": 10}
        vit = randomise(
            timm.models.eva.Eva(**shape, use_rot_pos_emb=True, class_token=True, global_pool="token", **kwargs)
        )
        vit.pretrained_cfg = {}
        model, images = AdaptiveViT(vit.eval()), make_images(vit)
        for setting in ("dense", "tome(r=0) | tome(r=0)", "adavit(1.0, threshold=0.0)"):
            assert relative(model.at(setting).eval()(images).logits, vit(images)) <= 1e-5, (kwargs, setting)


SETTINGS = ("tome(r=2)", "evit(0.5)", "imagepiece()", "quadtree(7)", "dynamicvit(0.7)", "adavit(0.5)", "ats()",
            "avit()", "tofu()", "mctf(r=2)", "tokenlearner(4)", "random(0.5)", "diffrate()", "ltmp()", "dpc_knn(0.4)",
            "token_pooling()", "ats() | pitome(0.9)", "avit() | tome(r=1)",
            "patchmerger(4)", "depth(2)", "pitome()", "algm()",
            "grid(16, size=96) | tome(r=2)")  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("name", "setting"), product(TWO, SETTINGS))
def test_a_batch_is_its_images_and_masked_is_skipped(name, setting):
    vit = make(name)
    model, images = AdaptiveViT(vit, setting).eval(), make_images(vit)
    found = model(images)
    alone = torch.cat([model(image[None]).logits for image in images])
    assert relative(found.logits, alone) <= 1e-5
    masked = model.forward_head(model.forward_tokens(images, sparse=False)[0])
    assert relative(found.logits, masked) <= 1e-4
    tokens, trace = model.forward_tokens(images)
    assert bool((tokens.area().sum(1) + (tokens.owner < 0).sum(1) == tokens.owner.shape[1]).all())
    assert bool((trace.macs() > 0).all())


FOUR = (*TWO, "eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384")
RECEIVED = "score='received'"  # where there is no class token
SIX = (
    "tome(r=2)",
    f"evit(0.5, {RECEIVED})",
    f"imagepiece({RECEIVED})",
    "quadtree(7)",
    "dynamicvit(0.7)",
    "adavit(0.5)",
)


@pytest.mark.parametrize(("name", "setting"), product(FOUR, SIX))
def test_the_contract_of_a_method_holds(name, setting, tmp_path):
    """MACs are the operators', the dense map has every cell, gradients reach all, folders and threads agree."""
    vit = make(name).requires_grad_(False)
    model, images = AdaptiveViT(vit, setting).eval(), make_images(vit, 3)

    def logits_of(i: int) -> Tensor:
        with torch.no_grad():  # of each thread
            return model(images[i % 3 :][:1]).logits

    with torch.no_grad():
        expected = model(images)
        short = counted_macs(lambda: model(images))
        assert float(expected.trace.macs().sum()) == pytest.approx(short, rel=1e-3)
        features, (tokens, _) = model.feature_map(images), model.forward_tokens(images)
        flat, owned = features.flatten(2).transpose(1, 2), tokens.owner >= 0
        assert features.shape == (3, 96, *tokens.grid) and (flat[~owned].norm(dim=-1) > 0).all()
        assert relative(flat[owned], vit.norm(tokens.scatter_to_grid(tokens.patches))[owned]) <= 1e-6
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(logits_of, range(16)))
        assert all(torch.equal(logits, logits_of(i)) for i, logits in enumerate(found))
        vit.pretrained_cfg = {"architecture": name}
        model.save(tmp_path / "model")
        again = saccade.load(tmp_path / "model")
        assert relative(again(images).logits, expected.logits) <= 1e-6
        assert relative(copy.deepcopy(model)(images).logits, expected.logits) <= 1e-6
    vit.requires_grad_()
    model.train()
    out = model(images)
    loss = (out.logits * torch.linspace(-1, 1, 10)).sum()
    for method in model.plan.methods:
        loss = loss + sum(method.loss(out.trace).values())
    loss.backward()
    for weight in [w for n, w in model.named_parameters() if not n.startswith("vit.attn_pool")]:
        assert weight.grad is not None and weight.grad.isfinite().all()
    for n in ("patch_embed.proj.weight", "blocks.0.attn.proj.weight"):
        assert vit.get_parameter(n).grad.abs().sum() > 0, n


def pruned_oracle(vit: nn.Module, images: Tensor, kept: dict[int, Tensor]) -> Tensor:
    """timm's own layers, patches that are not kept [B, N'] leaving between attention and MLP of some blocks, with the
    rotations of those that are there."""
    x, turns = vit._pos_embed(vit.patch_embed(images))
    x, prefix = vit.norm_pre(x), vit.num_prefix_tokens
    turns = turns.expand(len(vit.blocks), *turns.shape) if turns.ndim == 2 else turns
    turns = turns[:, None] if turns.ndim == 3 else turns  # [L, H or 1, G, 2d]
    left = torch.arange(x.shape[1] - prefix).expand(len(x), -1)
    for i, block in enumerate(vit.blocks):
        each = torch.stack([turns[i][:, cells] for cells in left])
        y = block.attn(block.norm1(x), rope=each)
        x = x + (y if block.gamma_1 is None else block.gamma_1 * y)
        if i in kept:
            rows = [torch.isin(cells, some).nonzero()[:, 0] for cells, some in zip(left, kept[i], strict=True)]
            left = torch.stack([cells[row] for cells, row in zip(left, rows, strict=True)])
            patches = [one[prefix:][row] for one, row in zip(x, rows, strict=True)]
            x = torch.cat([x[:, :prefix], torch.stack(patches)], dim=1)
        y = block.mlp(block.norm2(x))
        x = x + (y if block.gamma_2 is None else block.gamma_2 * y)
    return vit.forward_head(vit.norm(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_224", *TWO[1:]])
def test_pruned_patches_leave_with_their_rotations(name):
    vit = make(name)
    model, images = AdaptiveViT(vit, "random(0.6, at=1) | random(0.6, at=2)").eval(), make_images(vit)
    logits, (tokens, trace) = model(images, whole=True).logits, model.forward_tokens(images)
    kept = {i: torch.stack([(o >= 0).nonzero()[:, 0] for o in trace.blocks[i].owner]) for i in (1, 2)}
    assert kept[2].shape[1] < kept[1].shape[1] < 16 and tokens.num_patches == kept[2].shape[1]
    assert relative(logits, pruned_oracle(vit, images, kept)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", TWO)
def test_a_merged_token_is_turned_by_the_middle_of_its_cells(name):
    """The mean of the cells' rotations, brought back to length 1; of two cells, the rotation half way."""
    vit = make(name)
    tokens = padded(AdaptiveViT(vit, "tome(r=3)").eval().forward_tokens(make_images(vit))[0])
    table = tokens.state[ROPE]
    for block in range(len(vit.blocks)):
        cells = table[0][None] if table.ndim == 3 else table[0, block]  # [H, G, 2d], of every image the same
        found = Rotations().of_patches(block, tokens)
        assert found.shape[:2] == tokens.owner.new_zeros(2, tokens.num_patches).shape
        for b, n in product(range(2), range(tokens.num_patches)):
            own = (tokens.owner[b] == n).nonzero()[:, 0]
            sin, cos = cells[:, own].mean(1).chunk(2, dim=-1)
            angle, told = torch.atan2(sin, cos), torch.hypot(sin, cos) > 1e-3  # opposite rotations have no middle
            for part, expected in zip(found[b, n].chunk(2, dim=-1), (angle.sin(), angle.cos()), strict=True):
                assert torch.allclose(part[told], expected[told], atol=1e-4)
            if len(own) == 1:
                assert torch.allclose(found[b, n], cells[:, own[0]], atol=1e-6)
    still = Rotations().of(0, tokens)[:, : tokens.num_prefix]
    assert still.chunk(2, dim=-1)[0].abs().max() == 0 and bool((still.chunk(2, dim=-1)[1] == 1).all())


def position_angles(vit: nn.Module, block: int, y: float, x: float) -> Tensor:
    """Angles [H, d/2] at a position in cells of the model's grid, by the published formulas."""
    rope, (rows, columns) = vit.rope, vit.patch_embed.grid_size
    if hasattr(rope, "freqs"):
        return (x * rope.freqs[0, block] + y * rope.freqs[1, block]).detach()
    if hasattr(rope, "periods"):
        places = torch.tensor([2 * (y + 0.5) / rows - 1, 2 * (x + 0.5) / columns - 1])
        return (2 * torch.pi * places[:, None] / rope.periods).reshape(1, -1)
    counted = [x, y] if rope.grid_indexing == "xy" else [y, x]  # of cells
    return (torch.tensor(counted)[:, None] * rope.bands).reshape(1, -1)


KINDS = ("vit_small_patch16_dinov3", "vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_224")
REDUCTIONS = ("tome(r=3)", "evit(0.5) | tome(r=1)", "ats() | pitome(0.9)", "tofu()", "tokenlearner(4, at=1)")


@torch.no_grad()
@pytest.mark.parametrize(("name", "setting"), product(KINDS, REDUCTIONS))
def test_a_recomputed_rotation_is_that_of_the_mean_position(name, setting):
    vit = make(name)
    model = AdaptiveViT(vit, f"grid(16, rotation='recomputed') | {setting}").eval()
    tokens = padded(model.forward_tokens(make_images(vit))[0])
    half, several = getattr(vit.rope, "rotate_half", False), 0
    for block in range(len(vit.blocks)):
        found = Rotations().of_patches(block, tokens)
        for b, n in product(range(2), range(tokens.num_patches)):
            own = (tokens.owner[b] == n).nonzero()[:, 0].tolist()
            if not own:
                continue
            y, x = (sum(axis) / len(own) for axis in zip(*(divmod(cell, 4) for cell in own), strict=True))
            angles = position_angles(vit, block, y, x)
            angles = torch.cat([angles, angles], -1) if half else angles.repeat_interleave(2, -1)
            assert torch.allclose(found[b, n], torch.cat([angles.sin(), angles.cos()], -1), atol=1e-4)
            several += len(own) > 1
    assert several


@torch.no_grad()
@pytest.mark.parametrize(("name", "setting"), product(KINDS, REDUCTIONS))
def test_a_kept_rotation_is_that_of_a_cell(name, setting):
    vit = make(name)
    model, images = AdaptiveViT(vit, f"grid(16, rotation='kept') | {setting}").eval(), make_images(vit)
    tokens = padded(model.forward_tokens(images)[0])
    there = torch.ones_like(tokens.anchor).bool() if tokens.valid is None else tokens.valid
    assert bool((tokens.owner.gather(1, tokens.anchor) == torch.arange(tokens.num_patches))[there].all())
    for block in range(len(vit.blocks)):
        found, table = Rotations().of_patches(block, tokens), tokens.state[ROPE]
        for b, n in product(range(2), range(tokens.num_patches)):
            cell = int(tokens.anchor[b, n])
            assert torch.equal(found[b, n], table[b, block, :, cell] if table.ndim == 5 else table[b, cell][None])


@torch.no_grad()
def test_the_token_that_stays_is_the_one_whose_rotation_is_kept():
    """By hand: of six cells 1 and 4 merge into 3 and 0, 2 and 5 fuse, the heavier first."""
    x, owner = torch.randn(1, 6, 8), torch.arange(6)[None]
    tokens = Tokens(x, owner, (2, 3), 0, anchor=owner)
    merge = Merge(torch.tensor([[1, 4]]), torch.tensor([[1, 0]]))
    fuse = Fuse(torch.tensor([[5, 2]]), torch.tensor([[0.7, 0.3]]))
    assert reduce(tokens, Reduction(torch.tensor([[0, 3]]), merge, fuse)).anchor.tolist() == [[0, 3, 5]]
    mixed = reduce(tokens, SoftReduction(torch.tensor([[[0.1, 0.6, 0.1, 0.1, 0.1, 0], [0, 0, 0, 0, 0, 1.0]]])))
    assert mixed.anchor.tolist() == [[1, 5]]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [KINDS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS[1:])])
def test_forms_of_a_merged_rotation(name, form, tmp_path):
    """Without merges all are as dense; a batch is its images, masked is skipped, folders keep the form."""
    vit = make(name)
    model, images = AdaptiveViT(vit, f"grid(16, rotation={form!r})").eval(), make_images(vit)
    assert relative(model(images).logits, AdaptiveViT(vit)(images).logits) <= 1e-5
    pruned = [model.at(f"grid(16, rotation={r!r}) | random(0.6, at=1)").eval()(images).logits for r in (form, FORMS[0])]
    assert relative(*pruned) <= 1e-5
    others = []
    for setting in (*REDUCTIONS, "dynamicvit(0.7) | tome(r=1)", "imagepiece()", "diffrate()", "ltmp()"):
        view = model.at(f"grid(16, rotation={form!r}) | {setting}").eval()
        found = view(images).logits
        alone = torch.cat([view(image[None]).logits for image in images])
        masked = view.forward_head(view.forward_tokens(images, sparse=False)[0])
        assert relative(found, alone) <= 1e-5 and relative(found, masked) <= 1e-4, setting
        others.append(relative(found, model.at(setting).eval()(images).logits) > 1e-5)
    assert any(others) == (form != FORMS[0])
    vit.pretrained_cfg = {"architecture": name}
    view.save(tmp_path / "m")
    again = saccade.load(tmp_path / "m")
    assert form in str(again.setting) and torch.equal(again(images).logits, found)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS[:2])
@pytest.mark.parametrize("setting", [*SETTINGS, "cut((12, 8), at=(1, 2))"])
def test_sums_that_travel_are_sums_over_all_cells(name, setting):
    """What is carried from reduction to reduction is what the owner map gives, after every block."""
    vit, seen = make(name), []
    model, images, own = AdaptiveViT(vit, setting).eval(), make_images(vit), Rotations.of_patches

    def compared(self, block, tokens):
        found = own(self, block, tokens)
        if isinstance(tokens.owner, Tensor):  # read here, which leaves the next block to its sums all the same
            expected = own(Rotations(), block, changed(tokens, owner=tokens.owner.clone()))
            there = tokens.area() > 0 if tokens.valid is None else tokens.valid & (tokens.area() > 0)
            seen.append((found - expected)[there].abs().amax().item() if there.any() else 0.0)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rotations, "of_patches", compared)
        model(images, whole=True)
        model.forward_tokens(images, sparse=False)
    assert seen and max(seen) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_224", *TWO[1:]])
@pytest.mark.parametrize("size", [96, (48, 80), *(pytest.param(s, marks=pytest.mark.slow) for s in LARGE)], ids=str)
def test_another_size_is_timm_s_model_of_that_size(name, size):
    vit, model = make(name), AdaptiveViT(make(name), f"grid(16, size={size})")
    other = make(name, img_size=size)
    other.load_state_dict(vit.state_dict(), strict=True)
    images = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))
    assert relative(model(images, whole=True).logits, other(images)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(name, tmp_path):
    model = saccade.create_model(name, "tome(r=2)", **{"img_size": 64, "embed_dim": 96, "num_heads": 3, "depth": 3,
                                                       "num_classes": 10, **MODELS[name]})  # fmt: skip
    images = make_images(model.vit)
    model.save(tmp_path / "model")
    assert torch.equal(saccade.load(tmp_path / "model")(images).logits, model(images).logits)


def test_what_a_name_does_not_say_is_refused_before_anything_is_written(tmp_path):
    model = saccade.create_model("vit_small_patch16_rope_224", depth=2, rope_temperature=50.0)
    with pytest.raises(UserError, match="differs from what timm's"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@torch.no_grad()
def test_hooks_fire_as_often_as_in_timm():
    vit = make("vit_small_patch16_dinov3")
    heard: list[str] = []
    for name, module in vit.named_modules():
        module.register_forward_hook(lambda *_, name=name: heard.append(name))
    images = make_images(vit)
    vit(images)
    expected = sorted(heard)
    heard.clear()
    AdaptiveViT(vit)(images)
    assert sorted(heard) == expected
    heard.clear()
    AdaptiveViT(vit, "tome(r=2)")(images)
    assert {"blocks.0", "blocks.1.attn", "blocks.2.mlp.fc1"} <= {*heard}


def test_learned_rotations_learn_under_a_setting():
    vit = make("vit_small_patch16_rope_mixed_224").train()
    AdaptiveViT(vit, "tome(r=2)").train()(make_images(vit)).logits.square().sum().backward()
    assert vit.rope.freqs.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "setting", "match"),
    [
        ("vit_small_patch16_rope_224", "grid(8)", "count patches of 16x16 pixels"),
        ("vit_small_patch16_rope_224", "quadtree(28, sizes=(8, 16))", "count patches of 16x16 pixels"),
        ("vit_small_patch16_rope_224", "grid(16, stride=8)", "count patches of 16x16 pixels"),
        ("vit_small_patch16_dinov3", "grid(rotation='mean')", "rotation='mean': give centroid, kept, recomputed"),
        ("eva_giant_patch14_clip_224", "grid(rotation='kept')", "this model's positions are not rotations"),
        ("vit_small_patch16_dinov3", "topk(0.5)", "topk reads the weights of timm's Attention"),
        ("vit_small_patch16_dinov3", "quadtree(7, scorer='attention')", "rotary positions"),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, setting, match):
    with pytest.raises(UserError, match=match):
        AdaptiveViT(make(name), setting)


def test_every_method_works_or_is_refused():
    vit = make("vit_small_patch16_dinov3")
    refused = set()
    for name, entry in registry().items():
        if entry.kind == "tokenizer" or entry.origin:
            continue
        try:
            AdaptiveViT(vit, f"{name}()").eval()
        except UserError as error:
            refused.add(name) if "Attention" in str(error) else None
    assert refused == {"topk"}


@pytest.mark.parametrize("name", [*TWO, "vit_small_patch16_rope_224", "eva_giant_patch14_clip_224"])
def test_whatever_tune_tries_can_be_built(name):
    model = AdaptiveViT(make(name))
    tried = [setting for entry in registry().values() for setting in entry.menu(model.backbone)]
    assert len(tried) > 20
    for setting in tried:
        model.at(setting)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "onnx", "openvino", "aoti"])
@pytest.mark.parametrize("setting", ["tome(r=2)", "evit(0.5)", "adavit(0.7)"])
def test_in_engines(engine, setting):
    for package in import_module(f"saccade.runners.engines.{engine}").PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed")
    for name in TWO:
        model = AdaptiveViT(make(name), setting).eval()
        session = model.runner(engine)
        for count in (1, 3):
            images = make_images(model.vit, count, seed=count)
            assert relative(session(images), model(images).logits) <= 1e-5
