"""CUDA graphs: what a forward launches on a GPU, recorded once for each size of batch and replayed as a whole.

At small batches a GPU waits for the processor, which launches one kernel after the other; a replay is one launch.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.constant_cache import held
from saccade.errors import UserError
from saccade.runners.exported import Answer, has_fixed_counts

GRAPHS = 8  # of one model, recorded or compiled
WARMING = 3  # forwards before a recording, in which kernels are chosen and constants built


def warn_of_size(made: str, answer: Answer, images: Tensor) -> None:
    """A RuntimeWarning to who called a model with one size of batch too many."""
    how = f"so batches of {len(images)} run operator by operator, and slower: give batch="
    warnings.warn(f"{made} of {answer.model.setting}, {how}", RuntimeWarning, stacklevel=4)


@dataclass(frozen=True)
class Recording:
    """A graph, where it reads its images, where it leaves its outputs, and the constants that it reads."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    outputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]


class Captured:
    """A model as CUDA graphs. Any number of threads may call it: they take turns.

    Sizes of batch beyond the first few run operator by operator, and a RuntimeWarning says so. Images that ask for a
    gradient run operator by operator too.

    Raises:
        UserError: a model that is not on a GPU, or whose counts of tokens are known only when it runs.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer, self.device = answer, next(answer.parameters()).device
        if self.device.type != "cuda":
            raise UserError(
                f"a CUDA graph needs a GPU, and the model is on {self.device}: device='cuda', or another runner"
            )
        if not has_fixed_counts(answer.model):
            raise UserError(
                f"a CUDA graph holds one number of tokens, and those of {answer.model.setting} differ from image to "
                "image: use 'eager' or 'compile'"
            )
        self._recordings: dict[torch.Size, Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._read = torch.cuda.Event()  # the outputs of the latest replay were copied
        self._lock = threading.Lock()

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """images [B, C, h, w] -> the answer's outputs."""
        if images.requires_grad and torch.is_grad_enabled():
            return self.answer(images)
        with self._lock, torch.cuda.device(self.device):
            found = self._recordings.get(images.shape)
            if found is None and len(self._recordings) < GRAPHS:
                found = self._recordings[images.shape] = self._record(images)
            if found is not None:
                self._read.wait()  # the caller's stream may be another than the one before
                found.images.copy_(images)
                found.graph.replay()
                outputs = tuple(output.clone() for output in found.outputs)
                self._read.record()
                return outputs
        warn_of_size(f"there are {GRAPHS} CUDA graphs", self.answer, images)
        return self.answer(images)

    def _record(self, images: Tensor) -> Recording:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda", enabled=False):
            own, graph = images.clone(), torch.cuda.CUDAGraph()
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with held() as constants:
                with torch.cuda.stream(beside):
                    for _ in range(WARMING):
                        self.answer(own)
                torch.cuda.current_stream().wait_stream(beside)
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    outputs = self.answer(own)
        return Recording(graph, own, outputs, tuple(constants))
