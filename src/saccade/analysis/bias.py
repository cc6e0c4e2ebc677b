"""``bias``: whether a setting goes by shape or by texture where the two disagree (Geirhos et al., arXiv 1811.12231).

Cue-conflict pictures are laid out as theirs: ``cat/cat1-elephant2.png`` has the shape of a cat, as its folder says too.
The classes of the model's head are brought together into the few of the pictures by a table, and a picture's answer is
the class whose members have the highest mean probability. FlexiViT (arXiv 2212.08013, §6.5) asks it of patch sizes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from saccade.analysis import register
from saccade.analysis.study import Finding, Study
from saccade.data import ImageSet
from saccade.data.store import TooLong, read_regular
from saccade.errors import UserError, nearest
from saccade.evaluation.stats import proportion
from saccade.model import AdaptiveViT
from saccade.reports.report_blocks import Cell, Table

MOST_BYTES = 16 * 2**20  # of a table of classes
NAME = re.compile(r"(?P<shape>[A-Za-z_ ]+?)[0-9]*-(?P<texture>[A-Za-z_ ]+?)[0-9]*$")


def cues(name: str) -> tuple[str, str] | None:
    """(shape, texture) of a path ``shape/shape1-texture2.png``; None where it is none."""
    path = PurePosixPath(name)
    found = NAME.match(path.stem)
    if found is None or not path.parent.name or found["shape"] != path.parent.name:
        return None
    return found["shape"], found["texture"]


def no_conflict(model: AdaptiveViT, images: ImageSet) -> str | None:
    """Why these are no cue-conflict pictures; None: they are."""
    read = [cues(name) for name in images.names]
    classes = set(images.classes or ())
    for name, cue in zip(images.names, read, strict=True):
        if cue is None or not set(cue) <= classes:
            return (
                f"{name} is not laid out as cue-conflict pictures are: cat/cat1-elephant2.png, a folder for each class"
            )
    return None if any(cue[0] != cue[1] for cue in read if cue) else "shape and texture agree in every picture"


def read_table(file: str | None, classes: Sequence[str], num_classes: int) -> list[list[int]]:
    """For each class of the pictures, its classes in the head.

    Args:
        file: JSON like ``{"cat": [281, "n02123045"], …}`` with a class index or an ImageNet-1k synset for each member;
            None: the head has just the classes of the pictures, in the order of their names.

    Raises:
        UserError: a file that cannot be read, a class that it lacks, an index or synset that the head does not have.
    """
    if file is None:
        if num_classes != len(classes):
            raise UserError(
                f"bias: the head has {num_classes} classes and the pictures {len(classes)}: say which belong to which "
                """in a JSON file, {"cat": [281, "n02123045"], …}, by bias(classes='file.json')"""
            )
        return [[i] for i in range(num_classes)]
    try:
        table = json.loads(read_regular(Path(file), MOST_BYTES).decode())
        named = {name: [*members] for name, members in table.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, TooLong) as error:
        raise UserError(
            f"""bias: cannot read {file!r} ({error}); write it like {{"cat": [281, "n02123045"], …}}"""
        ) from None
    for name in classes:
        if not named.get(name):
            raise UserError(f"bias: {file!r} has no members for {name!r}{nearest(name, named)}")
    return [[_index(member, name, num_classes) for member in named[name]] for name in classes]


def _index(member: object, name: str, num_classes: int) -> int:
    if type(member) is int and 0 <= member < num_classes:
        return member
    if isinstance(member, str) and num_classes == 1000:
        synsets = ImageNetInfo("imagenet-1k").label_names()
        if member in synsets:
            return synsets.index(member)
    raise UserError(
        f"bias: {member!r} of {name!r} is no class of the head: 0 … {num_classes - 1}, or a synset of ImageNet"
    )


def decide(probabilities: Tensor, members: Sequence[Sequence[int]]) -> Tensor:
    """Probabilities [n, K] -> the class of the pictures whose members have the highest mean, [n]."""
    return torch.stack([probabilities[:, list(own)].mean(1) for own in members], dim=1).argmax(1)


@register("bias", misfit=no_conflict)
def bias(study: Study, *, classes: str | None = None) -> Finding:
    """Whether a setting goes by shape or by texture where they disagree, on cue-conflict pictures (arXiv 1811.12231).

    Args:
        classes: a JSON file that says which classes of the head belong to each class of the pictures; None: the head
            has just those.
    """
    known = study.images.classes or []
    members = read_table(classes, known, study.model.vit.num_classes)
    said = study.answers(study.settings, "bias")
    pairs = [cues(study.images.names[place]) or ("", "") for place in said.places.tolist()]
    shape, texture = (torch.tensor([known.index(pair[i]) for pair in pairs]) for i in (0, 1))
    conflict = shape != texture
    rows: dict[str, list[Cell]] = {}
    data: dict[str, Any] = {}
    for name, probabilities in said.probabilities.items():
        answer = decide(probabilities, members)
        by_shape, by_texture = (answer == shape) & conflict, (answer == texture) & conflict
        either = by_shape | by_texture
        if not either.any():
            rows[name] = [(None, ""), (0.0, "0"), (0.0, "0"), (0.0, "0.0%")]
            data[name] = {"bias": None, "shape": 0, "texture": 0, "conflicts": int(conflict.sum())}
            continue
        share = proportion(by_shape[either])
        counts = int(by_shape.sum()), int(by_texture.sum())
        decided = int(either.sum()) / int(conflict.sum())
        limits = f"{share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]"
        rows[name] = [(share.mean, limits), *((float(c), str(c)) for c in counts), (decided, f"{decided:.1%}")]
        per_class = {
            known[c]: proportion(by_shape[own]).mean for c in range(len(known)) if (own := either & (shape == c)).any()
        }
        data[name] = {"bias": vars(share), "shape": counts[0], "texture": counts[1],
                      "conflicts": int(conflict.sum()), "by_class": per_class}  # fmt: skip
    measured = {name: found["bias"] for name, found in data.items() if found["bias"]}
    line = "No answer was the shape's or the texture's class, under any setting."
    if measured:
        low, high = (pick(measured, key=lambda n: measured[n]["mean"]) for pick in (min, max))
        most = f", up to {measured[high]['mean']:.0%} at `{high}`" if high != low else ""
        line = f"Shape decides in {measured[low]['mean']:.0%} of what shape or texture decide at `{low}`{most}."
    table = Table(
        "Shape or texture",
        f"{int(conflict.sum())} pictures in which they disagree; intervals are at 95 %.",
        {
            "shape bias": "shape decisions ÷ (shape + texture decisions)",
            "shape": "answers that are the shape's class",
            "texture": "answers that are the texture's class",
            "decided": "answers that are either, of all",
        },
        rows,
    )
    return Finding([line], data, [table])
