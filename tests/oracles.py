"""Small models in which every error shows, and slow, obvious re-statements of what the library computes.

The oracles are written from the papers' formulas, one image at a time, with explicit attention matrices and Python
loops. None of them calls the code that it checks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import fields, replace

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import operator_counter as counter
from saccade.core.gates import Gates
from saccade.core.merging import Merge
from saccade.core.plan import Gater, Method, Plan
from saccade.core.reduction import Fuse, Reduction, SoftReduction
from saccade.core.tokens import AttentionStats, Tokens
from saccade.model import AdaptiveViT
from saccade.storage.skeletons import without_values

STATS = frozenset(f.name for f in fields(AttentionStats))

# Families of timm, shrunk: three blocks of width 96 on sixteen patches.
FAMILIES: dict[str, tuple[str, dict]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64}),
    "deit": ("deit_tiny_patch16_224", {"img_size": 64}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
    "deit3": ("deit3_small_patch16_224", {"img_size": 64}),  # LayerScale, no position for the class token
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 56}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", {"img_size": 56}),
    "clip": ("vit_base_patch32_clip_224", {"img_size": 128}),  # norm before the blocks, no bias in the patch embedding
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 64}),  # attention pooling, no class token
    "siglip-average": ("vit_base_patch16_siglip_gap_224", {"img_size": 64}),  # average pooling, no class token
    "registers-map": ("vit_so150m_patch16_reg4_map_256", {"img_size": 64}),
    "registers-average": ("vit_mediumd_patch16_reg4_gap_256", {"img_size": 64}),
    "class-average": ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg"}),
    "average-all": ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg", "pool_include_prefix": True}),
    "qk-norm": ("vit_tiny_patch16_224", {"img_size": 64, "qk_norm": True}),
    "inner-norms": ("vit_tiny_patch16_224", {"img_size": 64, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "flexivit": ("flexivit_small", {"img_size": 64}),
    "no-positions": ("vit_tiny_patch16_224", {"img_size": 64, "pos_embed": ""}),
    "dynamic-size": ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True}),
    "oblong": ("vit_tiny_patch16_224", {"img_size": (48, 80), "patch_size": (12, 20), "in_chans": 2}),
}


def make_vit(family: str = "vit", seed: int = 0, **kwargs) -> VisionTransformer:
    """A small timm model of a family, in evaluation mode, with random weights in which every error shows."""
    name, shape = FAMILIES[family]
    small = {"depth": 3, "embed_dim": 96, "num_heads": 3, "num_classes": 10}
    return randomise(timm.create_model(name, **{**small, **shape, **kwargs}), seed).eval()


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights: scales in 0.5 … 1.5 (LayerScale too), biases of std 0.3, tokens and positions of std 0.5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3, generator=generator)
            elif name.endswith(("_token", "pos_embed", "latent")):
                weight.normal_(0, 0.5, generator=generator)
            elif weight.ndim == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
    return module


def make_images(vit: nn.Module, count: int = 2, size: tuple[int, int] | None = None, seed: int = 0) -> Tensor:
    """Noise of the model's own size and channels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        count, vit.patch_embed.proj.in_channels, *(size or vit.patch_embed.img_size), generator=generator
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def counted_macs(run: Callable[[], object]) -> int:
    """Multiply-accumulates by torch's operator-level counter; the first call fills caches and is not counted."""
    with torch.inference_mode():
        run()
        return counter.counted_macs(run)


def make_tokens(
    images: int = 2, patches: int = 12, prefix: int = 1, width: int = 8, seed: int = 0, dtype=torch.float32, **state
) -> Tokens:
    """A random token set, one cell for each patch token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, prefix + patches, width, generator=generator, dtype=dtype)
    return with_fields(Tokens(x, torch.arange(patches).expand(images, -1), (1, patches), prefix), **state)


def field_of(tokens: Tokens, name: str) -> Tensor | None:
    """A field of the tokens, or a reading of their attention."""
    return getattr(tokens.stats if name in STATS else tokens, name)


def with_fields(tokens: Tokens, **values) -> Tokens:
    """The tokens with other fields, or readings of attention, by name."""
    stats = {name: values.pop(name) for name in STATS if name in values}
    return replace(tokens, **values, stats=replace(tokens.stats, **stats) if stats else tokens.stats)


# --- attention and blocks -------------------------------------------------------------------------------------------


def attention_by_hand(attn: nn.Module, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One image, head by head: x [L, D], key bias [L] -> output [L, D], shares [H, L, L], keys [H, L, d]."""
    heads, width = attn.num_heads, attn.head_dim
    q, k, v = attn.qkv(x).split(heads * width, dim=-1)
    outputs, shares, keys = [], [], []
    for head in range(heads):
        mine = slice(head * width, (head + 1) * width)
        query, key = attn.q_norm(q[:, mine]), attn.k_norm(k[:, mine])
        scores = query @ key.T / math.sqrt(width)
        share = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        outputs.append(share @ v[:, mine])
        shares.append(share)
        keys.append(key)
    return attn.proj(attn.norm(torch.cat(outputs, dim=-1))), torch.stack(shares), torch.stack(keys)


Decide = Callable[[int, Tensor, Tensor, Tensor, list[float]], tuple[Tensor, list[float]]]


@torch.no_grad()
def encode_by_hand(vit: nn.Module, image: Tensor, decide: Decide) -> tuple[Tensor, list[float]]:
    """One image [C, h, w] through timm's own layers; ``decide`` stands between attention and MLP of every block.

    ``decide(block, x [L, D], attention [L, L] (mean over heads), key [L, d] (mean over heads), sizes of L tokens)``.
    """
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image.unsqueeze(0))))[0]
    size = [1.0] * len(x)
    for i, block in enumerate(vit.blocks):
        bias = torch.tensor(size, dtype=x.dtype).log()
        attended, shares, keys = attention_by_hand(block.attn, block.norm1(x), bias)
        x = x + block.ls1(attended)
        x, size = decide(i, x, shares.mean(0), keys.mean(0), size)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, size


def logits_by_hand(vit: nn.Module, images: Tensor, decide: Decide) -> Tensor:
    """Logits of a class-token model, image by image."""
    encoded = [encode_by_hand(vit, image, decide)[0] for image in images]
    with torch.no_grad():
        return torch.cat([vit.forward_head(vit.norm(x).unsqueeze(0)) for x in encoded])


# --- the methods, one image at a time, the prefix included in the sequence -----------------------------------------


def merge_by_hand(
    x: Tensor, metric: Tensor, size: list[float], r: int, has_class: bool = True, has_dist: bool = False
) -> tuple[Tensor, list[float], list[list[int]]]:
    """ToMe's bipartite soft matching (paper §3.1) on the whole sequence of one image; also who is in each new token."""
    n = len(x)
    r = min(r, (n - has_class - has_dist) // 2)
    similar = _cosines(metric)
    side_a, side_b = list(range(0, n, 2)), list(range(1, n, 2))
    proposals = []
    may_receive = side_b[1:] if has_dist else side_b  # nobody proposes to the distillation token …
    for i in (side_a[1:] if has_class else side_a) if may_receive else []:  # … and the class token to nobody
        partner = max(may_receive, key=lambda j: similar[i][j])
        proposals.append((similar[i][partner], i, partner))
    members = {j: [j] for j in range(n)}
    for _, i, partner in sorted(proposals, key=lambda p: -p[0])[:r]:
        members[partner] += members.pop(i)
    order = [i for i in side_a + side_b if i in members]
    if has_dist:
        order = [0, 1] + [i for i in order if i > 1]
    groups = [members[i] for i in order]
    new_size = [sum(size[i] for i in group) for group in groups]
    rows = [sum(size[i] * x[i] for i in g) / total for g, total in zip(groups, new_size, strict=True)]
    return torch.stack(rows), new_size, groups


def _cosines(metric: Tensor) -> list[list[float]]:
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return (unit @ unit.T).tolist()


def prune_by_hand(
    x: Tensor, score: Tensor, size: list[float], keep: float, prefix: int = 1, fuse: bool = False
) -> tuple[Tensor, list[float]]:
    """EViT: the ⌈keep · n⌉ patches of the highest score; fuse: the rest as one token Σ a_j x_j."""
    patches = list(range(prefix, len(x)))
    count = math.ceil(round(keep * len(patches), 9))
    if count >= len(patches) - fuse:
        return x, size
    kept = sorted(sorted(patches, key=lambda i: -float(score[i]))[:count])
    rows = [x[i] for i in [*range(prefix), *kept]]
    sizes = [size[i] for i in [*range(prefix), *kept]]
    if fuse:
        rows.append(sum(score[i] * x[i] for i in patches if i not in kept))
        sizes.append(1.0)
    return torch.stack(rows), sizes


def retokenize_by_hand(
    x: Tensor, score: Tensor, metric: Tensor, size: list[float], p: float, merge: float, prefix: int = 1
) -> tuple[Tensor, list[float], list[tuple[int, int]]]:
    """ImagePiece (step 4): the best pairs among the least attended tokens; also the pairs (source, into)."""
    patches = list(range(prefix, len(x)))
    bottom = sorted(patches, key=lambda i: float(score[i]))[: math.floor(round(p * len(patches), 9))]
    side_a, side_b = bottom[0::2], bottom[1::2]
    similar = _cosines(metric)
    proposals = []
    for i in side_a if side_b else []:
        partner = max(side_b, key=lambda j: similar[i][j])
        proposals.append((similar[i][partner], i, partner))
    r = min(math.floor(round(merge * len(patches), 9)), len(proposals))
    pairs = [(i, j) for _, i, j in sorted(proposals, key=lambda p: -p[0])[:r]]
    rows, sizes = [], []
    for i in range(len(x)):
        if i not in [source for source, _ in pairs]:
            group = [i] + [source for source, into in pairs if into == i]
            total = sum(size[j] for j in group)
            rows.append(x[i] if len(group) == 1 else sum(size[j] * x[j] for j in group) / total)
            sizes.append(total)
    return torch.stack(rows), sizes, pairs


# --- reductions -----------------------------------------------------------------------------------------------------


def reduce_by_hand(tokens: Tokens, r: Reduction) -> Tokens:
    """What ``reduce`` has to give for a hard reduction: loops over images, slots and members."""
    images = range(len(tokens.x))
    names = ("size", "valid", "gate_mask", "key", "cls_attn", "attn_received")
    has = {name: field_of(tokens, name) for name in names if field_of(tokens, name) is not None}
    if r.merge and "size" not in has:
        has["size"] = torch.ones(len(tokens.x), tokens.num_patches)
    x: list[list[Tensor]] = []
    state: dict[str, list] = {name: [] for name in has}
    owner = torch.full_like(tokens.owner, -1)
    for b in images:
        members = [[int(i)] for i in r.keep[b]]
        for source, slot in zip(r.merge.src[b].tolist(), r.merge.dst[b].tolist(), strict=True) if r.merge else []:
            members[slot].append(source)
        weight = has.get("size", torch.ones(len(tokens.x), tokens.num_patches))
        weight = r.merge.weight if r.merge and r.merge.weight is not None else weight
        patches, rows = tokens.patches[b], []
        new: dict[str, list] = {name: [] for name in has}
        for group in members:
            share = [float(weight[b, i]) / sum(float(weight[b, j]) for j in group) for i in group]
            rows.append(sum(s * patches[i] for s, i in zip(share, group, strict=True)))
            for name, value in has.items():
                parts = [value[b, i] for i in group]
                if name == "valid":
                    new[name].append(parts[0])
                elif name == "key":
                    new[name].append(sum(s * part for s, part in zip(share, parts, strict=True)))
                else:
                    total = sum(float(part) for part in parts)
                    new[name].append(torch.tensor(min(total, 1.0) if name == "gate_mask" else total))
        if r.fuse is not None:
            rest, share = r.fuse.index[b].tolist(), r.fuse.weight[b].tolist()
            members.append(rest)
            rows.append(sum(s * patches[i] for s, i in zip(share, rest, strict=True)))
            for name, value in has.items():
                if name == "key":
                    parts = sum(s * value[b, i] for s, i in zip(share, rest, strict=True))
                    new[name].append(parts / sum(share))
                elif name in ("cls_attn", "attn_received"):
                    new[name].append(sum(value[b, i] for i in rest))
                else:
                    new[name].append(torch.ones((), dtype=value.dtype))
        for slot, group in enumerate(members):
            for cell in range(owner.shape[1]):
                if int(tokens.owner[b, cell]) in group:
                    owner[b, cell] = slot
        x.append([*tokens.x[b, : tokens.num_prefix], *rows])
        for name, values in new.items():
            state[name].append(torch.stack(values))
    return with_fields(
        tokens,
        x=torch.stack([torch.stack(rows) for rows in x]),
        owner=owner,
        **{name: torch.stack(values) for name, values in state.items()},
    )


def random_reduction(images: int, patches: int, seed: int, *, merge: bool, fuse: bool, drop: bool) -> Reduction:
    """Every token is kept, merged, fused or dropped at random; as many of each in every image."""
    rng = random.Random(seed)
    kept = rng.randint(1, patches)
    left = patches - kept
    merged = rng.randint(0, left) if merge else 0
    fused = rng.randint(0, left - merged) if fuse else 0
    if not drop:
        kept, merged = (kept, left - fused) if merge else (patches - fused, 0)
    orders = [rng.sample(range(patches), patches) for _ in range(images)]
    table = torch.tensor(orders)
    keep, src, rest = table[:, :kept], table[:, kept : kept + merged], table[:, kept + merged : kept + merged + fused]
    dst = torch.tensor([[rng.randrange(kept) for _ in range(merged)] for _ in range(images)]).reshape(images, merged)
    weights = torch.tensor([[rng.uniform(0.1, 2) for _ in range(fused)] for _ in range(images)])
    return Reduction(keep, Merge(src, dst.long()) if merge else None, Fuse(rest, weights) if fused else None)


def random_mixture(images: int, patches: int, left: int, seed: int = 0) -> SoftReduction:
    generator = torch.Generator().manual_seed(seed)
    return SoftReduction(torch.rand(images, left, patches, generator=generator).softmax(-1))


# --- gates ----------------------------------------------------------------------------------------------------------


class RandomGates(Gater):
    """Fixed random decisions, whatever the tokens are: for comparing the masked and the sparse executor."""

    ragged = True  # the draw is of the whole batch, padding or not

    def __init__(
        self, seed: int, heads: int, parts: tuple[str, ...] = ("patch", "head", "attn", "mlp"), on=0.6
    ) -> None:
        super().__init__()
        self.seed, self.heads, self.parts, self.on = seed, heads, parts, on

    def forward(self, tokens: Tokens) -> Gates:
        images = len(tokens.x)
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {"patch": (images, tokens.num_patches), "head": (images, self.heads), "attn": (images,)}
        draws = {p: torch.rand(shapes.get(p, (images,)), generator=generator) for p in ("patch", "head", "attn", "mlp")}
        return Gates(**{part: (draws[part] < self.on).float() for part in self.parts})


def add_gates(model: AdaptiveViT, gaters: dict[int, Gater], first: bool = True) -> AdaptiveViT:
    """The same model with one more method, made of these gaters; in front of the others or behind them."""
    more = Method(gaters.items())
    gated = model.at(model.setting)
    gated.plan = Plan([more, *model.plan.methods] if first else [*model.plan.methods, more])
    return gated.eval()


# --- costs, from the formulas of the specs --------------------------------------------------------------------------


def block_macs(before: int, after: int, width: int, ratio: float = 4.0) -> float:
    """qkv and output projection 4ND², scores and weighted sum 2N²D, MLP 2·ratio·N'D² (selection §1, merging §1.7)."""
    return 4 * before * width**2 + 2 * before**2 * width + 2 * ratio * after * width**2


def vit_macs(counts: list[int], patches: int, width: int, patch_size: int = 16, classes: int = 1000) -> float:
    """A class-token ViT: ``counts`` are the tokens (prefix included) that enter each block's MLP."""
    before = [patches + 1, *counts[:-1]]
    blocks = sum(block_macs(n, m, width) for n, m in zip(before, counts, strict=True))
    return patches * 3 * patch_size**2 * width + blocks + width * classes


G = 1e9


def nominal_gmacs(name: str, setting: str, **kwargs) -> float:
    """GMACs of one image by the trace of a run on the meta device: shapes only, so that large models are free."""
    with without_values():
        model = AdaptiveViT(timm.create_model(name, **kwargs).eval(), setting)
    with torch.device("meta"):
        trace = model(torch.empty(1, 3, *model.input_size())).trace
    return (trace.embed + trace.head + sum(block.macs(nominal=True) for block in trace.blocks)) / G


def busy_images(vit, count: int = 3, size: tuple[int, int] | None = None, seed: int = 0) -> Tensor:
    """Noise that is strong in some places and weak in others, so that mosaics of all kinds of blocks come out."""
    noise = make_images(vit, count, size, seed)
    field = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed + 1)) ** 4
    return noise * F.interpolate(field, size=noise.shape[-2:], mode="bilinear")
