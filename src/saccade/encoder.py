"""The loop, the file to read first: ``reduce → gate → attend → reduce → mlp`` over timm's own blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.attention import Attended, attend, timm_is_as_fast
from saccade.costs import block_cost, kept_share, reading_macs, taking_part, wanted_macs
from saccade.gates import Gates, residual
from saccade.heads import worth
from saccade.hooks import (
    plain_block,
    plain_linear,
    require_features,
    require_plain,
    through,
    untouched,
    watched,
)
from saccade.lazy import changed, unread
from saccade.plan import Plan, TimmBlock, ViT
from saccade.ragged import Rows, gathered, packed, padded, scattered
from saccade.tokens import READINGS, Tokens
from saccade.trace import BlockTrace, Count
from saccade.worth import images_that_run, pays, rows_that_run


def encode(
    vit: ViT, tokens: Tokens, plan: Plan, *, whole: bool = True, sparse: bool = True
) -> tuple[Tokens, tuple[BlockTrace, ...]]:
    """Run the blocks of a timm ViT on a token set.

    Args:
        whole: run the last block for all tokens. False: only for the prefix, which is all that class-token pooling
            reads (exact, and about 7 % of a 12-layer ViT); the tokens returned are then the prefix alone.
        sparse: gates skip what is off. False: compute everything and multiply (the differentiable training form).

    Raises:
        UserError: a ViT with a forward of the user's own, or a module that a method works inside of.
    """
    require_features(vit)
    return through(vit.blocks, partial(_run, vit, plan, whole, sparse), tokens)


def _run(vit: ViT, plan: Plan, whole: bool, sparse: bool, tokens: Tokens) -> tuple[Tokens, tuple[BlockTrace, ...]]:
    run = _recomputed if vit.grad_checkpointing and torch.is_grad_enabled() else _kept
    depth, as_timm = plan.depth(len(vit.blocks)), timm_is_as_fast(tokens.x)
    trace: list[BlockTrace] = []
    for i, block in enumerate(list(vit.blocks)[:depth]):
        tokens, deciding = plan.reduce(i, "block", tokens, sparse)
        if not whole and i == depth - 1 and not plan.gated(i) and prefix_is_enough(block):
            step: Callable = partial(last_block, block, plan.planned(i, "attn", tokens.num_patches))
        elif plan.rests(i, tokens.num_patches) and tokens.plain and (as_timm or watched(block)):
            step = partial(whole_block, block, run)
        else:
            step = partial(block_in_parts, plan, i, block, run, sparse)
        tokens, ran = step(tokens)
        wanted = None if ran.wanted is None else ran.wanted + deciding
        trace.append(changed(ran, overhead=ran.overhead + deciding, wanted=wanted))
    return padded(tokens), tuple(trace)


def block_in_parts(
    plan: Plan, i: int, block: TimmBlock, run: Callable, sparse: bool, tokens: Tokens
) -> tuple[Tokens, BlockTrace]:
    """A block inside of which a method works, or whose tokens do not count alike; its hooks see rectangles."""
    require_plain(block, Block, f"blocks[{i}]")
    shown = watched(block)
    gates, gating = plan.gates(i, block, tokens)
    tokens = packed(tokens) if sparse and gates is None and not shown else padded(tokens)
    return through(block, partial(_parts, plan, i, block, run, sparse, gates, gating, shown), tokens)


def _parts(
    plan: Plan,
    i: int,
    block: TimmBlock,
    run: Callable,
    sparse: bool,
    gates: Gates | None,
    gating: int,
    shown: bool,
    tokens: Tokens,
) -> tuple[Tokens, BlockTrace]:
    read = plan.readings(i, tokens.num_patches)
    before, start = tokens.length, tokens
    alone = not plan.reducers(i, "attn", tokens.num_patches)
    gates, real, pack = execution(block, tokens, gates, sparse, alone, shown)
    skip = sparse and not read and not shown and gates is not None and worth(block.attn, gates)
    among = None
    if real and pack and alone and gates is not None and gates.whole_rows:
        tokens, among = gathered(tokens, gates)
        gates = changed(gates, patch=None)
    tokens, attended, kernel = run(attention_branch, block, tokens, gates or Gates(), read, real, skip, pack)
    tokens, deciding = plan.reduce(i, "attn", tokens, sparse)
    tokens = tokens.without(READINGS)
    if among is None:
        tokens = packed(tokens) if sparse and gates is None and not shown else padded(tokens)
    middle = tokens
    tokens, updated = run(mlp_branch, block, tokens, gates or Gates(), real, pack)
    tokens = tokens if among is None else scattered(tokens, start, among)

    cost = block_cost(block)
    overheads = gating + deciding + reading_macs(block, read, kernel) * before
    return tokens, BlockTrace(
        cost=cost,
        queries=attended,
        keys=attended,
        mlp=updated,
        attn=gates.attn if gates and real and not read else None,
        mlp_on=gates.mlp if gates and real else None,
        heads=gates.head.mean(1) if gates and gates.head is not None and skip else None,
        own=gates is not None and gates.own,
        planned=(before, tokens.length),
        overhead=overheads,
        kernel=kernel if (real and pack) or not sparse else f"{kernel}, masked",
        owner=unread(tokens),
        wanted=None if sparse else wanted_macs(cost, start, middle, gates, overheads),
        gates=None if sparse else gates,
        kept=kept_share(start),
    )


def execution(
    block: TimmBlock, tokens: Tokens, gates: Gates | None, sparse: bool, alone: bool, shown: bool
) -> tuple[Gates | None, bool, bool]:
    """How gates are carried out: those that leave anything out, and whether images and single tokens are skipped.

    alone: no reducer wants to see the tokens between attention and MLP. shown: hooks want to see all tokens.
    """
    if gates is None or not sparse:
        return gates, sparse, sparse and not (shown and gates is not None)
    if shown:
        return gates, not gates.some_rows, False
    if torch.compiler.is_compiling():  # a graph has the same shapes for all images
        return gates, alone and gates.static, alone and gates.static
    measure = partial(_both, block)
    if (some := rows_that_run(tokens, gates)) == 1:
        gates = changed(gates, patch=None, places=None)
    pack = not gates.some_rows or pays(some, tokens, gates, measure)
    if (on := images_that_run(gates)) == 1:
        gates = changed(gates, attn=None, mlp=None)
    branches = changed(gates, patch=None, places=None)
    skip = branches.all_run or pays(on, tokens, branches, measure)
    if not gates.some_rows and branches.all_run and gates.head is None:
        return None, True, True
    return gates, (pack and gates.some_rows) or skip, pack


def _both(block: TimmBlock, tokens: Tokens, gates: Gates, sparse: bool) -> Tokens:
    """Both branches, with no reducer between them."""
    if not sparse or not gates.whole_rows:
        tokens = attention_branch(block, tokens, gates, frozenset(), sparse)[0]
        return mlp_branch(block, tokens, gates, sparse)[0]
    part, index = gathered(tokens, gates)
    part = attention_branch(block, part, Gates(), frozenset(), sparse)[0]
    return scattered(mlp_branch(block, part, Gates(), sparse)[0], tokens, index)


def _kept(branch: Callable, *args: Any) -> Any:
    """Run a branch; its activations stay for the backward pass."""
    return branch(*args)


def _recomputed(branch: Callable, *args: Any) -> Any:
    """Run a branch twice instead (timm's ``set_grad_checkpointing``)."""
    return checkpoint(branch, *args, use_reentrant=False)


def attention_branch(
    block: TimmBlock,
    tokens: Tokens,
    gates: Gates,
    read: frozenset[str],
    sparse: bool,
    skip: bool = False,
    pack: bool = True,
) -> tuple[Tokens, Count, str]:
    """``x + attn(norm1(x))``; with what reducers want to read, which needs attention to run for all images.

    skip: heads that are off are not computed.
    """
    seen: list[Attended] = []

    def branch(x: Tensor, bias: Tensor | None, heads: Tensor | None, rows: Rows | None) -> Tensor:
        how: dict[str, Any] = {"heads": heads, "own": gates.own, "alive": alive, "rows": rows, "skip": skip}
        how |= {"read": read, "asking": asking}
        seen.append(attend(block.attn, block.norm1(x), bias, **how))
        return block.drop_path1(block.ls1(seen[0].x))

    tokens = changed(tokens, mask=gates.patch)
    alive = _keys(tokens)
    asking = tokens.asking() if "received" in read else None
    x, count = residual(
        tokens, branch, tokens.key_bias(), gates.attn, gates.head, sparse=sparse and not read, pack=pack
    )
    readings = {name: getattr(seen[0], name) for name in read}
    if tokens.rows is not None:
        readings = {name: tokens.rows.unpack(value) for name, value in readings.items()}
    readings = {name: value[:, tokens.num_prefix :] for name, value in readings.items()}
    return changed(tokens, x=x, **readings), count, seen[0].kernel if seen else "none"


def _keys(tokens: Tokens) -> Tensor | None:
    """How much each key counts [B, P+N], 0/1 times its size, where dropping is learned through attention; else None."""
    part = tokens.takes_part()
    if part is None or tokens.alive is None or not tokens.alive.requires_grad:
        return None
    for other in (tokens.size if tokens.proportional else None, tokens.valid):
        part = part if other is None else part * other
    return tokens.of_all(part, 1.0)


def mlp_branch(block: TimmBlock, tokens: Tokens, gates: Gates, sparse: bool, pack: bool = True) -> tuple[Tokens, Count]:
    """``x + mlp(norm2(x))``."""

    def branch(x: Tensor, bias: Tensor | None, heads: Tensor | None, rows: Rows | None) -> Tensor:
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    x, count = residual(tokens, branch, on=gates.mlp, sparse=sparse, pack=pack)
    return changed(tokens, x=x, mask=None), count


def whole_block(block: TimmBlock, run: Callable, tokens: Tokens) -> tuple[Tokens, BlockTrace]:
    """A block of which nothing is asked: timm's own forward, and nothing of ours to wait for."""
    ran = BlockTrace(
        cost=block_cost(block),
        queries=tokens.length,
        keys=tokens.length,
        mlp=tokens.length,
        planned=(tokens.length, tokens.length),
        overhead=0,
        kernel="fused" if block.attn.fused_attn else "unfused",
        owner=unread(tokens),
    )
    return changed(tokens, x=run(block, tokens.x)), ran


def prefix_is_enough(block: TimmBlock) -> bool:
    """Whether the prefix tokens alone may go through a block: no hook sees it, and its layers are what we think."""
    return plain_block(block) and plain_linear(block.attn.qkv) and all(map(untouched, block.modules()))


def last_block(block: TimmBlock, left: int, tokens: Tokens) -> tuple[Tokens, BlockTrace]:
    """The last block for the prefix tokens only: they attend to all, and what the patches would become is not read."""
    tokens = padded(tokens)
    prefix, before = tokens.num_prefix, tokens.x.shape[1]
    attended = attend(block.attn, block.norm1(tokens.x), tokens.key_bias(), queries=prefix, alive=_keys(tokens))
    x = tokens.x[:, :prefix] + block.drop_path1(block.ls1(attended.x))
    x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    cost = block_cost(block)
    live = None if tokens.alive is None else taking_part(tokens)
    ran = BlockTrace(
        cost=cost,
        queries=prefix,
        keys=before,
        mlp=prefix,
        planned=(before, prefix + left),
        overhead=0,
        kernel=attended.kernel,
        owner=unread(tokens),
        wanted=None if live is None else cost.attention(prefix, live) + prefix * cost.mlp,  # type: ignore[arg-type]
        kept=kept_share(tokens),
    )
    return changed(tokens, x=x), ran
