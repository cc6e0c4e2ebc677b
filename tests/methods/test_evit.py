"""EViT against the paper by hand: what is kept and fused, and token counts."""

from __future__ import annotations

import pytest
import torch

from oracles import encode_by_hand, logits_by_hand, make_images, make_tokens, make_vit, prune_by_hand, relative
from saccade.core.reduction import reduce
from saccade.errors import UserError
from saccade.methods.common.matching import KeepAttended
from saccade.model import AdaptiveViT

# Tokens of DeiT-S at 224 pixels after each of the three prunings, without the class token.
COUNTS = {
    "evit(0.9)": (177, 160, 144),
    "evit(0.8)": (157, 126, 101),
    "evit(0.7)": (138, 97, 68),
    "evit(0.6)": (118, 71, 43),
    "evit(0.5)": (98, 49, 25),
    "evit(0.9, fuse=True)": (178, 162, 147),
    "evit(0.8, fuse=True)": (158, 128, 104),
    "evit(0.7, fuse=True)": (139, 99, 71),
    "evit(0.6, fuse=True)": (119, 73, 45),
    "evit(0.5, fuse=True)": (99, 51, 27),
}


@pytest.fixture(scope="module")
def large():
    """Twelve narrow blocks on the 196 patches of 224 pixels."""
    return make_vit(depth=12, embed_dim=24, img_size=224)


@pytest.mark.parametrize("setting", COUNTS)
def test_token_counts(large, setting):
    first, second, third = (count + 1 for count in COUNTS[setting])
    expected = [197] * 3 + [first] * 3 + [second] * 3 + [third] * 3
    images = make_images(large, 1)
    with torch.no_grad():
        tokens, trace = AdaptiveViT(large, setting).forward_tokens(images)
    assert trace.tokens() == expected
    assert tokens.x.shape[1] == expected[-1]
    assert [int(block.owner.max()) + 2 for block in trace.blocks] == expected, "the owner maps agree"


@torch.no_grad()
def test_keep_one_is_the_plain_model(large):
    images = make_images(large, 1)
    dense, _ = AdaptiveViT(large).forward_tokens(images)
    for setting in ("evit(1.0)", "evit(1)", "evit(1.0, fuse=True)"):
        assert torch.equal(AdaptiveViT(large, setting).forward_tokens(images)[0].x, dense.x), setting


@pytest.mark.parametrize("family", ["vit", "distilled", "deit3", "dinov2-registers", "qk-norm", "clip"])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("score", ["class", "received"])
def test_whole_model_equals_the_paper_by_hand(family, fuse, score):
    """Also that a fused token is Σ a_j x_j, not divided by the sum of the weights."""
    vit = make_vit(family, depth=4)

    def prune(block, x, attention, key, size):
        if block == 0:
            return x, size
        judged = attention[0] if score == "class" else attention.mean(0)
        return prune_by_hand(x, judged, size, 0.6, vit.num_prefix_tokens, fuse)

    images = make_images(vit)
    model = AdaptiveViT(vit, f"evit(0.6, fuse={fuse}, score='{score}')")
    with torch.no_grad():
        assert relative(model(images).logits, logits_by_hand(vit, images, prune)) <= 1e-5
        tokens, _ = model.forward_tokens(images)
        by_hand = [encode_by_hand(vit, image, prune)[0] for image in images]
        assert relative(tokens.x, torch.stack(by_hand)) <= 1e-5


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.75, 0.999])
def test_fused_token_is_the_weighted_sum_of_the_rest(keep):
    tokens = make_tokens(2, 20, cls_attn=torch.rand(2, 20))
    found = reduce(tokens, KeepAttended(keep, "cls_attn", fuse=True)(tokens))
    for b in range(2):
        order = sorted(range(20), key=lambda i: -float(tokens.stats.cls_attn[b, i]))
        count = found.num_patches - 1
        kept = sorted(order[:count])
        assert torch.equal(found.patches[b, :count], tokens.patches[b, kept]), "in their old order"
        fused = sum((tokens.stats.cls_attn[b, i] * tokens.patches[b, i] for i in order[count:]), torch.zeros(8))
        torch.testing.assert_close(found.patches[b, -1], fused)


def test_training_equals_evaluation():
    vit = make_vit(depth=4)
    images = make_images(vit)
    for setting in ("evit(0.6)", "evit(0.6, fuse=True)"):
        model = AdaptiveViT(vit, setting)
        evaluated = model.eval()(images)
        trained = model.train()(images)
        assert torch.equal(trained.logits, evaluated.logits)
        assert trained.trace.tokens() == evaluated.trace.tokens()
    vit.eval()


@pytest.mark.parametrize("share", [0.1, 0.29, 0.55, 0.57, 0.58, 0.07])
def test_rounding_does_not_add_a_token(share):
    """0.55 · 100 is 55.00000000000001 in floating point, and its ceiling 56."""
    assert KeepAttended(share, "cls_attn").count(100) == round(share * 100)


def test_at_least_one_token_is_kept():
    assert KeepAttended(0.001, "cls_attn").count(7) == 1


def test_padding_is_dropped_first():
    """Also before tokens that nobody attends to."""
    valid = torch.tensor([[False, True, False, True]])
    for scores in ([0.0, 0.1, 0.0, 0.2], [0.0, 0.0, 0.0, 0.0]):
        tokens = make_tokens(1, 4, cls_attn=torch.tensor([scores]), valid=valid)
        found = reduce(tokens, KeepAttended(0.5, "cls_attn")(tokens))
        assert found.valid.tolist() == [[True, True]] and found.owner.tolist() == [[-1, 0, -1, 1]]


def test_any_blocks_can_drop():
    vit = make_vit(depth=4)
    images = make_images(vit, 1)
    for at, expected in {(0,): [9, 9, 9, 9], (3,): [17, 17, 17, 9], (0, 2): [9, 9, 5, 5], (): [17] * 4}.items():
        assert AdaptiveViT(vit, f"evit(0.5, at={at})")(images).trace.tokens() == expected
    assert AdaptiveViT(vit, "evit(0.5, at=1)")(images).trace.tokens() == [17, 9, 9, 9]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("evit(0)", r"keep=0 .*\[0.001, 1\]"),
        ("evit(1.01)", r"keep=1.01 .*\[0.001, 1\]"),
        ("evit(-0.5)", r"keep=-0.5"),
        ("evit('half')", r"keep='half'"),
        ("evit(None)", r"keep=None"),
        ("evit(True)", r"keep=True"),
        ("evit(fuse=1)", r"fuse=1 is not True or False"),
        ("evit(fuse='no')", r"fuse='no'"),
        ("evit(score='best')", r"score='best' is not one of class, received"),
        ("evit(at=3)", r"block 3 is not one of 0 … 2"),
        ("evit(at=[0, -1])", r"block -1"),
        ("evit(at=[0.5])", r"block 0.5"),
        ("evit(at=True)", r"block True"),
        ("evit(at='all')", r"block 'a'"),
        ("evit(at=1.5)", r"wrong type"),
    ],
)
def test_knobs_out_of_range(setting, says):
    with pytest.raises(UserError, match=rf"^evit: .*{says}|^evit: {says}"):
        AdaptiveViT(make_vit(), setting)
