"""Opening an image set: a folder, a zip, one file, or the built-in scenes."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from zipfile import is_zipfile

from saccade.data.source import ImageSet, _counts, _extension, are_numbers, hidden, passed_over_note
from saccade.data.splits import choose_split
from saccade.data.store import Folder, Store, Zip
from saccade.errors import UserError
from saccade.storage.image_names import EXTENSIONS, is_image, kind_of

LAYOUTS = "name.jpg, class/name.jpg or split/class/name.jpg"


def splits(path: str | Path) -> list[str]:
    """Splits that ``open_images`` can be asked for; none where the images are not laid out in splits.

    Raises UserError as ``open_images`` does for a path that cannot be listed.
    """
    _, names, _ = list_images(Path(path))
    return sorted({name.split("/")[0] for name in names if name.count("/") == 2})


def open_images(path: str | Path, split: str | None = None) -> ImageSet:
    """The images at ``path``: a folder or zip laid out as ``LAYOUTS`` say, or one image file.

    How deep the images lie tells the layout. Hidden files, ``__MACOSX`` and files that are no images by extension are
    passed over and counted. Where there are splits and none is asked for, the held-out one is taken, one to check on
    before one to test on (``saccade.data.splits``). Nothing is decoded here. Where nothing of that name lies in the
    working folder, ``scenes`` is the built-in image set (``saccade.data.scenes``).

    Raises UserError for a missing path, no images, images at different depths, or a split that is not there.
    """
    path = Path(path)
    store, names, others = list_images(path)
    passed_over = Counter("hidden" if hidden(name) else _extension(name) for name in others)
    depths = {name.count("/"): name for name in names}
    if not depths:
        instead = f" (there are {_counts(passed_over)})" if passed_over else ""
        raise UserError(f"no images in {path}{instead}: looked for {', '.join(EXTENSIONS)} as {LAYOUTS}")
    if len(depths) > 1:
        shallow, deep = depths[min(depths)], depths[max(depths)]
        raise UserError(
            f"images at different depths in {path} ({shallow}, {deep}): lay all of them out as one of {LAYOUTS}"
        )
    (depth,) = depths
    if depth > 2:
        raise UserError(
            f"images too deep in {path} ({names[0]}): lay them out as {LAYOUTS}, or give a folder further in"
        )
    notes = []
    if depth == 2:
        known, asked = {name.split("/")[0] for name in names}, split
        split = choose_split(path, known, split)
        if split != asked and len(known) > 1:
            notes.append(f"{path}: split {split!r} of {', '.join(sorted(known))}")
    elif split is not None:
        raise UserError(f"no splits in {path}, so no {split!r}: leave the split out")
    classes = _ordered({name.split("/")[-2] for name in names}) if depth else None
    if depth == 1 and len({kind_of(name) for name in classes or ()} - {None}) > 1 and all(map(kind_of, classes or ())):
        raise UserError(
            f"folders {', '.join(classes or ())} in {path} are splits, with images right in them: give one of these "
            "folders, or lay the images out as split/class/name.jpg"
        )
    notes += passed_over_note(path, others)
    there = {name.split("/")[-2] for name in others if name.count("/") == depth > 0 and not hidden(name)}
    if empty := _ordered(there - {*(classes or ())}):
        notes.append(f"{path}: no class {', '.join(empty)}, as there is no image in it")
    chosen = [name for name in names if depth < 2 or name.startswith(f"{split}/")]
    place = {name: i for i, name in enumerate(classes or [])}
    labels = [place[name.split("/")[-2]] for name in chosen] if classes else None
    return ImageSet(path, split, chosen, labels, classes, store, passed_over, tuple(notes))


def list_images(path: Path) -> tuple[Store, list[str], list[str]]:
    """Where files lie, the names of all that are images by extension, sorted, however deep, and those of the others.

    Raises UserError.
    """
    if path == Path("scenes") and not os.path.lexists(path):
        from saccade.data.scenes import Rendered  # that file imports this one

        rendered = Rendered()
        return rendered, rendered.names(), []
    if path.is_file() and is_image(path.name):
        return Folder(path.parent), [path.name], []
    store: Store
    if path.is_dir():
        store = Folder(path)
    elif not path.exists():
        raise UserError(f"{path} does not exist: give a folder, a zip or an image")
    elif path.is_file() and is_zipfile(path):  # a pipe is not even opened
        store = Zip(path)
    else:
        raise UserError(f"{path} is neither a folder, nor a whole zip, nor an image ({', '.join(EXTENSIONS)})")
    names: list[str] = []
    others: list[str] = []
    for name in store.names():
        (names if is_image(name) and not hidden(name) else others).append(name)
    return store, sorted(names), others


def _ordered(classes: set[str]) -> list[str]:
    """Numbers by number; other names by name, as torchvision's ``ImageFolder`` has them."""
    return sorted(classes, key=lambda name: (int(name), name)) if are_numbers(classes) else sorted(classes)
