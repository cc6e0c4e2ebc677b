"""``saccade bench``: speed of settings, in ratios."""

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
    print_result,
)


@app.command("bench")
def command(
    model: Model,
    setting: Settings = [],  # noqa: B006  (typer reads it)
    batch: Annotated[list[int], typer.Option(help="Batch sizes: --batch 1 8 32.")] = [1, 8, 32],  # noqa: B006
    runner: Annotated[
        list[str],
        typer.Option(
            help="Engine and number type: eager, compile, cudagraph, aoti, onnx, openvino, 'openvino bf16'; "
            "repeatable, then all run interleaved and speed-ups are over dense in the first."
        ),
    ] = [],  # noqa: B006
    ideal: Annotated[
        bool,
        typer.Option(
            "--ideal",
            help="Also time the same token counts by plain slicing; 'kept', its time ÷ time, is what deciding costs.",
        ),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="fp32 (the default), bf16 or fp16, for dense too: a runner's short form.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Run everything under torch.compile.")] = False,
    autotuned: Annotated[
        bool, typer.Option("--autotuned", help="Use the table that `saccade autotune` wrote.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0, help="Seconds of timing for each batch size; at least 7 runs.")
    ] = 10.0,
    weights: Weights = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Interleaved timing of settings and the dense model: speed-up, MAC ratio and their quotient, conversion.

    A setting may hold ranges, a..b or a..b..step: one row for each value.

    Example: saccade bench deit_small_patch16_224 -s "evit(0.7)" --runner eager --runner "openvino bf16" --ideal
    """
    import torch

    from saccade.errors import UserError
    from saccade.evaluation.speed import bench
    from saccade.evaluation.sweep import expanded
    from saccade.execution.policy import Execution
    from saccade.runners.runner import Runner
    from saccade.terminal.progress import Progress

    if runner and (compile or dtype is not None):
        short = "--compile" if compile else f"--dtype {dtype}"
        raise UserError(f"{short} beside --runner {runner[0]!r}: write it into the runner, like --runner 'onnx bf16'")
    runners = [*map(Runner.of, runner)] or [Runner(dtype or "fp32", "compile" if compile else "eager")]
    vit = open_model(model, weights, pretrained, device, threads, trained=False, num_classes=num_classes)
    if autotuned:
        vit.execution = Execution.from_cache()
    with Progress(shown=True) as progress:
        asked = [name for text in setting for name in expanded(vit, text)]
        settings = list(dict.fromkeys([str(vit.setting), *asked]))
        speeds = bench(vit, settings, batch=batch, runner=runners, ideal=ideal, seconds=seconds, progress=progress)
    place = str(next(vit.parameters()).device)
    if json:
        facts = {"device": place, "threads": torch.get_num_threads(), "torch": torch.__version__}
        print_json({**facts, "rows": [s.to_dict() for s in speeds]})
        return
    print_result(speeds, f"{model} on {place}")
