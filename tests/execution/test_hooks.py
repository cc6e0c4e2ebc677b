"""Hooks, pruned and wrapped layers, replaced forwards: what users do to a timm ViT counts here as it does in timm."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from timm.layers import Attention
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from oracles import make_images, make_vit, relative
from saccade.core.hooks import around
from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.model import AdaptiveViT

SHAPE = {"depth": 3, "embed_dim": 48, "num_heads": 4, "img_size": 64}
# A setting of each method in which it has something to do in this model, where its defaults have not.
WORKING = {"quadtree": "quadtree(7)", "depth": "depth(2)", "grid": "grid(8)", "kth": "kth(2)", "algm": "algm(0.5, 0.5)"}
SETTINGS = ["dense", *(WORKING.get(name, name) for name in registry())]
FAMILIES = ("vit", "distilled", "registers-map", "siglip", "class-average", "qk-norm")


def parts(vit: nn.Module) -> dict[str, nn.Module]:
    return dict(vit.named_modules())


def count_calls(vit: nn.Module, run) -> dict[str, int]:
    seen = dict.fromkeys(parts(vit), 0)

    def note(name):
        def hook(module, args, out):
            seen[name] += 1

        return hook

    handles = [part.register_forward_hook(note(name)) for name, part in parts(vit).items()]
    run()
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_fire_as_often_as_in_timm(family):
    """On every module, the ViT and its containers too."""
    vit = make_vit(family, **SHAPE)
    images = make_images(vit)
    expected = count_calls(vit, lambda: vit(images))
    assert count_calls(vit, lambda: AdaptiveViT(vit)(images)) == expected
    assert expected["blocks.2.attn.qkv"] == expected["patch_embed"] == expected["blocks"] == expected[""] == 1


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS)
def test_hooks_fire_under_every_method(setting):
    vit = make_vit(**SHAPE)
    images = make_images(vit)
    model = AdaptiveViT(vit, setting).eval()
    seen = count_calls(vit, lambda: model(images))
    fires = {name for name, times in count_calls(vit, lambda: vit(images)).items() if times}
    if setting == "stem":  # it stands in the place of these
        fires -= {"patch_embed", "patch_embed.proj"}
    ran = model(images).trace.blocks
    rests = {i for i, block in enumerate(ran) if block.attn is not None and not bool(block.attn.any())}
    gone = tuple(f"blocks.{i}" for i in range(len(ran), 3)) + tuple(f"blocks.{i}.attn" for i in rests)
    gone += tuple(f"blocks.{i}.{part}" for i in rests for part in ("norm1", "ls1", "drop_path1"))
    gone += tuple(
        f"blocks.{i}.{part}"
        for i, block in enumerate(ran)
        if block.mlp_on is not None and not bool(block.mlp_on.any())
        for part in ("mlp", "norm2", "ls2", "drop_path2")
    )
    missing = {name for name in fires if not seen[name] and not name.startswith(gone or "-")}
    assert not missing


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_that_changes_features_changes_the_answer_as_in_timm(family):
    vit = make_vit(family, **SHAPE)
    images, plain = make_images(vit), vit(make_images(vit))
    fires = [name for name, times in count_calls(vit, lambda: vit(images)).items() if times]
    for name in fires:
        for register in ("register_forward_hook", "register_forward_pre_hook"):

            def halve(module, args, out=None):
                return args[0] * 0.5 + 0.1 if out is None else out * 0.5 + 0.1

            handle = getattr(parts(vit)[name], register)(halve)
            expected, found = vit(images), AdaptiveViT(vit)(images).logits
            handle.remove()
            assert relative(found, expected) <= 1e-5, name
    assert relative(AdaptiveViT(vit)(images).logits, plain) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("setting", ["tome(r=2)", "evit(0.7)", "dynamicvit(0.5)", "adavit(0.5)", "topk(0.5)", "ats()"])
def test_a_hook_that_changes_features_changes_the_answer_of_a_method(setting):
    vit = make_vit(**SHAPE)
    images, model = make_images(vit), AdaptiveViT(vit, setting).eval()
    before = model(images).logits
    for name in ("", "patch_embed", "patch_embed.proj", "blocks", "blocks.1", "blocks.1.attn", "blocks.2.attn.qkv"):
        handle = parts(vit)[name].register_forward_hook(lambda module, args, out: out * 0.5)
        assert not torch.equal(model(images).logits, before), name
        handle.remove()
    assert torch.equal(model(images).logits, before)


@torch.no_grad()
def test_a_hook_on_a_block_sees_a_rectangle_of_tokens():
    """Also where images keep different numbers of tokens and the block would run packed."""
    vit = make_vit(**SHAPE)
    images, model = make_images(vit, 3), AdaptiveViT(vit, "ats(0.4) | adavit(0.5)").eval()
    expected, shapes = model(images).logits, []
    for name in ("blocks.1", "blocks.2", "blocks.2.attn"):
        parts(vit)[name].register_forward_hook(lambda module, args, out: shapes.append((args[0].shape, out.shape)))
    assert relative(model(images).logits, expected) <= 1e-5
    assert len(shapes) == 3 and all(len(s) == 3 and s[0] <= 3 and s[2] == 48 for pair in shapes for s in pair)


@torch.no_grad()
@torch.no_grad()
@pytest.mark.parametrize("path", ["ls1", "drop_path2", "attn.q_norm", "attn.norm", "attn.proj_drop"])
def test_a_layer_that_does_nothing_is_heard_where_it_has_a_hook(path):
    """Identities and idle dropout are not called otherwise; a hook is, and what it gives counts."""
    vit = make_vit("vit")
    model, images = AdaptiveViT(vit, "tome(r=2)").eval(), make_images(vit, 2)
    plain, layer, heard = model(images).logits, vit.blocks[0].get_submodule(path), []

    def doubled(module, given, result):
        heard.append(path)
        return 2 * result

    handle = layer.register_forward_hook(doubled)
    changed = model(images).logits
    handle.remove()
    assert heard == [path] and not torch.equal(changed, plain)
    assert torch.equal(model(images).logits, plain)


def test_dropout_is_called_in_training():
    vit = make_vit("vit", proj_drop_rate=0.5).train()
    model, images = AdaptiveViT(vit, "tome(r=2)").train(), make_images(vit, 2)
    assert not torch.equal(model(images).logits, model(images).logits)


def test_a_hook_that_gives_another_shape_is_refused():
    vit = make_vit(**SHAPE)
    vit.blocks[1].register_forward_hook(lambda module, args, out: out[:, :3])
    with pytest.raises(UserError, match="gave features of shape"):
        AdaptiveViT(vit, "tome(r=2)")(make_images(vit))


def test_gradients_pass_backward_hooks():
    vit = make_vit(**SHAPE)
    seen: list[str] = []
    for name in ("blocks.1", "blocks.1.attn", "patch_embed.proj", "blocks"):
        part = parts(vit)[name]
        part.register_full_backward_hook(lambda module, given, got, name=name: seen.append(name))
        part.register_full_backward_pre_hook(lambda module, got, name=name: seen.append(f"before {name}"))
    AdaptiveViT(vit, "tome(r=2)")(make_images(vit)).logits.sum().backward()
    assert {n for n in seen if "before" not in n} == {"blocks.1", "blocks.1.attn", "patch_embed.proj", "blocks"}
    assert len(seen) == 8


def test_around_does_what_calling_the_module_does():
    """Every kind of hook, own and global, in torch's order."""

    class Double(nn.Module):
        def forward(self, x, scale=1.0):
            return 2 * x * scale

    def run(call) -> list:
        seen: list = []
        module = Double()
        module.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        module.register_forward_pre_hook(lambda m, args, kwargs: (args, {"scale": 3.0}), with_kwargs=True)
        module.register_forward_pre_hook(lambda m, args: seen.append(("pre", type(m), args[0].tolist())))
        module.register_forward_hook(lambda m, args, kwargs, out: out + kwargs["scale"], with_kwargs=True)
        module.register_forward_hook(lambda m, args, out: seen.append(("out", out.tolist())))
        module.register_full_backward_hook(lambda m, given, got: (given[0] * 7,))
        everywhere = register_module_forward_hook(lambda m, args, out: seen.append(("all", type(m))))
        x = torch.ones(2, requires_grad=True)
        result = call(module, x)
        everywhere.remove()
        result.sum().backward()
        return [*seen, result.tolist(), x.grad.tolist()]

    assert run(lambda module, x: around(module, module.forward, x)) == run(lambda module, x: module(x))


@torch.no_grad()
def test_threads_share_a_hooked_model():
    vit = make_vit(**SHAPE)
    model, images = AdaptiveViT(vit, "tome(r=2)"), [make_images(vit, seed=i) for i in range(8)]
    vit.blocks[1].attn.register_forward_hook(lambda module, args, out: out * 0.5)
    expected, found = [model(x).logits for x in images], [None] * 8

    def work(i):
        found[i] = model(images[i]).logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(relative(a, b) <= 1e-6 for a, b in zip(found, expected, strict=True))


# --- layers that are not plain ----------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A low-rank adapter around a layer, as adapter libraries put it there."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.1)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Scaled(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def subclassed(layer: nn.Linear) -> nn.Linear:
    new = Scaled(layer.in_features, layer.out_features)
    new.load_state_dict(layer.state_dict())
    return new


def own_forward(layer: nn.Linear) -> nn.Linear:
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 0.5
    return layer


WAYS = {
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "structurally pruned": lambda layer: prune.ln_structured(layer, "weight", 0.3, n=2, dim=0),
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "parametrized": lambda layer: parametrizations.weight_norm(layer),
    "parametrized by its own": lambda layer: (parametrize.register_parametrization(layer, "weight", Doubled()), layer)[
        1
    ],
    "adapter": Adapter,
    "subclass": subclassed,
    "own forward": own_forward,
    "int8": lambda layer: torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})[0],
}


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1"])
def test_a_layer_that_is_more_than_its_weights_is_called(way, path):
    """dense gives timm's own answer; methods give that of a model with the same function spelled out."""
    torch.manual_seed(0)
    vit = make_vit(**SHAPE)
    images, before = make_images(vit), vit(make_images(vit))
    for block in vit.blocks:
        owner, name = (block.attn if path.startswith("attn") else block.mlp), path.split(".")[1]
        setattr(owner, name, WAYS[way](getattr(owner, name)))
    vit.eval()
    expected = vit(images)
    if way != "weight norm" and way != "parametrized":  # which start where the layer was
        assert relative(before, expected) > 1e-4
    assert relative(AdaptiveViT(vit)(images).logits, expected) <= 1e-5
    for setting in ("tome(r=0) | tome(r=0)", "topk(1.0)", "evit(0.999, at=1)", "adavit(1.0, threshold=0.0)"):
        assert relative(AdaptiveViT(vit, setting).eval()(images).logits, expected) <= 1e-4, setting
    for setting in ("tome(r=2)", "topk(0.5)", "adavit(0.5)", "evit(0.5)", "ats()"):
        assert AdaptiveViT(vit, setting).eval()(images).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["pruned", "weight norm", "spectral norm", "parametrized"])
def test_a_layer_that_computes_its_weight_trains(way):
    """Two steps, and every block runs on the new weights (the last one too)."""
    vit = make_vit(**SHAPE)
    for block in vit.blocks:
        WAYS[way](block.attn.qkv)
    WAYS["pruned"](vit.patch_embed.proj)
    model, images = AdaptiveViT(vit.eval()), make_images(vit)
    step = torch.optim.SGD(vit.parameters(), lr=0.1)
    for _ in range(2):
        step.zero_grad()
        model(images).logits.square().sum().backward()
        step.step()
    with torch.no_grad():
        assert relative(model(images).logits, vit(images)) <= 1e-5
        assert (
            relative(model.at("grid(8)")(images).logits, AdaptiveViT(copy.deepcopy(vit), "grid(8)")(images).logits) == 0
        )


@torch.no_grad()
def test_a_pruned_patch_embedding_is_resized_as_pruned():
    vit = make_vit(**SHAPE)
    other = copy.deepcopy(vit)
    prune.random_unstructured(vit.patch_embed.proj, "weight", 0.5)
    other.patch_embed.proj.weight.copy_(vit.patch_embed.proj.weight)
    images = make_images(vit)
    vit.patch_embed.proj.weight_mask.zero_()  # the next call prunes everything
    other.patch_embed.proj.weight.zero_()
    for setting in ("dense", "grid(8)", "quadtree(7)", "quadtree(7, sizes=(8, 16, 32))"):
        assert relative(AdaptiveViT(vit, setting)(images).logits, AdaptiveViT(other, setting)(images).logits) <= 1e-6


@torch.no_grad()
def test_a_wrapped_patch_embedding_is_called_and_cannot_be_resized():
    vit = make_vit(**SHAPE)
    images, inner = make_images(vit), vit.patch_embed.proj

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = inner

        def forward(self, x):
            return 0.5 * self.conv(x)

    vit.patch_embed.proj = Wrapped()
    assert relative(AdaptiveViT(vit)(images).logits, vit(images)) <= 1e-5
    assert AdaptiveViT(vit, "tome(r=2)")(images).trace.macs().min() > 0
    for setting in ("grid(8)", "quadtree(7)"):
        with pytest.raises(UserError, match="no kernel to resize"):
            AdaptiveViT(vit, setting)(images)


# --- forwards that were replaced --------------------------------------------------------------------------------------


def save_attention(attn: Attention) -> list[torch.Tensor]:
    """What recipes for attention maps do: a forward of the user's own in the place of timm's."""
    kept: list[torch.Tensor] = []

    def forward(x, attn_mask=None, is_causal=False):
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * attn.scale
        kept.append((scores if attn_mask is None else scores + attn_mask).softmax(-1))
        return attn.proj((kept[-1] @ v).transpose(1, 2).flatten(2))

    attn.forward = forward
    return kept


@torch.no_grad()
def test_an_attention_with_a_forward_of_its_own_is_called():
    vit = make_vit(**SHAPE)
    images = make_images(vit)
    expected = {s: AdaptiveViT(vit, s)(images).logits for s in ("dense", "tome(r=2, metric='x')", "random(0.5, at=0)")}
    kept = [save_attention(block.attn) for block in vit.blocks]
    for i, (setting, logits) in enumerate(expected.items(), start=1):
        assert relative(AdaptiveViT(vit, setting)(images).logits, logits) <= 1e-5
        assert all(len(maps) == i for maps in kept), "in every block"
    for setting in ("tome(r=2)", "evit(0.5, at=0)"):
        with pytest.raises(UserError, match="has a forward of its own"):
            AdaptiveViT(vit, setting)(images)


@torch.no_grad()
def test_a_block_with_a_forward_of_its_own_is_called():
    vit = make_vit(**SHAPE)
    images, inner = make_images(vit), vit.blocks[1].forward
    vit.blocks[1].forward = lambda x, **kwargs: inner(x, **kwargs) * 0.5
    assert relative(AdaptiveViT(vit)(images).logits, vit(images)) <= 1e-5
    dropping = AdaptiveViT(vit, "dynamicvit(0.5, at=1)").eval()  # before the block, not inside of it
    assert dropping(images).trace.tokens()[1] < 17
    with pytest.raises(UserError, match=r"blocks\[1\] has a forward of its own"):
        AdaptiveViT(vit, "evit(0.5, at=1)")(images)


@torch.no_grad()
def test_what_is_replaced_after_the_model_was_made_counts_too():
    vit = make_vit(**SHAPE)
    images, model = make_images(vit), AdaptiveViT(vit)

    class Own(type(vit.blocks[0])):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs) * 0.5

    vit.blocks[1].__class__ = Own
    assert relative(model(images).logits, vit(images)) <= 1e-5
    with pytest.raises(UserError, match=r"blocks\[1\] is a Own"):
        model.at("evit(0.5, at=1)")(images)


@torch.no_grad()
def test_attention_maps_by_a_hook_on_dropout():
    """The usual recipe: unfused attention, and a hook on ``attn_drop``."""
    vit = make_vit(**SHAPE)
    images, maps = make_images(vit), []
    for block in vit.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: maps.append(out))
    AdaptiveViT(vit)(images)
    assert [m.shape for m in maps] == [(2, 4, 17, 17)] * 3
    maps.clear()
    AdaptiveViT(vit, "ats(0.5) | tome(r=2)")(images)
    assert len(maps) == 3 and all((m.sum(-1) - 1).abs().max() < 1e-5 for m in maps)


def test_no_warning_for_a_plain_model():
    vit = make_vit(**SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaptiveViT(vit, "tome(r=2)")(make_images(vit)).logits.sum().backward()


# --- what is replaced on the whole model ------------------------------------------------------------------------------


def halved(vit: nn.Module, name: str) -> None:
    """A method of the user's own in the place of timm's, as recipes and adapters put it there."""
    inner = getattr(vit, name)
    setattr(vit, name, lambda *args, **kwargs: inner(*args, **kwargs) * 0.5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["forward", "forward_features", "_pos_embed"])
def test_a_forward_of_the_whole_model_is_run_where_nothing_else_is_asked(name):
    vit = make_vit(**SHAPE)
    images, before = make_images(vit), vit(make_images(vit))
    halved(vit, name)
    found = AdaptiveViT(vit)(images)
    assert torch.equal(found.logits, vit(images)) and relative(found.logits, before) > 1e-3
    for ask in (
        lambda: found.trace,
        lambda: AdaptiveViT(vit, "tome(r=2)")(images),
        lambda: AdaptiveViT(vit, "grid(8)")(images),
        lambda: AdaptiveViT(vit).forward_tokens(images),
        lambda: AdaptiveViT(vit).feature_map(images),
        lambda: AdaptiveViT(vit).forward_features(images),
    ):
        with pytest.raises(UserError, match=rf"vit\.{name} was replaced.*del model\.vit\.{name}"):
            ask()
    delattr(vit, name)
    assert relative(AdaptiveViT(vit)(images).logits, before) <= 1e-6


@torch.no_grad()
def test_a_subclass_that_comes_later_is_heard():
    vit = make_vit(**SHAPE)
    images, model = make_images(vit), AdaptiveViT(vit)
    reduced = model.at("tome(r=2)")

    class Own(type(vit)):
        def forward_features(self, x, **kwargs):
            return super().forward_features(x) * 0.5

    vit.__class__ = Own
    assert torch.equal(model(images).logits, vit(images))
    with pytest.raises(UserError, match=r"vit\.forward_features was replaced"):
        reduced(images)
    with pytest.raises(UserError, match="Own is not supported"):
        model.at("tome(r=2)")


@torch.no_grad()
@pytest.mark.parametrize("name", ["forward_head", "pool"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_head_of_the_users_own_is_called_or_refused(name, pool):
    """One that reads all tokens too, though the class token is what timm's would read."""
    vit = make_vit(**SHAPE, global_pool=pool)
    images = make_images(vit)
    if name == "pool":
        vit.pool = lambda x, pool_type=None: x.mean(1)
    else:
        vit.forward_head = lambda x, pre_logits=False: vit.head(x.mean(1))
    expected = vit(images)
    assert relative(AdaptiveViT(vit)(images).logits, expected) <= 1e-5
    assert relative(AdaptiveViT(vit, "tome(r=0) | evit(1.0)")(images).logits, expected) <= 1e-5
    merging = AdaptiveViT(vit, "tome(r=2)")
    if pool == "token":
        assert merging(images).logits.isfinite().all()
    else:
        with pytest.raises(UserError, match=rf"vit\.{name} was replaced"):
            merging(images)


@torch.no_grad()
def test_a_list_of_blocks_with_a_forward_of_its_own_is_refused():
    vit = make_vit(**SHAPE)
    halved(vit.blocks, "forward")
    with pytest.raises(UserError, match=r"vit\.blocks\.forward was replaced"):
        AdaptiveViT(vit)(make_images(vit))


@torch.no_grad()
def test_a_table_that_is_computed_is_read_as_computed():
    vit = make_vit(**SHAPE)
    images, plain = make_images(vit), copy.deepcopy(vit)
    for name in ("pos_embed", "cls_token"):
        parametrize.register_parametrization(vit, name, Doubled())
        getattr(plain, name).mul_(2)
    assert relative(AdaptiveViT(vit)(images).logits, vit(images)) <= 1e-5
    for setting in ("tome(r=2)", "grid(8)", "quadtree(7)"):
        assert relative(AdaptiveViT(vit, setting)(images).logits, AdaptiveViT(plain, setting)(images).logits) <= 1e-6
    with pytest.raises(UserError, match="cannot be rebuilt"):
        AdaptiveViT(vit).save("never written")


@torch.no_grad()
def test_compiled_modules_are_named_with_the_remedy():
    vit = make_vit(**SHAPE)
    with pytest.raises(UserError, match=r"compiled already.*deploy\('fp32 compiled'\)"):
        AdaptiveViT(torch.compile(vit))
    model, images = AdaptiveViT(vit), make_images(vit)
    expected = model(images).logits
    vit.blocks[1].compile(backend="eager")  # in place: the same function
    assert relative(model(images).logits, expected) <= 1e-6 and model.at("tome(r=2)")(images).logits.isfinite().all()
    vit.blocks[1] = torch.compile(vit.blocks[1], backend="eager")
    assert relative(model(images).logits, expected) <= 1e-6
    for ask in (lambda: model.at("tome(r=2)"), lambda: AdaptiveViT(vit)):
        with pytest.raises(UserError, match=r"blocks\[1\] is compiled already"):
            ask()


@torch.no_grad()
@pytest.mark.parametrize("path", ["", "blocks.1", "head"])
def test_a_copy_that_would_run_the_original_is_refused(path):
    """A function put on an object is bound to it: copied to bf16, the copy would compute with the fp32 weights."""
    vit = make_vit(**SHAPE)
    halved(vit.get_submodule(path), "forward")
    with pytest.raises(UserError, match=rf"{path or 'forward'}.*was replaced, and a copy"):
        AdaptiveViT(vit).deploy("bf16")(make_images(vit))
