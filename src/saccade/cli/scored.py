"""What the verbs that score a task's model share: how scores are shown, and how a single photo is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from saccade.cli.common import print_failures, print_json, print_result
from saccade.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from saccade.evaluation.accuracy import Evaluated
    from saccade.model import AdaptiveViT
    from saccade.terminal.results import Scores


def show_scores(found: Scores | Evaluated, title: str, json: bool) -> None:
    """Scores on standard output, as tables or as JSON; in tables' place, what could not be read on standard error."""
    if json:
        print_json(found.to_dict())
        return
    print_result(found, title)
    print_failures(found.failures, found.item)


def is_photo(data: str) -> bool:
    """Whether DATA is one photo, by its name: it is drawn on, not measured."""
    from saccade.storage.image_names import EXTENSIONS

    return data.lower().endswith(EXTENSIONS)


def open_photo(model: AdaptiveViT, photo: str, settings: list[str], out: str) -> tuple[AdaptiveViT, Image.Image]:
    """A model under the one setting that a photo is drawn under, and the photo, for a PNG at ``out``.

    Raises:
        UserError: several settings, no such photo, a place where no picture can be written, or the photo's own.
    """
    from saccade.data import decode
    from saccade.storage.files import check_picture
    from saccade.storage.run_folder import check_apart

    if len(settings) > 1:
        raise UserError(f"a photo is drawn under one setting and {len(settings)} were given; run it once for each")
    if not Path(photo).is_file():
        raise UserError(f"there is no photo {photo!r}")
    check_picture(out)
    check_apart(out, [photo])
    view = model.at(settings[0]).eval() if settings else model
    return view, decode(Path(photo), photo)
