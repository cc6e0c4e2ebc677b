"""``saccade train``: one training script for every setting."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from saccade.cli.application import app
from saccade.cli.common import Json, kept_in, print_failures, print_json, print_result


@app.command("train")
def command(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A shipped config (named above) or a TOML file.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Like data.path=photos.zip optim.lr=1e-3.")
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder for checkpoints, metrics.csv, report.html and model/.")
    ] = "runs/train",
    new_head: Annotated[
        bool, typer.Option("--new-head", help="Leave out the classifier of the weights: model.new_head=true.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in that folder.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the config as it would be run, and stop.")] = False,
    json: Json = False,
) -> None:
    """Fine-tune any setting, or train one model for many; Ctrl-C stops after a checkpoint, --resume goes on.

    Shipped configs: finetune (one setting), elastic (one model for many), scenes (elastic, on built-in images);
    adavit, dynamicvit, dynamicvit_paper, imagepiece, quadformer (one method each); flexivit, flexivit_coarse,
    flexivit_curriculum, flexivit_distill (all patch sizes); segment, detect, flexilit, flexiclip (other tasks). --show
    prints one with its paper, what it costs and what to expect.

    Example: saccade train finetune model.weights=w.safetensors data.path=photos.zip "sampling.settings=['evit(0.5)']"
    """
    from saccade.terminal.progress import Progress
    from saccade.training.config import read_config, shipped

    changes = [*(changes or []), *(["model.new_head=true"] if new_head else [])]
    settled = read_config(config, changes)
    if show:
        head = [line for line in shipped().get(config, "").splitlines() if line.startswith("#")]
        print("\n".join([*head, settled.model_dump_json(indent=2)]) if not json else settled.model_dump_json(indent=2))
        return
    from saccade.training.train import train

    line = "saccade train " + shlex.join([config, *changes, "--out", out])
    with Progress(shown=True) as progress, kept_in(out, how="the same command with --resume"):
        trained = train(settled, out=out, resume=resume, command=line, progress=progress)
    facts = {
        "folder": str(trained.folder),
        "step": trained.step,
        "gmacs": trained.gmacs,
        "seconds": trained.seconds,
        "images_per_s": trained.images_per_s,
        "waiting": trained.waiting,
    }
    if json:
        print_json({**facts, "checks": trained.rows, "not_read": trained.failures})
        return
    print_result(trained)
    print_failures(trained.failures)
