"""Pairs of methods on images with nothing in them, or too much: blank, saturated, not a number, one patch, none."""

from __future__ import annotations

import itertools

import pytest
import torch

from oracles import make_images, make_vit, relative
from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.model import AdaptiveViT

SHAPE = {"depth": 3, "embed_dim": 48, "num_heads": 4, "img_size": 64}
# What leaves few tokens, or a number that depends on the image, in every block that allows it.
STRONG = {
    "adavit": "adavit(0.5, at=[0, 1, 2])",
    "algm": "algm(0.5, 0.5)",
    "ats": "ats(at=[0, 1, 2])",
    "avit": "avit(gamma=1, beta=-1)",
    "depth": "depth(2)",
    "diffrate": "diffrate(2, 2)",
    "dpc_knn": "dpc_knn(0.5, at=[0, 1, 2])",
    "cut": "cut([5, 3], at=[0, 1])",
    "dynamicvit": "dynamicvit(0.5, threshold=0.95, at=[0, 1, 2])",
    "evit": "evit(0.4, fuse=True, at=[0, 1, 2])",
    "grid": "grid(12)",
    "imagepiece": "imagepiece(p=1, merge=0.5, keep=0.5, merge_at=[0, 1, 2])",
    "kth": "kth(2, at=[0, 1], merge=True)",
    "ltmp": "ltmp(start=0.9, merge=0.1)",
    "mctf": "mctf(r=5)",
    "patchmerger": "patchmerger(3, at=1)",
    "pitome": "pitome(0.9)",
    "quadtree": "quadtree(threshold=5.0)",
    "radial": "radial(0.3, at=[0, 1, 2])",
    "random": "random(0.5, at=[0, 1, 2])",
    "random_plus": "random_plus(0.5, at=[0, 1, 2])",
    "tofu": "tofu(r=5, merge_from=1)",
    "token_pooling": "token_pooling(0.5, at=[0, 1, 2])",
    "tokenlearner": "tokenlearner(3, at=1)",
    "tome": "tome(r=5)",
    "topk": "topk(0.3, at=[0, 1, 2])",
}
METHODS = [STRONG.get(name, name) for name, entry in registry().items() if entry.kind == "method"]
TOKENIZERS = [STRONG.get(name, name) for name, entry in registry().items() if entry.kind == "tokenizer"]
ALONE = [*METHODS, *TOKENIZERS]
PAIRS = [f"{a} | {b}" for a, b in itertools.permutations(METHODS, 2)]
WITH_TOKENIZER = [f"{a} | {b}" for a in TOKENIZERS for b in METHODS]


def model_of(setting: str) -> AdaptiveViT:
    return AdaptiveViT(make_vit(**SHAPE), setting).eval()


def batch_of(model: AdaptiveViT) -> torch.Tensor:
    """Busy, blank, white, one bright point, and busy again."""
    images = make_images(model.vit, 5)
    images[1] = 0
    images[2] = 3
    images[3] = -1
    images[3, :, 5, 5] = 50
    return images


@torch.no_grad()
def check(setting: str, model: AdaptiveViT, images: torch.Tensor) -> None:
    together = model(images).logits
    assert together.isfinite().all(), setting
    alone = torch.cat([model(image.unsqueeze(0)).logits for image in images])
    for i in range(len(images)):
        assert relative(together[i], alone[i]) <= 1e-3, (setting, i)


@pytest.fixture(scope="module")
def base() -> AdaptiveViT:
    return model_of("dense")


def seconds(first: str) -> list[str]:
    """Methods behind a first one: not itself where it learns, since one set of parameters would serve both."""
    learns = any(True for _ in model_of(first).plan.parameters())
    return [second for second in METHODS if second != first or not learns]


@pytest.mark.parametrize("first", METHODS)
def test_pairs_of_methods_on_blank_and_busy_images(base, first):
    """No exception, numbers, and of each image those that it has alone: shares are of its own tokens."""
    images = batch_of(base)[:2]
    for second in seconds(first):
        check(f"{first} | {second}", base.at(f"{first} | {second}").eval(), images)


@pytest.mark.parametrize("size", [(64, 64), (16, 48)])
@pytest.mark.parametrize(
    "gated", ["random_plus(0.5, at=[0, 1, 2])", "topk(0.3, at=[0, 1, 2])", "adavit(0.5, at=[0, 1, 2])"]
)
def test_ats_samples_the_same_where_gates_left_tokens_without_attention(base, gated, size):
    images = batch_of(base)[:, :, : size[0], : size[1]]
    check(f"ats | {gated}", base.at(f"ats(at=[0, 1, 2]) | {gated}").eval(), images)


@pytest.mark.slow
@pytest.mark.parametrize("first", [*METHODS, *TOKENIZERS])
def test_pairs_on_every_degenerate_image(base, first):
    images = batch_of(base)
    for second in seconds(first):
        for size in ((64, 64), (16, 16), (16, 48), (1, 9)):
            picture = images[:, :, : size[0], : size[1]]
            check(f"{first} | {second}", base.at(f"{first} | {second}").eval(), picture)


@pytest.mark.parametrize("setting", ALONE)
def test_every_degenerate_image_alone(base, setting):
    check(setting, base.at(setting).eval(), batch_of(base))


@torch.no_grad()
@pytest.mark.parametrize("setting", [*ALONE, *WITH_TOKENIZER[::7], *PAIRS[::29]])
def test_an_image_of_one_patch_or_less(base, setting):
    model = base.at(setting).eval()
    for size in ((16, 16), (5, 3), (1, 1), (1, 64), (33, 16)):
        found = model(make_images(base.vit, 2, size))
        assert found.logits.isfinite().all() and found.trace.macs().min() > 0
    for size in ((0, 0), (0, 64), (64, 0)):
        with pytest.raises(UserError, match=rf"{size[0]}, {size[1]}"):
            model(torch.zeros(2, 3, *size))


@torch.no_grad()
@pytest.mark.parametrize("setting", [*ALONE, *PAIRS[::29]])
def test_an_empty_batch(base, setting):
    assert base.at(setting).eval()(torch.zeros(0, 3, 64, 64)).logits.shape == (0, 10)


@torch.no_grad()
@pytest.mark.parametrize("setting", [*ALONE, *PAIRS[::17]])
def test_an_image_that_is_not_a_number_stays_by_itself(base, setting):
    """No exception, and the others of its batch are what they are without it."""
    if "per_batch" in setting:
        pytest.skip("shares its tokens over the batch")
    model, images = base.at(setting).eval(), make_images(base.vit, 3)
    expected = model(images).logits
    for bad in (torch.nan, torch.inf, 3e38):
        images[1] = bad
        found = model(images).logits
        assert relative(found[[0, 2]], expected[[0, 2]]) <= 1e-4


@pytest.mark.parametrize("setting", [*METHODS, *PAIRS[::41]])
def test_training_on_blank_images(base, setting):
    model = base.at(setting).train()
    try:
        model(torch.zeros(2, 3, 64, 64)).logits.sum().backward()
    finally:
        model.eval()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    base.zero_grad()
