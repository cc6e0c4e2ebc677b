"""ToMe against brute force."""

from __future__ import annotations

import pytest
import torch

from oracles import logits_by_hand, make_images, make_tokens, make_vit, merge_by_hand, relative, with_fields
from saccade.core.reduction import reduce
from saccade.errors import UserError
from saccade.methods.tome import BipartiteMerge, resolve
from saccade.model import AdaptiveViT

SHAPES = [(197, 13), (197, 98), (197, 200), (50, 5), (5, 2), (4, 1), (3, 1)]


@pytest.mark.parametrize("prefix", [0, 1, 2], ids=["no class token", "class token", "and distillation token"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("length", "r"), SHAPES)
def test_equals_the_paper_by_brute_force(length, r, dtype, bound, prefix):
    torch.manual_seed(length + r)
    patches = length - prefix
    size = torch.randint(1, 9, (3, patches)).to(dtype)
    key = torch.randn(3, patches, 16, dtype=dtype)
    tokens = make_tokens(3, patches, prefix, width=16, seed=r, dtype=dtype, size=size, key=key)
    method = BipartiteMerge(r, 16)
    found = reduce(tokens, method(tokens)) if method.count(patches) < patches else tokens
    for b in range(3):
        metric = torch.cat([torch.randn(prefix, 16, dtype=dtype), key[b]])
        sizes = [1.0] * prefix + size[b].tolist()
        x, sizes, _ = merge_by_hand(tokens.x[b], metric, sizes, r, prefix > 0, prefix > 1)
        assert found.x[b].shape == x.shape
        if prefix:
            assert (found.x[b] - x).abs().max() <= bound
            assert found.size[b].tolist() == sizes[prefix:]
        else:  # without a class token the reference leaves unmerged tokens in the order of their similarity
            ours = sorted(zip(found.size[b].tolist(), found.x[b].tolist(), strict=True))
            theirs = sorted(zip(sizes, x.tolist(), strict=True))
            for (mine, row), (other, expected) in zip(ours, theirs, strict=True):
                assert mine == other and torch.tensor(row).sub(torch.tensor(expected)).abs().max() <= max(bound, 1e-7)


@pytest.mark.parametrize("family", ["vit", "distilled", "deit3", "qk-norm", "clip"])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_whole_model_equals_the_paper_by_hand(family, r):
    vit = make_vit(family, depth=4)

    def merge(block, x, attention, key, size):
        x, size, _ = merge_by_hand(x, key, size, r, has_dist=family == "distilled")
        return x, size

    images = make_images(vit)
    with torch.no_grad():
        found = AdaptiveViT(vit, f"tome(r={r})")(images).logits
    assert relative(found, logits_by_hand(vit, images, merge)) <= 1e-5


@pytest.mark.parametrize("r", [1, 8, 10_000])
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_prefix_is_never_merged(prefix, r):
    """Even where every patch equals the class token exactly."""
    tokens = make_tokens(2, 20, prefix)
    tokens = with_fields(tokens, x=tokens.x[:, :1].expand(-1, 20 + prefix, -1).clone(), key=torch.ones(2, 20, 4))
    tokens.x[:, 1:prefix] += 1
    for _ in range(4):
        tokens = with_fields(tokens, key=torch.ones(2, tokens.num_patches, 4))
        reduced = reduce(tokens, BipartiteMerge(r, 4)(tokens))
        assert torch.equal(reduced.x[:, :prefix], tokens.x[:, :prefix])
        assert reduced.size.sum(1).tolist() == [20, 20]
        tokens = reduced


def test_padding_is_not_merged_with_tokens():
    """In a ragged batch no token may vanish into padding, and no padding may count in a token."""
    torch.manual_seed(0)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[0, 12:] = False
    tokens = make_tokens(2, 20, key=torch.randn(2, 20, 4), valid=valid)
    reduction = BipartiteMerge(6, 4)(tokens)
    into = reduction.keep.gather(1, reduction.merge.dst)
    assert torch.equal(valid.gather(1, reduction.merge.src), valid.gather(1, into))


@pytest.mark.parametrize("patches", range(1, 30))
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_clip(patches, prefix):
    for r in (0, 1, 2, patches // 2, patches, 10_000):
        method = BipartiteMerge(r, 4)
        left = patches - min(r, patches // 2)
        assert method.count(patches) == left
        if left < patches:
            tokens = make_tokens(1, patches, prefix, key=torch.randn(1, patches, 4))
            assert reduce(tokens, method(tokens)).num_patches == left


@pytest.mark.parametrize(
    ("depth", "setting", "tokens"),
    [(24, "tome(r=8)", 7), (12, "tome(r=13)", 41), (12, "tome(r=16)", 11), (12, "tome(r=0)", 197)],
)
def test_tokens_left(depth, setting, tokens):
    vit = make_vit(depth=depth, embed_dim=24, img_size=224)
    model = AdaptiveViT(vit, setting)
    images = make_images(vit, 1)
    with torch.no_grad():
        encoded, trace = model.forward_tokens(images)
        assert encoded.x.shape[1] == trace.tokens()[-1] == model(images).trace.tokens()[-1] == tokens


def test_zero_is_the_identity():
    vit = make_vit()
    images = make_images(vit)
    with torch.no_grad():
        tokens, _ = AdaptiveViT(vit, "tome(r=0)").forward_tokens(images)
        assert torch.equal(tokens.x, AdaptiveViT(vit).forward_tokens(images)[0].x)
    assert tokens.size is None


@pytest.mark.parametrize(
    ("r", "inflection", "depth", "schedule"),
    [
        (13, 0.0, 12, [13] * 12),
        (16, -1.0, 12, [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]),
        (16, 1.0, 12, [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32]),
        ((5, 4, 3), 0.0, 6, [5, 4, 3, 0, 0, 0]),
        ((), 0.0, 3, [0, 0, 0]),
        (7, -1.0, 1, [14]),
    ],
)
def test_schedules(r, inflection, depth, schedule):
    assert resolve(r, inflection, depth) == schedule


def test_the_published_schedule_loses_eleven_tokens_to_rounding():
    assert sum(resolve(8, -1.0, 24)) == 181
    assert sum(resolve(8, 0.0, 24)) == 192


@pytest.mark.parametrize(
    "setting",
    [
        "tome(r=-1)",
        "tome(r=2.5)",
        "tome(r=True)",
        "tome(r='a')",
        "tome(r=None)",
        "tome(r=[1, 2.5])",
        "tome(r=[1, -2])",
        "tome(r=[1, 1, 1, 1])",
        f"tome(r={'9' * 400})",
        "tome(inflection=1.5)",
        "tome(inflection=-2)",
        "tome(inflection='x')",
        "tome(inflection=None)",
    ],
)
def test_knobs_out_of_range(setting):
    with pytest.raises(UserError, match=r"^tome: "):
        AdaptiveViT(make_vit(), setting)


def test_sizes_reach_attention_and_the_readings():
    """With proportional attention left out, the logits of a merged run would differ."""
    vit = make_vit(depth=4)
    images = make_images(vit)
    without = []

    def merge(block, x, attention, key, size):
        x, grown, _ = merge_by_hand(x, key, size, 5)
        without.append(grown)
        return x, [1.0] * len(x)

    with torch.no_grad():
        found = AdaptiveViT(vit, "tome(r=[5])")(images).logits
    assert relative(found, logits_by_hand(vit, images, merge)) > 1e-3
