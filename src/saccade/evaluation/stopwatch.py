"""``autotune``: measure on this machine, once and when asked, which way to run is the faster one.

A dense or gated forward asks its ``Execution`` two things: fused attention or not, and to skip or to mask. Here each is
answered with a stopwatch, for the kinds of shape that the given settings meet, and written down as a table.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.checkpoint import Source, open_model
from saccade.core.gates import Gates
from saccade.core.init import draw
from saccade.core.plan import Plan
from saccade.core.program import Step
from saccade.core.timm_types import TimmBlock
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.execution.executors import Gathered, Masked, Rows
from saccade.execution.policy import (
    SAMPLE,
    Execution,
    attention_kind,
    cache_file,
    images_that_run,
    rows_that_run,
    skip_kind,
)
from saccade.runners.runner import Runner
from saccade.storage.files import reported, write_json
from saccade.terminal.progress import Progress

GAIN = 0.95  # skipping has to take less than this part of the time of computing everything
ROUNDS = 7

Clock = Callable[[], float]


@dataclass(frozen=True)
class Stopwatch(Execution):
    """An execution that measures what it is asked, for a kind of shape that it does not know yet."""

    block: TimmBlock = field(kw_only=True)
    clock: Clock = time.perf_counter
    found: dict[str, str | float] = field(default_factory=dict)

    def kernel(self, q: Tensor, keys: int) -> str:
        """Measured."""
        kind = attention_kind(q, keys)
        if kind not in self.found:
            self.found[kind] = faster_attention(q, keys, self.clock)
        return str(self.found[kind])

    def is_timms(self) -> bool:
        """Never, so that attention is asked about."""
        return False

    def skips(self, share: float, tokens: Tokens, gates: Gates) -> bool:
        """Measured, but for a single image's branches."""
        if share == 0 or len(tokens.x) == 0 or (not gates.some_rows and len(tokens.x) == 1):
            return True
        kind = skip_kind(tokens, gates)
        if kind not in self.found:
            self.found[kind] = share_that_pays(self.block, tokens, gates, self.clock)
        return share <= float(self.found[kind])


def autotune(
    model: Source,
    settings: Sequence[str] = (),
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | None = None,
    batch: Sequence[int] = (1, 8),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    out: str | os.PathLike | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> Execution:
    """Measure the ways to run some settings, and write the table that ``Execution.from_cache`` reads.

    Args:
        model: a model, a folder, or a timm name with ``weights`` or ``pretrained``.
        settings: whose shapes are met; the dense model's always.
        batch, dtypes: images at once, and number types.
        out: the file; None: in the user's cache folder. What it holds of other kinds of shape stays.
        clock: what tells the time, in seconds.

    Raises:
        UserError: a bad setting, a batch below 1, an unknown number type, a file that cannot be written.
    """
    if any(b < 1 for b in batch):
        raise UserError(f"batch sizes {list(batch)}: each must be 1 or more")
    opened = open_model(model, weights, pretrained, device, trained=False).deploy(None)
    path = Path(out) if out is not None else cache_file()
    found: dict[str, str | float] = dict(_known(path))
    names = dict.fromkeys(("", *settings))
    advance = (progress or Progress()).start("measuring ways to run", len(names) * len(batch) * len(dtypes))
    for base in (Runner(dtype).model(opened) for dtype in dtypes):
        weight = next(base.parameters())
        for view in (base.at(name).eval() for name in names):
            view.execution = Stopwatch(block=view.vit.blocks[0], clock=clock, found=found)
            for images in batch:
                shape = (images, view.backbone.channels, *view.input_size())
                with torch.inference_mode():
                    view(torch.randn(shape).to(weight.device, weight.dtype))
                advance(1, what=f"{view.setting or 'dense'}, batch {images}")
    advance.finish()
    with reported("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return Execution(measured=found)


def _known(path: Path) -> Mapping[str, str | float]:
    try:
        return Execution.from_cache(path).measured
    except UserError:
        return {}


def faster_attention(q: Tensor, keys: int, clock: Clock) -> str:
    """Both paths of attention on random values of a kind of shape: q [B, H, Q, d], so many keys."""
    images, heads, queries, width = q.shape
    with torch.inference_mode(False), torch.no_grad():
        shapes = ((min(images, SAMPLE), heads, n, width) for n in (queries, keys, keys))
        a, k, v = (draw(shape, 1.0).to(q.device, q.dtype) for shape in shapes)
        best = _timed(
            {
                "fused": lambda: F.scaled_dot_product_attention(a, k, v),
                "unfused": lambda: (a @ k.transpose(-2, -1)).softmax(dim=-1) @ v,
            },
            q.device,
            clock,
        )
    return min(best, key=lambda name: best[name])


@torch.no_grad()
def share_that_pays(block: TimmBlock, tokens: Tokens, gates: Gates, clock: Clock) -> float:
    """The share up to which skipping is faster: its time is a line, of which one half and the whole are known."""
    images, patches, device = min(len(tokens.x), SAMPLE), tokens.num_patches, tokens.x.device
    x = torch.randn(images, tokens.length, tokens.x.shape[-1], device=device).to(tokens.x.dtype)
    sample = Tokens(x, torch.zeros(images, 1, dtype=torch.int64, device=device), (1, 1), tokens.num_prefix)
    every = torch.ones(images, device=device)
    if not gates.some_rows:
        on = (torch.arange(images, device=device) % 2).float()
        half = Gates(attn=on, mlp=on)
    else:
        mask = (torch.arange(patches, device=device) % 2 == 0).float().expand(images, -1)
        places = torch.arange(0, patches, 2, device=device).expand(images, -1)
        both = None if gates.all_run else every
        half = Gates(patch=mask, attn=both, mlp=both, patch_indices=None if gates.patch_indices is None else places)
    step, rules = Step(Plan(), 0, block), Execution()
    ways = {
        "masked": partial(Masked(rules, half).execute, step, sample),
        "half": partial((Gathered if half.whole_rows else Rows)(rules, half).execute, step, sample),
        "whole": partial(Masked(rules, Gates()).execute, step, sample),
    }
    best = _timed(ways, device, clock)
    part = images_that_run(half) if not gates.some_rows else rows_that_run(sample, half)
    overhead = best["half"] - part * best["whole"]
    return min(1.0, max(0.0, (GAIN * best["masked"] - overhead) / best["whole"]))


def _timed(ways: Mapping[str, Callable[[], object]], device: torch.device, clock: Clock) -> dict[str, float]:
    """The shortest of some runs of each, in turn; the first is a warm-up."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            _wait(device)
            begin = clock()
            way()
            _wait(device)
            taken = clock() - begin
            best[name] = min(best[name], taken) if turn else best[name]
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
