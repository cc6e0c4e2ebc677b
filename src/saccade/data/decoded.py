"""Images decoded and scaled down once, in one flat file that many processes can read at no cost."""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import Image

from saccade.data.decode import ImageError, pixel_limit
from saccade.data.source import ImageSet
from saccade.errors import UserError
from saccade.storage.files import replacing, sweep
from saccade.terminal.progress import Progress

MAGIC = b"saccade decoded 1"
TAIL = struct.Struct(f"<QQ{len(MAGIC)}s")  # bytes of pixels, bytes of the index, MAGIC


def estimated_bytes(images: ImageSet, side: int) -> int:
    """Bytes that ``Decoded`` will take on disk, for images of 4:3 with no side below ``side``."""
    return len(images) * side * side * 3 * 4 // 3


class Decoded:
    """The images of one set as uint8 RGB, their shorter side at most ``side`` pixels.

    In ``file``: the pixels of image after image, then an index in JSON, then the sizes of both, so that the file is
    whole or nothing. ``sizes`` is int [n, 2], the height and width of each image, 0 for one that failed; ``failures``
    gives those, name to reason. Picklable; each process maps the file for itself.
    """

    def __init__(self, file: Path, expected: dict[str, Any]):
        """Open ``file``. Raises ValueError if it is not whole or not of ``expected`` index entries, OSError."""
        index = _read_index(file)
        if any(index.get(name) != value for name, value in expected.items()):
            raise ValueError(f"{file} was made from something else")
        self.file = file
        self.side: int = index["side"]
        self.failures: dict[str, str] = index["failures"]
        self.sizes = np.array(index["sizes"], dtype=np.int64).reshape(-1, 2)
        self._ends = np.cumsum(self.sizes.prod(axis=1) * 3)
        if len(self.sizes) != index["count"] or (self._ends[-1] if len(self._ends) else 0) != index["bytes"]:
            raise ValueError(f"{file} has an index that contradicts itself")
        self._pixels: np.ndarray | None = None

    @classmethod
    def make(
        cls, images: ImageSet, side: int, folder: Path, *, workers: int = 2, progress: Progress | None = None
    ) -> Decoded:
        """The decoded ``images``: those in ``folder`` if they are there and whole, else made there in threads.

        The file is named after the set's split, length and fingerprint and ``side``. Images that cannot be read are
        recorded in ``failures``, and tried again when an existing file is opened.

        Raises UserError for a side below 1 or a folder that cannot be written.
        """
        if side < 1:
            raise UserError(f"side {side} is below 1 pixel: give the shorter side of the decoded images, such as 256")
        sweep(Path(folder))  # before room is needed: what a killed process left may be as large
        fingerprint = images.fingerprint()
        facts = {"side": side, "pixel_limit": pixel_limit(), "pillow": PIL.__version__}
        expected = {"fingerprint": fingerprint, "count": len(images), **facts}
        file = Path(folder) / f"{images.split or 'images'}-{len(images)}-{fingerprint}-{side}px.decoded"
        try:
            found = cls(file, expected)
            if not found._mended(images):
                return found
        except (OSError, ValueError, KeyError, TypeError):
            pass  # whatever is wrong with it, a new one is not
        try:
            with replacing(file) as part, part.open("wb") as stream:
                _write(stream, images, side, expected, max(1, workers), progress or Progress())
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            need = f"about {estimated_bytes(images, side) / 2**20:,.0f} MiB are needed"
            reason = error.__cause__.strerror or error.__cause__
            raise UserError(f"cannot write decoded images to {folder} ({reason}; {need}): free some space") from error
        return cls(file, expected)

    def __len__(self) -> int:
        return len(self.sizes)

    def array(self, i: int) -> np.ndarray:
        """Image ``i``, uint8 [h, w, 3], read-only and not copied. Raises KeyError for one that failed."""
        height, width = (int(size) for size in self.sizes[i])
        if not height:
            raise KeyError(f"image {i} could not be decoded")
        if self._pixels is None:
            self._pixels = np.memmap(self.file, dtype=np.uint8, mode="r")
        end = int(self._ends[i])
        return self._pixels[end - height * width * 3 : end].reshape(height, width, 3)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memmap is all of its bytes.
        return {**self.__dict__, "_pixels": None}

    def _mended(self, images: ImageSet) -> bool:
        """Whether any image that failed can be read now: the reason may have been the disk, not the file."""
        return any(isinstance(_decoded(images, int(i), self.side), np.ndarray) for i in np.flatnonzero(self._failed))

    @property
    def _failed(self) -> np.ndarray:
        return self.sizes[:, 0] == 0


def _read_index(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        whole = stream.seek(0, 2)
        if whole < TAIL.size:
            raise ValueError(f"{file} is cut short")
        stream.seek(whole - TAIL.size)
        pixels, index, magic = TAIL.unpack(stream.read())
        if magic != MAGIC or pixels + index + TAIL.size != whole:
            raise ValueError(f"{file} is cut short")
        stream.seek(pixels)
        return {**json.loads(stream.read(index)), "bytes": pixels}


def _write(
    stream: BinaryIO, images: ImageSet, side: int, expected: dict[str, Any], workers: int, progress: Progress
) -> None:
    sizes: list[tuple[int, int]] = []
    failures: dict[str, str] = {}
    pixels = 0
    bar = progress.start("Decoding images", len(images))
    try:
        for image in _in_order(images, side, workers):
            if isinstance(image, ImageError):
                sizes.append((0, 0))
                failures[image.name] = image.reason
            else:
                sizes.append(image.shape[:2])
                stream.write(image.data)
                pixels += image.nbytes
            bar()
    finally:
        bar.finish()
    index = json.dumps({**expected, "sizes": sizes, "failures": failures}).encode()
    stream.write(index + TAIL.pack(pixels, len(index), MAGIC))


def _decoded(images: ImageSet, i: int, side: int) -> np.ndarray | ImageError:
    try:
        image = images.read(i)
    except ImageError as error:
        return error
    shorter = min(image.size)
    if shorter > side:
        width, height = (max(1, round(length * side / shorter)) for length in image.size)
        # Pillow's bicubic is antialiased; beyond three times too large, a box filter goes first and is faster.
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.ascontiguousarray(image)


def _in_order(images: ImageSet, side: int, workers: int) -> Iterator[np.ndarray | ImageError]:
    """Every image, decoded in threads a bounded number ahead of the caller."""
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[np.ndarray | ImageError]] = deque()
    try:
        for i in range(len(images)):
            pending.append(pool.submit(_decoded, images, i, side))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
