"""What each token stands for, drawn over the photo as the model sees it."""

from __future__ import annotations

import io
import os
from base64 import b64encode
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from saccade.checkpoint import Source, open_model
from saccade.core.record import BlockTrace
from saccade.data import Preprocess, decode
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.reports.formatting import escape
from saccade.reports.token_map import draw_blocks, draw_tokens
from saccade.storage.files import check_picture, write_picture
from saccade.storage.run_folder import check_apart
from saccade.terminal.results import Result


class _Seen(NamedTuple):
    picture: Image.Image
    tokens: list[int]


class View(Result, _Seen):
    """What ``view`` gives: the picture, and the number of patch tokens after each block, a row each."""

    __slots__ = ()

    @property
    def rows(self) -> list[dict[str, int]]:
        """Tokens after each block."""
        return [{"block": block, "tokens": count} for block, count in enumerate(self.tokens)]

    def __repr__(self) -> str:
        ends = f"{self.tokens[0]} to {self.tokens[-1]}" if self.tokens else "no"
        return f"View: {len(self.tokens)} blocks, {ends} tokens, {self.picture.width}×{self.picture.height} pixels"

    def _repr_html_(self) -> str:
        return inline(self.picture, repr(self))


def view(
    model: Source,
    image: Image.Image | str | os.PathLike,
    setting: str | None = None,
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    device: str | None = None,
    out: str | os.PathLike | None = None,
) -> View:
    """Draw what each token stands for, after every block, from ``owner`` alone.

    Args:
        model: a model, a folder, or a timm name with ``weights`` or ``pretrained``; ``device`` as in
            ``saccade.checkpoint.open_model``.
        image: a photo or its path; it is shown as the model sees it, cropped.
        setting: None: the model's own.
        out: a PNG to write.

    Returns:
        The picture, and the number of patch tokens after each block, or in it where gates leave some out.

    Raises:
        UserError: bad setting, tokens that are not finite; ImageError: an image that cannot be read.
    """
    model = open_model(model, weights, pretrained, device)
    chosen = model if setting is None else model.at(setting).eval()
    if out is not None:
        check_picture(out)  # before the work
        check_apart(out, [image])
    photo, first, owners, grid = _look(chosen, image)
    counts = [len(owner[owner >= 0].unique()) for owner in owners]
    titles = [
        f"the tokenizer's · {int(first.max()) + 1} tokens",
        *(f"block {i} · {n} tokens" for i, n in enumerate(counts)),
    ]
    picture = draw_blocks(photo, [first, *owners], grid, titles)
    if out is not None:
        write_picture(out, picture)
    return View(picture, counts)


def inline(picture: Image.Image, words: str) -> str:
    """A picture as markup for a notebook, whole in itself; ``words`` stand for it where it is not shown."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{b64encode(file.getvalue()).decode()}">'


def token_map(model: AdaptiveViT, image: Image.Image) -> Image.Image:
    """What each token stands for after the last block."""
    photo, _, owners, grid = _look(model, image)
    return draw_tokens(photo, owners[-1], grid)


Looked = tuple[Image.Image, Tensor, list[Tensor], tuple[int, int]]


def as_seen(model: AdaptiveViT, image: Image.Image | str | os.PathLike) -> tuple[Image.Image, Tensor, str]:
    """A photo or its path as the model sees it: the crop, the same as input [1, 3, h, w], and the photo's name.

    Raises ImageError for an image that cannot be read.
    """
    if isinstance(image, Image.Image):
        name, photo = str(getattr(image, "filename", "") or "image"), image.convert("RGB")
    else:
        name, photo = str(image), decode(Path(image), str(image))
    prepare = Preprocess.of(model.vit, model.input_size())
    crop = prepare.crop(photo, name)
    weight = next(model.parameters())
    images = prepare.normalise(crop).unsqueeze(0).to(weight.device, weight.dtype)
    return to_pil_image(crop), images, name


def _look(model: AdaptiveViT, image: Image.Image | str | os.PathLike) -> Looked:
    """The photo as the model sees it, the tokenizer's owner map, those after each block, and the grid."""
    crop, images, name = as_seen(model, image)
    with torch.inference_mode():
        tokens, trace = model.forward_tokens(images, sparse=False)  # the gates are in the trace of what is masked
    if not tokens.x.isfinite().all():
        raise UserError(
            f"the tokens of `{model.setting}` hold NaN or infinity for {name}: where they go means nothing; "
            "check the weights and the number type"
        )
    owners = [_computed(block).cpu() for block in trace.blocks]
    return crop, trace.first[0].cpu(), owners, trace.grid


def _computed(block: BlockTrace) -> Tensor:
    """What each token of the first image stands for, [G]; -1 also where its patch gate is off in this block."""
    owner = block.owner[0]
    if block.gates is None or block.gates.patch is None or int(owner.max()) >= block.gates.patch.shape[1]:
        return owner
    return torch.where(block.gates.patch[0][owner.clamp(min=0)] > 0, owner, -1)
