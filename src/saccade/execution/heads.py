"""Attention by some of its heads: those that are off are not computed.

Heads that run for the same images run together: where all images agree, that is one slice of the weights; where each
has its own, there are as many groups as heads at most, and the images of a group are gathered for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.gates import Gates
from saccade.core.hooks import plain_linear

MAX_HEAD_SHARE = 0.8  # share of (image, head) pairs up to which skipping pays where images differ, in a large batch …
SMALL = 4.0  # … and how it shrinks in a small one, WORTH / (1 + SMALL / images): ``benchmarks/ragged.py --heads``

# queries, keys, values [T, h, d], rows of each image, key bias [T] -> mixed values [T, h, d], and how
Mix = Callable[[Tensor, Tensor, Tensor, tuple[int, ...], Tensor | None], tuple[Tensor, str]]


def should_skip_heads(attn: Attention, gates: Gates) -> bool:
    """Whether to skip the heads that are off, rather than to compute and forget them.

    Always where all images agree (a batch of one does), or else where enough are off. Waits for the device.
    """
    if gates.head is None or torch.compiler.is_compiling():
        return False
    plain = plain_linear(attn.qkv) and plain_linear(attn.proj) and isinstance(attn.norm, nn.Identity)
    if not plain or getattr(attn, "gate", None) is not None:  # these need all heads side by side
        return False
    attending = [True] * len(gates.head) if gates.attn is None else (gates.attn > 0).tolist()
    runs = [on for on, attends in zip((gates.head > 0).tolist(), attending, strict=True) if attends]
    some = sum(map(sum, runs))
    if not runs or some == len(runs) * len(runs[0]):
        return False
    alike = all(on == runs[0] for on in runs)
    return alike or some / (len(runs) * len(runs[0])) <= MAX_HEAD_SHARE / (1 + SMALL / len(runs))


def some_heads(
    attn: Attention, x: Tensor, heads: Tensor, partial: bool, lengths: tuple[int, ...], bias: Tensor | None, mix: Mix
) -> Tensor:
    """timm's attention on the rows of all images, x [T, D], by the heads that are on for each of them, [B, H] 0/1.

    Args:
        own: a head that is off gives each token its own value; False: nothing.
        lengths: rows of each image.
        bias: of the keys, [T] fp32; None: all count alike.
        mix: attention itself, for some images and some heads.
    """
    H, d, width = attn.num_heads, attn.head_dim, x.shape[-1]
    weight = attn.qkv.weight.view(3, H, d, width)
    offset = None if attn.qkv.bias is None else attn.qkv.bias.view(3, H, d)

    def project(rows: Tensor, which: slice, some: list[int]) -> Tensor:
        """Some of queries, keys and values, of some heads: [T, D] -> [T, parts * h, d]."""
        shift = None if offset is None else offset[which, some].flatten()
        return F.linear(rows, weight[which, some].flatten(0, 2), shift).unflatten(1, (-1, d))

    image_of = torch.arange(len(lengths), device="cpu").repeat_interleave(torch.tensor(lengths, device="cpu"))
    values = project(x, slice(2, 3), list(range(H))) if partial else None
    total: Tensor | None = None
    for images, some in groups(heads, lengths):
        rest = tuple(lengths[image] for image in images)
        everyone = sum(rest) == len(x)
        index = torch.isin(image_of, torch.tensor(images, device="cpu")).nonzero().squeeze(1).to(x.device)
        rows = x if everyone else x.index_select(0, index)
        counts = bias if everyone or bias is None else bias.index_select(0, index)
        if values is None:
            q, k, v = project(rows, slice(0, 3), some).chunk(3, dim=1)
        else:
            q, k = project(rows, slice(0, 2), some).chunk(2, dim=1)
            v = values[index.unsqueeze(1), some]
        mixed, _ = mix(attn.q_norm(q), attn.k_norm(k), v, rest, counts)
        if values is not None:
            values[index.unsqueeze(1), some] = mixed
            continue
        given = F.linear(mixed.flatten(1), attn.proj.weight.view(width, H, d)[:, some].flatten(1))
        if everyone:
            total = given if total is None else total.add_(given)
        else:
            total = (given.new_zeros(x.shape) if total is None else total).index_add_(0, index, given)
    if values is not None:
        return attn.proj(values.flatten(1))
    total = x.new_zeros(x.shape) if total is None else total
    return total if attn.proj.bias is None else total + attn.proj.bias


def groups(heads: Tensor, lengths: tuple[int, ...]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Images that have rows, and the heads that run for exactly these: heads [B, H] -> at most H pairs."""
    found: dict[tuple[int, ...], list[int]] = {}
    for head, column in enumerate((heads > 0).T.tolist()):
        images = tuple(image for image, on in enumerate(column) if on and lengths[image])
        if images:
            found.setdefault(images, []).append(head)
    return list(found.items())
