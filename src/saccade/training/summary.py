"""What a run amounts to, in words and numbers: the facts of a checkpoint, the model's card, the report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn import functional as F

import saccade
from saccade.data import Failures, ImageError
from saccade.reports import Checked, Sample, Share, TrainingReport, render_training
from saccade.storage.files import write_text
from saccade.terminal.progress import Progress
from saccade.training.batch_stream import Views
from saccade.training.config import Config
from saccade.training.logging import Row
from saccade.training.loss import sized
from saccade.training.train_step import TrainStep
from saccade.training.validation import as_row, from_rows

SAMPLES, SHOWN = 3, 5  # images, and settings, of which the report shows pictures
DATA_BOUND = 0.2  # share of the time spent waiting for images


class Summary:
    """Keeps count of a run; ``facts`` goes into its checkpoints and comes back out of them."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        command: str,
        learner: TrainStep,
        facts: dict[str, Any],
    ) -> None:
        self.config, self.folder, self.command, self.learner = config, folder, command, learner
        self.task, self.first = learner.task, learner.rank == 0
        self.best: float = facts.get("best", -1.0)
        self.seconds: float = facts.get("seconds", 0.0)  # of training, checks not counted
        self.waited: float = facts.get("waited", 0.0)
        self.images: int = facts.get("images", 0)
        self.notes: list[str] = facts.get("notes", [])

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must remember."""
        own = {name: getattr(self, name) for name in ("best", "seconds", "waited", "images", "notes")}
        return {**own, "spent": self.learner.spent, "taught": self.learner.teacher_gmacs}

    def note(self, lines: Sequence[str], progress: Progress) -> None:
        """Lines to say now and to repeat in the report."""
        for line in lines:
            progress.say(line)
            self.notes.append(line)

    def time(self, row: Row) -> None:
        """Take up the timing of one row of metrics."""
        seconds = row.pop("seconds")
        self.seconds += seconds
        self.waited += row["wait"] * seconds
        self.images += round(row["images_per_s"] * seconds)

    def card(self, step: int, found: Sequence[Checked]) -> dict[str, Any]:
        """What the saved model says of itself."""
        images, names = self.task.images, self.learner.student.views[0].class_names
        return {
            "settings": list(self.config.sampling.settings),
            "classes": images.classes if names is None else list(names),
            "trained": {
                "images": f"{Path(images.path).name}, {len(images)} of {images.split or 'all'}",
                "step": step,
                "seed": self.config.run.seed,
                "checked": [as_row(row, self.task.column) for row in found],
                "config": self.config.model_dump(mode="json"),
            },
        }

    def of_best(self, best: Path, rows: Sequence[Row]) -> tuple[int, list[Checked]]:
        """The step of the best checkpoint, and its checks."""
        step = int(best.name.rpartition("-")[2])
        return step, from_rows([row for row in rows if row["step"] == step], self.task.column)

    def write(self, metrics: Sequence[Row], checks: Sequence[Row], failures: Failures, *, running: bool) -> None:
        """Write ``report.html``."""
        if not self.first:
            return
        rows = from_rows(checks, self.task.column)
        report = TrainingReport(
            title=f"Training {self.config.model.name}",
            command=self.command,
            verdict=self._verdict(metrics, rows),
            facts=self._facts(failures),
            metric_name=self.task.metric,
            steps=[{k: v for k, v in row.items() if isinstance(v, (int, float))} for row in metrics],
            checks=rows,
            shares=self._shares(int(metrics[-1]["step"]) if metrics else 0),
            samples=self._samples(),
            notes=self.notes,
            running=running,
        )
        write_text(self.folder / "report.html", render_training(report))

    def _verdict(self, metrics: Sequence[Row], checks: Sequence[Checked]) -> list[str]:
        done = f"{metrics[-1]['step']} of {self.learner.steps} steps" if metrics else "No steps yet"
        spent = f"{done}, {self.images:,} images, {self.learner.gmacs:,.0f} GMACs, {self.seconds / 60:.1f} minutes."
        lines = [spent]
        if checks:
            latest = [row for row in checks if row.step == checks[-1].step]
            best, worst = max(latest, key=lambda r: r.top1), min(latest, key=lambda r: r.top1)
            interval = f"[{best.low:.1%}, {best.high:.1%}]"
            name = "" if self.task.metric == "top-1" else f" {self.task.metric}"
            text = f"`{best.setting}` reaches {best.top1:.1%}{name} {interval} at {best.gmacs:.3f} GMACs"
            if worst is not best:
                text += f"; `{worst.setting}`, the lowest, {worst.top1:.1%} at {worst.gmacs:.3f}"
            lines = [text + ", on images that were not trained on.", spent]
        if self.seconds and self.waited / self.seconds > DATA_BOUND:
            share = self.waited / self.seconds
            lines.append(f"Data-bound: {share:.0%} of the time went by waiting for images; raise data.workers.")
        return lines

    def _facts(self, failures: Failures) -> dict[str, str]:
        run, images, held = self.config.run, self.task.images, self.task.held
        device = self.learner.student.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
        rate = f"{self.images / self.seconds:.0f} images/s" if self.seconds else "not measured"
        facts = {
            "images": f"{Path(images.path).name}, {len(images)} of {images.split or 'all'}",
            "checked on": f"{len(held)} of {held.split or 'the same'}, none trained on" if held else "nothing",
            "device": f"{name}, {self.learner.world} processes × {torch.get_num_threads()} threads, {run.precision}",
            "wall time": f"{self.seconds / 60:.1f} minutes, checks not counted",
            "throughput": f"{rate}, {self.waited / max(self.seconds, 1e-9):.1%} of the time waiting for images",
            "batch": f"{run.batch} in {run.accumulate} parts, seed {run.seed}",
            "versions": f"saccade {saccade.__version__}, torch {torch.__version__}, timm {timm.__version__}",
        }
        if self.learner.teacher_gmacs:
            facts["teacher"] = f"{self.config.distill.teacher}, {self.learner.teacher_gmacs:,.0f} GMACs"
        if failures:
            facts["not read"] = str(failures)
        return facts

    def _shares(self, steps: int) -> list[Share]:
        drawn = self.learner.sampler.histogram(0, steps)
        settings, spent = self.config.sampling.settings, self.learner.spent
        return [Share(name, drawn[i], spent[i]) for i, name in enumerate(settings)]

    def _samples(self) -> list[Sample]:
        student = self.learner.best
        mode = student.training
        student.eval()
        shown, samples = self.task.held or self.task.images, []
        for place in range(0, len(shown), max(1, len(shown) // SAMPLES)):
            try:
                image = shown.read(place)
            except ImageError:
                continue
            pairs = list(zip(self.config.sampling.settings, student.views, strict=True))[:SHOWN]
            samples.append(Sample(shown.names[place], [(name, self.task.picture(view, image)) for name, view in pairs]))
        student.train(mode)
        return samples[:SAMPLES]


def equality(learner: TrainStep, views: Views) -> list[str]:
    """How far each setting of a student that starts from its teacher is from it, before the first step."""
    teacher, student = learner.teacher, learner.student
    assert teacher is not None
    mode = student.training
    student.eval()
    images = learner.preprocess.normalise(views.images.to(student.device))
    with torch.no_grad():
        teacher_logits = teacher(images).logits.float().log_softmax(-1)
        lines = []
        for name, view in zip(learner.config.sampling.settings, student.views, strict=True):
            said = view(sized(images, learner.preprocess.size)).logits.float().log_softmax(-1)
            kl = F.kl_div(said, teacher_logits, reduction="batchmean", log_target=True).item()
            same = (said.argmax(-1) == teacher_logits.argmax(-1)).float().mean().item()
            lines.append(f"Before the first step: KL(teacher ‖ {name}) {kl:.2g}, same best class {same:.1%}.")
    student.train(mode)
    return lines
