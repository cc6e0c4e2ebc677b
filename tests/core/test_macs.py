"""Cost accounting.

Published figures are *nominal*: every block whole, nothing for reading attention and deciding. What ran is counted
by torch's own operator-level counter.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from oracles import G, RandomGates, add_gates, block_macs, counted_macs, make_images, make_vit, nominal_gmacs, vit_macs
from saccade.core.gates import Gates
from saccade.core.plan import Gater
from saccade.core.record import BlockCost
from saccade.model import AdaptiveViT
from saccade.setting import Setting

STEM = {"deit_small_patch16_224": (0.435 - 0.058) * G, "deit_tiny_patch16_224": (0.113 - 0.029) * G}

PUBLISHED = [
    ("deit_tiny_patch16_224", "", 1.25),
    ("deit_small_patch16_224", "", 4.60),
    ("deit_base_patch16_224", "", 17.56),
    ("deit_tiny_patch16_224", "evit(0.7)", 0.81),
    ("deit_tiny_patch16_224", "evit(0.7, fuse=True)", 0.82),
    ("deit_small_patch16_224", "evit(0.9)", 3.99),
    ("deit_small_patch16_224", "evit(0.8)", 3.44),
    ("deit_small_patch16_224", "evit(0.7)", 3.00),
    ("deit_small_patch16_224", "evit(0.6)", 2.61),
    ("deit_small_patch16_224", "evit(0.5)", 2.28),
    ("deit_small_patch16_224", "evit(0.9, fuse=True)", 4.02),
    ("deit_small_patch16_224", "evit(0.8, fuse=True)", 3.48),
    ("deit_small_patch16_224", "evit(0.7, fuse=True)", 3.03),
    ("deit_small_patch16_224", "evit(0.6, fuse=True)", 2.64),
    ("deit_small_patch16_224", "evit(0.5, fuse=True)", 2.31),
    ("deit_base_patch16_224", "evit(0.7)", 11.49),
    ("deit_base_patch16_224", "evit(0.7, fuse=True)", 11.61),
    ("deit_small_patch16_224", "dynamicvit(0.7)", 2.98),
    ("deit_small_patch16_224", "dynamicvit(0.5)", 2.23),
    ("deit_base_patch16_224", "dynamicvit(0.7)", 11.48),
    ("deit_small_patch16_224", "evit_paper()", 3.03),
    ("deit_small_patch16_224", "imagepiece_paper()", 2.916),
    ("deit_small_patch16_224", "tome(r=13)", 2.70),
    ("vit_base_patch16_224", "tome(r=8)", 13.10),
    ("vit_base_patch16_224", "tome(r=12)", 10.91),
    ("vit_base_patch16_224", "tome(r=16)", 8.77),
    ("vit_base_patch16_224", "tome(r=20)", 7.13),
    ("vit_large_patch16_224", "tome(r=8)", 30.96),
    ("vit_large_patch16_224", "tome(r=8, inflection=-1)", 22.33),
]


@pytest.mark.parametrize(("name", "setting", "gmacs"), PUBLISHED)
def test_published_figures(name, setting, gmacs):
    assert nominal_gmacs(name, setting) == pytest.approx(gmacs, abs=0.01)


@pytest.mark.parametrize(
    ("name", "tokens", "size"), [("quadformer", 100, 256), ("flexivit", 225, 240), ("imagepiece_patches", 196, 224)]
)
def test_published_systems_have_their_tokens(name, tokens, size):
    offline = str(Setting.parse(name)).replace("'feature'", "\"feature(weights='random')\"")
    model = AdaptiveViT(make_vit("deit", img_size=224), offline)
    assert model.input_size() == (size, size)
    with torch.no_grad():
        assert model(make_images(model.vit, 1, (size, size))).trace.blocks[0].static_counts[0] == tokens + 1


@pytest.mark.parametrize(
    ("name", "setting", "gmacs", "bound"),
    [
        ("vit_huge_patch14_224", "tome(r=7)", 92.8, 0.06),
        ("vit_huge_patch14_224", "tome(r=7, inflection=-1)", 72.5, 0.06),
        ("deit_tiny_patch16_224", "tome(r=13)", 0.731, 0.0006),
        ("deit_tiny_patch16_224", "", 1.254, 0.0006),
    ],
)
def test_more_published_figures(name, setting, gmacs, bound):
    assert nominal_gmacs(name, setting) == pytest.approx(gmacs, abs=bound)


@pytest.mark.parametrize("setting", ["imagepiece() | evit(0.8)", "imagepiece(keep=0.8)"])
@pytest.mark.parametrize(("name", "gmacs"), [("deit_small_patch16_224", 2.916), ("deit_tiny_patch16_224", 0.770)])
def test_imagepiece_with_its_stem(name, gmacs, setting):
    """The published figure has a convolutional stem in place of the patch embedding."""
    assert nominal_gmacs(name, setting) + STEM[name] / G == pytest.approx(gmacs, abs=0.001)


@pytest.mark.parametrize("patch", [8, 10, 12, 15, 16, 20, 24, 30, 40, 48])
def test_flexivit_figures(patch):
    """ViT-S at 240 pixels (without the classifier's 0.0004)."""
    small = {8: 26.68, 10: 15.39, 12: 10.06, 15: 6.13, 16: 5.34, 20: 3.34, 24: 2.31, 30: 1.49, 40: 0.87, 48: 0.63}
    assert nominal_gmacs("flexivit_small", f"grid({patch})") == pytest.approx(small[patch], abs=0.01)


@pytest.mark.parametrize("setting", ["", "evit(0.6, fuse=True)", "tome(r=3)", "imagepiece(merge=0.1, keep=0.7)"])
def test_nominal_is_the_formula_of_the_papers(setting):
    vit = make_vit(depth=5, img_size=112)
    trace = AdaptiveViT(vit, setting)(make_images(vit, 3)).trace
    expected = vit_macs(trace.tokens(), 49, 96, classes=10)
    assert trace.macs(nominal=True).tolist() == [expected] * 3


def test_cost_of_a_block_by_hand():
    cost = BlockCost(dim=96, attn_dim=96, mlp=2 * 96 * 384)
    assert cost.attention(17, 17) + 9 * cost.mlp == block_macs(17, 9, 96)
    assert cost.attention(1, 17) == 2 * 96**2 + 17 * 2 * 96**2 + 2 * 17 * 96


# --- what ran -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit():
    return make_vit(depth=4, img_size=112).requires_grad_(False)


@pytest.mark.parametrize("seed", range(20))
def test_random_plans_cost_what_the_operators_do(vit, seed):
    setting = ["", "tome(r=4)", "evit(0.7, fuse=True)", "imagepiece(merge=0.1, keep=0.8)", "grid(28) | random(0.6)"][
        seed % 5
    ]
    parts = [("patch",), ("head", "attn"), ("attn", "mlp"), ("patch", "attn", "mlp"), ("patch", "head", "mlp")][
        seed % 4
    ]
    gates = {block: RandomGates(seed + block, 3, parts, on=0.3 + 0.1 * (seed % 6)) for block in range(seed % 2, 4)}
    model = add_gates(AdaptiveViT(vit, setting), gates, first=seed % 3 > 0)
    images = make_images(vit, 5, seed=seed)
    counted = counted_macs(lambda: model(images))
    assert float(model(images).trace.macs().sum()) == pytest.approx(counted, rel=1e-3)
    whole = counted_macs(lambda: model.forward_tokens(images))
    _, trace = model.forward_tokens(images)
    assert float(trace.macs().sum()) - 5 * trace.head == pytest.approx(whole, rel=1e-3)


class SomeOff(Gater):
    """Image 0 runs everything, image 1 no MLP, image 2 no attention, image 3 neither."""

    def forward(self, tokens):
        return Gates(attn=torch.tensor([1.0, 1, 0, 0]), mlp=torch.tensor([1.0, 0, 1, 0]))


def test_macs_are_counted_per_image(vit):
    model = add_gates(AdaptiveViT(vit), {2: SomeOff()})
    images = make_images(vit, 4)
    everything, no_mlp, no_attention, neither = model(images).trace.macs().tolist()
    mlp = 8 * 50 * 96**2
    attention = block_macs(50, 0, 96)
    assert everything - no_mlp == pytest.approx(mlp)
    assert everything - no_attention == pytest.approx(attention)
    assert everything - neither == pytest.approx(mlp + attention)


def test_masked_execution_is_charged_in_full(vit):
    gates = {block: RandomGates(block, 3) for block in range(4)}
    model, dense = add_gates(AdaptiveViT(vit), gates), AdaptiveViT(vit)
    images = make_images(vit, 4)
    full = dense.forward_tokens(images)[1].macs()
    assert torch.equal(model.forward_tokens(images, sparse=False)[1].macs(), full)
    assert (model.forward_tokens(images, sparse=True)[1].macs() < full).all()
    assert float(full.sum()) - 4 * dense.forward_tokens(images)[1].head == pytest.approx(
        counted_macs(lambda: model.forward_tokens(images, sparse=False)), rel=1e-3
    )


class Patches(Gater):
    """Image b keeps its first ``counts[b]`` patches."""

    def __init__(self, *counts: int) -> None:
        super().__init__()
        self.counts = counts

    def forward(self, tokens):
        place = torch.arange(tokens.num_patches)
        return Gates(patch=torch.stack([(place < count).float() for count in self.counts]))


def test_a_ragged_batch_is_charged_with_what_each_image_computes(vit):
    """Rows are packed: there is no padding to pay for."""
    images = make_images(vit, 2)
    model = add_gates(AdaptiveViT(vit), {1: Patches(10, 30)})
    few, many = (add_gates(AdaptiveViT(vit), {1: Patches(n, n)})(images).trace.macs()[0] for n in (10, 30))
    assert model(images).trace.macs().tolist() == [few, many]
    assert float(few + many) == pytest.approx(counted_macs(lambda: model(images)), rel=1e-3)


def test_less_never_costs_more(vit):
    images = make_images(vit, 2)

    def cost(gater: Gater | None = None, setting: str = "") -> float:
        model = AdaptiveViT(vit, setting)
        return float((model if gater is None else add_gates(model, {1: gater}))(images).trace.macs().sum())

    by_patches = [cost(Patches(count, count)) for count in range(49, -1, -7)]
    assert by_patches == sorted(by_patches, reverse=True) and by_patches[0] == cost()
    for family in ("evit({})", "random({})", "imagepiece(keep={})"):
        by_rate = [cost(setting=family.format(rate)) for rate in (1.0, 0.9, 0.7, 0.5, 0.3)]
        assert by_rate == sorted(by_rate, reverse=True), family
    by_r = [cost(setting=f"tome(r={r})") for r in (1, 3, 6, 10, 20)]
    assert by_r == sorted(by_r, reverse=True)
    by_patch = [cost(setting=f"grid({p})") for p in (8, 14, 16, 28, 56)]
    assert by_patch == sorted(by_patch, reverse=True)
    by_heads = [cost(RandomGates(0, 3, ("head",), on=share)) for share in (1.0, 0.0)]
    assert by_heads[1] < by_heads[0] == cost(), "heads that are off in all images are not computed"


def test_the_shortened_last_block_saves_a_twelfth_but_the_keys():
    vit = make_vit(depth=12, embed_dim=192, img_size=224)
    images = make_images(vit, 1)
    model = AdaptiveViT(vit)
    with torch.no_grad():
        short, whole = model(images).trace, model.forward_tokens(images)[1]
    saved = 1 - float(short.macs()) / float(whole.macs())
    assert 0.06 < saved < 1 / 12
    assert short.macs(nominal=True).tolist() == whole.macs(nominal=True).tolist()


# --- the published table of AdaViT -----------------------------------------------------------------------------------


def table_entry(heads: int, tokens: float, attn: bool, mlp: bool, width: int, all_heads: int, ratio: int) -> float:
    """GMACs of a block by the closed form of AdaViT's published table, for 197 places.

    Norms are charged with five operations an element, and the output projection as if it were square.
    """
    if heads == 0:
        return 0.0
    w, norm = heads * width // all_heads, 5 * 197 * width
    attention = norm + 3 * tokens * width * w + 2 * tokens**2 * w + tokens * w**2
    return (attn * attention + norm + mlp * ratio * tokens * (width * w + width**2)) / G


def over_patches(usage: float, heads: int, *block) -> float:
    """The mean of ``table_entry`` where every patch takes part with the same probability."""
    chances = (math.comb(196, t) * usage**t * (1 - usage) ** (196 - t) for t in range(197))
    return sum(chance * table_entry(heads, 1 + t, *block) for t, chance in enumerate(chances))


def expected_entry(usage: float, width: int, all_heads: int, ratio: int) -> float:
    """Its mean where every patch, head and branch runs with the same probability."""
    total = 0.0
    for heads in range(1, all_heads + 1):
        chance = math.comb(all_heads, heads) * usage**heads * (1 - usage) ** (all_heads - heads)
        for attn, mlp in itertools.product((0, 1), repeat=2):
            branches = usage ** (attn + mlp) * (1 - usage) ** (2 - attn - mlp)
            total += chance * branches * over_patches(usage, heads, bool(attn), bool(mlp), width, all_heads, ratio)
    return total


@pytest.mark.parametrize(
    ("width", "heads", "ratio", "depth", "stem", "entry", "total", "half", "most"),
    [(384, 6, 4, 12, 0.06, 0.379, 4.61, 0.90, 2.2), (448, 7, 3, 19, 0.33, 0.431, 8.52, 1.7, 4.1)],
    ids=["deit-small", "t2t-19"],
)
def test_the_published_table_by_its_closed_form(width, heads, ratio, depth, stem, entry, total, half, most):
    """Its facts, and by how much it differs from what a block costs."""
    shape = (width, heads, ratio)
    full = table_entry(heads, 197, True, True, *shape)
    assert full == pytest.approx(entry, abs=5e-4) and stem + depth * full == pytest.approx(total, abs=5e-3)
    for usage, gmacs in ((0.5, half), (0.75, most)):  # the first block decides about patches only
        first = over_patches(usage, heads, True, True, *shape)
        found = stem + first + (depth - 1) * expected_entry(usage, *shape)
        assert found == pytest.approx(gmacs, abs=0.05 if gmacs > 1 else 0.01)

    cost = BlockCost(dim=width, attn_dim=width, mlp=2 * ratio * width**2)
    norms = 10 * 197 * width
    assert full * G == pytest.approx(cost.attention(197, 197) + 197 * cost.mlp + norms)
    for on in range(1, heads):
        w = on * width // heads
        ours = cost.attention(100, 100, torch.tensor([on / heads], dtype=torch.float64))
        missing = 100 * w * (width - w)  # of the output projection, which is not square
        assert float(ours) == pytest.approx(table_entry(on, 100, True, False, *shape) * G - norms + missing)
