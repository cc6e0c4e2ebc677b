"""``saccade doctor``: what this machine has, and what would make it faster."""

from __future__ import annotations

from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import Json, Threads, open_model, print_json, print_result, use_threads


@app.command("doctor")
def command(
    curve: Annotated[
        str | None,
        typer.Option(help="Measure the latency curve of this model: time of a block by tokens, and of each method."),
    ] = None,
    runner: Annotated[str, typer.Option(help="Runner of the curve: eager, onnx, openvino, …")] = "eager",
    batch: Annotated[int, typer.Option(min=1, help="Batch size of the curve.")] = 1,
    out: Annotated[str | None, typer.Option(help="Also write the curve as a page with plots: FILE.html.")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Processor and number types, threads, allocator, versions, engines found and missing, what autotune measured.

    With --curve, a model's latency curve on this machine instead, which is measured once and kept in your cache folder.

    Example: saccade doctor --curve deit_small_patch16_224 --runner openvino
    """
    from saccade.errors import UserError
    from saccade.evaluation.device_curve import device_curve
    from saccade.evaluation.doctor import doctor
    from saccade.storage.files import write_text
    from saccade.terminal.progress import Progress
    from saccade.terminal.results import Result

    use_threads(threads)
    found: Result
    if curve is None:
        if out is not None:
            raise UserError(f"--out {out[:60]} is for a curve: give --curve MODEL")
        found = doctor()
    else:
        vit = open_model(curve, None, False, "auto", threads, trained=False)
        with Progress(shown=True) as progress:
            measured = found = device_curve(vit, runner=runner, batch=batch, progress=progress)
        if out is not None:
            write_text(out, measured.page())
    if json:
        print_json(found.to_dicts())
        return
    print_result(found)
