"""``saccade bench``: speed of settings, in ratios."""

from __future__ import annotations

from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import (
    Device,
    Json,
    Model,
    Pretrained,
    Settings,
    Threads,
    Weights,
    open_model,
    print_json,
    print_result,
)


@app.command("bench")
def command(
    model: Model,
    setting: Settings = [],  # noqa: B006  (typer reads it)
    batch: Annotated[list[int], typer.Option(help="Images at once; several: --batch 1 8 32.")] = [1, 8, 32],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16, for dense too.")] = "fp32",
    compile: Annotated[bool, typer.Option("--compile", help="Under torch.compile, dense too.")] = False,
    autotuned: Annotated[bool, typer.Option("--autotuned", help="By the table that `saccade autotune` wrote.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="Of timed runs for each batch size; at least 7 runs.")] = 10.0,
    weights: Weights = None,
    pretrained: Pretrained = False,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Interleaved timing of settings and the dense model: speed-up, MAC ratio and their quotient, conversion.

    A setting may hold ranges, a..b or a..b..step: one row for each value.

    Example: saccade bench deit_small_patch16_224 -s "evit(0.7)" --batch 1 8 32 --dtype bf16
    """
    import torch

    from saccade.evaluation.speed import bench
    from saccade.evaluation.sweep import expanded
    from saccade.execution.policy import Execution
    from saccade.runners.runner import Runner
    from saccade.terminal.progress import Progress

    vit = open_model(model, weights, pretrained, device, threads, trained=False)
    runner = Runner(dtype, "compile" if compile else "eager")
    if autotuned:
        vit.execution = Execution.from_cache()
    with Progress(shown=True) as progress:
        asked = [name for text in setting for name in expanded(vit, text)]
        settings = list(dict.fromkeys([str(vit.setting), *asked]))
        speeds = bench(vit, settings, batch=batch, runner=runner, seconds=seconds, progress=progress)
    place = str(next(vit.parameters()).device)
    if json:
        facts = {"device": place, "threads": torch.get_num_threads(), "torch": torch.__version__}
        print_json({**facts, "rows": [s.to_dict() for s in speeds]})
        return
    print_result(speeds, f"{model} on {place}")
