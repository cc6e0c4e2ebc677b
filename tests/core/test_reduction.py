"""``reduce`` and the token set against loops, where they need no method."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from oracles import (
    attention_by_hand,
    field_of,
    make_images,
    make_tokens,
    make_vit,
    random_mixture,
    random_reduction,
    reduce_by_hand,
    relative,
    with_fields,
)
from saccade.core.merging import Merge, few_means, means
from saccade.core.reduction import Fuse, Reduction, SoftReduction, reduce
from saccade.core.tokens import DROPPED, Tokens
from saccade.execution import attention
from saccade.execution.attention import attend
from saccade.execution.mixing import Asked
from saccade.execution.policy import Execution
from saccade.methods.common.matching import best_edges
from saccade.model import AdaptiveViT

FIELDS = ("size", "valid", "gate_mask", "key", "cls_attn", "attn_received")


def full_tokens(
    images: int, patches: int, prefix: int, seed: int, fields: tuple[str, ...], dtype=torch.float32
) -> Tokens:
    """Random tokens with these fields, and an owner map in which tokens own several cells, or none is dropped twice."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        "size": torch.randint(1, 6, (images, patches), generator=generator).to(dtype),
        "valid": torch.rand(images, patches, generator=generator) < 0.8,
        "gate_mask": (torch.rand(images, patches, generator=generator) < 0.7).to(dtype),
        "key": torch.randn(images, patches, 4, generator=generator, dtype=dtype),
        "cls_attn": torch.rand(images, patches, generator=generator, dtype=dtype),
        "attn_received": torch.rand(images, patches, generator=generator, dtype=dtype),
    }
    tokens = make_tokens(images, patches, prefix, seed=seed, dtype=dtype, **{name: values[name] for name in fields})
    owner = torch.randint(-1, patches, (images, 3 * patches), generator=generator)
    return replace(tokens, owner=owner, grid=(3, patches))


seeds = st.integers(0, 10_000)
some_fields = st.sets(st.sampled_from(FIELDS)).map(lambda chosen: tuple(sorted(chosen)))


@given(seeds, st.integers(1, 3), st.integers(1, 12), st.integers(0, 5), some_fields, st.tuples(*[st.booleans()] * 3))
def test_reduce_is_what_loops_give(seed, images, patches, prefix, fields, kinds):
    merge, fuse, drop = kinds
    tokens = full_tokens(images, patches, prefix, seed, fields, torch.float64)
    reduction = random_reduction(images, patches, seed, merge=merge, fuse=fuse, drop=drop)
    found, expected = reduce(tokens, reduction), reduce_by_hand(tokens, reduction)
    assert torch.equal(found.x[:, :prefix], tokens.x[:, :prefix])
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-6)
    assert torch.equal(found.owner, expected.owner)
    for name in FIELDS:
        a, b = field_of(found, name), field_of(expected, name)
        assert (a is None) == (b is None), name
        if b is not None:
            torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol=1e-6, msg=name)


@given(seeds, st.integers(1, 3), st.integers(2, 12), st.integers(0, 5))
def test_weights_of_a_merge_need_not_be_sizes(seed, images, patches, prefix):
    tokens = full_tokens(images, patches, prefix, seed, ("size", "key"), torch.float64)
    reduction = random_reduction(images, patches, seed, merge=True, fuse=False, drop=False)
    weight = torch.rand(images, patches, dtype=torch.float64) + 0.1
    found, expected = (
        f(tokens, replace(reduction, merge=replace(reduction.merge, weight=weight))) for f in (reduce, reduce_by_hand)
    )
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.size, expected.size.to(found.size.dtype))


@given(seeds, st.integers(1, 3), st.integers(1, 12), st.integers(1, 6), st.integers(0, 5))
def test_soft_reduction_mixes_patches_and_forgets_what_it_cannot_carry(seed, images, patches, left, prefix):
    tokens = full_tokens(images, patches, prefix, seed, FIELDS)
    soft = random_mixture(images, patches, left, seed)
    found = reduce(tokens, soft)
    assert torch.equal(found.x[:, :prefix], tokens.x[:, :prefix])
    for b in range(images):
        for slot in range(left):
            expected = sum(soft.weights[b, slot, i] * tokens.patches[b, i] for i in range(patches))
            torch.testing.assert_close(found.patches[b, slot], expected)
        for cell, token in enumerate(tokens.owner[b].tolist()):
            gave = -1 if token < 0 else max(range(left), key=lambda m: float(soft.weights[b, m, token]))
            assert int(found.owner[b, cell]) == gave
    assert all(field_of(found, name) is None for name in FIELDS)


@given(seeds, st.integers(1, 3), st.integers(1, 12), st.tuples(*[st.booleans()] * 3))
def test_every_cell_is_owned_once(seed, images, patches, kinds):
    merge, fuse, drop = kinds
    tokens = make_tokens(images, patches, seed=seed)
    found = reduce(tokens, random_reduction(images, patches, seed, merge=merge, fuse=fuse, drop=drop))
    dropped = (found.owner < 0).sum(1)
    assert torch.equal(found.area().sum(1) + dropped, torch.full((images,), patches))
    assert (found.area() >= 1).all(), "every new token stands for something"
    assert drop or not dropped.any()
    for b in range(images):
        assert found.area()[b].tolist() == [found.owner[b].tolist().count(i) for i in range(found.num_patches)]


@given(seeds, st.integers(2, 12))
def test_mass_is_conserved(seed, patches):
    tokens = make_tokens(2, patches, seed=seed)
    mass = tokens.patches.sum(1)
    for step in range(3):  # several merges, one after the other
        reduction = random_reduction(2, tokens.num_patches, seed + step, merge=True, fuse=False, drop=False)
        tokens = reduce(tokens, reduction)
        assert torch.equal(tokens.size.sum(1), torch.full((2,), float(patches)))
        assert torch.equal(tokens.size.long(), tokens.area())
        torch.testing.assert_close((tokens.size.unsqueeze(-1) * tokens.patches).sum(1), mass, rtol=1e-5, atol=1e-5)


@given(seeds, st.integers(2, 12))
def test_kept_and_dropped_make_the_whole(seed, patches):
    tokens = make_tokens(2, patches, seed=seed)
    for step in range(3):
        before = tokens
        reduction = random_reduction(2, tokens.num_patches, seed + step, merge=False, fuse=False, drop=True)
        tokens = reduce(tokens, reduction)
        gone = (tokens.owner < 0).sum(1)
        assert torch.equal(gone + tokens.num_patches, torch.full((2,), patches))
        assert ((tokens.owner < 0) >= (before.owner < 0)).all(), "what is dropped stays dropped"


@given(seeds, st.integers(0, 6), st.tuples(*[st.booleans()] * 3))
def test_prefix_is_bit_identical(seed, prefix, kinds):
    merge, fuse, drop = kinds
    tokens = make_tokens(2, 9, prefix, seed=seed)
    copy = tokens.x.clone()
    found = reduce(tokens, random_reduction(2, 9, seed, merge=merge, fuse=fuse, drop=drop))
    assert found.num_prefix == prefix and torch.equal(found.x[:, :prefix], copy[:, :prefix])
    assert torch.equal(tokens.x, copy), "the input is not written to"


def test_none_is_the_identity():
    tokens = make_tokens()
    assert reduce(tokens, None) is tokens


def test_a_dropped_cell_keeps_its_last_features():
    tokens = make_tokens(2, 6, state={DROPPED: torch.zeros(2, 6, 8)})
    first = reduce(tokens, Reduction(torch.tensor([[0, 1, 3, 4, 5], [0, 1, 2, 3, 4]])))
    changed = replace(first, x=first.x + 1)
    second = reduce(changed, Reduction(torch.tensor([[1, 2, 3], [1, 2, 3]])))
    assert torch.equal(second.dropped_features[0, 2], tokens.patches[0, 2]), "dropped first, and not touched again"
    assert torch.equal(second.dropped_features[0, 0], tokens.patches[0, 0] + 1)
    assert torch.equal(second.dropped_features[0, 5], tokens.patches[0, 5] + 1)
    assert (second.dropped_features[0, [1, 3, 4]] == 0).all(), "those that stay are read from the tokens"
    assert second.owner[0].tolist() == [-1, 0, -1, 1, 2, -1]


# --- proportional attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_proportional_attention_is_key_duplication(dtype, bound, fused):
    attend = partial(attention.attend, execution=Execution("fused" if fused else "unfused"))
    attn = make_vit().blocks[0].attn.to(dtype)
    x = torch.randn(2, 9, 96, dtype=dtype)
    repeats = torch.tensor([1, 4, 1, 2, 7, 1, 1, 3, 1])
    with torch.no_grad():
        found = attend(attn, x, repeats.to(dtype).log().expand(2, -1))
        copies = attend(attn, x.repeat_interleave(repeats, dim=1))
        firsts = repeats.cumsum(0) - repeats
        assert relative(found.x, copies.x[:, firsts]) <= bound
        assert relative(attend(attn, x).x, copies.x[:, firsts]) > 1e-3
    assert found.kernel == ("fused+bias" if fused else "unfused+bias")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_bias_channel_and_product_forms_agree(dtype, bound):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 16, dtype=dtype) for _ in range(3))
    size = torch.randint(1, 8, (9,)).to(dtype)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log().expand(9, 9))
    channel = torch.cat([q, torch.ones_like(q[..., :1])], -1)
    longer = torch.cat([k, 4 * size.log().expand(2, 3, 9).unsqueeze(-1)], -1)  # 4 = sqrt(16)
    assert relative(F.scaled_dot_product_attention(channel, longer, v, scale=1 / 4), expected) <= bound
    product = (q @ k.mT / 4).exp() * size
    assert relative(product / product.sum(-1, keepdim=True) @ v, expected) <= bound


def test_key_bias_of_the_token_set():
    size = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    valid = torch.tensor([[True, True, True, False]])
    mask = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    tokens = make_tokens(1, 4, 2)
    hidden = -math.inf
    assert tokens.key_bias() is None
    assert replace(tokens, size=size).key_bias()[0].tolist() == pytest.approx([0, 0, 0, *map(math.log, (2, 3, 4))])
    assert replace(tokens, valid=valid).key_bias()[0].tolist() == [0, 0, 0, 0, 0, hidden]
    assert with_fields(tokens, gate_mask=mask).key_bias()[0].tolist() == [0, 0, 0, hidden, 0, 0]
    all_three = with_fields(tokens, size=size, valid=valid, gate_mask=mask).key_bias()[0]
    assert all_three.tolist() == pytest.approx([0, 0, 0, hidden, math.log(3), hidden])
    assert all_three.dtype == torch.float32


# --- attention in general ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "deit3", "qk-norm", "inner-norms"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_readings_are_those_of_the_full_attention(family, biased, fused):
    attend = partial(attention.attend, execution=Execution("fused" if fused else "unfused"))
    attn = make_vit(family).blocks[1].attn
    torch.manual_seed(0)
    x = 2 * torch.randn(2, 17, 96)
    bias = torch.randint(1, 9, (2, 17)).float().log() if biased else None
    with torch.no_grad():
        some = attend(attn, x, bias, ask=Asked(read=frozenset({"cls_attn", "key"})))
        every = attend(attn, x, bias, ask=Asked(read=frozenset({"cls_attn", "key", "attn_received"})))
        for b in range(2):
            y, shares, keys = attention_by_hand(attn, x[b], None if bias is None else bias[b])
            assert relative(some.x[b], y) <= 1e-5 and relative(every.x[b], y) <= 1e-5
            for found in (some, every):
                assert (found.stats.cls_attn[b] - shares[:, 0].mean(0)).abs().max() <= 1e-6
                assert float(found.stats.cls_attn[b].sum()) == pytest.approx(1, abs=1e-6)
                assert relative(found.stats.key[b], keys.mean(0)) <= 1e-5
            assert (every.stats.attn_received[b] - shares.mean((0, 1))).abs().max() <= 1e-6
    assert some.stats.attn_received is None


@pytest.mark.parametrize("queries", [1, 5])
def test_fewer_queries_are_the_first_rows(queries):
    attn = make_vit("qk-norm").blocks[0].attn
    x, bias = torch.randn(2, 17, 96), torch.randint(1, 9, (2, 17)).float().log()
    with torch.no_grad():
        assert (
            relative(attend(attn, x, bias, ask=Asked(queries=queries)).x, attend(attn, x, bias).x[:, :queries]) <= 1e-5
        )


# --- unmerge -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "distilled", "dinov2-registers", "siglip-average"])
def test_cells_undo_twelve_merges(family):
    vit = make_vit(family, depth=12, img_size=140 if family == "dinov2-registers" else 160)
    tokens, trace = AdaptiveViT(vit, "tome(r=7)").forward_tokens(make_images(vit))
    assert tokens.num_patches == 100 - 12 * 7
    features = tokens.scatter_to_grid(tokens.patches)
    for b in range(2):
        for token in range(tokens.num_patches):
            own = features[b, tokens.owner[b] == token]
            assert len(own) == int(tokens.size[b, token]) >= 1
            assert (own == tokens.patches[b, token]).all(), "constant on groups, the token itself on singletons"
    sizes = [1] * trace.first.shape[1]
    assert int(tokens.size.sum()) == 2 * len(sizes)
    for before, after in zip(
        [trace.first, *(t.owner for t in trace.blocks)], (t.owner for t in trace.blocks), strict=False
    ):
        for b in range(2):
            pairs = {(int(old), int(new)) for old, new in zip(before[b], after[b], strict=True)}
            assert len(pairs) == len({old for old, _ in pairs}), "merged once, never parted again"


@given(seeds, st.integers(2, 10))
def test_a_token_is_the_weighted_mean_of_its_cells(seed, patches):
    tokens = make_tokens(2, patches, seed=seed, dtype=torch.float64)
    found = tokens
    for step in range(3):
        found = reduce(found, random_reduction(2, found.num_patches, seed + step, merge=True, fuse=False, drop=False))
    for b in range(2):
        for token in range(found.num_patches):
            mean = tokens.patches[b, found.owner[b] == token].mean(0)
            torch.testing.assert_close(found.patches[b, token], mean, rtol=0, atol=1e-6)


def test_cells_spread_values_and_fill_dropped_ones():
    tokens = replace(make_tokens(1, 2), owner=torch.tensor([[1, -1, 0, 1]]))
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert tokens.scatter_to_grid(values).tolist() == [[[3, 4], [0, 0], [1, 2], [3, 4]]]
    assert tokens.scatter_to_grid(values, torch.full((1, 4, 2), 9.0)).tolist()[0][1] == [9, 9]


# --- degenerate input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["zeros", "one zero row", "equal", "duplicates", "huge"])
def test_matching_of_degenerate_features(kind, dtype):
    torch.manual_seed(0)
    feature = torch.randn(2, 10, 4)
    if kind == "zeros":
        feature.zero_()
    if kind == "one zero row":
        feature[:, 3] = 0
    if kind == "equal":
        feature[:] = 1
    if kind == "duplicates":
        feature[:, 1::2] = feature[:, 0::2]
    if kind == "huge":
        feature *= 1e4
    merged, rest, partner = best_edges(feature[:, 0::2].to(dtype), feature[:, 1::2].to(dtype), 3)
    assert merged.shape == partner.shape == (2, 3) and rest.shape == (2, 2)
    assert torch.equal(torch.cat([merged, rest], 1).sort(1).values, torch.arange(5).expand(2, -1))
    assert ((partner >= 0) & (partner < 5)).all()
    if kind in ("zeros", "equal"):
        assert merged.tolist() == [[0, 1, 2]] * 2, "among equals the first wins"
    if kind == "one zero row":
        unit = F.normalize(feature.to(dtype).float()[0], dim=-1)
        best = (unit[0::2] @ unit[1::2].T).max(1).values
        assert set(merged[0].tolist()) == set(best.argsort(descending=True)[:3].tolist()), "it is similar to nothing"


def test_all_fused_tokens_without_attention():
    """Nobody attended to any of the rest: the fused token is zero, and no NaN may come of it."""
    tokens = make_tokens(1, 4, cls_attn=torch.tensor([[0.9, 0.1, 0.0, 0.0]]), key=torch.randn(1, 4, 4))
    rest = torch.tensor([[2, 3]])
    found = reduce(tokens, Reduction(torch.tensor([[0, 1]]), fuse=Fuse(rest, tokens.stats.cls_attn.gather(1, rest))))
    assert (found.patches[0, 2] == 0).all()
    assert found.stats.key.isfinite().all()


@pytest.mark.parametrize("setting", ["tome(r=7)", "evit(0.5, fuse=True)", "imagepiece(keep=0.6)", "random(0.5)"])
@pytest.mark.parametrize("kind", ["black", "noise"])
def test_the_same_for_ten_runs_and_any_number_of_threads(setting, kind):
    vit = make_vit(img_size=128)
    model = AdaptiveViT(vit, setting)
    images = make_images(vit) * (kind == "noise")
    if kind == "black":
        vit.pos_embed.data.zero_()  # all patches are equal
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            expected = model(images)
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                for run in range(10):
                    found = model(images)
                    if count == 1:
                        assert torch.equal(found.logits, expected.logits), run
                    assert torch.equal(found.trace.blocks[-1].owner, expected.trace.blocks[-1].owner), (count, run)
                    assert relative(found.logits, expected.logits) <= 1e-5
    finally:
        torch.set_num_threads(threads)


# --- validity and order
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["merge", "fuse", "soft"])
def test_gradcheck(kind):
    tokens = full_tokens(2, 6, 1, 0, ("size",), torch.float64)
    reduction: Reduction | SoftReduction
    if kind == "soft":
        reduction = replace(random_mixture(2, 6, 3), weights=random_mixture(2, 6, 3).weights.double())
    else:
        reduction = random_reduction(2, 6, 4, merge=kind == "merge", fuse=kind == "fuse", drop=True)
    x = tokens.x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reduce(replace(tokens, x=x), reduction).x, (x,))


@pytest.mark.parametrize("kind", ["merge", "fuse"])
def test_every_source_gets_a_finite_gradient(kind):
    tokens = full_tokens(2, 8, 1, 0, ("size", "key", "cls_attn"))
    reduction = random_reduction(2, 8, 3, merge=kind == "merge", fuse=kind == "fuse", drop=False)
    x = tokens.x.clone().requires_grad_()
    found = reduce(replace(tokens, x=x), reduction)
    (found.x * torch.randn(found.x.shape)).sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).all()


def test_gradient_of_the_fusing_weights():
    tokens = make_tokens(1, 4)
    score = torch.tensor([[0.4, 0.3, 0.2, 0.1]], requires_grad=True)
    rest = torch.tensor([[2, 3]])
    found = reduce(tokens, Reduction(torch.tensor([[0, 1]]), fuse=Fuse(rest, score.gather(1, rest))))
    found.patches[0, 2].sum().backward()
    assert score.grad[0].tolist() == pytest.approx([0, 0, *tokens.patches[0, 2:].sum(-1).tolist()])


def test_no_gradient_through_the_choice():
    feature = torch.randn(1, 6, 4, requires_grad=True)
    assert not any(t.requires_grad for t in best_edges(feature[:, 0::2], feature[:, 1::2], 2))


@given(seeds, st.integers(2, 10), some_fields)
def test_an_image_does_not_depend_on_its_batch(seed, patches, fields):
    tokens = full_tokens(3, patches, 1, seed, fields)
    reduction = random_reduction(3, patches, seed, merge=True, fuse=False, drop=True)
    found = reduce(tokens, reduction)

    def only(value, b):
        return None if value is None else value[b : b + 1]

    for b in range(3):
        names = ("x", "owner", *FIELDS)
        alone = reduce(
            with_fields(tokens, **{name: only(field_of(tokens, name), b) for name in names}),
            Reduction(only(reduction.keep, b), Merge(only(reduction.merge.src, b), only(reduction.merge.dst, b))),
        )
        for name in names:
            whole = only(field_of(found, name), b)
            assert whole is None or torch.equal(whole, field_of(alone, name)), name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("images", [1, 3])
def test_means_of_few_are_the_means_of_all(images: int, prefix: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(images + prefix)
    n, merged = 20, 7
    x = torch.randn(images, prefix + n, 6, generator=draw).to(dtype)
    order = torch.rand(images, n, generator=draw).argsort(1)
    src, keep = order[:, :merged], order[:, merged:].sort(1).values
    dst = torch.randint(0, 4, (images, merged), generator=draw)  # some are merged into by several
    for size in (None, torch.randint(1, 5, (images, n), generator=draw).float()):
        expected, sizes = means(x[:, prefix:], size, keep, Merge(src, dst))
        found, total = few_means(x, size, keep, Merge(src, dst), prefix)
        assert torch.equal(found[:, :prefix], x[:, :prefix]) and torch.equal(total, sizes)
        close = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        assert (found[:, prefix:] - expected).abs().max() <= close * expected.abs().max()
        alone = sizes == (1.0 if size is None else size.gather(1, keep))
        assert torch.equal(
            found[:, prefix:][alone], x[:, prefix:].gather(1, keep.unsqueeze(2).expand(-1, -1, 6))[alone]
        )
