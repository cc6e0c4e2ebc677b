"""A convolutional stem that a pretrained ViT survives: fitted to what its patch embedding gives, without training.

    model = saccade.fit_stem("vit_tiny_patch16_224", "photos/", pretrained=True)  # model.at("stem() | imagepiece()")

A patch embedding is linear, and a stem whose features stay positive is, too. Level by level, pixels are grouped as the
convolutions see them, and of all linear readings of a group those are kept that the tokens depend on most, over the
given images: a truncated SVD of (what the tokens make of the group) · (its covariance)^½. Biases keep the features off
the kink of the ReLU. The last, 1×1, is then fitted to the tokens by least squares. What is lost is what does not go
through the widths D/8, D/4, D/2: nothing from D = 384 on (at 16 pixels), little below; ``token_error`` tells.
"""

from __future__ import annotations

import os
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones.learned import Learned
from saccade.checkpoint import Source, open_dense
from saccade.core.init import draw
from saccade.data import ImageSet, Loader, Preprocess, open_images
from saccade.errors import UserError
from saccade.evaluation.accuracy import spread
from saccade.model import AdaptiveViT
from saccade.terminal.progress import Progress
from saccade.tokenizers.resize.resampling import PRESETS, resize_kernel
from saccade.tokenizers.stem import Stem

Images = str | os.PathLike | ImageSet | Tensor
OFF_THE_KINK = 6.0  # standard deviations from a feature's mean to the ReLU's kink
# Directions with less than this share of the mean variance are not stretched further: SMALLEST, or DOUBT times the
# values of a row over the number of rows, where that is more.
SMALLEST, DOUBT = 1e-6, 1e-2
RIDGE = 1e-3  # how firmly least squares stay with what the levels composed
BATCH = 16


def fit_stem(
    source: Source,
    images: Images = "scenes",
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    limit: int = 256,
    progress: Progress | None = None,
) -> AdaptiveViT:
    """A model under ``stem()``, whose stem gives nearly the tokens of the source's patch embedding.

    The source is not changed and shares its weights; ``grid()`` of the same model still is the patch embedding.

    Args:
        source: a timm name, a folder saved by Saccade, a timm ViT or an AdaptiveViT.
        images: what to fit on: a folder or zip, "scenes" for the built-in ones, or normalised images [n, C, h, w].
        weights, pretrained: as in ``saccade.create_model``.
        limit: at most this many images, evenly spread; 64 are enough for most.

    Raises:
        UserError: a source or images that do not fit, fewer than one image, a model that a stem does not fit.
    """
    model = open_dense(source, weights, pretrained)
    own = model.backbone
    if limit < 1:
        raise UserError(f"limit={limit} leaves no image to fit the stem on")
    seen = images if isinstance(images, Tensor) else read_images(model, images, limit, progress)
    if seen.ndim != 4 or not len(seen) or seen.shape[1] != own.channels or min(seen.shape[2:]) < max(own.patch_size):
        wanted = f"one or more, [n, {own.channels}, h, w] of at least a patch"
        raise UserError(f"cannot fit a stem on images of shape {tuple(seen.shape)}: give {wanted}")
    made = AdaptiveViT(model.vit, "stem()", model.trained, Learned.without(model.learned, "stem"))
    fit(cast(Stem, made.tokenizer), model, seen[:limit], progress or Progress())
    return made.eval()


@torch.no_grad()
def fit(stem: Stem, model: AdaptiveViT, images: Tensor, progress: Progress) -> None:
    """Fit the convolutions, in place, to the tokens of a model's patch embedding on images [n, C, h, w]."""
    weight = model.vit.patch_embed.proj.weight
    parts = images.to(weight.device, weight.dtype).split(BATCH)
    advance = progress.start("fitting the stem", (1 + len(stem.strides)) * len(parts))
    kernel = resize_kernel(weight.float(), (stem.side, stem.side), PRESETS["default"])
    # what a token makes of each place of its patch, [side, side, D, channels]; the places are grouped level by level
    made = F.pixel_unshuffle(kernel, stem.fold).permute(2, 3, 0, 1).double()
    for level, stride in enumerate(stem.strides):
        conv = cast(nn.Conv2d, stem.convs[level])
        grouped = _group(made, stride)
        moments = Moments(grouped.shape[-1])
        for part in parts:
            moments.add(F.unfold(stem.levels(part)[level].float(), stride, stride=stride).transpose(1, 2).flatten(0, 1))
            advance(1)
        floor = max(SMALLEST, DOUBT * moments.width / moments.count)
        reading, made = keep_best(grouped, moments.covariance(), conv.out_channels, floor)
        conv.weight.zero_()
        within = reading.unflatten(1, (-1, stride, stride)).to(conv.weight.dtype)
        conv.weight[:, :, 1 : 1 + stride, 1 : 1 + stride] = within  # taps beyond the group wait to be trained
        conv.bias.copy_(OFF_THE_KINK - reading @ moments.mean())  # type: ignore[union-attr]
    width = made.shape[-1]
    moments = Moments(width + made.shape[-2])
    for part in parts:
        features = stem.levels(part)[-1].flatten(2).transpose(1, 2)
        moments.add(torch.cat([features, embedded(model, part)], dim=2).flatten(0, 1).float())
        advance(1)
    both, mean = moments.covariance(), moments.mean()
    own = both[:width, :width]
    ridge = (
        max(RIDGE, width / moments.count)
        * own.diagonal().mean()
        * torch.eye(width, dtype=torch.float64, device=own.device)
    )
    last = torch.linalg.solve(own + ridge, both[:width, width:] + ridge @ made[0, 0].T).T
    stem.last.weight.copy_(last[:, :, None, None])
    stem.last.bias.copy_(mean[width:] - last @ mean[:width])  # type: ignore[union-attr]
    advance.finish()


def embedded(model: AdaptiveViT, images: Tensor) -> Tensor:
    """Tokens [B, N, D] of the patch embedding on whole patches, before its norm, positions and prefix."""
    proj = model.vit.patch_embed.proj
    return F.conv2d(images, proj.weight, proj.bias, stride=proj.stride).flatten(2).transpose(1, 2)


@torch.no_grad()
def token_error(model: AdaptiveViT, images: Tensor) -> float:
    """How far a model's stem is from its patch embedding on images [n, C, h, w]: the share of the variance of the
    tokens that it gets wrong (0: none; 1: no better than a constant)."""
    stem = cast(Stem, model.at("stem()").tokenizer)
    wrong = total = 0.0
    weight = model.vit.patch_embed.proj.weight
    for part in images.to(weight.device, weight.dtype).split(BATCH):
        tokens = embedded(model, part)
        found = stem.last(stem.levels(part)[-1]).flatten(2).transpose(1, 2)
        wrong += (found - tokens).square().sum().item()
        total += (tokens - tokens.mean((0, 1))).square().sum().item()
    return wrong / total


def keep_best(made: Tensor, covariance: Tensor, count: int, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """The ``count`` linear readings of k values that lose least of what is made of them.

    Args:
        made: what is made of the values, [..., D, k].
        covariance: of the values, [k, k].
        floor: share of their mean variance that each direction is taken to have at least.

    Returns:
        readings [count, k], uncorrelated and of variance 1 (those beyond k are mixtures of the others), and what is
        made of them, [..., D, count]: the best approximation in the mean square.
    """
    variances, axes = torch.linalg.eigh(covariance)
    deviations = variances.clamp(min=max(floor, 1e-12) * float(variances.mean())).sqrt()
    weighed = made @ (axes * deviations)  # as a function of uncorrelated values of variance 1
    flat = weighed.flatten(0, -2)
    best = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, :count]  # right singular vectors, largest first
    found = weighed @ best
    spare = count - best.shape[1]
    if spare > 0:
        mixed = draw((best.shape[1], spare), best.shape[1] ** -0.5).to(best)
        best, found = torch.cat([best, best @ mixed], dim=1), F.pad(found, (0, spare))
    return (axes / deviations @ best).T, found


class Moments:
    """Mean and covariance of rows that come in parts, in double precision."""

    def __init__(self, width: int) -> None:
        self.count, self.width = 0, width
        self.sums: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """rows [n, width], fp32."""
        self.count += len(rows)
        self.sums = self.sums + rows.double().sum(0)
        self.products = self.products + (rows.T @ rows).double()

    def mean(self) -> Tensor:
        """Of all rows, [width], fp64."""
        return cast(Tensor, self.sums) / self.count

    def covariance(self) -> Tensor:
        """Of all rows, [width, width], fp64."""
        return cast(Tensor, self.products) / self.count - torch.outer(self.mean(), self.mean())


def _group(made: Tensor, stride: int) -> Tensor:
    """What is made of places [s, s, D, c] -> of groups [s/t, s/t, D, c·t·t], in a kernel's order (c, i, j)."""
    side, _, dim, width = made.shape
    tiles = made.unflatten(0, (side // stride, stride)).unflatten(2, (side // stride, stride))
    return tiles.permute(0, 2, 4, 5, 1, 3).reshape(side // stride, side // stride, dim, width * stride**2)


def read_images(
    model: AdaptiveViT, data: str | os.PathLike | ImageSet, limit: int, progress: Progress | None = None
) -> Tensor:
    """Images as the model wants them, [n, C, h, w]; what is passed over or cannot be read is said."""
    if model.backbone.channels != 3:
        raise UserError(f"the model takes {model.backbone.channels} channels: give its images as a tensor [n, C, h, w]")
    found = data if isinstance(data, ImageSet) else open_images(os.fspath(data))
    loader = Loader(found, Preprocess.of(model.vit, model.backbone.input_size))
    places = spread(len(found), limit)
    images = torch.cat([batch.images for batch in loader.batches(BATCH, places)])
    for line in (*found.notes, *([str(loader.failures)] if loader.failures else [])):
        (progress or Progress()).say(line)
    return images
