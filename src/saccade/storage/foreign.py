"""Folders of photos: read by every verb, and written into by none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from saccade.errors import UserError
from saccade.storage.files import is_our_picture, shortened

OURS = ("model", "source", "checkpoints", "cache", "tokens", "tensorboard")  # folders that verbs make in theirs


def check_no_photos(folder: str | os.PathLike) -> None:
    """Raises UserError where a folder holds images, as name.jpg, class/name.jpg or split/class/name.jpg, that are not
    pictures of ours: what is written there would lie among somebody's data."""
    if (photo := next(_photos(Path(folder), 0), None)) is not None:
        raise UserError(
            f"{shortened(folder)} is a folder of images (such as {shortened(photo.relative_to(folder))}): "
            "give a new folder, or an empty one"
        )


def _photos(folder: Path, depth: int) -> Iterator[Path]:
    from saccade.storage.image_names import is_image, kind_of

    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = folder / entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    deeper = depth == 0 or (depth == 1 and kind_of(folder.name) is not None)
                    if deeper and entry.name not in OURS:
                        yield from _photos(path, depth + 1)
                elif is_image(entry.name) and entry.is_file() and not is_our_picture(path):
                    yield path
    except OSError:  # not there, or not to be listed: then nothing is written there either
        return
