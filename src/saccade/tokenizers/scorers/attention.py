"""``attention``: what the ViT itself looks at, in its first blocks and on a small image."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from saccade.core.costs import block_cost
from saccade.core.hooks import hooked, plain_linear
from saccade.core.plan import Backbone
from saccade.core.timm_types import ViT
from saccade.errors import UserError
from saccade.execution.attention import attend
from saccade.execution.mixing import Asked
from saccade.methods.common.arguments import whole
from saccade.tokenizers.mosaic.geometry import Geometry
from saccade.tokenizers.scorers.base import Scene, Scorer, pooled, register_scorer


class FirstLook(Scorer):
    """Attention of a cheap first pass: the class token's, or what each patch receives where there is none."""

    def __init__(self, blocks: int, level: int) -> None:
        super().__init__()
        self.blocks, self.level = blocks, level

    def _grid(self, g: Geometry) -> tuple[int, int]:
        """Patches of the small image, down and across."""
        times = 1 << min(self.level, g.levels - 1)
        return -(-g.cells[0] // times), -(-g.cells[1] // times)

    def macs(self, vit: ViT, geometry: Geometry) -> int:
        h, w = self._grid(geometry)
        n, cost, attn = h * w + vit.num_prefix_tokens, block_cost(vit.blocks[0]), vit.blocks[0].attn
        embed = h * w * vit.patch_embed.proj.in_channels * geometry.patch**2 * cost.dim
        whole_blocks = (self.blocks - 1) * (cost.attention(n, n) + n * cost.mlp)
        if vit.cls_token is None:
            return int(embed + whole_blocks + cost.attention(n, n))
        return int(embed + whole_blocks + cost.attention(1, n) + attn.num_heads**2 * attn.head_dim * n)

    def forward(self, scene: Scene) -> list[Tensor]:
        vit, g = scene.vit, scene.geometry
        h, w = self._grid(g)
        small = scene.levels[min(self.level, g.levels - 1)]
        if tuple(small.shape[-2:]) != (h * g.patch, w * g.patch):  # it ends before the image does
            small = F.interpolate(scene.images, size=(h * g.patch, w * g.patch), mode="bilinear", antialias=True)
        tokens = scene.fine(vit, small.to(vit.patch_embed.proj.weight.dtype))
        x = vit.blocks[: self.blocks - 1](tokens.x)
        last = vit.blocks[self.blocks - 1]
        if vit.cls_token is None:
            seen = attend(last.attn, last.norm1(x), ask=Asked(read=frozenset({"attn_received"}))).stats.attn_received
        else:
            queries = 1 if plain_linear(last.attn.qkv) and not hooked(last.attn) else None
            ask = Asked(queries=queries, read=frozenset({"cls_attn"}))
            seen = attend(last.attn, last.norm1(x), ask=ask).stats.cls_attn
        assert seen is not None
        return pooled(seen[:, vit.num_prefix_tokens :].unflatten(1, (h, w)), g)


@register_scorer("attention")
def attention(backbone: Backbone, blocks: int = 4, level: int = 1) -> FirstLook:
    """Class attention of the same ViT, after a few blocks on a small image (received attention without a class token).

    Args:
        blocks: of the ViT, the last of which is asked where the class token looks.
        level: halvings of the image that the first pass sees; 1 is a quarter of the tokens.
    """
    if backbone.rotary is not None:
        raise UserError("scorer attention runs blocks on a smaller grid, and this model's have rotary positions")
    whole("scorer attention", "blocks", blocks, 1, backbone.depth)
    return FirstLook(blocks, whole("scorer attention", "level", level, 0, 6))
