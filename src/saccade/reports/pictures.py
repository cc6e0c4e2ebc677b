"""The report's pictures: token maps side by side, each inside the page as a data URI."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from saccade.reports.formatting import escape
from saccade.reports.svg import tag

if TYPE_CHECKING:
    from saccade.reports.rows import Sample

IMAGE_BYTES = 4_000_000  # for all pictures of a page together, before base64 makes them a third larger


def render_samples(samples: Sequence[Sample]) -> str:
    """Each sample's panels in a row, or in rows of equal length."""
    total = max(1, sum(len(s.panels) for s in samples))
    most = IMAGE_BYTES // total
    longest = int(min(640, max(160, 1.6 * math.sqrt(most))))  # a token map takes about 0.4 bytes per pixel
    hint = (
        "Lines part the tokens; a merged token is filled with its mean colour; hatched is dropped. "
        "Select a picture to enlarge it."
    )
    out = [tag("p", hint, kind="hint")]
    out += [render_panels(sample.name, sample.panels, longest, most) for sample in samples]
    return "".join(out) + '<dialog id="zoom"><img alt=""><p></p></dialog>'


def render_panels(name: str, panels: Sequence[tuple[str, Image.Image]], longest: int, most: int) -> str:
    """``(caption, picture)`` each in rows of equal length, at most ``longest`` pixels and ``most`` bytes a picture."""
    count = max(1, len(panels))
    columns = math.ceil(count / math.ceil(count / 7))
    figures = ""
    for caption, image in panels:
        picture = f'<img src="{picture_uri(image, longest, most)}" alt="{escape(name)}: {escape(caption)}">'
        figures += tag("figure", tag("button", picture, kind="zoom") + tag("figcaption", escape(caption)))
    return tag("h3", escape(name)) + tag("div", figures, kind="panels", style=f"--n:{columns}")


def picture_uri(image: Image.Image, longest: int, most: int) -> str:
    """``image`` as a data URI: at most ``longest`` pixels wide and tall, at most ``most`` bytes; PNG or JPEG."""
    image = image.convert("RGB")
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    tries: list[tuple[str, dict[str, Any]]] = [("jpeg", {"quality": q, "subsampling": 0}) for q in (88, 75, 60)]
    if image.getcolors(4096):  # flat enough for PNG to have a chance; on a photo it only takes time
        tries.insert(0, ("png", {"optimize": True}))
    found: list[tuple[int, str, bytes]] = []
    for kind, options in tries:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found.append((buffer.tell(), kind, buffer.getvalue()))
        if kind == "jpeg" and min(found)[0] <= most:
            break
    size, kind, data = min(found)
    if size > most and longest > 64:
        return picture_uri(image, 2 * longest // 3, most)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
