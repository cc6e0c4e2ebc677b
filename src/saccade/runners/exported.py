"""A model as one program: what ``torch.export`` makes of a setting, and what every engine is given."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from saccade.core.plan import Gater, Reducer
from saccade.errors import UserError
from saccade.runners.input_stage import InputStage
from saccade.runners.runner import FP32, Runner

if TYPE_CHECKING:
    from saccade.model import AdaptiveViT

IMAGES = "images"  # the input's name
LOGITS, EMBEDDING, OWNER, TOKENS = "logits", "embedding", "owner", "tokens"


class Answer(nn.Module):
    """A model that gives tensors alone: logits (features [B, D] of a ViT without classifier) and, where asked for,
    which token each cell ended in, and how many tokens are left."""

    def __init__(self, model: AdaptiveViT, provenance: bool = False, stage: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.stage = model.deploy(None), stage
        self.outputs: tuple[str, ...] = (LOGITS if model.vit.num_classes else EMBEDDING,)
        self.outputs += (OWNER, TOKENS) if provenance else ()
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images [B, C, h, w], or what the stage takes -> logits [B, K] fp32; owner [B, cells], tokens [B] int32."""
        images = images if self.stage is None else self.stage(images)
        out = self.model(images.to(next(self.model.parameters()).dtype))
        found: tuple[Tensor, ...] = (out.logits.float(),)
        if len(self.outputs) > 1:
            owner = out.trace.blocks[-1].owner if out.trace.blocks else out.trace.first
            seen = owner.new_zeros(owner.shape[0], owner.shape[1] + 1).scatter(1, owner + 1, 1)[:, 1:]
            found += (owner.to(torch.int32), (seen.sum(1) + self.model.backbone.num_prefix).to(torch.int32))
        return found


@dataclass(frozen=True)
class Exported:
    """A setting of a model as a program for engines.

    ``program`` takes images like ``example``: [B, C, h, w] in fp32, or uint8 [B, H, W, 3] with H and W free; B is free
    where ``batch`` is None. A caller's batch is ``parts`` of these, which an engine computes side by side.
    """

    program: ExportedProgram
    outputs: tuple[str, ...]
    batch: int | None
    example: Tensor
    parts: int = 1

    @classmethod
    def of(
        cls,
        model: AdaptiveViT,
        runner: Runner = FP32,
        batch: int | None = None,
        provenance: bool = False,
        stage: InputStage | None = None,
    ) -> Exported:
        """Export a model under its setting, with weights in the number type that the runner's engine takes.

        Args:
            batch: images of a call, for good; None: any number.
            provenance: also give the owner map and the number of tokens of each image.
            stage: takes photos of any size instead of a model's input.

        Raises:
            UserError: a model of another task, or one that torch.export refuses (the reason is its own).
        """
        if not model.classifies:
            raise UserError("only classifiers and encoders are exported: this model has a head for another task")
        answer = Answer(runner.model(model), provenance, stage)
        weight, free = next(answer.model.parameters()), {} if batch else {0: Dim("batch")}
        example = torch.zeros(batch or 2, model.backbone.channels, *model.input_size(), device=weight.device)
        if stage is not None:
            example = torch.zeros(batch or 2, 240, 320, 3, dtype=torch.uint8, device=weight.device)
            free |= {1: Dim("height", min=2), 2: Dim("width", min=2)}
        try:
            with torch.no_grad(), quiet():
                program = torch.export.export(answer, (example,), dynamic_shapes=(free,))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"{model.setting}: torch.export refuses it ({type(error).__name__}: {reason})") from error
        return cls(program, answer.outputs, batch, example)

    def sizes(self) -> tuple[int | torch.SymInt, ...]:
        """Of the program's input; a symbol where it is free."""
        (name,) = self.program.graph_signature.user_inputs
        (given,) = (node for node in self.program.graph.nodes if node.op == "placeholder" and node.name == name)
        return tuple(given.meta["val"].shape)


def has_fixed_counts(model: AdaptiveViT) -> bool:
    """Whether a graph of a model skips what its setting leaves out, by shapes that all images share.

    Else the graph masks it: the answers are the same, and all of it is computed.
    """
    steps = [step for method in model.plan.methods for step in method.steps]
    counts = [step.count(model.backbone.num_patches) for step in steps if isinstance(step, Reducer)]
    if model.tokenizer.varies or None in counts:
        return False
    if not any(isinstance(step, Gater) for step in steps):
        return True
    weight = next(model.parameters())
    image = torch.zeros(1, model.backbone.channels, *model.input_size(), dtype=weight.dtype, device=weight.device)
    with torch.inference_mode():
        _, trace = model.forward_tokens(image, sparse=False)
    gated = [block for block in trace.blocks if block.gates is not None]
    return all(b.gates.static and b.static_counts[0] == b.static_counts[1] for b in gated if b.gates is not None)


@contextmanager
def quiet() -> Iterator[None]:
    """What exporters say of themselves is for their makers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def silent() -> Iterator[None]:
    """What exporters print and log of their progress goes nowhere."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        finally:
            logging.disable(before)


def reason(error: BaseException) -> str:
    """The innermost cause of a failed export, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
