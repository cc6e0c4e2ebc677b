"""``saccade autotune``: which way to run is the faster one on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import (
    Device,
    Json,
    Model,
    NumClasses,
    Pretrained,
    Settings,
    Threads,
    Weights,
    open_model,
    print_json,
)


@app.command("autotune")
def command(
    model: Model,
    setting: Settings = [],  # noqa: B006  (typer reads it)
    batch: Annotated[list[int], typer.Option(help="Batch sizes: --batch 1 8 32.")] = [1, 8],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="Number types: fp32, bf16, fp16; repeatable.")] = ["fp32", "bf16"],  # noqa: B006
    out: Annotated[str | None, typer.Option(help="Where to write the table; your cache folder by default.")] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure where fused attention, and skipping, are faster on this machine; models follow fixed rules otherwise.

    A model uses the table where it is told to: model.execution = Execution.from_cache(), or bench --autotuned.

    Example: saccade autotune deit_small_patch16_224 -s "topk(0.5)" -s "adavit(0.7)"
    """
    from saccade.evaluation.stopwatch import autotune
    from saccade.execution.policy import cache_file
    from saccade.terminal.progress import Progress

    vit = open_model(model, weights, pretrained, device, threads, trained=False, num_classes=num_classes)
    with Progress(shown=True) as progress:
        found = autotune(vit, setting, batch=batch, dtypes=dtype, out=out, progress=progress)
    if json:
        print_json(found.to_dict())
        return
    for kind, best in sorted(found.measured.items()):
        print(f"{kind}: {best if isinstance(best, str) else f'up to {best:.0%}'}")
    print(f"written to {out or cache_file()}")
