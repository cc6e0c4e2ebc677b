"""``algm`` from the first block to the logits, against slow, obvious code: windows, then the even and odd places."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from oracles import make_images, make_vit, relative
from saccade.model import AdaptiveViT

SHAPE = {"depth": 4, "embed_dim": 48, "num_heads": 6}


def by_hand(vit, image: torch.Tensor, grid: tuple[int, int], local: float, merge: float, weighted: bool):
    """Logits of one image: windows merge in block 0, pairs in block 1, between attention and MLP."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))
    size = [1.0] * (x.shape[1] - 1)
    for i, block in enumerate(vit.blocks):
        x = x + block.ls1(block.attn(block.norm1(x)))
        if i == 0 and local:  # else nothing comes into another order
            x, size = windows(x, grid, local)
        if i == 1:
            x = anywhere(x, size, merge, weighted)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return vit.forward_head(vit.norm(x))


def windows(x: torch.Tensor, grid: tuple[int, int], share: float):
    """The most uniform windows become one token; then stand the tokens that are first in no window, and the firsts."""
    (height, width), patches = grid, x[0, 1:]
    found = []
    for r in range(0, height - 1, 2):
        for c in range(0, width - 1, 2):
            cells = [r * width + c, r * width + c + 1, (r + 1) * width + c, (r + 1) * width + c + 1]
            pairs = [(i, j) for i in cells for j in cells if i != j]
            alike = sum(float(F.cosine_similarity(patches[i], patches[j], dim=0)) for i, j in pairs) / 12
            found.append((alike, cells))
    best = sorted(found, key=lambda window: -window[0])[: int(share * len(found) + 1e-9)]
    gone = {cell for _, cells in best for cell in cells[1:]}
    firsts = [cells[0] for _, cells in found]
    means = {cells[0]: patches[cells].mean(0) for _, cells in best}
    order = [cell for cell in range(height * width) if cell not in gone and cell not in firsts] + firsts
    tokens = torch.stack([means.get(cell, patches[cell]) for cell in order])
    return torch.cat([x[:, :1], tokens[None]], dim=1), [4.0 if cell in means else 1.0 for cell in order]


def anywhere(x: torch.Tensor, size: list[float], share: float, weighted: bool) -> torch.Tensor:
    """A and B are the even and odd places of the sequence that the class token leads; it stays. [rest of A | B]."""
    size = [1.0, *size] if weighted else [1.0] * (len(size) + 1)
    count = x.shape[1]
    proposals = []
    for a in range(2, count, 2):
        alike = {b: float(F.cosine_similarity(x[0, a], x[0, b], dim=0)) for b in range(1, count, 2)}
        partner = max(alike, key=lambda b, alike=alike: alike[b])
        proposals.append((alike[partner], a, partner))
    merged = sorted(proposals, key=lambda p: -p[0])[: min(int(share * (count - 1) + 1e-9), (count - 1) // 2)]
    left = [x[0, 0], *(x[0, a] for a in range(2, count, 2) if a not in [m[1] for m in merged])]
    for b in range(1, count, 2):
        group = [b, *(a for _, a, partner in merged if partner == b)]
        left.append(sum(size[i] * x[0, i] for i in group) / sum(size[i] for i in group))
    return torch.stack(left)[None]


@torch.no_grad()
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("grid", "local", "merge"), [((8, 8), 0.5, 0.25), ((5, 7), 0.7, 0.4), ((6, 4), 0.0, 0.5)])
def test_the_whole_is_that_of_plain_code(grid, local, merge, weighted):
    vit = make_vit("deit", **SHAPE, img_size=tuple(16 * side for side in grid))
    images = make_images(vit, 4)
    expected = torch.cat([by_hand(vit, image, grid, local, merge, weighted) for image in images])
    model = AdaptiveViT(vit, f"algm({local}, {merge}, weighted={weighted})")
    assert model.plan.methods[0].at[-1] == 1
    assert relative(model(images).logits, expected) <= 1e-5
    other = AdaptiveViT(vit, f"algm({local}, {merge}, weighted={not weighted})")(images).logits
    assert not local or relative(other, expected) > 1e-3, "the two means differ where windows were merged"
