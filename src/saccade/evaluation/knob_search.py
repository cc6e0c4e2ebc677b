"""Knobs of a setting, learned for a budget from images without labels.

The weights are frozen. A method's learner (``KnobLearner``) runs in training's masked form and moves by the gradient of
the divergence from the dense model's answers, and of the squared miss of the budget (as in arXiv 2305.17997). Then, or
instead, whole settings are tried, each a move away from the best so far (``knob_moves``).
Everything is a function of (seed, step), so that what was interrupted goes on from its last state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from saccade.core.plan import Plan
from saccade.core.registry import KnobLearner, registry
from saccade.data import Loader, Preprocess
from saccade.errors import UserError
from saccade.evaluation.distance import IMAGES
from saccade.evaluation.evaluator import Evaluator
from saccade.evaluation.knob_moves import Moves
from saccade.model import AdaptiveViT
from saccade.setting import Call, Setting
from saccade.storage.files import replacing
from saccade.storage.weights import READ_ERRORS

RATE = 0.05  # of Adam, for logits
BUDGET = 100.0  # weight of the squared relative miss of the budget, beside nats


def learnable(setting: str | Setting) -> bool:
    """Whether a setting is one method some of whose knobs can be learned."""
    calls = Setting.parse(setting).calls
    entry = registry().get(calls[0].name) if len(calls) == 1 else None
    return entry is not None and entry.learner is not None


@dataclass(frozen=True)
class KnobSearch:
    """How knobs are learned: so many steps of gradients on so many images each, drawn by a seed, and then so many moves
    on the real thing (``knob_moves``)."""

    steps: int = 0
    batch: int = 16
    seed: int = 0
    moves: int = 150

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = int(name == "batch")
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise UserError(f"{name}={value!r} is not a whole number from {least} up to 2**31")

    @property
    def work(self) -> int:
        """Images that are run, about."""
        return self.steps * self.batch + self.moves * IMAGES

    def learn(
        self,
        evaluator: Evaluator,
        setting: str,
        gmacs: float,
        places: Sequence[int],
        folder: Path | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> str:
        """The setting with the knobs found.

        Args:
            setting: one for which ``learnable`` holds; its other knobs stay.
            gmacs: the budget, 10^9 MACs an image.
            places: images, which the dense model has been asked about.
            folder: for states, so that an interrupted search goes on; None: none is kept.
        """
        learner, view = _masked(evaluator.dense, setting, gmacs)
        optimizer = torch.optim.Adam(learner.parameters(), RATE)
        file = None if folder is None else folder / f"{self._key(setting, gmacs)}.safetensors"
        start = 0 if file is None else _restored(file, learner, optimizer, self.steps)
        loader = Loader(evaluator.images, Preprocess.of(view.vit, view.input_size()))
        weight = view.vit.patch_embed.proj.weight
        advance(start * self.batch)
        for step in range(start, self.steps):
            for seen in loader.batches(self.batch, self._drawn(places, step)):
                out = view(seen.images.to(weight.device, weight.dtype))
                target = evaluator.reference(seen.indices).to(weight.device)
                divergence = torch.nn.functional.kl_div(
                    out.logits.double().log_softmax(-1), target, reduction="batchmean", log_target=True
                )
                miss = out.trace.target_macs().mean() / (gmacs * 1e9) - 1
                grads = torch.autograd.grad(divergence + BUDGET * miss.square(), list(learner.parameters()))
                for parameter, grad in zip(learner.parameters(), grads, strict=True):
                    parameter.grad = grad
                optimizer.step()
            advance(self.batch)
            if file is not None:
                _keep(file, step + 1, learner, optimizer)
        line = partial(_with_knobs, Setting.parse(setting).calls[0])
        moves = None if folder is None else folder / f"{self._key(setting, gmacs)}-{self.steps}.json"
        search = Moves(evaluator, line, learner, self.seed)
        return line(search.improve(learner.found(), places, self.moves, moves, advance))

    def _key(self, setting: str, gmacs: float) -> str:
        """A name for a search of however many steps: a longer one goes on from a shorter one."""
        facts = "search", self.batch, self.seed, str(Setting.parse(setting)), gmacs
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]

    def _drawn(self, places: Sequence[int], step: int) -> list[int]:
        """The images of a step: all are seen before one is seen again."""
        drawn: list[int] = []
        for place in range(step * self.batch, (step + 1) * self.batch):
            order = torch.Generator().manual_seed(self.seed + 1_000_003 * (place // len(places)))
            drawn.append(places[int(torch.randperm(len(places), generator=order)[place % len(places)])])
        return list(dict.fromkeys(drawn))


def _with_knobs(call: Call, found: Mapping[str, Any]) -> str:
    """The setting of one method with other knobs, each by its name, and no budget."""
    given = dict(zip(registry()[call.name].knobs, call.args, strict=False)) | dict(call.kwargs) | dict(found)
    kept = tuple((name, value) for name, value in given.items() if name not in ("gmacs", "speed"))
    return str(Setting((replace(call, args=(), kwargs=kept),)))


def _masked(model: AdaptiveViT, setting: str, gmacs: float) -> tuple[KnobLearner, AdaptiveViT]:
    """A setting's learner, and the model with it, in which masks have gradients and nothing else is trained."""
    call, view = Setting.parse(setting).calls[0], model.at("dense").eval()
    entry = registry()[call.name]
    entry(model.backbone, call.args, {k: v for k, v in call.kwargs if k not in ("gmacs", "speed")})  # refuses bad knobs
    knobs = entry.bound(model.backbone, call.args, dict(call.kwargs)) or {}
    knobs = {name: value for name, value in knobs.items() if name not in ("gmacs", "speed")}
    assert entry.learner is not None
    learner = entry.learner(**knobs, gmacs=gmacs)
    learner.to(view.vit.patch_embed.proj.weight.device).train()
    view.plan = Plan([learner])
    view.training = True  # masks, where evaluation would drop; the ViT itself stays in evaluation: no dropout
    return learner, view


def _keep(file: Path, step: int, learner: KnobLearner, optimizer: torch.optim.Adam) -> None:
    tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
    for i, parameter in enumerate(learner.parameters()):
        tensors[f"{i}.value"] = parameter.detach().cpu().contiguous()
        for name, value in optimizer.state[parameter].items():
            tensors[f"{i}.{name}"] = value.cpu().contiguous()
    with replacing(file) as part:
        safetensors.torch.save_file(tensors, part)


def _restored(file: Path, learner: KnobLearner, optimizer: torch.optim.Adam, most: int) -> int:
    """Steps that were done, ``most`` at most, whose state is taken up; 0 where there is none that can be read."""
    if not file.is_file():
        return 0
    with suppress(KeyError, *READ_ERRORS):
        tensors = safetensors.torch.load_file(file)
        if int(tensors["step"]) > most:
            return 0
        for i, parameter in enumerate(learner.parameters()):
            state = {name: tensors[f"{i}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
            on = {name: value.to(parameter.device) for name, value in state.items() if name != "step"}
            with torch.no_grad():
                parameter.copy_(tensors[f"{i}.value"])
            optimizer.state[parameter] = {"step": state["step"], **on}
        return int(tensors["step"])
    return 0
