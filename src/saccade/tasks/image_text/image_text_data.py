"""Images with texts: files side by side, a table, or classes spelled out by templates."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import is_zipfile

from timm.data import ImageNetInfo

from saccade.data import ImageSet
from saccade.data.labels import is_run, some
from saccade.data.listed import open_listed
from saccade.data.source import are_numbers, hidden
from saccade.data.store import NoFile, Store, TooLong, open_store, read_regular
from saccade.errors import UserError
from saccade.storage.image_names import is_image

IMAGE_COLUMNS = ("image", "path", "image_path", "file", "filename", "file_name", "filepath")
TEXT_COLUMNS = ("text", "caption", "captions", "texts", "title", "sentence")
TABLES = (".csv", ".tsv", ".jsonl")
LARGEST_TABLE = 2 * 2**30  # bytes of a table
LARGEST = 64 * 2**10  # bytes of one text file
PHOTO = ("a photo of a {}.",)


@dataclass(frozen=True)
class Pairs:
    """Images and what is said of them: ``texts[i]`` are image i's, at least one."""

    images: ImageSet
    texts: list[tuple[str, ...]] = field(repr=False)
    alone: list[str] = field(default_factory=list, repr=False)  # images that were left out: there is no text for them

    def __len__(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        """32 hex digits of the texts, in order."""
        return blake2b(repr(self.texts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def subset(self, places: Sequence[int]) -> Pairs:
        """Some of the pairs, in that order."""
        chosen = list(places)
        return Pairs(self.images.subset(chosen), [self.texts[i] for i in chosen], self.alone)


def open_pairs(path: str | Path, images: str | Path | None = None) -> Pairs:
    """Pairs from a folder or zip of ``name.jpg`` and ``name.txt``, a text a line, or from a table.

    A table (.csv, .tsv, .jsonl) has a column for the image's name and one for its text (in JSON also a list of them);
    rows of one image are put together. Names are relative to ``images``, a folder or zip (None: the table's folder).

    Raises UserError for a path, table, column or name that is not there, and where no image has a text.
    """
    path = Path(path)
    if path.suffix.lower() in TABLES:
        return _tabled(path, Path(images) if images is not None else path.parent)
    store = open_store(path)
    names = sorted(n for n in store.names() if not hidden(n))
    there = set(names)
    texts: dict[str, tuple[str, ...]] = {}
    alone = []
    for name in names:
        if is_image(name):
            beside = str(PurePosixPath(name).with_suffix(".txt"))
            if said := _lines(store, beside) if beside in there else ():
                texts[name] = said
            else:
                alone.append(name)
    if not texts:
        known = ", ".join(TABLES)
        raise UserError(
            f"no image in {path} has a text: lay them out as name.jpg and name.txt, or give a {known} table"
        )
    return Pairs(ImageSet(path, None, list(texts), None, None, store), list(texts.values()), alone)


def has_texts(path: str | Path) -> bool:
    """Whether ``open_pairs`` is meant: a table, or a folder or zip with texts in it."""
    path = Path(path)
    if path.suffix.lower() in TABLES:
        return True
    return (path.is_dir() or (path.is_file() and is_zipfile(path))) and any(
        n.lower().endswith(".txt") for n in open_store(path).names()
    )


def captioned(images: ImageSet, templates: Sequence[str] = PHOTO) -> Pairs:
    """Texts made from class names, every template for every image: no natural captions or descriptions.

    Raises UserError for an unlabelled set, or a template without ``{}``.
    """
    if images.labels is None or images.classes is None:
        raise UserError(f"no classes in {images.path} to make texts of: lay the images out as class/name.jpg")
    said = [prompts(name, templates) for name in readable(images.classes)]
    return Pairs(images, [said[label] for label in images.labels])


def prompts(name: str, templates: Sequence[str]) -> tuple[str, ...]:
    """A class name in each template. Raises UserError for a template without ``{}``."""
    wrong = next((t for t in templates if t.count("{}") != 1), None)
    if wrong is not None or not templates:
        raise UserError(f"template {wrong!r} does not have one {{}}: write it like {PHOTO[0]!r}")
    return tuple(t.replace("{}", name) for t in templates)


def readable(classes: Sequence[str]) -> list[str]:
    """Names of classes in words: ImageNet synsets in English, other names with their underscores as spaces.

    Raises UserError for numbers, which are no words; ImageNet's class indices (0344) are.
    """
    known = ImageNetInfo("imagenet-1k")
    if are_numbers(classes):
        if max(map(int, classes)) >= known.num_classes() or (len(classes) < known.num_classes() and is_run(classes)):
            raise UserError(f"classes {some(classes)} are numbers, and no text tells what they show: name the folders")
        classes = [known.index_to_label_name(int(name)) for name in classes]
    if all(name in known.label_names() for name in classes):
        return [known.label_name_to_description(name).split(",")[0] for name in classes]
    return [" ".join(name.replace("_", " ").replace("-", " ").split()) or name for name in classes]


def _lines(store: Store, name: str) -> tuple[str, ...]:
    try:
        data = store.read(name, LARGEST)
    except TooLong as error:
        raise UserError(f"text {name!r} has {error}, limit {LARGEST:,}: a text a line, no book") from None
    except Exception as error:  # zipfile alone raises six kinds
        raise UserError(f"text {name!r} cannot be read ({error}): mend it or take it away") from None
    lines = data.decode("utf-8", "replace").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _tabled(table: Path, where: Path) -> Pairs:
    texts: dict[str, list[str]] = {}
    alone: list[str] = []
    for name, said in _rows(table):
        texts.setdefault(name, []).extend(said)
    for name in [name for name, said in texts.items() if not said]:
        alone.append(name)
        del texts[name]
    return Pairs(open_listed(list(texts), where, table), [tuple(said) for said in texts.values()], alone)


def _rows(table: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and texts of each row."""
    try:
        text = read_regular(table, LARGEST_TABLE).decode("utf-8-sig")
        with io.StringIO(text, newline="") as file:
            if table.suffix.lower() == ".jsonl":
                rows: Any = (json.loads(line) for line in file if line.strip())
            else:
                rows = csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict):
                    raise ValueError(f"row {number} is no object")
                name, said = (_column(row, names, table) for names in (IMAGE_COLUMNS, TEXT_COLUMNS))
                listed = said if isinstance(said, list) else [said]
                if not isinstance(name, str) or not all(isinstance(text, str) for text in listed):
                    raise ValueError(f"row {number} has no name and text")
                yield name, [text.strip() for text in listed if text.strip()]
    except (OSError, NoFile, TooLong) as error:
        raise UserError(f"cannot read {str(table)!r}: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{str(table)!r} is no table of images and texts: {str(error)[:120]}") from None


def _column(row: dict[str, Any], names: Sequence[str], table: Path) -> Any:
    found = next((key for key in row if isinstance(key, str) and key.strip().lower() in names), None)
    if found is None:
        there = ", ".join(map(str, row))[:120]
        raise UserError(f"{str(table)!r} has columns {there}: one must be called {' or '.join(names[:3])}")
    return row[found]
