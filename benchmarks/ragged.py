"""Does what is left out save time? Fixed and ragged counts, branches, heads, all of AdaViT's axes at once.

    python benchmarks/ragged.py [--model deit_small_patch16_224] [--batch 8 32] [--dtype fp32] [--seconds 60]
    python benchmarks/ragged.py --heads       which heads are worth skipping (``heads.MAX_HEAD_SHARE``)

Every way is timed interleaved with the dense model, whose last block is shortened, and with timm's own forward, which
computes it whole: medians of ratios, run by run. MAC ratios are of what ran, against the dense model here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import saccade
import saccade.core.packing
from saccade.core.gates import Gates
from saccade.core.plan import Gater, Method, Plan, Reducer
from saccade.core.reduction import Reduction
from saccade.core.tokens import Tokens
from saccade.execution.attention import attend
from saccade.execution.mixing import Asked
from saccade.methods.common.sampling import keep_where
from saccade.runners.allocator import steady_allocator
from saccade.runners.runner import DTYPES

Way = Callable[[Tensor], Tensor]
WHOLE, MASKED, PADDED, PACKED = (
    "timm, whole",
    "three axes at 0.8, masked",
    "ragged, padded to the longest",
    "ragged, packed",
)


@dataclass(frozen=True)
class Floor:
    """What is asked for at batch 8 and 32 (the project's acceptance list)."""

    speedup: float | None = None
    conversion: tuple[float, float] | None = None


ASKED = {
    "evit(0.7)": Floor(1.45, (0.9, 0.9)),
    "re-selection at 0.5": Floor(1.9, (0.9, 0.9)),
    PACKED: Floor(None, (0.90, 0.93)),
    "branches at 0.5": Floor(1.9, (0.9, 0.9)),
    "three axes at 0.8": Floor(1.55, (0.9, 0.9)),
}


class Ragged(Reducer):
    """Before the first block: another number of patches in every image, 34 to 196 of 196, 138 on average."""

    site = "block"

    def count(self, n: int) -> None:
        return None

    def forward(self, tokens: Tokens) -> Reduction:
        images, n = len(tokens.x), tokens.num_patches
        share = torch.linspace(0, 1, images) if images > 1 else torch.tensor([0.5])
        counts = (n * (34 + 162 * share**0.558) / 196).round().long()
        order = torch.rand(images, n, generator=torch.Generator().manual_seed(0)).argsort(1)
        return keep_where((order < counts.unsqueeze(1)).to(tokens.x.device))


class Drawn(Gater):
    """Random gates, drawn once for a batch size."""

    def __init__(self, on: dict[str, float], heads: int, seed: int) -> None:
        super().__init__()
        self.on, self.heads, self.seed = on, heads, seed
        self.drawn: dict[tuple[int, int], Gates] = {}

    def forward(self, tokens: Tokens) -> Gates:
        shape = len(tokens.x), tokens.num_patches
        if shape not in self.drawn:
            generator = torch.Generator().manual_seed(self.seed)
            sizes = {"patch": shape, "head": (shape[0], self.heads), "attn": shape[:1], "mlp": shape[:1]}
            draws = {part: torch.rand(sizes[part], generator=generator) for part in sizes}
            gates = {part: (draws[part] < on).float().to(tokens.x.device) for part, on in self.on.items()}
            self.drawn[shape] = Gates(**gates)  # type: ignore[arg-type]
        return self.drawn[shape]


def gated(model: saccade.AdaptiveViT, **on: float) -> saccade.AdaptiveViT:
    """Gates in all blocks but the last, which computes the class token alone."""
    view = model.at("dense").eval()
    steps = [(i, Drawn(on, model.backbone.heads, i)) for i in range(model.backbone.depth - 1)]
    view.plan = Plan([Method(steps)])
    return view


def ways_of(model: saccade.AdaptiveViT) -> dict[str, tuple[saccade.AdaptiveViT, Way]]:
    """Every way with the model whose trace prices it."""
    ragged = model.at("dense").eval()
    ragged.plan = Plan([Method([(0, Ragged())])])
    axes = gated(model, patch=0.8, head=0.8, attn=0.8, mlp=0.8)

    def plain(view: saccade.AdaptiveViT) -> Way:
        return lambda images: view(images).logits

    def padded(images: Tensor) -> Tensor:
        kept, saccade.core.packing.MAX_LIVE_SHARE = saccade.core.packing.MAX_LIVE_SHARE, 0.0
        try:
            return ragged(images).logits
        finally:
            saccade.core.packing.MAX_LIVE_SHARE = kept

    def masked(images: Tensor) -> Tensor:
        return axes.forward_head(axes._forward_tokens(images, whole=False, sparse=False)[0])

    dense, blocks = model.at("dense").eval(), tuple(range(model.backbone.depth - 1))
    views = {"dense": dense, "evit(0.7)": model.at("evit(0.7)").eval()}
    views["re-selection at 0.5"] = model.at(f"topk(0.5, at={blocks})").eval()
    views |= {"branches at 0.5": gated(model, attn=0.5, mlp=0.5), "patches at 0.5": gated(model, patch=0.5)}
    views |= {"heads at 0.5": gated(model, head=0.5), "three axes at 0.8": axes, PACKED: ragged}
    found = {name: (view, plain(view)) for name, view in views.items()}
    return found | {PADDED: (ragged, padded), MASKED: (dense, masked), WHOLE: (dense, model.vit)}


def interleaved(ways: Sequence[Way], images: Tensor, seconds: float) -> list[list[float]]:
    """Seconds of each way, run by run, in a rotating order; never fewer than 7."""
    times: list[list[float]] = [[] for _ in ways]
    order = list(range(len(ways)))
    with torch.inference_mode():
        for way in (*ways, *ways):
            way(images)
        start = time.perf_counter()
        while len(times[0]) < 7 or time.perf_counter() - start < seconds:
            for i in order:
                _wait(images)
                begin = time.perf_counter()
                ways[i](images)
                _wait(images)
                times[i].append(time.perf_counter() - begin)
            order = order[1:] + order[:1]
    return times


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def table(model: saccade.AdaptiveViT, batch: int, seconds: float) -> None:
    """One row for each way."""
    weight = next(model.parameters())
    images = torch.randn(batch, 3, *model.input_size()).to(weight.device, weight.dtype)
    ways = ways_of(model)
    times = dict(zip(ways, interleaved([way for _, way in ways.values()], images, seconds), strict=True))
    with torch.inference_mode():
        macs = {name: view(images).trace.macs().mean().item() for name, (view, _) in ways.items()}
    print(
        f"\nbatch {batch}, {len(times['dense'])} runs of each; dense {1e3 * statistics.median(times['dense']):.1f} ms\n"
    )
    print("| way | speed-up (quartiles) | MAC ratio | conversion | asked | against timm, whole |")
    print("|---|---|---|---|---|---|")
    for name in ways:
        low, middle, high = against(times["dense"], times[name])
        ratio = macs["dense"] / macs[name]
        floor, asked = ASKED.get(name, Floor()), []
        if floor.speedup is not None and batch > 1:
            asked.append(f"{floor.speedup}×")
        if floor.conversion is not None and batch > 1:
            asked.append(f"{floor.conversion[batch >= 32]} conversion")
        if batch == 1 and name not in (WHOLE, MASKED, PADDED):
            asked.append("0.97×")
        real = name not in (PADDED, MASKED, WHOLE)
        cells = [name, f"{middle:.3f} ({low:.3f}–{high:.3f})", f"{ratio:.3f}" if real else ""]
        cells += [
            f"{middle / ratio:.3f}" if real else "",
            ", ".join(asked),
            f"{against(times[WHOLE], times[name])[1]:.3f}",
        ]
        print("| " + " | ".join(cells) + " |")
    print(f"\npacked against padded to the longest: {against(times[PADDED], times[PACKED])[1]:.3f} (asked 1.25)")


def against(base: list[float], own: list[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios, run by run."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(base, own, strict=True)], n=4)
    return low, middle, high


def heads(batches: Sequence[int], seconds: float) -> None:
    """Attention with heads skipped ÷ with all computed, as fewer of them run; below 1 it is worth it."""
    shares = (0.25, 0.4, 0.5, 0.6, 0.67, 0.75, 0.85)
    print("| model | batch | same for all images | " + " | ".join(map(str, shares)) + " |")
    print("|---" * (3 + len(shares)) + "|")
    for name in ("deit_tiny_patch16_224", "deit_small_patch16_224"):
        model = saccade.create_model(name)
        attn = model.vit.blocks[1].attn
        for batch in batches:
            x = torch.randn(batch, 197, model.backbone.dim)
            for alike in (True, False) if batch > 1 else (True,):
                cells = []
                for share in shares:
                    on = torch.rand(1 if alike else batch, attn.num_heads, generator=torch.Generator().manual_seed(1))
                    gate = torch.zeros_like(on).flatten()
                    gate[on.flatten().argsort()[: max(1, round(share * on.numel()))]] = 1
                    gate = gate.view_as(on).expand(batch, -1)

                    def skipped(x: Tensor, attn=attn, gate=gate) -> Tensor:
                        return attend(attn, x, ask=Asked(heads=gate, skip=True)).x

                    def computed(x: Tensor, attn=attn, gate=gate) -> Tensor:
                        return attend(attn, x, ask=Asked(heads=gate)).x

                    times = interleaved([skipped, computed], x, seconds / (4 * len(batches) * len(shares)))
                    cells.append(f"{against(times[0], times[1])[1]:.2f}")
                print(f"| {name} | {batch} | {'yes' if alike else 'no'} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each batch size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    steady_allocator()
    where = f"{arguments.dtype}, {arguments.device}, {arguments.threads} threads, torch {torch.__version__}"
    print(f"{arguments.model}, {where}")
    if arguments.heads:
        heads(arguments.batch, arguments.seconds)
        return
    vit = saccade.create_model(arguments.model).vit.to(arguments.device, DTYPES[arguments.dtype])
    for batch in arguments.batch:
        table(saccade.AdaptiveViT(vit), batch, arguments.seconds)


if __name__ == "__main__":
    main()
