"""``Execution``: how a block is run where several ways give the same answer. A value on the model, never a stopwatch.

"auto" is a rule that is written here, so that MACs, counts and results do not depend on the machine or on its load.
``saccade autotune`` measures both choices on this machine, once and when asked; ``Execution.from_cache`` loads that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.core.gates import Gates
from saccade.core.tokens import Tokens
from saccade.errors import UserError

WAYS = {"attention": ("auto", "fused", "unfused"), "skip": ("auto", "always", "never")}
LIMITS = {"index": 1.0, "rows": 0.9, "images": 0.95}  # shares up to which skipping is the faster way, by how it is done
STEP = 64  # tokens and keys of one kind of shape
SAMPLE = 4  # images from which on a batch is of one kind
ENTRIES = 10_000  # of a table


@dataclass(frozen=True)
class Execution:
    """How blocks are run.

    Args:
        attention: the path of attention where either would do: "fused" (torch's), "unfused" (scores, softmax, product);
            "auto": fused, or what was measured.
        skip: whether gates leave out what is off, or compute all and multiply: "always", "never"; "auto": where at
            most ``LIMITS`` of it is on, or what was measured.
        measured: what ``saccade autotune`` found, by kind of shape: the faster path, or the share up to which skipping
            is faster.

    Raises:
        UserError: a way that does not exist, or a table that holds anything else.
    """

    attention: str = "auto"
    skip: str = "auto"
    measured: Mapping[str, str | float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, ways in WAYS.items():
            if (way := getattr(self, name)) not in ways:
                raise UserError(f"execution: {name}={str(way)[:40]!r} is not one of {', '.join(ways)}")
        for kind, found in self.measured.items():
            path = kind.startswith("attention ") and found in WAYS["attention"][1:]
            share = kind.startswith("skip ") and type(found) in (int, float) and 0 <= float(found) <= 1
            if not (path or share):
                raise UserError(
                    f"execution: {kind[:60]!r}: {str(found)[:40]!r} is neither a path nor a share in [0, 1]"
                )

    @classmethod
    def default(cls) -> Execution:
        """What a new model has: the rules, or ``SACCADE_ATTENTION`` and ``SACCADE_SKIP`` where they are set."""
        return cls(os.environ.get("SACCADE_ATTENTION", "auto"), os.environ.get("SACCADE_SKIP", "auto"))

    @classmethod
    def from_cache(cls, file: str | Path | None = None) -> Execution:
        """The table that ``saccade autotune`` wrote; None: where it writes when nothing is said.

        Raises UserError where there is none, or it is damaged.
        """
        path = Path(file) if file is not None else cache_file()
        try:
            with path.open("rb") as opened:
                found = json.loads(opened.read(2_000_000))
            if not isinstance(found, dict) or len(found) > ENTRIES:
                raise ValueError("it is no table")
            return replace(cls.default(), measured=found)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{str(path)!r} cannot be read ({str(error)[:100]}): run `saccade autotune`") from None

    def kernel(self, q: Tensor, keys: int) -> str:
        """``"fused"`` or ``"unfused"``, for queries [B, H, Q, d] over so many keys."""
        if self.attention != "auto":
            return self.attention
        if not self.measured or torch.compiler.is_compiling() or q.requires_grad:
            return "fused"
        return str(self.measured.get(attention_kind(q, keys), "fused"))

    def is_timms(self) -> bool:
        """Whether timm's own forward takes the path that these rules would."""
        return self.attention == "fused" or (self.attention == "auto" and "unfused" not in self.measured.values())

    def skips(self, share: float, tokens: Tokens, gates: Gates) -> bool:
        """Whether to leave out what is off, where this share of an image's tokens, or of the images, is on."""
        if self.skip != "auto":
            return self.skip == "always"
        if torch.compiler.is_compiling() or len(tokens.x) == 0 or share == 0:
            return True
        if not gates.some_rows and len(tokens.x) == 1:
            return True  # the one image's branch runs, or is not computed
        return share <= float(self.measured.get(skip_kind(tokens, gates), LIMITS[how(gates)]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"attention": self.attention, "skip": self.skip, "measured": dict(self.measured)}


AUTO = Execution()


def cache_file() -> Path:
    """Where ``saccade autotune`` writes: ``$XDG_CACHE_HOME/saccade/execution.json``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "saccade" / "execution.json"


def how(gates: Gates) -> str:
    """By what skipping is done: patches by "index", by "rows" that are counted; "images": whole branches."""
    return "images" if not gates.some_rows else "rows" if gates.patch_indices is None else "index"


def attention_kind(q: Tensor, keys: int) -> str:
    """The kind of shape that a measurement of attention holds for."""
    square = "all queries" if q.shape[2] == keys else "few queries"
    return f"attention {_machine(q)}, {square}, width {q.shape[-1]}, {_step(keys)} keys"


def skip_kind(tokens: Tokens, gates: Gates) -> str:
    """The kind of shape that a measurement of skipping holds for."""
    images = min(len(tokens.x), SAMPLE)
    parts = how(gates) if gates.all_run or not gates.some_rows else f"{how(gates)} and images"
    return f"skip {_machine(tokens.x)}, {parts}, {images} images, {_step(tokens.length)} tokens of {tokens.x.shape[-1]}"


def _machine(x: Tensor) -> str:
    autocast = " autocast" if torch.is_autocast_enabled(x.device.type) else ""
    threads = f", {torch.get_num_threads()} threads" if x.device.type == "cpu" else ""
    return f"{x.device.type} {str(x.dtype).removeprefix('torch.')}{autocast}{threads}"


def _step(count: int) -> int:
    return -(-count // STEP) * STEP


def rows_that_run(tokens: Tokens, gates: Gates) -> float:
    """Part of an image's tokens that take part, on average. Waits for the device, but where shapes tell it."""
    if not gates.some_rows:
        return 1.0
    if gates.patch_indices is not None:
        return (tokens.num_prefix + gates.patch_indices.shape[1]) / tokens.length
    images = max(1, len(tokens.x))
    assert gates.patch is not None
    return (tokens.num_prefix + float(_held(gates.patch).sum()) / images) / tokens.length


def images_that_run(gates: Gates) -> float:
    """Part of the branches of images that are on. Waits for the device."""
    parts = [1.0 if on is None or not len(on) else float(_held(on).mean()) for on in (gates.attn, gates.mlp)]
    return sum(parts) / 2


def _held(gate: Tensor) -> Tensor:
    return gate.detach() if gate.requires_grad else gate
