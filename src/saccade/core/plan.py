"""What a method is, what a plan of several is, and the registry where each method's own file puts its name.

A method only decides; the core applies. Adding one is adding one file to ``methods/``: a docstring with the paper,
a ``Reducer`` or ``Gater``, and a factory with ``@register``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from saccade.core.gates import Gates
from saccade.core.groups import gates_by_group, groups, is_ragged, joined
from saccade.core.packing import padded
from saccade.core.reduction import Reduction, SoftReduction, hide, reduce
from saccade.core.slicing import First
from saccade.core.tokens import READINGS, Tokens
from saccade.errors import UserError

if TYPE_CHECKING:
    from saccade.core.record import BlockCost, Trace
    from saccade.core.timm_types import TimmBlock, ViT
    from saccade.tokenizers.resize.resampling import ResizeSpec


@dataclass(frozen=True)
class Backbone:
    """What a method may know of the ViT it is built for."""

    depth: int
    dim: int  #              D
    heads: int  #            H
    head_dim: int  #         d
    num_prefix: int  #       P
    has_class_token: bool
    patch_size: tuple[int, int]  # of the weights
    input_size: tuple[int, int]  # pixels the weights were trained at
    channels: int  #         of an image
    pool: str  #             timm's global_pool
    cost: BlockCost  #       MACs of a block's parts
    head: tuple[int, int]  # MACs of pooling and classifier, and how many more of them for each token
    resize: ResizeSpec | None = None  # how kernel and positions were resized in training; None: not recorded
    num_classes: int = 0
    attention: str = "Attention"  # timm's kind, by its name
    rotary: str | None = None  # what rotary positions count: "grid", shares of the whole grid, or "cells"; None: none

    def check_cells(self, part: str, patch: tuple[int, int]) -> None:
        """Raises UserError where cells of other pixels than the weights' would be counted as theirs."""
        if self.rotary == "cells" and patch != self.patch_size:
            own = "x".join(map(str, self.patch_size))
            raise UserError(
                f"{part}: this model's rotary positions count patches of {own} pixels, and would turn others as if "
                f"they were these: keep {own}, and change size"
            )

    @property
    def num_patches(self) -> int:
        """N of an image of the model's own size."""
        return (self.input_size[0] // self.patch_size[0]) * (self.input_size[1] // self.patch_size[1])

    def stages(self) -> tuple[int, ...]:
        """Blocks at a quarter, a half and three quarters of the depth: (3, 6, 9) of twelve, the field's default."""
        found = (max(1, round(self.depth * q / 4)) for q in (1, 2, 3))
        return tuple(dict.fromkeys(block for block in found if block < self.depth))


class Tokenizer(nn.Module):
    """Makes tokens of images."""

    resize: ResizeSpec | None = None  # how it resizes the weights' kernel or positions; None: it uses them as they are
    varies: bool = False  # whether images may get different numbers of tokens

    def input_size(self, native: tuple[int, int]) -> tuple[int, int]:
        """Pixels (h, w) that images should come in, given those of the weights; others are resized on the way."""
        return native

    def macs(self, vit: ViT, tokens: Tokens) -> int:
        """Multiply-accumulates per image of making these tokens."""
        raise NotImplementedError

    def forward(self, vit: ViT, images: Tensor) -> Tokens:
        """images [B, C, h, w] -> tokens with prefix and positions, ready for the blocks."""
        raise NotImplementedError


class Reducer(nn.Module):
    """Decides where patch tokens go, in one block."""

    site: ClassVar[str] = "attn"  # "attn": between attention and MLP; "block": before the block
    read: frozenset[str] = frozenset()  # readings of attention that it needs ("attn" only)
    ragged: bool = False  # whether padding changes nothing; else it is asked about images of equal counts
    part: str = ""  # by which what it learns is told from that of another in the same block
    counted: ClassVar[bool] = False  # its MACs are part of the model's in the papers' count: a network decides

    def count(self, n: int) -> int | None:
        """Patch tokens left of n; None when it depends on the image. Equal to n: nothing will be read or run."""
        raise NotImplementedError

    def macs(self, n: int) -> int:
        """Multiply-accumulates of deciding (and of mixing, for a soft reduction) among n patch tokens."""
        return 0

    def forward(self, tokens: Tokens) -> Reduction | SoftReduction | First | None:
        raise NotImplementedError


class Gater(nn.Module):
    """Decides which parts of one block run, from the tokens at its input."""

    ragged: bool = False  # as a reducer's
    part: str = ""  #       as a reducer's
    draws: bool = False  #  whether it draws by chance for each image, by ``fingerprint.FINGERPRINT`` of its pixels

    def macs(self, n: int) -> int:
        """Multiply-accumulates of deciding, for n patch tokens."""
        return 0

    def gates_for(self, block: TimmBlock, tokens: Tokens) -> Gates:
        """The gates of this block; to override where its weights are asked too."""
        return self(tokens)

    def forward(self, tokens: Tokens) -> Gates:
        raise NotImplementedError


class Method(nn.Module):
    """Reducers and gaters, each with its block, in the order in which they run in one block.

    A method with a loss of its own overrides ``loss``.
    """

    depth: int | None = None  # blocks that run at all; None: every one

    def __init__(self, steps: Iterable[tuple[int, Reducer | Gater]]) -> None:
        super().__init__()
        at, modules = zip(*steps, strict=True) if (steps := list(steps)) else ((), ())
        self.at: tuple[int, ...] = at
        self.steps: Any = nn.ModuleList(modules)

    def places(self) -> tuple[str, ...]:
        """Where each step learns, ``<block>`` or ``<block>.<part>``: under these names its parameters are kept."""
        steps = zip(self.at, self.steps, strict=True)
        return tuple(f"{block}.{step.part}" if step.part else str(block) for block, step in steps)

    def loss(self, trace: Trace) -> dict[str, Tensor]:
        """Terms that training adds to the task's loss, by name."""
        return {}

    def head(self, vit: ViT, tokens: Tokens) -> Tensor | None:
        """Logits [B, K] by a head of its own; None: by the ViT's."""
        return None


@dataclass(frozen=True)
class Site:
    """What reducers do at one site of a block, as far as is known before the first pixel.

    Behind a reducer whose count depends on the image each may have something to do: that is known when it is asked.
    """

    reducers: tuple[Reducer, ...]  # that may have something to do
    left: int  #                     patch tokens after them, as if those whose count depends on the image took none
    macs: int  #                     of deciding, for one image
    read: frozenset[str]  #          readings of attention that they need
    spent: tuple[frozenset[str], ...]  # for each, readings that none behind it needs
    counted: int = 0  #              of ``macs``, those that the papers count too


class Plan(nn.Module):
    """Several methods, run in the order in which the setting names them."""

    def __init__(self, methods: Iterable[Method] = ()) -> None:
        super().__init__()
        self.methods: Any = nn.ModuleList(methods)
        self.at: dict[int, list[Reducer | Gater]] = {}  # a plain dictionary: methods own their steps
        self._sites: dict[tuple[int, str, int], Site] = {}  # what ``site`` has found: a plan does not change
        for method in self.methods:
            for block, step in zip(method.at, method.steps, strict=True):  # type: ignore[arg-type]
                self.at.setdefault(block, []).append(step)
        asked = [(i, "gate" if isinstance(s, Gater) else s.site) for i, steps in self.at.items() for s in steps]
        self._works = frozenset(asked)  # the blocks and sites where a method works
        self.draws = any(isinstance(s, Gater) and s.draws for steps in self.at.values() for s in steps)

    def site(self, block: int, site: str, n: int) -> Site:
        """The work at a site ("block" or "attn") of a block that n patch tokens come to."""
        if type(n) is not int or torch.compiler.is_dynamo_compiling():  # it is, or may be, a symbol
            return self._site(block, site, n)
        key = block, site, n
        if (known := self._sites.get(key)) is None:
            known = self._sites[key] = self._site(block, site, n)
        return known

    def _site(self, block: int, site: str, n: int) -> Site:
        chosen: list[Reducer] = []
        known, macs, counted = True, 0, 0
        for step in self.at.get(block, ()):
            if not isinstance(step, Reducer) or step.site != site:
                continue
            left = step.count(n)
            if left != n or not known:
                chosen.append(step)
                cost = step.macs(n)
                macs, counted = macs + cost, counted + (cost if step.counted else 0)
                n, known = left or n, known and left is not None
        reads = [step.read for step in chosen]
        spent = tuple(READINGS.difference(*reads[i + 1 :]) for i in range(len(reads)))
        return Site(tuple(chosen), n, macs, frozenset().union(*reads), spent, counted)

    def works_at(self, block: int) -> bool:
        """Whether a method works at a block, or in it."""
        return block in self.at

    def is_identity(self, block: int, n: int) -> bool:
        """Whether no method has anything to do inside of a block that n patch tokens enter."""
        idle = len(self.site(block, "attn", n).reducers) == 0  # compilers do not trace `not` of a tuple
        return idle and not self.gated(block)

    def gated(self, block: int) -> bool:
        """Whether a method decides which parts of a block run."""
        return (block, "gate") in self._works

    def depth(self, blocks: int) -> int:
        """How many of so many blocks run."""
        return min([blocks, *(method.depth for method in self.methods if method.depth is not None)])

    def reduce(self, block: int, site: str, tokens: Tokens, sparse: bool = True) -> tuple[Tokens, int]:
        """Run the reducers of a site; the tokens and the MACs of deciding.

        sparse: False: a reduction that has a gate is carried out as a mask.
        """
        cost: int = 0
        if (block, site) not in self._works:
            return tokens, cost
        found = self.site(block, site, tokens.num_patches)
        for reducer, spent in zip(found.reducers, found.spent, strict=True):
            tokens = padded(tokens)
            if reducer.ragged or not is_ragged(tokens):
                tokens, macs = _reduced(reducer, spent, sparse, tokens)
            else:
                parts = groups(tokens)
                done = [_reduced(reducer, spent, sparse, part.tokens) for part in parts]
                costs = [len(part.images) * macs for part, (_, macs) in zip(parts, done, strict=True)]
                macs = round(sum(costs) / len(tokens.x))  # the mean image's
                tokens = joined([left for left, _ in done], parts)
            cost += macs
        return tokens, cost

    def gates(self, i: int, block: TimmBlock, tokens: Tokens) -> tuple[Gates | None, int]:
        """The gates of the i-th block (several methods: a part runs where all agree) and the MACs of deciding."""
        cost, found = 0, []
        for gater in self.at.get(i, ()):
            if not isinstance(gater, Gater):
                continue
            cost += gater.macs(tokens.num_patches)
            decide = partial(gater.gates_for, block)
            ragged = is_ragged(tokens) and not gater.ragged
            found.append(gates_by_group(tokens, decide) if ragged else decide(padded(tokens)))
        return _agree(found), cost


def _reduced(reducer: Reducer, spent: frozenset[str], sparse: bool, tokens: Tokens) -> tuple[Tokens, int]:
    """One reducer's decision, carried out, and its MACs an image; readings that are ``spent`` then stay behind.

    Where fewer tokens are there than could be foreseen, so few that it would leave them all, it is not asked.
    """
    n = tokens.num_patches
    if reducer.count(n) == n:
        return tokens.without(spent), 0
    decision, tokens = reducer(tokens), tokens.without(spent)
    gate = None if sparse else getattr(decision, "gate", None)
    return reduce(tokens, decision) if gate is None else hide(tokens, decision), reducer.macs(n)


def _agree(gates: list[Gates]) -> Gates | None:
    if not gates:
        return None
    merged = gates[0]
    for other in gates[1:]:
        pairs = {f: (getattr(merged, f), getattr(other, f)) for f in ("patch", "head", "attn", "mlp")}
        both = {f: b if a is None else a if b is None else a * b for f, (a, b) in pairs.items()}
        ways = {f: getattr(merged, f) or getattr(other, f) for f in ("partial", "mlp_heads", "inner")}
        merged = Gates(**both, **ways)
    return merged
