"""What every registered method and tokenizer has to keep, on every setting of its menu and on some harder ones.

A new method is tested by being registered. Its harder settings go into ``HARD``, the settings in which it does nothing
into ``OFF``.
"""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
import pickle
import resource
import threading
from dataclasses import replace

import pytest
import torch

import saccade.core.plan
from oracles import RandomGates, add_gates, counted_macs, make_images, make_vit, relative
from registered_settings import HARD, SHAPE, learns, menu_of, settings_of
from saccade.backbones.saving import save
from saccade.checkpoint import load
from saccade.core.plan import Gater, Method, Plan, Reducer
from saccade.core.reduction import Reduction, SoftReduction, reduce
from saccade.core.registry import registry
from saccade.core.slicing import First
from saccade.errors import UserError
from saccade.execution.loop import encode
from saccade.model import AdaptiveViT
from saccade.setting import Setting

OFF = {
    "evit": ["evit(1)", "evit(1.0, fuse=True)", "evit(0.5, at=[])"],
    "tome": ["tome(r=0)", "tome(r=[])", "tome(r=[0, 0])"],
    "imagepiece": ["imagepiece(merge=0)", "imagepiece(p=0)", "imagepiece(merge_at=[])"],
    "token_pooling": ["token_pooling(1)", "token_pooling(at=[])"],
    "dpc_knn": ["dpc_knn(1)", "dpc_knn(at=[])"],
    "tofu": ["tofu(r=0)", "tofu(total=0)"],
    "pitome": ["pitome(1)"],
    "mctf": ["mctf(r=0)", "mctf(share=0)", "mctf(at=[])"],
    "depth": ["depth()", "depth(4)"],
    "algm": ["algm(0, 0)"],
    "kth": ["kth(1)", "kth(at=[])"],
    "cut": ["cut(64)", "cut([64, 100], at=[0, 2], site='block')", "cut(at=[])"],
    "tokenlearner": ["tokenlearner(64)"],
    "patchmerger": ["patchmerger(64)"],
    "radial": ["radial(1)", "radial(at=[])"],
    "diffrate": ["diffrate(0, 0)", "diffrate([], [0, 0])"],
    "dynamicvit": ["dynamicvit(1)", "dynamicvit(at=[])"],
    "adavit": ["adavit(at=[])"],
    "ats": ["ats(at=[])"],
    "avit": ["avit(at=[])"],
    "ltmp": ["ltmp(at=[])"],
    "topk": ["topk(1)", "topk(at=[])", "topk((1, 1), at=(0, 2))"],
    "random_plus": ["random_plus(1)", "random_plus(at=[])", "random_plus(axes=())"],
    "random": ["random(1)", "random(0.5, at=[])"],
    "grid": ["grid()", "grid(16)", "grid(16, 128)"],
    "quadtree": ["quadtree(64)", "quadtree(per_batch=64)"],
    "stem": [],  # other weights than those of the patch embedding
}


slow = pytest.mark.slow
SETTINGS = [text for name in registry() for text in settings_of(name)]
HARDEST = {text for name in registry() for text in settings_of(name)[-1 - len(HARD.get(name, [name])) :]}
# For what a stronger or weaker setting cannot change: the strongest of a menu and the hard ones; slow: all.
SOME = [text if text in HARDEST else pytest.param(text, marks=slow, id=text) for text in SETTINGS]
MENUS = list(dict.fromkeys(SETTINGS + [text for name in registry() for text in menu_of(name)]))
METHODS = [name for name, entry in registry().items() if entry.kind == "method"]
TOKENIZERS = [name for name, entry in registry().items() if entry.kind == "tokenizer"]
# another count in every image: a fixed share beside them is one of the batch's longest image
RAGGED = {"ats", "avit", "ltmp"}
PARTNERS = {"evit", "tome", "tokenlearner"}  # of each kind: drops and fuses, merges, mixes
PAIRED, MIXED = {"evit", "tome"}, {"evit", "tome", "adavit", "imagepiece"}  # behind what mixes fewer are enough
ONE_EACH = [settings_of(name)[-1] for name in registry()]
# What is saved is a line and what the methods have learned: one setting of each name, and of those that learn all.
SAVED = [text if text in ONE_EACH or learns(text) else pytest.param(text, marks=slow, id=text) for text in SETTINGS]


# A strength that a budget finds lets these do something at the block where they stand by default: the last of four.
EARLIER = {"tokenlearner": "at=1, ", "patchmerger": "at=1, "}
COARSE = {"kth", "depth"}  # few strengths: a budget is met, and not used up


def in_pairs() -> list:
    """Every method behind one that drops and one that merges, before one, and behind a mosaic; slow: with every other,
    both ways, and behind every tokenizer.

    Baselines decide nothing that could go wrong in company: one partner is enough.
    """
    strong = {name: settings_of(name)[min(2, len(settings_of(name)) - 1)] for name in registry()}
    found: list = []
    for a, b in itertools.permutations(METHODS, 2):
        partners = {"tome"} if registry()[a].baseline or registry()[b].baseline else PARTNERS if b in MIXED else PAIRED
        text = f"{strong[a]} | {strong[b]}"
        if "head='own'" in text and "avit" in (a, b):
            continue  # two heads, which is refused: ``test_avit``
        found.append(pytest.param(text, marks=() if a in partners or b == "tome" else slow, id=text))
    for t, m in itertools.product(TOKENIZERS, METHODS):
        text = f"{strong[t]} | {strong[m]}"
        found.append(pytest.param(text, marks=() if t == "quadtree" or m in PARTNERS else slow, id=text))
    return found


@pytest.fixture(scope="module")
def vit():
    return make_vit("deit", seed=1, **SHAPE).requires_grad_(False)  # by seed 0, avit halts all before the last block


@pytest.fixture(scope="module")
def images(vit):
    return make_images(vit, 3)


@pytest.fixture
def plain(vit):
    """timm's model of the same shape with nothing of these weights: not a number, until they are loaded."""
    twin = copy.deepcopy(vit)
    for weight in twin.parameters():
        weight.fill_(math.nan)
    return twin


@pytest.fixture
def reductions(monkeypatch) -> list:
    """Token sets before and after each reduction, and the reduction, as they happen."""
    seen: list = []

    def spied(tokens, reduction):
        after = reduce(tokens, reduction)
        seen.append((tokens, reduction, after))
        return after

    monkeypatch.setattr(saccade.core.plan, "reduce", spied)
    return seen


def test_every_registered_name_says_how_it_is_switched_off():
    assert set(OFF) >= set(registry()), f"add {set(registry()) - set(OFF)} to OFF, with [] if it cannot be off"


# what these spend follows from what they learn or draw, or differs from image to image: ``test_budgets`` says how
AIMED = {"adavit", "avit", "ltmp", "random_plus", "ats"}


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_a_budget_finds_the_strength_of_every_method(vit, images, name):
    assert {"speed", "gmacs"} <= set(registry()[name].knobs)
    for wrong in ("speed=0.5", "gmacs=-1", "speed=2, gmacs=1", "speed='x'"):
        with pytest.raises(UserError, match=r"speed|gmacs"):
            AdaptiveViT(vit, f"{name}({wrong})")
    if name in AIMED:
        return
    dense = float(AdaptiveViT(vit)(images[:1]).trace.macs())

    def cost(knob: str) -> float:
        model = AdaptiveViT(vit, f"{name}({EARLIER.get(name, '')}{knob})")  # another: what is learned has its own shape
        return float(model(images[:1]).trace.macs())

    found = [cost("speed=1.2"), cost(f"gmacs={dense / 1.2e9!r}")]
    assert max(found) <= dense / 1.2
    assert name in COARSE or min(found) >= 0.9 * dense / 1.2, "and no more is saved than was asked for"
    assert cost("speed=1") == dense


@torch.no_grad()
@pytest.mark.parametrize("text", [text for name in registry() for text in OFF.get(name, [])])
def test_off_is_timm_exactly(vit, images, text):
    model = AdaptiveViT(vit, text)
    tokens, trace = model.forward_tokens(images)
    assert torch.equal(model.forward_head(tokens), vit(images))
    assert relative(model(images).logits, vit(images)) <= 1e-5
    dense, plain = AdaptiveViT(vit).forward_tokens(images)
    assert torch.equal(tokens.x, dense.x) and torch.equal(trace.macs(), plain.macs())


@torch.no_grad()
@pytest.mark.parametrize("text", MENUS + in_pairs())
def test_every_cell_is_owned_once_and_the_prefix_is_untouched(vit, images, reductions, text):
    tokens, trace = AdaptiveViT(vit, text).forward_tokens(images)
    assert tokens.stats.key is tokens.stats.cls_attn is tokens.stats.attn_received is tokens.stats.gate_mask is None, (
        "these are of one block only"
    )
    cells = tokens.grid[0] * tokens.grid[1]
    assert tokens.x.isfinite().all()
    for before, reduction, after in reductions:
        everything = torch.full((len(after.x),), cells)  # a ragged batch is reduced in groups of equal counts
        prefix = before.num_prefix
        assert after.num_prefix == prefix == 1 and torch.equal(after.x[:, :prefix], before.x[:, :prefix])
        assert ((after.owner < 0) >= (before.owner < 0)).all(), "nothing comes back"
        assert torch.equal(after.area().sum(1) + (after.owner < 0).sum(1), everything)
        if isinstance(reduction, Reduction):
            stands_for = after.area() > 0
            if (before.area() > 0).all():  # of a soft reduction, some mixtures may be no cell's largest
                assert (stands_for if after.valid is None else stands_for | ~after.valid).all()
            whole = reduction.merge is not None and reduction.merge.size_share is None
            if whole and torch.equal(after.owner < 0, before.owner < 0):
                ragged = reduction.valid is not None  # may leave padding behind, with the size that it has
                total, expected = (sizes(t, only_valid=ragged).sum(1) for t in (after, before))
                assert torch.allclose(total, expected), "a merge that drops nothing loses nothing"
        else:
            assert reduction is None or isinstance(reduction, (SoftReduction, First))
    for block in trace.blocks:
        assert block.owner.shape == (len(images), cells)
        assert int(block.owner.min()) >= -1 and int(block.owner.max()) < block.static_counts[1] - tokens.num_prefix
    assert torch.equal(trace.blocks[-1].owner, tokens.owner)
    assert trace.tokens()[-1] == tokens.x.shape[1]


def sizes(tokens, only_valid: bool = False) -> torch.Tensor:
    size = torch.ones(tokens.x.shape[0], tokens.num_patches) if tokens.size is None else tokens.size
    return size * tokens.valid if only_valid and tokens.valid is not None else size


@torch.no_grad()
@pytest.mark.parametrize("family", ["distilled", "dinov2-registers", "siglip", "registers-average", "class-average"])
@pytest.mark.parametrize("name", METHODS)
def test_prefix_is_untouched_in_other_families(reductions, family, name):
    vit = make_vit(family, depth=4)
    images = make_images(vit)
    prefix = vit.num_prefix_tokens
    for text in menu_of(name, family, depth=4) or [name]:
        out = AdaptiveViT(vit, text)(images)
        assert out.logits.isfinite().all()
        assert all(torch.equal(a.x[:, :prefix], b.x[:, :prefix]) for a, _, b in reductions)
    steps = [step for method in AdaptiveViT(vit, text).plan.methods for step in method.steps]
    assert reductions or not any(isinstance(step, Reducer) for step in steps)


@torch.no_grad()
@pytest.mark.parametrize("text", MENUS)
def test_macs_are_those_of_the_operators(vit, images, text):
    model = AdaptiveViT(vit, text)
    short = counted_macs(lambda: model(images))
    whole = counted_macs(lambda: model.forward_head(model.forward_tokens(images)[0]))
    assert float(model(images).trace.macs().sum()) == pytest.approx(short, rel=1e-3)
    encoded = model.forward_tokens(images)[1]
    head = AdaptiveViT(vit)(images).trace.head
    assert float(encoded.macs().sum()) - 3 * (encoded.head - head) == pytest.approx(whole, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("text", SETTINGS + in_pairs())
def test_a_batch_equals_its_images_one_by_one(vit, images, text):
    names = [call.name for call in Setting.parse(text).calls]
    if RAGGED & set(names) and sum(name in METHODS for name in names) > 1:
        pytest.skip("what a fixed share of a ragged batch is depends on its longest image")
    model = AdaptiveViT(vit, text)
    logits, dense = model(images).logits, model.feature_map(images)
    for b in range(3):
        assert relative(model(images[b : b + 1]).logits, logits[b : b + 1]) <= 1e-5
        assert relative(model.feature_map(images[b : b + 1]), dense[b : b + 1]) <= 1e-5
    assert relative(model(images.flip(0)).logits.flip(0), logits) <= 1e-5


def dense_map(model: AdaptiveViT, images: torch.Tensor, sparse: bool) -> torch.Tensor:
    tokens, _ = model._forward_tokens(images, whole=True, sparse=sparse, dense=True)
    return tokens.scatter_to_grid(tokens.patches, tokens.dropped_features)


@torch.no_grad()
@pytest.mark.parametrize("text", ONE_EACH + [text for name in METHODS for text in HARD.get(name, [])] + in_pairs())
@pytest.mark.parametrize("first", [True, pytest.param(False, marks=slow)], ids=["gates first", "gates last"])
def test_with_gates_masked_equals_sparse(vit, images, text, first):
    """Composed with a method of the other kind, in the same blocks: logits, dense map, and what it cost."""
    gates = {block: RandomGates(block, 6) for block in range(4)}
    model = add_gates(AdaptiveViT(vit, text), gates, first)
    masked, _ = model.forward_tokens(images, sparse=False)
    sparse, trace = model.forward_tokens(images, sparse=True)
    real = (
        slice(None) if sparse.valid is None else sparse.pad_prefix(sparse.valid, 1.0) > 0
    )  # padding may hold anything
    assert relative(sparse.x[real], masked.x[real]) <= 1e-5
    assert torch.equal(sparse.owner, masked.owner)
    assert relative(model.forward_head(sparse), model.forward_head(masked)) <= 1e-5
    assert relative(dense_map(model, images, True), dense_map(model, images, False)) <= 1e-5
    assert float(trace.macs().sum()) - 3 * trace.head == pytest.approx(
        counted_macs(lambda: model.forward_tokens(images, sparse=True)), rel=1e-3
    )


@pytest.mark.parametrize("text", SETTINGS + in_pairs())
def test_gradients_reach_every_parameter(vit, images, text):
    model = AdaptiveViT(copy.deepcopy(vit).requires_grad_(), text).train()
    out = model(images)
    loss = (out.logits * torch.linspace(-1, 1, 10)).sum()
    for method in model.plan.methods:
        loss = loss + sum(method.loss(out.trace).values())
    loss.backward()
    idle = [f"vit.blocks.{i}." for i in range(model.plan.depth(4), 4)]  # blocks that do not run, a head not asked
    idle += ["vit.norm.", "vit.head."] if "head='own'" in text else []
    idle += ["vit.patch_embed."] if text.startswith("stem") else []  # it stands in its place
    ends = model.plan.depth(4) - 1  # what is decided there after attention is about patches, and the class is read
    for m, method in enumerate(model.plan.methods):
        sites = [getattr(step, "site", "block") for step in method.steps]
        unread = [s for s, at in enumerate(method.at) if at > ends or (at == ends < 3 and sites[s] == "attn")]
        idle += [f"plan.methods.{m}.steps.{s}." for s in unread]
    left = [(block.kept, block.static_counts[0] - vit.num_prefix_tokens) for block in out.trace.blocks]
    alone = [kept is not None and bool((kept * n < 2).all()) for kept, n in left]  # no two tokens are left to choose of
    few = ["none"]
    for m, method in enumerate(model.plan.methods):
        few += [f"plan.methods.{m}.steps.{s}." for s, at in enumerate(method.at) if at < len(alone) and alone[at]]
    for name, weight in model.named_parameters():
        if name.startswith(tuple(idle)):
            assert weight.grad is None, name
            continue
        assert weight.grad is not None, name
        blind = "random_plus" in text or name.startswith(tuple(few))  # may switch a part off for every image
        assert weight.grad.isfinite().all() and (blind or weight.grad.abs().sum() > 0), name


@pytest.mark.parametrize("text", SAVED)
def test_weights_make_the_round_trip(vit, images, plain, text, tmp_path):
    model = AdaptiveViT(vit, text)
    save(model, tmp_path / "model")
    found = load(tmp_path / "model").requires_grad_(False)  # as `vit`: torch 2.9 rounds frozen products differently
    with torch.no_grad():
        assert torch.equal(found(images).logits, model(images).logits)
    base = {k.removeprefix("vit."): v for k, v in found.state_dict().items() if k.startswith("vit.")}
    plain.load_state_dict(base, strict=True)
    with torch.no_grad():
        assert torch.equal(plain(images), vit(images))


@torch.no_grad()
@pytest.mark.parametrize("text", ONE_EACH)
def test_sixteen_threads_agree_with_one(vit, text):
    model = AdaptiveViT(vit, text)
    batches = [make_images(vit, 1 + i % 3, seed=i) for i in range(16)]
    expected = [model(batch).logits for batch in batches]
    found: list = [None] * 16

    def work(i: int) -> None:
        with torch.no_grad():
            found[i] = [model(batches[(i + step) % 16]).logits for step in range(2)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, logits in enumerate(found):
        assert all(torch.equal(x, expected[(i + step) % 16]) for step, x in enumerate(logits))


@torch.no_grad()
@pytest.mark.parametrize("text", SOME)
def test_forwards_of_other_shapes_leave_no_trace(vit, images, text):
    model = AdaptiveViT(vit, text)
    for count, size in ((2, (96, 160)), (1, (64, 64)), (3, (128, 128)), (2, (96, 160))):
        batch = make_images(vit, count, size, seed=count)
        assert torch.equal(model(batch).logits, AdaptiveViT(copy.deepcopy(vit), text)(batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("text", ONE_EACH)
def test_memory_does_not_grow(text):
    model = AdaptiveViT(make_vit(), text)
    batch = make_images(model.vit, 2)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    for _ in range(5):  # constants are made once, in a process, for each number of tokens
        model(batch)
        model.forward_tokens(batch)
    tensors, peak = alive(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(25):
        model(batch)
        model.forward_tokens(batch)
    assert alive() == tensors
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 10_000  # kB


@torch.no_grad()
@pytest.mark.parametrize("text", SOME)
def test_deepcopy_and_pickle(vit, images, text):
    model = AdaptiveViT(vit, text)
    expected = model(images).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(images).logits, expected)
        assert twin.setting == model.setting and twin.vit is not vit


@torch.no_grad()
@pytest.mark.parametrize("text", SOME)
def test_at_shares_the_parameters_and_mutates_nothing(vit, images, text):
    model = AdaptiveViT(vit, "tome(r=3)")
    before, parts = copy.deepcopy(model.state_dict()), (model.vit, model.tokenizer, model.plan, model.setting)
    expected = model(images).logits
    view = model.at(text)
    for training in (True, False):
        model.train(training)
        modes = {module.training for module in model.at(text).modules()}
        assert modes == {training}, "a view runs in the mode of its model"
    view(images)
    assert view.vit is model.vit and str(view.setting) == text and view.backbone == model.backbone
    assert parts == (model.vit, model.tokenizer, model.plan, model.setting)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(images).logits, expected)
    assert torch.equal(view.at("tome(r=3)")(images).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("text", SOME)
def test_runs_are_one_whatever_the_seed(vit, images, text):
    first = AdaptiveViT(vit, text)(images)
    for seed in range(4):
        torch.manual_seed(seed)
        again = AdaptiveViT(vit, text)(images)
        assert torch.equal(again.logits, first.logits)
        assert torch.equal(again.trace.blocks[-1].owner, first.trace.blocks[-1].owner)


@pytest.mark.parametrize("text", SOME)
def test_in_half_precision_and_inference_mode(vit, images, text):
    with torch.inference_mode():
        exact = AdaptiveViT(vit, text)(images).logits
        for dtype in (torch.bfloat16, torch.float16):
            half = AdaptiveViT(copy.deepcopy(vit).to(dtype), text)(images.to(dtype))
            assert half.logits.dtype == dtype and half.logits.isfinite().all()
        with torch.autocast("cpu", torch.bfloat16):
            assert AdaptiveViT(vit, text)(images).logits.isfinite().all()
    with torch.no_grad():
        assert torch.equal(AdaptiveViT(vit, text)(images).logits, exact)


@torch.no_grad()
@pytest.mark.parametrize("text", SETTINGS)
def test_dense_map_has_every_cell(vit, images, text):
    """A cell that is still owned has its token's features; one that was dropped, its own last ones."""
    model = AdaptiveViT(vit, text)
    features = model.feature_map(images)
    tokens, _ = model.forward_tokens(images)
    assert features.shape == (3, vit.embed_dim, *tokens.grid) and features.isfinite().all()
    flat = features.flatten(2).transpose(1, 2)
    spread = vit.norm(tokens.scatter_to_grid(tokens.patches))
    owned = tokens.owner >= 0
    assert relative(flat[owned], spread[owned]) <= 1e-6
    assert (flat[~owned].norm(dim=-1) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("text", SOME)
def test_no_images_give_no_logits(vit, text):
    model = AdaptiveViT(vit, text)
    out = model(torch.zeros(0, 3, 128, 128))
    assert out.logits.shape == (0, 10) and out.trace.macs().shape == (0,)
    assert model.feature_map(torch.zeros(0, 3, 128, 128)).shape[:2] == (0, vit.embed_dim)


# --- methods together -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("text", in_pairs())
def test_pairs_run_one_after_the_other(vit, images, text, reductions):
    """In each block the reducers act in the order of the setting, each on what the one before has left."""
    model = AdaptiveViT(vit, text)
    model.forward_tokens(images[:1])  # of several images, those with equally many tokens are reduced together
    for (_, _, after), (before, _, _) in itertools.pairwise(reductions):
        assert torch.equal(after.owner, before.owner), "nothing between two reductions moves tokens"
    macs = float(model(images).trace.macs().sum())
    assert macs == pytest.approx(counted_macs(lambda: model(images)), rel=1e-3)
    parts = [AdaptiveViT(vit, part) for part in text.split(" | ")]
    first, second = (float(part(images).trace.macs().sum()) for part in parts)
    if any(isinstance(step, Gater) for part in parts for method in part.plan.methods for step in method.steps):
        # What reads the attention of all tokens has computed what a gate before it would have left out.
        assert macs < max(first, second) * 1.02
    else:
        assert macs < first * (1.02 if parts[0].plan.methods else 1)


def test_the_order_of_a_setting_is_the_order_in_a_block(vit, images):
    """Merging what pruning left, and pruning what merging left, are different things."""
    one = AdaptiveViT(vit, "evit(0.5, at=1) | tome(r=[0, 10])")
    other = AdaptiveViT(vit, "tome(r=[0, 10]) | evit(0.5, at=1)")
    assert one.forward_tokens(images)[1].tokens()[1] == 1 + 32 - 10
    assert other.forward_tokens(images)[1].tokens()[1] == 1 + 27
    nested = AdaptiveViT(vit)
    nested.plan = Plan([Method(zip(m.at, m.steps, strict=True)) for m in one.plan.methods])
    assert torch.equal(nested(images).logits, one(images).logits)


def test_padding_stays_padding_through_every_reducer(vit):
    """A ragged batch: two tokens of image 0 are no tokens. Its logits are those of the image without them."""
    model = AdaptiveViT(vit)
    tokens, _ = model.forward_tokens(make_images(vit, 2))
    valid = torch.ones(2, tokens.num_patches, dtype=torch.bool)
    valid[0, -2:] = False
    padded, _ = encode(vit, replace(tokens, valid=valid), Plan())
    alone, _ = encode(vit, replace(tokens, x=tokens.x[:1, :-2], owner=tokens.owner[:1, :-2]), Plan())
    assert relative(padded.x[:1, :-2], alone.x) <= 1e-5


# --- the baseline ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_random_places_depend_on_seed_and_block_and_on_nothing_else(vit, images):
    def kept(text: str, batch=images) -> list[list[bool]]:
        return (AdaptiveViT(vit, text).forward_tokens(batch)[1].blocks[-1].owner >= 0).tolist()

    places = kept("random(0.5, at=1)")
    assert places[0] == places[1] == places[2], "the same for every image"
    assert kept("random(0.5, at=1)", images.flip(0) * 2) == places
    assert kept("random(0.5, at=2)") != places and kept("random(0.5, at=1, seed=1)") != places
    assert sum(places[0]) == 32
    often = (
        torch.tensor([kept(f"random(0.5, at=1, seed={seed})", images[:1])[0] for seed in range(200)]).float().mean(0)
    )
    assert ((often > 0.3) & (often < 0.7)).all(), "no place is favoured: 5.6 standard deviations"
