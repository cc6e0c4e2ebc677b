"""One image at a time: our settings against timm's own dense forward, and against a bare loop of the same operators.

    python benchmarks/batch_one.py [--models deit_small_patch16_224 deit_tiny_patch16_224] [--rounds 60] [--dtype fp32]

Every round times timm's forward, each setting, its ideal and each bare loop once, in turn; medians of the ratios round
by round, with their quartiles. *Asked* is what the methods' reference implementations reach, as the project's list has
it. *Kept* is the time of the ideal, the same token counts by slicing, ÷ ours: what deciding costs. *Bare ÷ ours* is the
bare loop's time ÷ ours: what settings, traces, hooks and owner maps cost.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from math import ceil
from typing import cast

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import saccade
from saccade.core.timm_types import TimmBlock, ViT
from saccade.evaluation.ideal import ideal_of
from saccade.evaluation.interleaved import in_turn
from saccade.runners.allocator import steady_allocator

ASKED = {  # speed-up over timm's dense forward: ViT-S, ViT-Ti
    "dense": (1.0, 1.0),
    "tome(r=13)": (1.25, 0.98),
    "evit(0.7)": (1.31, 1.23),
    "evit(0.5)": (1.56, 1.42),
    "dynamicvit(0.7)": (1.31, 1.15),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_small_patch16_224", "deit_tiny_patch16_224"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    steady_allocator()
    print(f"batch {arguments.batch}, {arguments.dtype}, {arguments.threads} threads, torch {torch.__version__}\n")
    print("| model | setting | speed-up over timm's (quartiles) | asked | ideal | kept | bare loop | bare ÷ ours |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.models:
        made = timm.create_model(name).eval().to(torch.bfloat16 if arguments.dtype == "bf16" else torch.float32)
        vit = cast(ViT, made)
        model = saccade.AdaptiveViT(vit)
        ways: dict[str, Callable] = {"timm": vit} | {setting: model.at(setting).eval() for setting in ASKED}
        ways |= {f"ideal {setting}": model.at(ideal_of(model.at(setting))).eval() for setting in ASKED}
        ways |= {f"bare {setting}": partial(bare, vit, reduce) for setting, reduce in BARE.items()}
        images = torch.randn(arguments.batch, 3, *model.input_size(), dtype=next(vit.parameters()).dtype)
        times = timed(ways, images, arguments.rounds)
        for setting in ASKED:
            low, middle, high = statistics.quantiles(ratios(times, "timm", setting), n=4)
            asked = ASKED[setting]["tiny" in name] if arguments.batch == 1 and arguments.dtype == "fp32" else ""
            cells = [f"{middle:.3f} ({low:.3f}–{high:.3f})", str(asked)]
            for best in (f"ideal {setting}", f"bare {setting}"):
                found = [ratios(times, "timm", best), ratios(times, best, setting)] if best in times else []
                cells += [f"{statistics.median(one):.3f}" for one in found] or ["", ""]
            print(f"| {name} | {setting} | {' | '.join(cells)} |")


@torch.inference_mode()
def timed(ways: dict[str, Callable], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round."""
    for run in ways.values():
        for _ in range(5):
            run(images)
    return in_turn({name: (run, images) for name, run in ways.items()}, lambda done: done < rounds)


def ratios(times: dict[str, list[float]], one: str, other: str) -> list[float]:
    """Time of one way ÷ time of another, round by round."""
    return [a / b for a, b in zip(times[one], times[other], strict=True)]


# A bare loop for DeiT: class token first, no hooks, no settings, no record; what a script for one method would do.

Reduce = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def bare(vit: ViT, reduce: Reduce, images: Tensor) -> Tensor:
    """images -> logits; reduce: block, x [B, N, D], queries and keys [B, H, N, d], sizes [B, N-1] -> x and sizes."""
    x, size = vit._pos_embed(vit.patch_embed(images)), None
    for i, block in enumerate(list(vit.blocks)[:-1]):
        attn, shape = block.attn, (x.shape[0], x.shape[1], 3, block.attn.num_heads, block.attn.head_dim)
        q, k, v = attn.qkv(block.norm1(x)).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias(size))
        x, size = reduce(i, x + attn.proj(mixed.transpose(1, 2).flatten(2)), q, k, size)
        x = x + block.mlp(block.norm2(x))
    return vit.head(vit.norm(last(vit.blocks[-1], x, size))[:, 0])


def bias(size: Tensor | None) -> Tensor | None:
    """Log of the sizes, for the scores of keys."""
    return None if size is None else F.pad(size.log(), (1, 0))[:, None, None]


def last(block: TimmBlock, x: Tensor, size: Tensor | None) -> Tensor:
    """The last block, for the class token alone."""
    attn, (images, _, width) = block.attn, x.shape
    h, (wq, wkv), (bq, bkv) = block.norm1(x), *(p.split([width, 2 * width]) for p in attn.qkv.parameters())
    q = F.linear(h[:, :1], wq, bq).view(images, attn.num_heads, 1, -1)
    k, v = F.linear(h, wkv, bkv).view(images, -1, 2, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias(size)).reshape(images, 1, width)
    x = x[:, :1] + attn.proj(y)
    return x + block.mlp(block.norm2(x))


def nothing(i: int, x: Tensor, q: Tensor, k: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """All tokens stay."""
    return x, size


def merged(r: int, i: int, x: Tensor, q: Tensor, k: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The r most similar pairs, averaged."""
    key, width = k.mean(1)[:, 1:], x.shape[2]
    key = key / key.norm(dim=-1, keepdim=True)
    best, partner = (key[:, ::2] @ key[:, 1::2].mT).max(-1)
    order = best.argsort(dim=-1, descending=True)
    some, rest = order[:, :r, None], order[:, r:, None]
    one = x.new_ones(x.shape[0], x.shape[1] - 1) if size is None else size
    carried = torch.cat([x[:, 1:] * one.unsqueeze(2), one.unsqueeze(2)], dim=2)
    a, b = carried[:, ::2], carried[:, 1::2]
    gone = a.gather(1, some.expand(-1, -1, width + 1))
    into = partner.gather(1, some.squeeze(2)).unsqueeze(2).expand(-1, -1, width + 1)
    together = torch.cat([a.gather(1, rest.expand(-1, -1, width + 1)), b.scatter_add(1, into, gone)], dim=1)
    mean, total = together.split([width, 1], dim=2)
    return torch.cat([x[:, :1], mean / total], dim=1), total.squeeze(2)


def pruned(keep: float, i: int, x: Tensor, q: Tensor, k: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The tokens of the highest class attention, at three blocks."""
    if i not in (3, 6, 9):
        return x, size
    scores = ((q[:, :, :1] * q.shape[-1] ** -0.5) @ k.mT).softmax(-1).mean(1)[:, 0, 1:]
    order = scores.argsort(dim=-1, descending=True)[:, : ceil(keep * scores.shape[1])]
    return torch.cat([x[:, :1], x[:, 1:].gather(1, order.unsqueeze(2).expand(-1, -1, x.shape[2]))], dim=1), size


BARE: dict[str, Reduce] = {
    "dense": nothing,
    "tome(r=13)": partial(merged, 13),
    "evit(0.7)": partial(pruned, 0.7),
    "evit(0.5)": partial(pruned, 0.5),
}


if __name__ == "__main__":
    main()
