"""Mosaics in files: computed once, looked at or run again later."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from saccade.errors import UserError
from saccade.storage.files import replacing
from saccade.storage.weights import READ_ERRORS
from saccade.tokenizers.mosaic.geometry import Geometry, Mosaic

FORMAT = "saccade.mosaic.1"


def save_mosaic(file: str | os.PathLike, mosaic: Mosaic, names: Sequence[str] = ()) -> None:
    """Write the mosaics of a batch as safetensors: ``level`` uint8 and ``owner`` int32, both [B, gh, gw].

    Args:
        names: of the images, if they have any.

    Raises:
        UserError: not as many names as images; nothing can be written there.
    """
    images, g = len(mosaic.level), mosaic.geometry
    if names and len(names) != images:
        raise UserError(f"{len(names)} names for the mosaics of {images} images: give one each, or none")
    tensors = {
        "level": mosaic.level.cpu().to(torch.uint8).unflatten(1, g.cells),
        "owner": mosaic.owner.cpu().to(torch.int32).unflatten(1, g.cells),
    }
    facts = {"patch": g.patch, "levels": g.levels, "names": list(names)}
    with replacing(file) as part:
        save_file(tensors, part, metadata={"format": FORMAT, "mosaic": json.dumps(facts)})
        part.chmod(0o644)  # safetensors writes for the owner alone


def load_mosaic(file: str | os.PathLike) -> tuple[Mosaic, list[str]]:
    """The mosaics of a file and the names of their images. Raises UserError for anything that is no mosaic."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"there is no mosaic file {str(path)!r}")
    try:
        with safe_open(path, "pt") as found:
            facts = found.metadata() or {}
            if facts.get("format") != FORMAT:
                raise ValueError(f"format {facts.get('format')!r}, this version reads {FORMAT}")
            known, level, owner = json.loads(facts["mosaic"]), found.get_tensor("level"), found.get_tensor("owner")
        patch, levels, names = int(known["patch"]), int(known["levels"]), [str(name) for name in known["names"]]
        mosaic = _checked(patch, levels, level, owner)
        if names and len(names) != len(level):
            raise ValueError(f"{len(names)} names for {len(level)} images")
    except (KeyError, TypeError, AttributeError, *READ_ERRORS) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{str(path)!r} is not a mosaic file ({line}); write one with save_mosaic") from None
    return mosaic, names


def _checked(patch: int, levels: int, level: torch.Tensor, owner: torch.Tensor) -> Mosaic:
    """A mosaic from what was in a file. ValueError where it is none."""
    if level.dtype != torch.uint8 or level.ndim != 3 or level.shape != owner.shape or 0 in level.shape:
        raise ValueError(f"levels of shape {tuple(level.shape)} and owners of shape {tuple(owner.shape)}")
    cells = level.shape[1], level.shape[2]
    if not (1 <= patch <= 1024 and 1 <= levels <= min(cells).bit_length()):
        raise ValueError(f"{levels} levels of {patch} pixels on {cells[0]}x{cells[1]} cells")
    flat = level.flatten(1).long()
    if int(flat.max()) >= levels:
        raise ValueError(f"a level {int(flat.max())} of {levels}")
    mosaic = Mosaic.of_levels(Geometry(cells, patch, levels), flat)
    places = torch.zeros(len(flat), mosaic.geometry.finest, dtype=torch.int64)
    owned = places.scatter_add(1, mosaic.owner.clamp(min=0), torch.ones_like(flat)).gather(1, mosaic.owner.clamp(min=0))
    if int(mosaic.owner.min()) < 0 or not torch.equal(owned, 4**flat):
        raise ValueError("levels that do not make whole blocks")
    if not torch.equal(mosaic.owner, owner.flatten(1).long()):
        raise ValueError("owners that are not those of the levels")
    return mosaic
