"""Batches of model inputs, decoded ahead in threads; what cannot be read is named, never replaced."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from saccade.data.decode import ImageError
from saccade.data.preprocess import Preprocess
from saccade.data.source import ImageSet
from saccade.errors import UserError

CACHE_BYTES = 2 * 2**30  # of decoded images that one job keeps, at all input sizes together
SIZES = 8  # input sizes that find room in it, each as much
NAMED = 3


@dataclass(frozen=True)
class Batch:
    """``images`` is float [b, 3, h, w]; ``indices[k]`` is the place of ``images[k]`` in the image set."""

    images: torch.Tensor
    indices: list[int]


@dataclass
class Failures:
    """The (name, reason) of each image that could not be used, of ``total`` images asked for."""

    total: int = 0
    items: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def __str__(self) -> str:
        """One line: "3 of 300 images could not be read: a.jpg (empty file), …"; empty if there are none."""
        if not self.items:
            return ""
        named = ", ".join(f"{name} ({reason})" for name, reason in self.items[:NAMED])
        more = f" and {len(self) - NAMED} more" if len(self) > NAMED else ""
        return f"{len(self)} of {self.total} images could not be read: {named}{more}"


class Room:
    """Bytes that may still be kept, here and in the larger room that this one lies ``within``."""

    def __init__(self, size: int, within: Room | None = None) -> None:
        self.left, self.within = size, within

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes, which then are taken."""
        if size > self.left or (self.within is not None and not self.within.take(size)):
            return False
        self.left -= size
        return True


class Loader:
    """An image set, preprocessed for one model. ``failures`` are those of the latest pass.

    Crops are kept as uint8 (h·w·3 bytes each) while there is ``room``, so that a later pass over the same images
    neither reads nor decodes them. Normalising comes after, so both ways are bit-equal. ``cache_bytes`` is a room of
    its own, of so many bytes.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocess: Preprocess,
        *,
        workers: int = 2,
        cache_bytes: int = 0,
        room: Room | None = None,
    ):
        self.images = images
        self.preprocess = preprocess
        self.workers = workers
        self.failures = Failures()
        self._cache: dict[int, torch.Tensor] = {}
        self._room = Room(cache_bytes) if room is None else room

    def batches(self, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """One pass over ``indices`` (default: all), in their order.

        Every batch but the last holds ``batch_size`` images, after images that fail are left out. The next batch is
        decoded in ``workers`` threads while the caller works on this one.

        Raises UserError if not one image could be read, or for a batch size below 1.
        """
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} is below 1: give at least 1")
        indices = range(len(self.images)) if indices is None else indices
        self.failures = Failures(len(indices))
        kept: list[int] = []
        crops: list[torch.Tensor] = []
        for i, future in self._submitted(indices, ahead=max(batch_size, 2 * self.workers)):
            try:
                crop = future.result()
            except ImageError as error:
                self.failures.items.append((error.name, error.reason))
                continue
            if i not in self._cache and self._room.take(crop.nbytes):
                self._cache[i] = crop
            kept.append(i)
            crops.append(crop)
            if len(kept) == batch_size:
                yield self._batch(crops, kept)
                kept, crops = [], []
        if kept:
            yield self._batch(crops, kept)
        if len(self.failures) == len(indices):
            raise UserError(f"nothing to work on in {self.images.path}: {self.failures or 'no images were asked for'}")

    def _submitted(self, indices: Sequence[int], ahead: int) -> Iterator[tuple[int, Future[torch.Tensor]]]:
        """The crop of each image in order, while those of the next ``ahead`` images are under way."""
        pool = ThreadPoolExecutor(self.workers)
        pending: deque[tuple[int, Future[torch.Tensor]]] = deque()
        try:
            for i in indices:
                pending.append((i, pool.submit(self._crop, i)))
                if len(pending) > ahead:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            pool.shutdown(cancel_futures=True)

    def _crop(self, i: int) -> torch.Tensor:
        if i in self._cache:
            return self._cache[i]
        return self.preprocess.crop(self.images.read(i), self.images.names[i])

    def _batch(self, crops: list[torch.Tensor], indices: list[int]) -> Batch:
        return Batch(self.preprocess.normalise(torch.stack(crops)), indices)


class Loaders:
    """An image set as several models or input sizes want it, which keep ``CACHE_BYTES`` of decoded images in all."""

    def __init__(self, images: ImageSet) -> None:
        self.images, self._room = images, Room(CACHE_BYTES)
        self._made: dict[Preprocess, Loader] = {}

    def of(self, preprocess: Preprocess) -> Loader:
        """The loader of a preprocessing, always the same one."""
        if preprocess not in self._made:
            room = Room(CACHE_BYTES // SIZES, self._room)
            self._made[preprocess] = Loader(self.images, preprocess, room=room)
        return self._made[preprocess]
