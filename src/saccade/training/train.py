"""``train``: the one training script of the library, from the config to the saved model, straight down."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.backbones.saving import check_savable, save
from saccade.checkpoint import Source, load_model
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.reports import Checked
from saccade.storage.files import write_json
from saccade.storage.run_folder import taking
from saccade.storage.signs import TRAIN
from saccade.terminal import text_table as tables
from saccade.terminal.progress import Progress
from saccade.terminal.results import Result
from saccade.training.augmentation import isolated
from saccade.training.batch_stream import BatchStream
from saccade.training.checkpoints import newest, publish, read_last, write_state
from saccade.training.config import Config, read_config
from saccade.training.devices import Stopping, open_fabric
from saccade.training.image_sets import check_data
from saccade.training.logging import Board, Meter, Table
from saccade.training.multi_setting import MultiSettingModel
from saccade.training.summary import Summary, equality
from saccade.training.task import open_task
from saccade.training.train_arguments import with_arguments
from saccade.training.train_step import TrainStep
from saccade.training.validation import as_row, check


@dataclass(frozen=True, repr=False)
class TrainResult(Result):
    """What ``train`` hands back."""

    model: AdaptiveViT  #      under the first setting: the best checked one, or the last where nothing was checked
    folder: Path  #            ``folder / "model"`` holds it
    step: int  #               at which it was taken
    metric: str  #             what was checked: "top-1", "mIoU", …
    column: str  #             its name in tables
    checks: list[Checked]  #   of it under each setting; empty where nothing was checked
    gmacs: float  #            spent in all, 10^9, forward and backward
    seconds: float  #          in all, resumed parts together
    images_per_s: float  #     checks not counted
    waiting: float  #          share of the time in which the model waited for images
    failures: dict[str, str]  # images that could not be read, and why

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The checks, with the metric under its own name."""
        return [as_row(row, self.column) for row in self.checks]

    def table(self) -> tables.Table:
        """The checks, and what the training cost."""
        cells = [[c.setting, f"{c.top1:.2%} [{c.low:.1%}, {c.high:.1%}]", f"{c.gmacs:.3f}"] for c in self.checks]
        said = (
            f"{self.seconds / 60:.1f} minutes, {self.gmacs:,.0f} GMACs, {self.images_per_s:.0f} images/s, "
            f"{self.waiting:.0%} of the time waiting for images. {self.folder}: model/, report.html"
        )
        return tables.Table(
            f"Model of step {self.step}, on held-out images", ["setting", self.metric, "GMACs"], cells, said
        )


def train(
    config: str | Path | Mapping[str, Any] | Config,
    changes: Iterable[str] = (),
    *,
    model: Source | None = None,
    data: str | os.PathLike | None = None,
    settings: Sequence[str] | None = None,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | None = None,
    out: str | os.PathLike = "runs/train",
    resume: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> TrainResult:
    """Train one set of weights for one or several settings; writes a folder that can be looked at and resumed.

    ``out`` holds ``config.json``, ``metrics.csv``, ``checks.csv``, ``report.html``, ``checkpoints/`` and, in the end,
    ``model/``. Every batch, draw and random number is a function of (seed, step), so that a resumed run equals an
    uninterrupted one, bit for bit on a CPU.

    Args:
        config: the name of a shipped config, a TOML file, a mapping, or a Config.
        changes: ``key=value``, like ``optim.lr=1e-3``.
        model, data, settings, weights, pretrained, device: as for the other verbs, instead of ``model.name=…``,
            ``data.path=…`` and so on; a module is saved as ``out/source`` first.
        out: the folder.
        resume: go on from the last checkpoint in ``out``, or begin where there is none.

    Raises:
        UserError: bad config, data or folder; a folder that holds a run, without ``resume``; a loss that is not finite.
        KeyboardInterrupt: was asked to stop; a checkpoint has been written.
    """
    config = config if isinstance(config, Config) else read_config(config, changes)
    config = with_arguments(config, Path(out), model, data, settings, weights, pretrained, device)
    with isolated(config.run.seed), Stopping() as stopping:
        return _train(config, Path(out), resume, command, progress or Progress(), stopping)


def _train(
    config: Config, folder: Path, resume: bool, command: str, progress: Progress, stopping: Stopping
) -> TrainResult:
    run = config.run
    fabric = open_fabric(run)
    world, first = fabric.world_size, fabric.global_rank == 0
    if run.batch % (world * run.accumulate):
        raise UserError(f"run.batch={run.batch} is no multiple of {world} processes × {run.accumulate} parts")

    inputs = [config.model.name, config.model.weights, config.data.path]
    with taking(folder, TRAIN, inputs) if first else nullcontext():
        return _run(config, folder, resume, command, progress, stopping, fabric)


def _run(
    config: Config, folder: Path, resume: bool, command: str, progress: Progress, stopping: Stopping, fabric: Any
) -> TrainResult:
    run, settings = config.run, config.sampling.settings
    rank, world, first = fabric.global_rank, fabric.world_size, fabric.global_rank == 0

    # The folder, and what an earlier run left in it.
    checkpoints = folder / "checkpoints"
    if newest(checkpoints, "last") is not None and not resume:
        raise UserError(f"{str(folder)!r} holds a run: go on with --resume, or give another --out")
    last, tensors, facts = read_last(checkpoints, progress.say)
    described = config.model_dump(mode="json")
    _same(described, facts.get("config", described), folder)
    start = facts.get("step", 0)

    # Images, model, teacher: all batches and draws are functions of (seed, step).
    task = open_task(config)
    data = task.identity() if first else {}
    if first and last is not None:
        check_data(data, facts, folder)
    student = MultiSettingModel(task.model(), settings).to(fabric.device)
    check_savable(student.views[0])
    if first:
        write_json(folder / "config.json", described)
    usable = task.ready(folder / "cache", progress) if first else 0
    fabric.barrier()
    usable = usable or task.ready(folder / "cache", progress)
    per_epoch = max(1, usable // run.batch)
    steps = run.steps or max(1, round(run.epochs * per_epoch))
    learner = TrainStep(config, task, student, steps, config.optim.freeze * per_epoch, rank, world)
    share = {"rank": rank, "world": world, "workers": config.data.workers}
    feed = BatchStream(task.examples(learner.seen), batch=run.batch, seed=run.seed, **share)
    if last is not None:
        learner.restore(tensors)
        learner.spent, learner.teacher_gmacs = facts["spent"], facts["taught"]

    # What is watched, by the first process alone.
    summary = Summary(config, folder, command, learner, facts)
    metrics, checks, meter = (
        Table(folder / "metrics.csv", start, first),
        Table(folder / "checks.csv", start, first),
        Meter(world),
    )
    board = Board(folder / "tensorboard" if run.tensorboard and first else None)
    if config.distill.init and start == 0 and first:
        summary.note(equality(learner, next(iter(feed.run(0, 1)))), progress)
    if first and start == 0:
        summary.note(task.notes, progress)

    def keep(step: int) -> None:
        """Write a checkpoint of all that must be remembered after ``step`` steps."""
        if first:
            now, known = learner.tensors(), {"step": step, "config": described, "data": data, **summary.facts()}
            publish(checkpoints, "last", step, lambda part: write_state(part, now, known), keep=2)
            if run.keep_every and step % run.keep_every == 0:
                publish(checkpoints, f"kept-{step}", step, lambda part: write_state(part, now, known))

    def look(step: int) -> None:
        """Check every setting on the held-out images, and keep the best model."""
        if task.held is None or not first:
            return
        found = check(task, learner.best, settings, step, progress)
        for row in found:
            checks.add(as_row(row, task.column))
        progress.say(f"step {step}: " + ", ".join(f"{row.setting} {row.top1:.1%}" for row in found))
        mean = sum(row.top1 for row in found) / len(found)
        if mean > summary.best:
            summary.best = mean
            card = summary.card(step, found)
            publish(checkpoints, "best", step, lambda part: save(learner.best.views[0].eval(), part, **card))
        summary.write(metrics.rows, checks.rows, feed.failures, running=step < steps)

    # The loop.
    student.train()
    check_every = max(1, round(run.check_every * per_epoch))
    bar = progress.start("training", steps)
    bar(start)
    meter.restart(feed)
    for step, views in enumerate(feed.run(start, steps), start + 1):  # ``step``: how many will have been done
        meter.add(learner.step(step - 1, views, fabric.autocast), run.batch)
        bar(1, what=f"training{meter.text}")
        stop = stopping.agreed(world, fabric.device)
        saving = step % run.save_every == 0 or step == steps or stop
        if step % run.log_every == 0 or saving:
            row = meter.take(feed)
            summary.time(row)
            row = {"step": step, "epoch": step / per_epoch, "lr": learner.lr, **row, "gmacs": learner.gmacs}
            row["images"] = summary.images
            if not math.isfinite(row["loss"]):
                raise UserError(
                    f"the loss is {row['loss']} at step {step}: lower optim.lr={config.optim.lr:g}, or raise "
                    f"optim.warmup; --resume goes on from the last checkpoint, before it"
                )
            metrics.add(row)
            board.add(row)
        if step % check_every == 0 or step == steps:
            look(step)
            student.train()
            meter.restart(feed)
        if saving:
            keep(step)
        if stop and step < steps:
            summary.write(metrics.rows, checks.rows, feed.failures, running=True)
            raise KeyboardInterrupt

    # The model.
    board.close()
    bar.finish()
    best = newest(checkpoints, "best")
    step, found = (steps, []) if best is None else summary.of_best(best, checks.rows)
    if first:
        model = learner.best.views[0].eval() if best is None else load_model(best)
        save(model, folder / "model", **summary.card(step, found))
    fabric.barrier()
    summary.write(metrics.rows, checks.rows, feed.failures, running=False)
    return TrainResult(
        model=load_model(folder / "model"),
        folder=folder,
        step=step,
        metric=task.metric,
        column=task.column,
        checks=found,
        gmacs=learner.gmacs,
        seconds=summary.seconds,
        images_per_s=summary.images / max(summary.seconds, 1e-9),
        waiting=summary.waited / max(summary.seconds, 1e-9),
        failures=dict(feed.failures.items),
    )


def _same(now: dict[str, Any], before: dict[str, Any], folder: Path) -> None:
    """A run goes on as it began, or not at all; keys that an earlier version did not know had their defaults then."""
    known = Config().model_dump(mode="json")
    for section, values in now.items():
        if not isinstance(values, dict):
            values, was, place = {section: values}, {section: before.get(section, known[section])}, ""
        else:
            was, place = {**known[section], **before.get(section, {})}, f"{section}."
        for key, value in values.items():
            if was.get(key) != value:
                raise UserError(
                    f"{str(folder)!r} was run with {place}{key}={was.get(key)!r}, now {value!r}: give another --out"
                )
