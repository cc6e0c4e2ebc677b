"""When is skipping worth its gathers? Measured on the machine at hand, once in a process for each kind of shape.

Gathering rows and putting them back costs something whatever their number, so a block of which nearly everything runs
is faster computed whole and masked, which gives the same. ``SACCADE_SKIP=always`` (or ``never``) pins the answer, for
results and counts that are the same on every run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.gates import Gates
from saccade.tokens import Tokens

GAIN = 0.95  # skipping has to take less than this part of the time of computing everything
SAMPLE = 4  # images of a measurement, at most
ROUNDS = 3

Run = Callable[[Tokens, Gates, bool], object]  # both branches of a block; True: sparse


@dataclass(frozen=True)
class Kind:
    """What a measurement holds for."""

    device: str
    dtype: torch.dtype
    autocast: bool
    threads: int
    images: int  #       1, 2 or SAMPLE
    tokens: int  #       in steps of 64
    dim: int
    patches: bool  #     patches are gated; False: whole branches only
    places: bool  #      by index
    branches: bool  #    too


_LIMITS: dict[Kind, float] = {}


def rows_that_run(tokens: Tokens, gates: Gates) -> float:
    """Part of an image's tokens that take part, on average. Waits for the device, but where shapes tell it."""
    if not gates.some_rows:
        return 1.0
    if gates.places is not None:
        return (tokens.num_prefix + gates.places.shape[1]) / tokens.length
    images = max(1, len(tokens.x))
    assert gates.patch is not None
    return (tokens.num_prefix + float(_held(gates.patch).sum()) / images) / tokens.length


def images_that_run(gates: Gates) -> float:
    """Part of the branches of images that are on. Waits for the device."""
    parts = [1.0 if gate is None or not len(gate) else float(_held(gate).mean()) for gate in (gates.attn, gates.mlp)]
    return sum(parts) / 2


def _held(gate: Tensor) -> Tensor:
    return gate.detach() if gate.requires_grad else gate


def pays(part: float, tokens: Tokens, gates: Gates, run: Run) -> bool:
    """Whether skipping to this part of the tokens, or of the images where only branches are gated, is at least 5 %
    faster than computing all under masks."""
    pinned = os.environ.get("SACCADE_SKIP")
    if pinned in ("always", "never"):
        return pinned == "always"
    if torch.compiler.is_compiling() or len(tokens.x) == 0 or part == 0:
        return True
    if not gates.some_rows and len(tokens.x) == 1:
        return True  # a branch of one image runs or does not
    x, length = tokens.x, tokens.length
    images = SAMPLE if len(x) >= SAMPLE else len(x)
    kind = Kind(
        str(x.device), x.dtype, torch.is_autocast_enabled(x.device.type), torch.get_num_threads(), images,
        -(-length // 64) * 64, x.shape[-1], gates.some_rows, gates.places is not None, not gates.all_run,
    )  # fmt: skip
    if kind not in _LIMITS:
        _LIMITS[kind] = _limit(tokens, images, gates, run)
    return part <= _LIMITS[kind]


@torch.no_grad()
def _limit(tokens: Tokens, images: int, gates: Gates, run: Run) -> float:
    """The share of rows up to which skipping pays: its time is a line, of which one half and the whole are known."""
    patches, device = tokens.num_patches, tokens.x.device
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
        half = Gates(patch=mask, attn=both, mlp=both, places=None if gates.places is None else places)
    ways = {
        "masked": lambda: run(sample, half, False),
        "half": lambda: run(sample, half, True),
        "whole": lambda: run(sample, Gates(), False),
    }
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            _wait(device)
            begin = time.perf_counter()
            way()
            _wait(device)
            if turn:  # the first is a warm-up
                best[name] = min(best[name], time.perf_counter() - begin)
    part = images_that_run(half) if not gates.some_rows else rows_that_run(sample, half)
    overhead = best["half"] - part * best["whole"]
    return min(1.0, max(0.0, (GAIN * best["masked"] - overhead) / best["whole"]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
