"""One training step: draw, look, compare with labels and teacher, and move the weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from saccade.data import Preprocess
from saccade.training.batch_stream import Views
from saccade.training.config import Config
from saccade.training.loss import method_losses, sized
from saccade.training.multi_setting import MultiSettingModel
from saccade.training.optimizer import (
    average_gradients,
    build_optimizer,
    optimizer_tensors,
    rate,
    restore_optimizer,
    set_rate,
)
from saccade.training.setting_sampler import Sampler
from saccade.training.task import Task

BACKWARD = 2  # a backward pass costs about two forward ones


class TrainStep:
    """All that learns, all that it learns from, and what it has cost so far.

    Args:
        steps: of the whole training.
        frozen: steps for which the backbone stands still.
    """

    def __init__(
        self, config: Config, task: Task, student: MultiSettingModel, steps: int, frozen: float, rank: int, world: int
    ) -> None:
        self.config, self.task, self.student, self.steps, self.frozen = config, task, student, steps, frozen
        self.rank, self.world = rank, world
        self.preprocess = Preprocess.of(student.vit)
        task.teach(student)
        self.teacher, self.project = task.teacher, task.project.to(student.device)
        self.sampler = Sampler(config.sampling, student.macs(), steps, config.run.seed)
        self.optimizer = build_optimizer(student, self.project, config.optim)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        decay = config.optim.ema
        self.averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        self.spent = [0.0] * len(student.views)  # 10^9 MACs of each setting, forward and backward, all processes
        self.teacher_gmacs = 0.0  #                and of the teacher
        self.lr = 0.0  # of the latest step
        student.vit.set_grad_checkpointing(config.run.checkpointing)
        views = student.views
        self.runners: list[Any] = [torch.compile(view) for view in views] if config.run.compile else list(views)

    @property
    def gmacs(self) -> float:
        """10^9 MACs spent so far, the teacher's too."""
        return sum(self.spent) + self.teacher_gmacs

    @property
    def seen(self) -> Preprocess:
        """What views should be like: large enough for student and teacher."""
        own = self.preprocess
        return own if self.teacher is None else replace(own, size=max(own.size, self.teacher.own.size))

    @property
    def best(self) -> MultiSettingModel:
        """The student to look at: with averaged weights, where they are kept."""
        averaged: Any = self.averaged
        return self.student if averaged is None else averaged.module

    def step(self, step: int, views: Views, autocast: Callable[[], AbstractContextManager]) -> dict[str, Tensor]:
        """Learn from one batch; gives the terms of the loss and the gradient's norm."""
        run, optim, device = self.config.run, self.config.optim, self.student.device
        torch.manual_seed(hash((run.seed, step, self.rank)) % 2**63)  # dropout and drop path
        self.lr = rate(step, self.steps, optim)
        set_rate(self.optimizer, self.lr, frozen=step < self.frozen)
        images = self.preprocess.normalise(views.images.to(device, non_blocking=True))
        key = (run.seed, step, self.rank)
        images, targets = self.task.batch(images, views.labels.to(device), key)
        drawn = self.sampler.draw(step)
        found: dict[str, Any] = {}
        for part, wanted in zip(images.chunk(run.accumulate), targets.chunk(run.accumulate), strict=True):
            for name, value in self._learn(drawn, part, wanted, autocast).items():
                found[name] = found.get(name, 0.0) + value
        average_gradients(self.trained, self.world)
        if optim.clip:
            found["grad_norm"] = nn.utils.clip_grad_norm_(self.trained, optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.averaged is not None:
            self.averaged.update_parameters(self.student)
        return found

    def _learn(
        self, drawn: list[int], images: Tensor, targets: Tensor, autocast: Callable[[], AbstractContextManager]
    ) -> dict[str, Tensor]:
        """Add up the gradients of the drawn settings on some images."""
        teacher_out = None
        if self.teacher is not None:
            with autocast():
                teacher_out = self.teacher(images)
            self.teacher_gmacs += self.teacher.macs * len(images) * self.world / 1e9
        images = sized(images, self.preprocess.size)
        full = self.config.run.batch // self.world * len(drawn)
        found: dict[str, Any] = {}
        for i in drawn:
            model = self.student.views[i]
            with autocast():
                out = self.runners[i](images, **self.task.asks)
                parts = self.task.terms(model, out, targets, teacher_out, full)
                for name, value in method_losses(model, out, len(images) / full).items():
                    parts[name] = parts.get(name, 0.0) + value
            loss = torch.stack(list(parts.values())).sum()
            loss.backward()
            if self.config.distill.teacher == "self" and teacher_out is None:  # the first drawn is the largest
                teacher_out = self.task.teacher_output(model, out)
            cost = 1 + BACKWARD + self.config.run.checkpointing
            self.spent[i] += cost * out.trace.macs().sum().item() * self.world / 1e9
            for name, value in {"loss": loss, **{f"loss/{k}": v for k, v in parts.items()}}.items():
                found[name] = found.get(name, 0.0) + value.detach()
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All that must be remembered to go on."""
        held = {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        for name, module in self._modules():
            held |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
        return held

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``tensors``."""
        for name, module in self._modules():
            module.load_state_dict(_below(name, tensors))
        restore_optimizer(self.optimizer, _below("optimizer", tensors))

    def _modules(self) -> list[tuple[str, nn.Module]]:
        named = [("student", self.student), ("project", self.project), ("averaged", self.averaged)]
        return [(name, module) for name, module in named if module is not None]


def _below(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
