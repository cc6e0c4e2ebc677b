"""Training batches as a pure function of (seed, step), for any number of ranks and workers."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saccade.data.decode import ImageError, pixel_limit
from saccade.data.loader import Failures
from saccade.errors import UserError
from saccade.training.augmentation import isolated, reseed
from saccade.training.task import Examples

Read = tuple["Views", list[tuple[str, str]]]


@dataclass(frozen=True)
class Views:
    """One rank's share of one batch, without the images that failed: it may be short, or empty.

    ``images`` is uint8 [b, 3, h, w] and ``labels`` [b, ...] whatever the task compares with, such as classes int64 [b];
    ``indices[k]`` is the place of row k in the image set.
    """

    images: Tensor
    labels: Tensor
    indices: list[int]


class BatchStream:
    """Batches of augmented views of ``examples``.

    Each epoch has an order of its own, drawn from (seed, epoch), and each view a seed of its own, (seed, epoch,
    position in the epoch's order): a batch is the same whichever step the run starts at, and rank r's share is the
    r-th of ``world`` equal slices of the global batch's rows. The last ``usable % batch`` images of an epoch's order
    are left out of it. A set smaller than ``batch`` is gone round until the batch is full, each time seen anew.

    Examples that are known to be unreadable are in no epoch; one that fails while it is read is missing from its
    batch. ``failures`` names both kinds once each; ``waited`` sums the seconds that ``run`` kept its caller waiting,
    for the caller to set back. With ``workers`` reading runs in so many processes, else in this one.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
    ):
        """Raises UserError for a batch that ranks cannot share, counts below their limits, or no readable image."""
        if world < 1 or not 0 <= rank < world:
            raise UserError(f"there is no rank {rank} of {world}: give at least 1 rank, counted from 0")
        if batch < 1 or batch % world:
            raise UserError(f"batch {batch} cannot be shared by {world} ranks: give a positive multiple of {world}")
        if workers < 0:
            raise UserError(f"{workers} workers are too few: give 0 (none but this process) or more")
        pixel_limit()  # a bad one is better refused here than in a worker
        self.failures = Failures(len(examples), [*examples.failures.items()])
        self.waited = 0.0
        self.workers = workers
        usable = examples.usable()
        if not len(usable):
            raise UserError(f"nothing to train on in {examples.path}: {self.failures or 'no images'}")
        order = _Order(usable, batch, seed)
        self.steps = order.steps
        self._shares = _Shares(order, examples, rank, world)

    def places(self, step: int) -> list[int]:
        """The places in the image set of the whole batch of ``step``, all ranks' rows in order."""
        return self._shares.order.rows(step)[2].tolist()

    def run(self, start: int, stop: int) -> Iterator[Views]:
        """This rank's share of the batches of steps ``start`` … ``stop`` - 1, in order.

        Workers start with the first batch and are gone when the generator is closed, ends or raises. Raises UserError
        for a negative ``start``, and after an epoch's worth of steps without an image if there is none to be had.
        """
        if start < 0:
            raise UserError(f"step {start} is below 0: steps are counted from 0")
        reads = self._reads(range(start, stop))
        named = {name for name, _ in self.failures.items}
        empty = 0
        try:
            while True:
                began = time.perf_counter()
                read = next(reads, None)
                self.waited += time.perf_counter() - began
                if read is None:
                    return
                views, failed = read
                new = {name: reason for name, reason in failed if name not in named}
                named |= new.keys()
                self.failures.items += new.items()
                yield views
                empty = 0 if views.indices else empty + 1
                if empty == self.steps:
                    # This rank's images may all have failed while another's are well, so look at every image: then
                    # all ranks stop at the same step, or none.
                    self._shares.check_any()
                    empty = 0
        finally:
            reads.close()

    def _reads(self, steps: range) -> Generator[Read, None, None]:
        if not self.workers or not steps:
            yield from (self._shares[step] for step in steps)
            return
        loader = DataLoader(
            self._shares,
            batch_size=None,  # an item is a whole batch
            sampler=steps,
            num_workers=min(self.workers, len(steps)),
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts,
            generator=torch.Generator(),  # else DataLoader draws from the caller's
        )
        batches: Any = iter(loader)
        try:
            yield from batches
        finally:
            # Else the workers live for as long as a traceback keeps the iterator.
            batches._shutdown_workers()


def throughput(feed: BatchStream, steps: int) -> float:
    """Images per second that ``feed`` delivers over ``steps`` steps to a caller that only takes them.

    Reading runs from step 0, and the clock once every worker has delivered a batch. Raises UserError below 1 step.
    """
    if steps < 1:
        raise UserError(f"{steps} steps cannot be timed: give at least 1")
    warm = max(1, feed.workers)
    waited, count, began = feed.waited, 0, time.perf_counter()
    for step, views in enumerate(feed.run(0, warm + steps)):
        if step == warm - 1:
            began = time.perf_counter()
        elif step >= warm:
            count += len(views.indices)
    seconds = time.perf_counter() - began
    feed.waited = waited
    return count / seconds


class _Order:
    """Which image is where: the rows of each step, from ``usable`` places in the image set."""

    def __init__(self, usable: np.ndarray, batch: int, seed: int):
        self.usable, self.batch, self.seed = usable, batch, seed
        self.steps = max(1, len(usable) // batch)
        self._latest: tuple[int, np.ndarray] | None = None

    def rows(self, step: int) -> tuple[int, int, np.ndarray]:
        """(epoch, position in the epoch of the first row, places of all rows) of the batch of ``step``."""
        epoch, within = divmod(step, self.steps)
        if self._latest is None or self._latest[0] != epoch:
            with isolated(self.seed, epoch):
                # numpy promises this stream to every later version, unlike those of its Generator.
                order = np.random.permutation(self.usable)
            self._latest = epoch, np.resize(order, max(self.batch, len(order)))  # goes round a set below one batch
        first = within * self.batch
        return epoch, first, self._latest[1][first : first + self.batch]


@dataclass
class _Shares(Dataset[Read]):
    """One rank's share of each step, by step. Picklable."""

    order: _Order
    examples: Examples
    rank: int
    world: int

    def __getitem__(self, step: int) -> Read:
        epoch, first, places = self.order.rows(step)
        share = len(places) // self.world
        seen: list[tuple[Tensor, Tensor]] = []
        kept: list[int] = []
        failed: list[tuple[str, str]] = []
        with isolated():
            for row in range(self.rank * share, (self.rank + 1) * share):
                place = int(places[row])
                try:
                    read = self.examples.read(place)
                except ImageError as error:
                    failed.append((error.name, error.reason))
                    continue
                reseed(self.order.seed, epoch, first + row)
                seen.append(self.examples.view(read, place))
                kept.append(place)
        if not seen:
            pixels, labels = (part.new_empty((0, *part.shape)) for part in self.examples.blank())
            return Views(pixels, labels, kept), failed
        pixels, labels = (torch.stack(parts) for parts in zip(*seen, strict=True))
        return Views(pixels, labels, kept), failed

    def check_any(self) -> None:
        """Raises UserError unless some image of the set can be read."""
        failures = Failures(len(self.examples))
        for place in self.order.usable:
            try:
                self.examples.read(int(place))
                return
            except ImageError as error:
                failures.items.append((error.name, error.reason))
        raise UserError(f"nothing to train on in {self.examples.path}: {failures}")


def _as_it_is(read: Any) -> Any:
    return read


def _leave_interrupts(worker: int) -> None:
    # Ctrl-C reaches the workers too; the main process may yet want its batches, and ends them when it does not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
