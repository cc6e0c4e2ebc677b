"""How a model is run: the other ways than PyTorch's own, as a view or as a bare callable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from saccade.errors import UserError

if TYPE_CHECKING:
    from saccade.model import AdaptiveViT
    from saccade.runners.deployment import Deployment
    from saccade.runners.engine import Session
    from saccade.runners.runner import Runner


class Deployable(nn.Module):
    """What an ``AdaptiveViT`` has beside its forward: views and callables that run it in another way."""

    _deployment: Deployment | None = None  # another way to run than this module's own

    def deploy(self, runner: Runner | str | Mapping[str, Any] | None = "bf16") -> AdaptiveViT:
        """A view whose forward, outside of training, runs another way: fp32 images in, fp32 logits out all the same.

        The first forward makes a copy of the weights in the runner's number type, and starts its engine. This
        model's own weights, ``state_dict`` and ``save`` stay what they are; ``encode`` and ``train()`` do not use it.
        On Linux the process keeps freed memory from then on (``saccade.runners.allocator.steady_allocator``).

        Args:
            runner: ``"bf16"``, ``"bf16 compiled"``, ``"openvino"``, … (``saccade.runners.runner.Runner``); None or
            "eager": the plain way.

        Raises:
            UserError: a runner that does not exist, or a task whose model has no other way to run.
        """
        from saccade.runners.deployment import Deployment
        from saccade.runners.runner import Runner

        model = cast("AdaptiveViT", self)
        view = model.at(model.setting)
        view._deployment = None if runner is None else Deployment(Runner.of(runner))
        own = type(self).__name__ if model.task_head is None else model.task_head.noun
        if not (model.classifies or view.deployed is None or view.deployed.is_plain):
            raise UserError(f"a {own} runs as it is: runner {view.deployed} is for classifiers and encoders")
        return view

    def runner(
        self,
        engine: str = "eager",
        *,
        dtype: str = "fp32",
        batch: int | None = None,
        threads: int | None = None,
        provenance: bool = False,
    ) -> Session:
        """This model under its setting inside an engine: a callable, images [B, C, h, w] -> logits [B, K], fp32 both.

        Any number of threads may call it. Its ``precision``, ``device`` and ``threads`` can be read; ``all(images)``
        gives every output by its name. It keeps the weights of now.

        Args:
            engine: "eager", "compile" (torch.compile), "cudagraph" (on a GPU), "aoti" (AOTInductor), "onnx" (ONNX
                Runtime), "openvino".
            dtype: "fp32", "bf16", "fp16", and "int8" weights where the engine has them.
            batch: images of every call; None: any number.
            threads: of one call; None: as many as torch has.
            provenance: outputs "owner" (token of each cell, [B, cells] int32) and "tokens" ([B] int32) too.

        Raises:
            UserError: an engine that is not installed, with the line that installs it; a number type that this
            machine does not compute in; an operator that the engine does not have.
        """
        from saccade.runners.runner import Runner
        from saccade.runners.starting import start

        model, made = cast("AdaptiveViT", self), Runner(dtype, engine, batch)
        return start(model, made, threads=threads, fixed=batch is not None, provenance=provenance)

    @property
    def deployed(self) -> Runner | None:
        """How the forward is run; None: plainly, and nothing else was recorded."""
        return None if self._deployment is None else self._deployment.runner
