"""How a model is run: its number type, and whether compiled. ``tune`` recommends one, and ``load`` gives it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.core.hooks import copied
from saccade.core.output import LazyOutput, Output
from saccade.errors import UserError
from saccade.runners.allocator import steady_allocator

if TYPE_CHECKING:
    from saccade.model import AdaptiveViT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VIEWS = 8  # settings of one model that stay compiled


@dataclass(frozen=True)
class Runner:
    """A way to run a model.

    Raises UserError for an unknown number type or a batch that is no whole number of images.
    """

    dtype: str = "fp32"  #        of weights and activations; images and logits are fp32 whatever it is
    compiled: bool = False  #     by ``torch.compile``
    batch: int | None = None  #   images at once that its speed was measured at; compiled for just so many

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {str(self.dtype)[:40]!r} is not one of {', '.join(DTYPES)}")
        if type(self.compiled) is not bool:
            raise UserError(f"compiled={str(self.compiled)[:40]} is neither true nor false")
        if self.batch is not None and not (type(self.batch) is int and 1 <= self.batch <= 65536):
            raise UserError(f"batch={str(self.batch)[:40]} is not a whole number in [1, 65536]")

    @classmethod
    def of(cls, given: Runner | str | Mapping[str, Any]) -> Runner:
        """A runner as people and folders write it: ``"bf16"``, ``"bf16 compiled"``, ``"eager"`` (fp32), or its fields.

        Raises UserError.
        """
        if isinstance(given, Runner):
            return given
        if isinstance(given, str):
            words = given.split()
            dtypes = [word for word in words if word not in ("compiled", "eager")]
            if len(dtypes) > 1 or len(words) > 2 or ("compiled" in words and "eager" in words):
                raise UserError(f"runner {given[:40]!r} is not like 'bf16', 'bf16 compiled' or 'eager'")
            return cls(dtypes[0] if dtypes else "fp32", "compiled" in words)
        if isinstance(given, Mapping) and given.keys() <= {"dtype", "compiled", "batch"}:
            return cls(**given)
        raise UserError(f"runner {str(given)[:60]} is not a text like 'bf16 compiled' or {{dtype, compiled, batch}}")

    def __str__(self) -> str:
        return f"{self.dtype} compiled" if self.compiled else self.dtype

    def to_dict(self) -> dict[str, Any]:
        """As a folder's config holds it."""
        return asdict(self)

    @property
    def is_plain(self) -> bool:
        """fp32, operator by operator: the weights as they are."""
        return self.dtype == "fp32" and not self.compiled

    def model(self, model: AdaptiveViT) -> AdaptiveViT:
        """The model itself in this number type, run operator by operator (a copy, unless it is its own)."""
        dtype, plain = DTYPES[self.dtype], model.deploy(None)
        if next(plain.parameters()).dtype == dtype:
            return plain
        return copied(plain).to(dtype)


FP32 = Runner()


class Logits(nn.Module):
    """A model that gives its logits alone: what is compiled and exported."""

    def __init__(self, model: AdaptiveViT) -> None:
        super().__init__()
        self.model = model.deploy(None)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, h, w] -> logits [B, K]."""
        return self.model(images).logits


class Deployment:
    """The weights of one model as a runner needs them: a copy of them, made by the first forward.

    It is made again when the weights have changed, as far as torch counts that; after edits through ``.data``, and
    where a module was exchanged, ask ``model.deploy(model.runner)`` for a new one. The process's allocator is made
    steady, as it was when the runner's speed was measured.
    """

    def __init__(self, runner: Runner) -> None:
        steady_allocator()
        self.runner = runner
        self.failure: str | None = None  # why torch.compile does not work here
        self.forget()

    def __deepcopy__(self, memo: dict) -> Deployment:
        return Deployment(self.runner)

    def __reduce__(self) -> tuple:
        return Deployment, (self.runner,)

    def forget(self) -> None:
        """Make the copy anew next time."""
        self._lock = threading.Lock()
        self._watch: Watch | None = None
        self._copy: AdaptiveViT | None = None
        self._views: dict[str, tuple[AdaptiveViT, Callable[[Tensor], Tensor]]] = {}

    def run(self, model: AdaptiveViT, images: Tensor) -> Output:
        """images [B, C, h, w], fp32 -> what the model gives, logits in fp32."""
        view, compiled = self.view(model)
        cast = images.to(next(view.parameters()).dtype)
        n = self.runner.batch or len(cast)
        usable = self.runner.compiled and self.failure is None and not torch.compiler.is_compiling()
        if usable and len(cast) >= n > 0 and tuple(cast.shape[-2:]) == view.input_size():
            logits = self._by_compiler(compiled, view, cast, n)
            if logits is not None:
                return LazyOutput(logits.float(), lambda: view(cast))
        out = view(cast)
        return replace(out, logits=out.logits.float())

    def view(self, model: AdaptiveViT) -> tuple[AdaptiveViT, Callable[[Tensor], Tensor]]:
        """The copy under the setting of a model, and the same compiled (where this runner compiles)."""
        name = str(model.setting)
        with self._lock:
            if self._copy is None or self._watch is None or self._watch.changed():
                self._views.clear()
                with torch.inference_mode(False), torch.no_grad():  # what is made here serves other modes too
                    made = self.runner.model(model)
                    self._copy = made if made.vit is model.vit else made.requires_grad_(False).eval()
                self._watch = Watch(model)
            if name not in self._views:
                with torch.inference_mode(False):
                    view = self._copy.at(name)
                logits = Logits(view).eval()
                way = torch.compile(logits, dynamic=False) if self.runner.compiled else logits
                self._views[name] = view, way
                for oldest in list(self._views)[:-VIEWS]:
                    del self._views[oldest]
            return self._views[name]

    def _by_compiler(self, compiled: Callable, view: AdaptiveViT, images: Tensor, n: int) -> Tensor | None:
        """Batches of n compiled, what is left over operator by operator; None where torch.compile does not work."""
        whole = len(images) // n * n
        try:
            parts = [compiled(images[i : i + n]) for i in range(0, whole, n)]
        except Exception as error:
            self.failure = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            warnings.warn(f"torch.compile does not work here, so it runs {self.runner.dtype} eager, and slower: "
                          f"{self.failure}", RuntimeWarning, stacklevel=4)  # fmt: skip
            return None
        return torch.cat([*parts, *([view(images[whole:]).logits] if whole < len(images) else [])])


def eager(model: AdaptiveViT) -> AdaptiveViT:
    """What a model runs, operator by operator: a copy in its runner's number type, or the model itself."""
    deployment = model._deployment
    return model.deploy(None) if deployment is None or deployment.runner.is_plain else deployment.view(model)[0]


def compile_failure(model: AdaptiveViT) -> str | None:
    """Why torch.compile did not work where the model was run; None: it did, or was not asked for."""
    return None if model._deployment is None else model._deployment.failure


class Watch:
    """Tells whether weights, buffers, hooks or the head of a model have changed, in a fraction of a millisecond."""

    def __init__(self, model: AdaptiveViT) -> None:
        self.vit, self.learned = model.vit, model.learned
        self.tensors = (*model.vit.parameters(), *model.vit.buffers())
        self.hooks = [d for m in model.vit.modules() for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.state = self.now()

    def now(self) -> tuple:
        """What would be different if a weight, a hook or the head had been changed."""
        tensors = (*self.tensors, *self.learned.values())
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        return id(self.vit.head), sum(map(len, self.hooks)), state

    def changed(self) -> bool:
        """Whether the state is another than when this was made."""
        return self.state != self.now()
