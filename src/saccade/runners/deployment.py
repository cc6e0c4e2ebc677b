"""``Deployment``: the copy of a model's weights that a runner needs, made by the first forward."""

from __future__ import annotations

import threading
import warnings
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from saccade.core.output import LazyOutput, Output
from saccade.errors import UserError
from saccade.runners.allocator import steady_allocator
from saccade.runners.engine import Session
from saccade.runners.runner import EAGER, Runner
from saccade.runners.starting import start

if TYPE_CHECKING:
    from saccade.model import AdaptiveViT

VIEWS = 32  # settings of one model that stay compiled, or exported, though no view of theirs is left


class Deployment:
    """The weights of one model as a runner needs them: a copy of them, made by the first forward.

    It is made again when the weights have changed, as far as torch counts that; after edits through ``.data``, and
    where a module was exchanged, ask ``model.deploy(model.deployed)`` for a new one. The process's allocator is made
    steady, as it was when the runner's speed was measured.
    """

    def __init__(self, runner: Runner) -> None:
        steady_allocator()
        self.runner = runner
        self.failure: str | None = None  # why its engine does not work here
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
        self._views: dict[str, tuple[AdaptiveViT, Way]] = {}
        self._held: WeakKeyDictionary[AdaptiveViT, tuple[AdaptiveViT, Way]] = WeakKeyDictionary()

    def run(self, model: AdaptiveViT, images: Tensor) -> Output:
        """images [B, C, h, w], fp32 -> what the model gives, logits in fp32."""
        view, way = self.view(model)
        weight = next(view.parameters())
        cast = images.to(weight.device, weight.dtype)  # an engine of the processor takes what lies on a GPU too
        n = self.runner.batch or len(cast)
        eager = self.runner.engine == EAGER or self.failure is not None or torch.compiler.is_compiling()
        enough = len(cast) >= n or self.runner.exported  # what is compiled is for n images, and no others
        if not eager and enough and len(cast) > 0 and tuple(cast.shape[-2:]) == view.input_size():
            given = images.to(weight.device, torch.float32) if self.runner.exported else cast  # a program casts itself
            logits = self._by_engine(way, view, given, n)
            if logits is not None:
                return LazyOutput(logits.to(images.device, torch.float32), lambda: view(cast))
        out = view(cast)
        return out.with_logits(out.logits.float())

    def view(self, model: AdaptiveViT) -> tuple[AdaptiveViT, Way]:
        """The copy under the setting of a model, and images -> logits by the engine, which starts at the first call."""
        name = str(model.setting)
        with self._lock:
            if self._copy is None or self._watch is None or self._watch.changed():
                self._views.clear()
                self._held.clear()
                with torch.inference_mode(False), torch.no_grad():  # what is made here serves other modes too
                    made = self.runner.model(model)
                    self._copy = made if made.vit is model.vit else made.requires_grad_(False).eval()
                self._watch = Watch(model)
            held = self._held.get(model)  # of a living view, so that many settings may take turns
            if held is not None and held[0].setting == model.setting:
                return held
            if name not in self._views:
                with torch.inference_mode(False):
                    view = self._copy.at(name)
                self._views[name] = view, Way(view, self.runner)
                for oldest in list(self._views)[:-VIEWS]:
                    del self._views[oldest]
            found = self._held[model] = self._views[name]
            return found

    def _by_engine(self, way: Way, view: AdaptiveViT, images: Tensor, n: int) -> Tensor | None:
        """Batches of n by the engine, which is no slower than larger ones at once; what is left over by a program for
        any number, or, of what is compiled, operator by operator. None where the engine does not work."""
        whole = len(images) // n * n
        try:
            parts = [way(images[i : i + n]) for i in range(0, whole, n)]
            if whole < len(images) and self.runner.exported:
                parts.append(way(images[whole:]))
                whole = len(images)
        except Exception as error:
            self.failure = described(error)
            noun, dtype = self.runner.engine_noun, self.runner.dtype
            warnings.warn(f"{noun} does not work here, so it runs {dtype} eager, and slower: {self.failure}",
                          RuntimeWarning, stacklevel=4)  # fmt: skip
            return None
        return torch.cat([*parts, *([view(images[whole:]).logits] if whole < len(images) else [])])


class Way:
    """images [B, C, h, w] -> logits by an engine, which starts at the first call: once, whatever threads call.

    Where the first batch is the runner's, it starts with a program for just that size, which is exported in a fraction
    of the time; the first batch of another size starts one for any.
    """

    def __init__(self, view: AdaptiveViT, runner: Runner) -> None:
        self._start, self._batch = partial(start, view, runner), runner.batch
        self._sessions: dict[bool, Session] = {}  # for the runner's batch alone, for any
        self._lock = threading.Lock()

    def __call__(self, images: Tensor) -> Tensor:
        fixed = len(images) == self._batch
        with self._lock:
            found = (self._sessions.get(True) if fixed else None) or self._sessions.get(False)
            session = found or self._sessions.setdefault(fixed, self._start(fixed=fixed))
        return session(images)


def eager(model: AdaptiveViT) -> AdaptiveViT:
    """What a model runs, operator by operator: a copy in its runner's number type, or the model itself."""
    deployment = model._deployment
    return model.deploy(None) if deployment is None or deployment.runner.is_plain else deployment.view(model)[0]


def engine_failure(model: AdaptiveViT) -> str | None:
    """Why its engine did not work where the model was run; None: it did, or it is run by none."""
    return None if model._deployment is None else model._deployment.failure


def described(error: Exception) -> str:
    """An error in one line; that of a missing package or operator is one already."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first[:200]}"


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
