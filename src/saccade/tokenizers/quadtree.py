"""``quadtree(100)``: large patches where there is little to see, small ones where there is much.

Quadformer (arXiv 2304.00287): a number of tokens for every image. APT (arXiv 2510.18091): a threshold. Between them:
a number of tokens on average over a batch. One embedding for all sizes, so any ViT's weights will do, and a mosaic that
is fine everywhere is the ViT itself.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core.constant_cache import full_precision
from saccade.core.hooks import around, require_plain
from saccade.core.plan import Backbone, Tokenizer
from saccade.core.registry import register
from saccade.core.timm_types import ViT
from saccade.core.tokens import Tokens
from saccade.errors import UserError
from saccade.methods.common.arguments import one_of, switch
from saccade.tokenizers.grid import grid, place
from saccade.tokenizers.mosaic.geometry import Geometry, Mosaic
from saccade.tokenizers.mosaic.leaf_embedding import POSITIONS, Detail, leaf_positions
from saccade.tokenizers.mosaic.pyramid import RESAMPLERS, fitted, pyramid, read_leaves
from saccade.tokenizers.mosaic.selection import Budget
from saccade.tokenizers.rotary import rotary
from saccade.tokenizers.scorers.base import Scene, Scorer, build_scorer
from saccade.tokenizers.scorers.gate import credit

Size = int | tuple[int, int]


class Quadtree(Tokenizer):
    """A mosaic of square patches of several sizes, each brought to the finest."""

    def __init__(
        self,
        backbone: Backbone,
        budget: Budget,
        sizes: tuple[int, ...],
        scorer: Scorer,
        size: tuple[int, int] | None,
        resample: str,
        positions: str,
        area_bias: bool,
        size_embedding: bool,
        detail: bool,
    ) -> None:
        super().__init__()
        self.budget, self.sizes, self.size, self.scorer = budget, sizes, size, scorer
        self.resample, self.positions, self.area_bias = resample, positions, area_bias
        self.varies = budget.tokens is None
        self.fine = grid(backbone, sizes[0])
        self.resize = self.fine.resize
        self.size_embedding: nn.Parameter | None = None
        if size_embedding:
            self.size_embedding = nn.Parameter(torch.zeros(len(sizes), backbone.dim, dtype=torch.float32))
        self.detail: nn.Module | None = Detail(backbone.dim) if detail else None

    def input_size(self, native: tuple[int, int]) -> tuple[int, int]:
        return self.size or native

    def macs(self, vit: ViT, tokens: Tokens) -> int:
        g, proj = Geometry.of(tokens.grid, self.sizes), vit.patch_embed.proj
        cost = tokens.num_patches * proj.in_channels * g.patch**2 * proj.out_channels
        if self._is_grid(g):
            return cost
        if self.budget.splits(g) not in (0, g.splits):
            cost += self.scorer.macs(vit, g)
        return cost + (0 if self.detail is None else self.detail.macs(g, proj.in_channels, tokens.num_patches))  # type: ignore[operator]

    def forward(self, vit: ViT, images: Tensor) -> Tokens:
        images = fitted(images, self.sizes[0], self.size)
        if self._is_grid(self._geometry(images)):
            return self.fine(vit, images)
        scene = self._scene(vit, images)
        mosaic, scores = self._decide(scene)
        heard = credit(scores, mosaic) if self.scorer.learns and scores and torch.is_grad_enabled() else None
        return self._embed(scene, mosaic, heard)

    def mosaic(self, vit: ViT, images: Tensor) -> Mosaic:
        """Which block of each image is one token: images [B, C, h, w], normalised as the ViT wants them."""
        return self._decide(self._scene(vit, fitted(images, self.sizes[0], self.size)))[0]

    def embed(self, vit: ViT, images: Tensor, mosaic: Mosaic) -> Tokens:
        """The tokens of a mosaic that was made, or read from a file, before. UserError where it is of other images."""
        scene = self._scene(vit, fitted(images, self.sizes[0], self.size))
        if mosaic.geometry != scene.geometry or len(mosaic.level) != len(images):
            made = f"{len(mosaic.level)} images of {_pixels(mosaic.geometry)}"
            raise UserError(f"quadtree: a mosaic of {made} and {len(images)} images of {_pixels(scene.geometry)}")
        return self._embed(scene, mosaic, None)

    def _geometry(self, images: Tensor) -> Geometry:
        return Geometry.of_pixels((images.shape[-2], images.shape[-1]), self.sizes)

    def _scene(self, vit: ViT, images: Tensor) -> Scene:
        g = self._geometry(images)
        x = images if images.dtype == torch.float64 else images.float()
        return Scene(x, pyramid(x, g.levels, self.resample), g, vit, self.fine)

    def _is_grid(self, g: Geometry) -> bool:
        """Whether nothing distinguishes this from a plain grid, for these images: then it is one, to the last bit."""
        plain = self.positions != "sinusoid" and self.size_embedding is None
        return plain and self.budget.splits(g) == g.splits

    def _decide(self, scene: Scene) -> tuple[Mosaic, list[Tensor]]:
        g, images = scene.geometry, scene.images
        count = self.budget.splits(g)
        leaves = None if count is None else g.coarsest + 3 * count
        if count in (0, g.splits):  # no need to look
            split = torch.full((images.shape[0], g.splits), count > 0, device=images.device)
            return Mosaic.of(g, split, leaves), []
        with nullcontext() if self.scorer.learns else torch.no_grad(), full_precision(images):
            scores = self.scorer(scene)
        with torch.no_grad():
            return Mosaic.of(g, self.budget.choose([s.detach() for s in scores], g), leaves), scores

    def _embed(self, scene: Scene, mosaic: Mosaic, heard: Tensor | None) -> Tokens:
        vit = scene.vit
        embed, proj = vit.patch_embed, vit.patch_embed.proj

        def project(leaves: Tensor) -> Tensor:  # the kernel is read behind the hooks that compute it (pruning)
            kernel = self.fine.kernel(vit)
            return F.linear(leaves.to(kernel.dtype), kernel.flatten(1), proj.bias)

        def forward(images: Tensor) -> Tensor:
            x = around(proj, project, read_leaves(scene.levels, mosaic))
            if self.detail is not None:
                kernel = self.fine.kernel(vit)
                x = x + self.detail(F.conv2d(images.to(kernel.dtype), kernel, proj.bias, stride=self.sizes[0]), mosaic)
            return embed.norm(x)

        require_plain(embed, "patch_embed", PatchEmbed)
        x = around(embed, forward, scene.images)
        if self.size_embedding is not None:
            x = x + self.size_embedding[mosaic.leaf_level].to(x.dtype)
        if heard is not None:
            x = x * heard.unsqueeze(-1).to(x.dtype)
        x = place(vit, x, leaf_positions(vit, self.fine.positions(vit, mosaic.geometry.cells), mosaic, self.positions))
        size = mosaic.area if self.area_bias else None
        cells = mosaic.geometry.cells
        turns = rotary(vit, x.shape[0], cells)
        return Tokens(x, mosaic.owner, cells, vit.num_prefix_tokens, size=size, valid=mosaic.valid, state=turns)


def _pixels(g: Geometry) -> str:
    return "x".join(str(side * g.patch) for side in g.cells)


def _menu(backbone: Backbone) -> list[str]:
    """The model's own input at 80 to 30 % of its tokens, and a larger one, for detail where it matters."""
    (patch, other), (h, w) = backbone.patch_size, backbone.input_size
    if patch != other or h != w or h % patch or not 4 <= patch <= 32:
        return []
    sizes, own = (patch, 2 * patch, 4 * patch), (h // patch) ** 2
    found = []
    for side, shares in ((h, (0.8, 0.65, 0.5, 0.4, 0.3)), (h // sizes[2] * sizes[2] + sizes[2], (0.65, 0.5, 0.4))):
        g = Geometry.of_pixels((side, side), sizes)
        found += [f"quadtree({g.nearest(share * own)}, size={side})" for share in shares]
    return list(dict.fromkeys(found))


def _half(backbone: Backbone, edges: tuple[int, ...], size: Size | None) -> int:
    """The number nearest to half of the finest patches of the model's own input, or of ``size``."""
    h, w = backbone.input_size if size is None else _pair(size)
    return Geometry.of_pixels((h, w), edges).nearest(0.5 * (h // edges[0]) * (w // edges[0]))


def _steps(
    backbone: Backbone, tokens: int | None, sizes: tuple[int, ...] | None, size: Size | None, **_: object
) -> bool:
    """A range of tokens stops at what can be had."""
    edges = sizes or _default_sizes(backbone)
    g = Geometry.of_pixels(backbone.input_size if size is None else _pair(size), edges)
    return tokens is None or g.nearest(tokens) == tokens


@register(
    "quadtree",
    sources={"paper": "sizes area_bias size_embedding detail"},
    kind="tokenizer",
    menu=_menu,
    range_filter=_steps,
)
def quadtree(
    backbone: Backbone,
    tokens: int | None = None,
    per_batch: int | None = None,
    threshold: float | tuple[float, ...] | None = None,
    sizes: tuple[int, ...] | None = None,
    scorer: str | None = None,
    size: Size | None = None,
    resample: str = "area",
    positions: str = "mean",
    area_bias: bool = False,
    size_embedding: bool = False,
    detail: bool = False,
) -> Quadtree:
    """Patches of several sizes, small where there is much to see (Quadformer, arXiv 2304.00287; APT, arXiv 2510.18091).

    Each split adds three tokens, so a number of tokens must be one that can be had. Of the first three knobs one is
    given; with none, half of the tokens that the finest patches would be.

    Args:
        tokens: patch tokens of every image, exactly.
        per_batch: patch tokens of an image on average: the batch has exactly so many times its images, busy ones more.
        threshold: split every block that scores as much; one number, or one for each size, the smaller first.
        sizes: edges of the patches in pixels, each twice the one before; None: the weights' own, twice, and four times.
        scorer: who says what is split, with knobs of its own, like "pixel(weight='area')": pixel, entropy, laplacian,
            feature, attention, gate, maps, gradcam, random; None: 'pixel', or with a threshold 'entropy'.
        size: pixels that images are brought to, s or (h, w); None: as they come.
        resample: how a large patch is made small: 'area' (means) or 'bilinear' (published: no antialiasing).
        positions: of a large patch: the 'mean' of the positions under it, the one at its 'centre', or for all patches
            the paper's fixed 'sinusoid'.
        area_bias: attention counts a patch as often as it has finest patches in it.
        size_embedding: learn a vector for each size, zero at first.
        detail: learn what a large patch hides (APT's zero-initialised branch).
    """
    edges = _default_sizes(backbone) if sizes is None else _check_sizes(sizes)
    if tokens is None and per_batch is None and threshold is None:
        tokens = _half(backbone, edges, size)
    backbone.check_cells("quadtree", (edges[0], edges[0]))
    budget = Budget.of(tokens, per_batch, threshold, len(edges) - 1)
    chosen = build_scorer(scorer or ("pixel" if threshold is None else "entropy"), backbone)
    chosen.check(edges[0])
    pixels = None if size is None else _pair(size)
    if pixels is not None:
        budget.splits(Geometry.of_pixels(pixels, edges))
    one_of("quadtree", "resample", resample, RESAMPLERS)
    one_of("quadtree", "positions", positions, POSITIONS)
    if positions == "sinusoid" and backbone.dim % 2:
        raise UserError(f"quadtree: positions='sinusoid' need an even width, this ViT has {backbone.dim}")
    knobs = {"area_bias": area_bias, "size_embedding": size_embedding, "detail": detail}
    for knob, value in knobs.items():
        switch("quadtree", knob, value)
    return Quadtree(backbone, budget, edges, chosen, pixels, resample, positions, **knobs)


def _default_sizes(backbone: Backbone) -> tuple[int, ...]:
    patch = backbone.patch_size[0]
    return patch, 2 * patch, 4 * patch


def _check_sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(sizes, int) or not all(type(v) is int for v in sizes) or not 2 <= len(sizes) <= 8:
        raise UserError(f"quadtree: sizes={sizes!r} are not two to eight whole numbers of pixels, like (16, 32, 64)")
    if not 4 <= sizes[0] <= 32 or any(b != 2 * a for a, b in pairwise(sizes)):
        right = tuple(min(32, max(4, sizes[0])) << i for i in range(len(sizes)))
        raise UserError(f"quadtree: sizes={sizes!r} must start at 4 to 32 pixels and double, like {right}")
    return tuple(sizes)


def _pair(size: Size) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    if len(pair) != 2 or not all(type(v) is int and 4 <= v <= 8192 for v in pair):
        raise UserError(f"quadtree: size={size!r} is not one or two whole numbers in [4, 8192] (pixels)")
    return pair
