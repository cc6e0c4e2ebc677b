"""Folders of photos and of documents: read by every verb, and written into by none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from saccade.errors import UserError
from saccade.storage.files import is_our_picture, shortened
from saccade.storage.signs import written_by_us

OURS = ("model", "source", "checkpoints", "cache", "tokens", "tensorboard")  # folders that verbs make in theirs
# What people write, calculate and record. Not what a run is started with and from: configs, scripts, logs, weights.
DOCUMENTS = (
    *(".txt", ".doc", ".docx", ".odt", ".rtf", ".tex", ".pdf", ".ps", ".epub"),
    *(".csv", ".tsv", ".xls", ".xlsx", ".ods", ".parquet", ".ppt", ".pptx", ".odp", ".ipynb"),
    *(".mp3", ".wav", ".flac", ".m4a", ".ogg", ".mp4", ".mov", ".avi", ".mkv", ".webm"),
    *(".heic", ".heif", ".raw", ".cr2", ".nef", ".arw", ".dng", ".psd", ".svg"),
)


def check_not_foreign(folder: str | os.PathLike) -> None:
    """Raises UserError where a folder is somebody's: what is written there would lie among their data.

    It is where it holds images, as name.jpg, class/name.jpg or split/class/name.jpg, that are not pictures of ours; or
    documents, unless a file beside them is of a verb, which makes the folder ours and them its owner's notes.
    """
    path = Path(folder)
    photo = next(_photos(path, 0), None)
    document = None if photo else next(_documents(path), None)
    if (found := photo or document) is not None and not (document and written_by_us(path)):
        raise UserError(
            f"{shortened(folder)} is a folder of {'images' if photo else 'documents'} "
            f"(such as {shortened(found.relative_to(folder))}): give a new folder, or an empty one"
        )


def _documents(folder: Path) -> Iterator[Path]:
    """Files of that kind in a folder itself; one without content is none, as a shell makes it for what will be said."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                kind = PurePosixPath(entry.name).suffix.lower()
                if kind in DOCUMENTS and not entry.name.startswith(".") and entry.is_file() and entry.stat().st_size:
                    yield folder / entry.name
    except OSError:
        return


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
