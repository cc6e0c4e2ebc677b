"""``saccade eval``: accuracy and speed of settings on images."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from saccade.cli import app
from saccade.cli.common import (
    Data,
    Device,
    Json,
    Model,
    Pretrained,
    Settings,
    Split,
    Threads,
    Weights,
    open_model,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from saccade.measure.sweep import Swept


@app.command("eval")
def command(
    model: Model,
    data: Data,
    setting: Settings = [],  # noqa: B006  (typer reads it)
    weights: Weights = None,
    pretrained: Pretrained = False,
    split: Split = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images, evenly spread.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once, for timing too.")] = 32,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Of interleaved timing; 0: none. Default: 10 with a range, else 0.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder for scores.csv, scores.json and report.html; then it can be resumed.")
    ] = None,
    corrupt: Annotated[
        str | None, typer.Option(help="Corrupt the images: masks:50, gaussian_noise:3, jpeg:2, … (strength 1 to 5).")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Accuracy, agreement, GMACs and speed of settings on images, with 95 % intervals, beside the dense model.

    A setting may hold ranges, a..b or a..b..step: one row for each value.

    Example: saccade eval vit_tiny_patch16_224 photos/ --pretrained -s "tome(r=13)" -s "evit(0.7)"

    Example: saccade eval vit_tiny_patch16_224 photos/ --pretrained -s "grid(8..40)" --out runs/sweep
    """
    from saccade.measure.sweep import evaluate
    from saccade.progress import Progress

    vit = open_model(model, weights, pretrained, device, threads)
    if vit.describe().get("task") == "segment":
        from saccade.cli import segment

        segment.command(
            model, data, setting, split, limit=limit, batch=batch, device=device, threads=threads, json=json
        )
        return
    with Progress(shown=True) as progress:
        rows, failures = evaluate(
            vit,
            data,
            [str(vit.setting), *setting],
            split=split,
            limit=limit,
            batch=batch,
            seconds=seconds,
            out=out,
            corrupt=corrupt,
            command=shlex.join(["saccade", *sys.argv[1:]]),
            progress=progress,
        )
    if json:
        print_json({"rows": [r.to_dict() for r in rows], "not_read": failures})
        return
    _show(f"{model}, {rows[0].images} images of {data}" + (f", {corrupt}" if corrupt else ""), rows)
    if out is not None:
        print(f"report: {out}/report.html")
    if failures:
        print(f"{len(failures)} images could not be read and count nowhere:", file=sys.stderr)
        for name, reason in failures.items():
            print(f"  {name}: {reason}", file=sys.stderr)


def _show(title: str, rows: list[Swept]) -> None:
    """The table on standard output: columns that have anything to say and find room (JSON holds all)."""
    room = {"NLL", "KL", "top-5"} if rows[0].speed else set()
    columns = {
        rows[0].metric: [f"{r.top1.mean:.2%} [{r.top1.low:.1%}, {r.top1.high:.1%}]" for r in rows],
        "top-5": [f"{r.top5.mean:.1%}" for r in rows],
        "points vs dense": [
            f"{100 * r.delta.mean:+.2f} [{100 * r.delta.low:+.1f}, {100 * r.delta.high:+.1f}]" if r.delta else ""
            for r in rows
        ],
        "NLL": [f"{r.nll.mean:.3f}" for r in rows],
        "agree": [f"{r.agreement.mean:.1%}" for r in rows],
        "KL": [f"{r.kl.mean:.3f}" for r in rows],
        "tokens": [f"{r.tokens:.0f}" for r in rows],
        "GMACs": [f"{r.gmacs:.3f}" for r in rows],
        "MAC ratio": [f"{r.mac_ratio:.2f}×" for r in rows],
        "speed-up": [f"{r.speed.speedup:.2f}×" if r.speed else "" for r in rows],
        "images/s": [f"{r.speed.images_per_s:.1f}" if r.speed else "" for r in rows],
        "trained": [{True: "yes", False: "no", None: ""}[r.trained] for r in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells) and name not in room}
    caption = "Intervals are at 95 %."
    if speed := rows[0].speed:
        caption += f" Speed: medians of {speed.runs} interleaved runs at batch {speed.batch}, {speed.runner}."
    table = [[r.setting, *cells] for r, *cells in zip(rows, *shown.values(), strict=True)]
    print_table(title, ["setting", *shown], table, caption)
