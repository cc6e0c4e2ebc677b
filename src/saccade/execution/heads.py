"""Attention by some of its heads: those that are off are not computed.

Heads that run for the same images run together: where all images agree, that is one slice of the weights; where each
has its own, there are as many groups as heads at most, and the images of a group are gathered for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.gates import Gates
from saccade.core.hooks import plain_linear
from saccade.execution.mixing import Packed

MAX_HEAD_SHARE = 0.8  # of (image, head) pairs: up to it skipping is faster in a large batch where images differ
SMALL = 4.0  # in a batch of few that share is divided by 1 + SMALL / images: ``benchmarks/ragged.py --heads``

Mix = Callable[[Packed], tuple[Tensor, str]]  # mixed values [T, h, d], and by which kernel


def should_skip_heads(attn: Attention, gates: Gates) -> bool:
    """Whether to skip the heads that are off, rather than to compute and forget them.

    Always where all images agree (a batch of one does), or else where enough are off. Waits for the device.
    """
    if gates.head is None or torch.compiler.is_compiling():
        return False
    plain = (
        type(attn) is Attention
        and plain_linear(attn.qkv)
        and plain_linear(attn.proj)
        and isinstance(attn.norm, nn.Identity)
    )
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
    attn: Attention, x: Tensor, some: tuple[Tensor, bool], lengths: tuple[int, ...], bias: Tensor | None, mix: Mix
) -> Tensor:
    """timm's attention on the rows of all images, x [T, D], by some of its heads.

    Args:
        some: [B, H] 0/1, the heads that are on for each image; and whether one that is off gives each token its own
            value, not nothing.
        lengths: rows of each image.
        bias: of the keys, [T] fp32; None: all count alike.
        mix: attention itself, for some images and some heads.
    """
    heads, partial = some
    values = _project(attn, x, slice(2, 3), list(range(attn.num_heads))) if partial else None
    total: Tensor | None = None
    for index, rest, on in _groups_of_rows(heads, lengths, x):
        rows = x if index is None else x.index_select(0, index)
        counts = bias if index is None or bias is None else bias.index_select(0, index)
        if values is None:
            q, k, v = _project(attn, rows, slice(0, 3), on).chunk(3, dim=1)
        else:
            q, k = _project(attn, rows, slice(0, 2), on).chunk(2, dim=1)
            v = values[:, on] if index is None else values[index.unsqueeze(1), on]
        mixed, _ = mix(Packed(attn.q_norm(q), attn.k_norm(k), v, rest, counts))
        if values is not None:
            values[slice(None) if index is None else index.unsqueeze(1), on] = mixed
            continue
        weight = attn.proj.weight.unflatten(1, (attn.num_heads, attn.head_dim))[:, on].flatten(1)
        given = F.linear(mixed.flatten(1), weight)
        if index is None:
            total = given if total is None else total.add_(given)
        else:
            total = (given.new_zeros(x.shape) if total is None else total).index_add_(0, index, given)
    if values is not None:
        return attn.proj(values.flatten(1))
    total = x.new_zeros(x.shape) if total is None else total
    return total if attn.proj.bias is None else total + attn.proj.bias


def _project(attn: Attention, rows: Tensor, which: slice, some: list[int]) -> Tensor:
    """Some of queries, keys and values, of some heads: [T, D] -> [T, parts * h, d]."""
    shape = (3, attn.num_heads, attn.head_dim)
    weight = attn.qkv.weight.unflatten(0, shape)[which, some].flatten(0, 2)
    shift = None if attn.qkv.bias is None else attn.qkv.bias.view(shape)[which, some].flatten()
    return F.linear(rows, weight, shift).unflatten(1, (-1, attn.head_dim))


def _groups_of_rows(
    heads: Tensor, lengths: tuple[int, ...], x: Tensor
) -> Iterator[tuple[Tensor | None, tuple[int, ...], list[int]]]:
    """For each group of images by heads: their places among all rows (None: all), rows of each, and the heads."""
    image_of = torch.arange(len(lengths), device="cpu").repeat_interleave(torch.tensor(lengths, device="cpu"))
    for images, on in groups(heads, lengths):
        rest = tuple(lengths[image] for image in images)
        if sum(rest) == len(x):
            yield None, rest, on
        else:
            places = torch.isin(image_of, torch.tensor(images, device="cpu")).nonzero().squeeze(1)
            yield places.to(x.device), rest, on


def groups(heads: Tensor, lengths: tuple[int, ...]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Images that have rows, and the heads that run for exactly these: heads [B, H] -> at most H pairs."""
    found: dict[tuple[int, ...], list[int]] = {}
    for head, column in enumerate((heads > 0).T.tolist()):
        images = tuple(image for image, on in enumerate(column) if on and lengths[image])
        if images:
            found.setdefault(images, []).append(head)
    return list(found.items())
